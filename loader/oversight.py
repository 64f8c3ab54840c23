"""What a pool tells of its runs, and what it is told to do about them.

A pool knows replicas and a queue; versions, blame and rollback are the manager's. This is all that
passes between the two on the path of a request, each part absent where nobody asked for it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from loader.drills import Order
from loader.faults import Fault
from registry.inference import Array, Inference

Feeds = Mapping[str, Array]


@dataclass(frozen=True, slots=True)
class FaultReport:
    """One fault of one run, or of one worker."""

    fault: Fault
    pid: int
    feeds: Feeds | None
    """Of the request that was running; ``None`` when none was."""
    is_breach: bool = False
    """Enough of them to act at once, whatever was counted before (an objective is not met)."""


@dataclass(frozen=True, slots=True)
class Finding:
    """What an inspection of an answer found wrong."""

    fault: Fault
    is_breach: bool
    is_held: bool
    """The answer is not to be given before another version was asked."""


def _nothing(_report: FaultReport) -> bool:
    return False


@dataclass(frozen=True, slots=True)
class Oversight:
    """Called on the event loop. None of these may raise."""

    on_fault: Callable[[FaultReport], bool] = _nothing
    """Told once for each fault, before any request learns of it; may retire the pool. ``True``:
    the input itself is to blame, and its request is refused rather than run again."""
    on_answered: Callable[[FaultReport, bool], None] = lambda _report, _by_other: None
    """Told that the very request that failed here was answered after all, by another version
    (``True``) or by another worker of this one."""
    has_control: Callable[[], bool] = lambda: False
    """Whether another version is loaded that could answer the same requests."""
    refuses: Callable[[Feeds], float] | None = None
    """For how many seconds more this input is refused; 0: it is not."""
    drill: Callable[[], Order | None] | None = None
    """What the next run is to do, where drills are enabled."""
    inspect: Callable[[Inference, float], Finding | None] | None = None
    """Looks at an answer and its latency (s)."""
