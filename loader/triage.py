"""What one model's faults amount to: nothing yet, a suspicion, or somebody to blame (pure).

Counting says *when* to act (`loader.counting`), the record of incidents says *against whom*
(`loader.blame`). One a model; the manager feeds it and does what it rules.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, replace

from loader.blame import SEVERE, Blame, Incident, Verdict, judge
from loader.counting import FaultCounter, Seen, Tripped
from loader.faults import Fault
from registry.names import ServableId, Version

RECORD_MAX = 256


@dataclass(frozen=True, slots=True)
class Limits:
    """When faults are enough: the part of ``rollback`` that counting needs."""

    codes: tuple[int | str, ...]
    consecutive: int
    window_s: float


@dataclass(frozen=True, slots=True)
class Ruling:
    """What follows from one fault."""

    tripped: Tripped | None
    """The servable had enough of them: nothing new goes to it while there is another."""
    verdict: Verdict | None
    """Who is to blame, once that can be said; ``None`` before anything needs saying."""


class Triage:
    """The faults of one model's servables. Not for two threads."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._counters: dict[ServableId, FaultCounter] = {}
        self._answered: dict[ServableId, int] = {}
        """The servable's counter of answers at its last fault: more by now end the row."""
        self._record: deque[Incident] = deque(maxlen=RECORD_MAX)
        self._innocent = 0

    def configure(self, limits: Limits) -> None:
        """Take new limits; what was counted under the old ones is forgotten."""
        if limits != self._limits:
            self._limits = limits
            self._counters.clear()

    def fault(
        self,
        now_s: float,
        id: ServableId,
        fault: Fault,
        *,
        control: ServableId | None,
        device: str,
        input_digest: str = "",
        incident: Hashable | None = None,
        answers: int = 0,
        answers_of_all: int = 0,
        proven: bool = False,
    ) -> Ruling:
        """Count one fault of ``id``.

        control: the other version that requests are run on again, if one is loaded.
        input_digest: of the request that was running; empty when none was, or not known.
        incident: what makes two reports one fault (a dead worker's pid).
        answers: how many requests ``id`` has answered so far; answers_of_all: all of the model's.
        proven: the control answered the same request.
        """
        counter = self._counters.get(id)
        if counter is None:
            limits = self._limits
            counter = self._counters[id] = FaultCounter(
                codes=limits.codes, consecutive=limits.consecutive, window_s=limits.window_s
            )
        if answers > self._answered.get(id, 0):
            counter.success()
        self._answered[id] = answers
        self._record.append(
            Incident(
                now_s,
                _label(id),
                fault.code,
                fault.fault_class,
                input_digest,
                device,
                answers_of_all,
            )
        )
        tripped = counter.add(now_s, fault, incident=incident, proven=proven)
        verdict = None
        if tripped is not None or (fault.fault_class in SEVERE and input_digest):
            verdict = self.judge(now_s, id, control=control, answers_of_all=answers_of_all)
            if tripped is None and verdict.blame is not Blame.INPUT:
                verdict = None  # only a killer input is acted upon before the count is full
        return Ruling(tripped, verdict)

    def judge(
        self, now_s: float, id: ServableId, *, control: ServableId | None, answers_of_all: int
    ) -> Verdict:
        """Who is to blame for the faults of ``id`` on record, as things stand now."""
        oldest_s = now_s - self._limits.window_s
        recent = [incident for incident in self._record if incident.at_s >= oldest_s]
        verdict = judge(
            recent,
            live=_label(id),
            standby=_label(control) if control is not None else None,
            answered=answers_of_all,
        )
        reason = verdict.reason
        for each in (id, control):
            if each is not None:
                reason = reason.replace(_label(each), each.version)
        return replace(verdict, reason=reason)

    def exonerate(self, input_digest: str) -> None:
        """This input was answered after it had met a fault: it killed nobody.

        A worker that ends for reasons of its own (the OOM killer) takes some input with it, and
        where all clients send the same one, always that one.
        """
        for index, incident in enumerate(self._record):
            if incident.input_digest == input_digest:
                # Not empty: what is not known is paired with whatever failed at the same time.
                self._innocent += 1
                innocent = f"answered-{self._innocent}"
                self._record[index] = replace(incident, input_digest=innocent)

    def seen(self, id: ServableId) -> dict[str, Seen]:
        """Every fault of ``id`` so far, by code."""
        counter = self._counters.get(id)
        return {} if counter is None else counter.seen

    def errors(self, id: ServableId) -> dict[str, int]:
        """``{"<code>": n}`` of SPEC section 7."""
        counter = self._counters.get(id)
        return {} if counter is None else counter.errors()

    def forget(self, ids: Iterable[ServableId]) -> None:
        """A new start for these: released, reloaded or gone."""
        gone = set(ids)
        for id in gone:
            self._counters.pop(id, None)
            self._answered.pop(id, None)
        labels = {_label(id) for id in gone}
        self._record = deque(
            (incident for incident in self._record if incident.version not in labels),
            maxlen=RECORD_MAX,
        )


def _label(id: ServableId) -> Version:
    """Tells servables of one version text apart: other bytes, or loaded in another way."""
    return Version(f"{id.version}@{id.digest[7:15]}.{id.recipe[:4]}")
