"""When faults of one servable are enough: n in a row, or n within a window (SPEC section 3)."""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from enum import StrEnum

from loader.faults import DEFAULT_CODES, Fault, FaultClass, counts


class Rule(StrEnum):
    """Which of the two rules was met."""

    CONSECUTIVE = "consecutive"
    WINDOW = "window"


@dataclass(frozen=True, slots=True)
class Tripped:
    """The servable had enough counted faults: it is to be taken out, once blame is settled."""

    rule: Rule
    count: int
    within_s: float
    """From the first of the ``count`` faults to the last."""
    fault: Fault
    """The last one."""

    def __str__(self) -> str:
        how = "in a row" if self.rule is Rule.CONSECUTIVE else f"within {self.within_s:.1f} s"
        return f"code {self.fault.code} ({self.fault.fault_class}): {self.count} faults {how}"


@dataclass(slots=True)
class Seen:
    """What one code amounts to so far: the value of ``P/faults/...`` but for the wall clock."""

    fault_class: FaultClass
    count: int
    first_s: float
    last_s: float
    message: str


class FaultCounter:
    """The counted faults of one servable. Every operation is O(1); not for use by two threads.

    ``consecutive`` is the n of both rules. A fault that does not count (the client's, or a code
    that ``codes`` leaves out) neither adds to a row nor ends it: it says nothing of the version.
    """

    __slots__ = (
        "_codes",
        "_incidents",
        "_n",
        "_row",
        "_row_began_s",
        "_times",
        "_window_s",
        "seen",
    )

    def __init__(
        self,
        *,
        codes: Iterable[int | str] = DEFAULT_CODES,
        consecutive: int = 3,
        window_s: float = 30.0,
    ) -> None:
        if consecutive < 1:
            raise ValueError(f"consecutive: want >= 1, got {consecutive}")
        self._codes = frozenset(str(code) for code in codes)
        self._n = consecutive
        self._window_s = window_s
        self._row = 0
        self._row_began_s = 0.0
        self._times: deque[float] = deque(maxlen=consecutive)
        self._incidents: deque[Hashable] = deque(maxlen=64)
        self.seen: dict[str, Seen] = {}
        """Every fault by its code, the uncounted too: ``errors`` in the servable's status."""

    def success(self) -> None:
        """An answer was given: the row ends. Nearly free, for the hot path."""
        self._row = 0

    def add(
        self,
        now_s: float,
        fault: Fault,
        *,
        incident: Hashable | None = None,
        proven: bool = False,
    ) -> Tripped | None:
        """Count one fault; the n-th says so, and so does each one after it until `reset`.

        now_s: any clock that never goes back.
        incident: faults of the same incident are one: a dead worker fails every request that
            waited on it (its pid and start say which). At most the last 64 are remembered.
        proven: another version answered the same request (see `loader.faults.counts`).
        """
        if incident is not None:
            if incident in self._incidents:
                return None
            self._incidents.append(incident)
        self._note(now_s, fault)
        if not counts(fault, self._codes, proven=proven):
            return None
        if self._row == 0:
            self._row_began_s = now_s
        self._row += 1
        self._times.append(now_s)
        if self._row >= self._n:
            return Tripped(Rule.CONSECUTIVE, self._row, now_s - self._row_began_s, fault)
        within_s = now_s - self._times[0]
        if len(self._times) == self._n and within_s <= self._window_s:
            return Tripped(Rule.WINDOW, self._n, within_s, fault)
        return None

    def reset(self) -> None:
        """Forget the row and the window, not what was `seen`: after a release, a new start."""
        self._row = 0
        self._times.clear()
        self._incidents.clear()

    def errors(self) -> dict[str, int]:
        """``{"<code>": n}`` of SPEC section 7."""
        return {code: seen.count for code, seen in self.seen.items()}

    def _note(self, now_s: float, fault: Fault) -> None:
        seen = self.seen.get(fault.code)
        if seen is None:
            self.seen[fault.code] = Seen(fault.fault_class, 1, now_s, now_s, fault.message)
            return
        seen.count += 1
        seen.last_s = now_s
        seen.message = fault.message or seen.message
