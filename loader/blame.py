"""Who is at fault: the version, the device under it, or the input (DESIGN: blame before rollback).

The standby is the control of the experiment. A request that failed on the live version runs again
on the standby: the same input, on the same device, at the same time. What came of those pairs, and
whether anything else was answered meanwhile, decides:

- the standby answered what live failed: the live version is at fault;
- both failed on some inputs, while other requests were answered: those inputs are;
- both failed on whatever came, and hardly anything was answered: the device is.

No verdict is better than a wrong one: a wrong "version" quarantines good weights in the whole
fleet, a wrong "device" takes a node away. What is undecided now is judged again at the next fault.
A first verdict of "input" may turn into "device" as soon as a second input fares the same, so the
caller lifts the refusals of a device's verdict (`Verdict.inputs` names them).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from loader.faults import FaultClass
from registry.names import Version


class Blame(StrEnum):
    VERSION = "version"
    DEVICE = "device"
    INPUT = "input"
    UNDECIDED = "undecided"


@dataclass(frozen=True, slots=True)
class Incident:
    """One fault on record. One dead worker is one incident, whoever waited on it."""

    at_s: float
    version: Version
    code: str
    fault_class: FaultClass
    input_digest: str = ""
    """Of the request that was running (`loader.poison.input_digest`); empty: not known."""
    device: str = "cpu"
    answered: int = 0
    """A reading, at this moment, of the counter of answers that all versions of the model gave."""


@dataclass(frozen=True, slots=True)
class Verdict:
    blame: Blame
    reason: str
    """One line for the status, with the counts that decided."""
    code: str = ""
    """The code blamed: that of most incidents."""
    version: Version | None = None
    device: str | None = None
    inputs: frozenset[str] = frozenset()
    """`Blame.INPUT`: digests to refuse. `Blame.DEVICE`: digests that are not at fault after all."""


SEVERE = frozenset({FaultClass.STICKY, FaultClass.CRASH})
"""Faults that take the worker with them: only these can be a device's or a poison input's doing."""

RECENT = 8
"""So many of the live version's latest incidents are looked at: older ones are another story."""
FAILING_SHARE = 0.7
"""Of what ran since the first of some incidents, at least this share failed: nothing works."""
CONTROLS_MIN = 3
"""Fewer requests that failed on both are two poison inputs close together as likely as a device."""
PAIR_S = 5.0
"""Where the input is not known: incidents of one code on both versions within this are one pair."""


def judge(
    recent: Sequence[Incident],
    *,
    live: Version,
    standby: Version | None,
    answered: int | None = None,
) -> Verdict:
    """Say who is at fault for the incidents on the live version.

    recent: incidents of the last while (``rollback.window_s``), in any order; other versions' and
        those of the request's own class are left out here.
    live: the version that the faults were counted against; standby: the one before, when loaded.
    answered: the counter that `Incident.answered` is a reading of, as it stands now. ``None``:
        nobody counts, and what is not known to have been answered counts as not answered.
    """
    relevant = [i for i in recent if i.fault_class is not FaultClass.REQUEST]
    bad_device = next((i for i in relevant if i.fault_class is FaultClass.HARDWARE), None)
    if bad_device is not None:
        reason = f"device {bad_device.device} reported {bad_device.code}"
        return Verdict(Blame.DEVICE, reason, bad_device.code, device=bad_device.device)
    ours = sorted((i for i in relevant if i.version == live), key=lambda i: i.at_s)[-RECENT:]
    if not ours:
        return Verdict(Blame.UNDECIDED, f"no incident of {live} on record")
    seen = _Evidence(ours, relevant, live, standby, answered)
    if standby is None:
        return _blame_input(seen) or Verdict(
            Blame.UNDECIDED, f"{seen.told}, and no standby to compare with", seen.code
        )
    verdict = _blame_device(seen) or _blame_input(seen) or _blame_version(seen)
    return verdict or Verdict(
        Blame.UNDECIDED, f"{seen.told}; of the standby {len(seen.theirs)}", seen.code
    )


class _Evidence:
    """The incidents of the live version, each paired with the standby's own of the same request."""

    def __init__(
        self,
        ours: Sequence[Incident],
        relevant: Sequence[Incident],
        live: Version,
        standby: Version | None,
        answered: int | None,
    ) -> None:
        self.ours = ours
        self.live = live
        self.standby = standby
        self.answered = answered
        self.device = Counter(i.device for i in ours).most_common(1)[0][0]
        self.code = Counter(i.code for i in ours).most_common(1)[0][0]
        self.theirs = [i for i in relevant if i.version == standby and i.device == self.device]
        self.told = f"code {self.code}: {len(ours)} faults of {live}"

    def failed_on_both(self, incident: Incident) -> bool:
        """Whether the request that took a worker of live took one of the standby too."""
        return incident.fault_class in SEVERE and any(
            other.fault_class in SEVERE and _same_request(incident, other) for other in self.theirs
        )

    def killers(self) -> frozenset[str]:
        """Inputs that ended two workers: of both versions where there are two."""
        if self.standby is not None:
            # By digest alone: a worker that died idle, or of nobody knows what, accuses no input.
            theirs = {o.input_digest for o in self.theirs if o.fault_class in SEVERE}
            ours = {i.input_digest for i in self.ours if i.fault_class in SEVERE}
            return frozenset(ours & theirs - {""})
        kills = Counter(i.input_digest for i in self.ours if i.fault_class in SEVERE)
        return frozenset(digest for digest, times in kills.items() if digest and times >= 2)

    def failing_share(self, last: int) -> float:
        """Of all that ran since the ``last`` incidents of live began, the share that failed."""
        first = self.ours[-last]
        answers = 0 if self.answered is None else max(0, self.answered - first.answered)
        failures = last + sum(other.at_s >= first.at_s for other in self.theirs)
        return failures / (failures + answers)


def _blame_device(seen: _Evidence) -> Verdict | None:
    """Three or more of the latest requests failed on both, and hardly anything was answered."""
    for last in range(CONTROLS_MIN, len(seen.ours) + 1):
        tail = seen.ours[-last:]
        both = [i for i in tail if seen.failed_on_both(i)]
        inputs = {i.input_digest for i in tail}
        shared = {i.code for i in both} & {other.code for other in seen.theirs}
        if len(both) < max(CONTROLS_MIN, FAILING_SHARE * last) or not shared:
            continue
        if _all_crashed(both) and "" not in inputs and len(inputs) < CONTROLS_MIN:
            continue  # a few inputs, sent again and again: `_blame_input`
        if seen.failing_share(last) < FAILING_SHARE:
            continue
        code = Counter(i.code for i in both if i.code in shared).most_common(1)[0][0]
        reason = (
            f"code {code} on {seen.live} and on {seen.standby}, {len(both)} of {last} requests:"
            f" device {seen.device} is at fault, neither version"
        )
        acquitted = frozenset(digest for digest in inputs if digest)
        return Verdict(Blame.DEVICE, reason, code, device=seen.device, inputs=acquitted)
    return None


def _blame_input(seen: _Evidence) -> Verdict | None:
    killers = seen.killers()
    if not killers:
        return None
    of_killers = [i for i in seen.ours if i.input_digest in killers]
    code = Counter(i.code for i in of_killers).most_common(1)[0][0]
    whose = f"of {seen.live}" + ("" if seen.standby is None else f" and of {seen.standby}")
    reason = f"code {code}: {len(killers)} input(s) ended workers {whose}, others were answered"
    verdict = Verdict(Blame.INPUT, reason, code, inputs=killers)
    share = seen.failing_share(len(seen.ours))
    if seen.standby is None:
        # No control: it must be these inputs only, and nearly everything else must be well.
        others = [i for i in seen.ours if i.fault_class in SEVERE and i not in of_killers]
        return verdict if not others and share < 0.1 else None
    if share < FAILING_SHARE:
        return verdict
    # The first sight of a killer or two, before anything else ran. Two processes that died of an
    # input are enough; two error codes are not: a broken device says the same of whatever runs.
    only_they = len(killers) < CONTROLS_MIN and len(of_killers) == len(seen.ours)
    return verdict if only_they and _all_crashed((*seen.ours, *seen.theirs)) else None


def _blame_version(seen: _Evidence) -> Verdict | None:
    alone = [i for i in seen.ours if not seen.failed_on_both(i)]
    first = seen.ours[0]
    theirs = [other for other in seen.theirs if other.at_s >= first.at_s]
    if len(theirs) > len(seen.ours) / 3 or len(alone) < 0.6 * len(seen.ours):
        return None
    if seen.answered is not None and seen.answered <= first.answered:
        return None  # nobody answered anything since: the control has not run yet
    reason = f"{seen.told}, of the standby {len(theirs)}, which answered the same requests"
    return Verdict(Blame.VERSION, reason, seen.code, version=seen.live)


def _all_crashed(incidents: Sequence[Incident]) -> bool:
    return all(i.fault_class is FaultClass.CRASH for i in incidents)


def _same_request(ours: Incident, other: Incident) -> bool:
    if ours.input_digest and other.input_digest:
        return ours.input_digest == other.input_digest
    return ours.code == other.code and abs(ours.at_s - other.at_s) <= PAIR_S
