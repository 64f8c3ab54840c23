"""The output guard: is the share of bad answers above what the document allows (``rollback.on``)?

Two objectives, one rule. ``nan_rate`` allows that share of answers with a NaN or an Inf;
``p95_ms`` says that at most 5 % of the answers may take longer, which is what a 95th percentile
means. So both are a share of bad samples against an allowed share, and both are judged by the
Wilson interval of that share: above it for sure, below it for sure, or not known yet. A percentile
of the samples compared with a limit was turned down: with few samples it is a guess.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np
import numpy.typing as npt

from loader.faults import Fault, FaultClass

MIN_SAMPLES = 50
SAMPLES = 1024
"""The most recent answers that are judged; older ones no longer say anything."""
Z = 3.3
"""Standard normal quantile. High (0.05 %), because the verdict is asked for again and again."""
SLOW_SHARE = 0.05
_SMALL_ELEMENTS = 4096


class Verdict(StrEnum):
    KEPT = "kept"
    BREACHED = "breached"
    INCONCLUSIVE = "inconclusive"


def interval(bad: int, samples: int, *, z: float = Z) -> tuple[float, float]:
    """The Wilson score interval of a share: ``bad`` of ``samples``, both ends within 0..1."""
    if samples == 0:
        return 0.0, 1.0
    share = bad / samples
    spread = z * math.sqrt(share * (1 - share) / samples + z * z / (4 * samples * samples))
    middle, scale = share + z * z / (2 * samples), 1 + z * z / samples
    low = 0.0 if bad == 0 else max(0.0, (middle - spread) / scale)
    high = 1.0 if bad == samples else min(1.0, (middle + spread) / scale)
    return low, high


class ShareGuard:
    """Whether the share of bad samples, of the last `SAMPLES`, is above ``allowed``."""

    __slots__ = ("_next", "_ring", "allowed", "bad", "min_samples", "samples")

    def __init__(self, allowed: float, *, min_samples: int = MIN_SAMPLES) -> None:
        self.allowed = allowed
        self.min_samples = min_samples
        self.bad = 0
        self.samples = 0
        self._ring = bytearray(SAMPLES)
        self._next = 0

    def add(self, is_bad: bool) -> None:
        """O(1): the oldest sample makes room."""
        at = self._next
        self.bad += is_bad - self._ring[at]
        self._ring[at] = is_bad
        self._next = (at + 1) % SAMPLES
        if self.samples < SAMPLES:
            self.samples += 1

    def verdict(self) -> Verdict:
        if self.samples < self.min_samples:
            return Verdict.INCONCLUSIVE
        low, high = interval(self.bad, self.samples)
        if low > self.allowed:
            return Verdict.BREACHED
        # With nothing allowed the interval never ends at 0: no bad sample at all is kept.
        if high <= self.allowed or (self.allowed == 0 and self.bad == 0):
            return Verdict.KEPT
        return Verdict.INCONCLUSIVE

    def reset(self) -> None:
        self.bad = self.samples = self._next = 0
        self._ring = bytearray(SAMPLES)


@dataclass(frozen=True, slots=True)
class Objectives:
    """``rollback.on`` of a document; ``None``: not asked for."""

    nan_rate: float | None = None
    p95_ms: float | None = None
    min_samples: int = MIN_SAMPLES


class OutputGuard:
    """The objectives of one servable. One `observe` an answer; a breach is reported as a fault."""

    __slots__ = ("_nan", "_slow", "objectives")

    def __init__(self, objectives: Objectives) -> None:
        self.objectives = objectives
        n = objectives.min_samples
        nan, slow = objectives.nan_rate, objectives.p95_ms
        self._nan = None if nan is None else ShareGuard(nan, min_samples=n)
        self._slow = None if slow is None else ShareGuard(SLOW_SHARE, min_samples=n)

    def observe(self, *, latency_ms: float, is_finite: bool) -> Fault | None:
        """Add one answer; the fault when an objective is breached for sure by now.

        Only a bad answer can breach, so a good one costs two additions.
        """
        nan, slow = self._nan, self._slow
        is_slow = False
        if nan is not None:
            nan.add(not is_finite)
        if slow is not None:
            is_slow = latency_ms > (self.objectives.p95_ms or 0.0)
            slow.add(is_slow)
        if nan is not None and not is_finite and nan.verdict() is Verdict.BREACHED:
            text = f"{nan.bad} of {nan.samples} answers held NaN or Inf; allowed {nan.allowed:g}"
            return Fault("NAN", FaultClass.GUARD, text)
        if slow is not None and is_slow and slow.verdict() is Verdict.BREACHED:
            limit = self.objectives.p95_ms
            text = f"{slow.bad} of {slow.samples} answers took over {limit:g} ms; p95 allows 5 %"
            return Fault("SLA", FaultClass.GUARD, text)
        return None

    def verdicts(self) -> dict[str, Verdict]:
        """For ``/admin/servables``: each objective asked for and what is known of it."""
        guards = {"nan_rate": self._nan, "p95_ms": self._slow}
        return {name: guard.verdict() for name, guard in guards.items() if guard is not None}

    def reset(self) -> None:
        """The servable was replaced, or released: what it did before says nothing now."""
        for guard in (self._nan, self._slow):
            if guard is not None:
                guard.reset()


def all_finite(arrays: Iterable[npt.NDArray[Any]]) -> bool:
    """Whether no floating array holds a NaN or an Inf: 0.7 us for a small one, 10 us at 600 KB.

    bfloat16 travels as uint16 (`registry.inference`) and is not looked into.
    """
    # No generator: it costs as much as a small array does.
    for array in arrays:  # noqa: SIM110
        if array.dtype.kind == "f" and not _is_finite(array):
            return False
    return True


def _is_finite(array: npt.NDArray[Any]) -> bool:
    finite = np.isfinite(array)
    if array.size <= _SMALL_ELEMENTS:
        return b"\0" not in finite.tobytes()  # half the time of `all`, which is Python inside
    return bool(finite.all())
