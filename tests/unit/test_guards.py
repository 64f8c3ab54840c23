"""Shares of bad answers: breached, kept, or not known yet; never a guess."""

from __future__ import annotations

import random

import numpy as np
import pytest

from loader.faults import FaultClass
from loader.guards import (
    SAMPLES,
    Objectives,
    OutputGuard,
    ShareGuard,
    Verdict,
    all_finite,
    interval,
)


@pytest.mark.parametrize(
    ("allowed", "bad", "good", "wanted"),
    [
        (0.01, 0, 0, Verdict.INCONCLUSIVE), (0.01, 49, 0, Verdict.INCONCLUSIVE),
        (0.01, 50, 0, Verdict.BREACHED), (0.01, 1, 99, Verdict.INCONCLUSIVE),
        (0.01, 0, 50, Verdict.INCONCLUSIVE), (0.05, 0, 1024, Verdict.KEPT),
        (0.01, 100, 900, Verdict.BREACHED), (0.05, 51, 973, Verdict.INCONCLUSIVE),
        (0.0, 0, 60, Verdict.KEPT), (0.0, 5, 55, Verdict.BREACHED), (1.0, 60, 0, Verdict.KEPT),
    ],
)  # fmt: skip
def test_share(allowed: float, bad: int, good: int, wanted: Verdict) -> None:
    guard = ShareGuard(allowed)
    for is_bad in [True] * bad + [False] * good:
        guard.add(is_bad)
    assert guard.verdict() is wanted


def test_old_samples_make_room() -> None:
    guard = ShareGuard(0.05)
    for _ in range(SAMPLES):
        guard.add(True)
    for _ in range(SAMPLES):
        guard.add(False)
    assert (guard.bad, guard.samples, guard.verdict()) == (0, SAMPLES, Verdict.KEPT)


@pytest.mark.parametrize("bad", [0, 1, 10, 99, 100])
def test_interval_holds_the_share(bad: int) -> None:
    low, high = interval(bad, 100)
    assert 0 <= low <= bad / 100 <= high <= 1


def test_a_share_just_allowed_is_not_breached_by_chance() -> None:
    """Asked at every sample of 20 long runs at exactly the allowed share."""
    breached = 0
    for seed in range(20):
        rng, guard = random.Random(seed), ShareGuard(0.05)
        for _ in range(3000):
            guard.add(rng.random() < 0.05)
            if guard.verdict() is Verdict.BREACHED:
                breached += 1
                break
    assert breached <= 1


def test_a_clear_breach_is_seen_soon() -> None:
    rng, guard = random.Random(1), OutputGuard(Objectives(nan_rate=0.01))
    for n in range(200):
        fault = guard.observe(latency_ms=1.0, is_finite=rng.random() >= 0.3)
        if fault is not None:
            assert (fault.code, fault.fault_class) == ("NAN", FaultClass.GUARD)
            assert 50 <= n + 1 <= 70
            return
    pytest.fail("never seen")


def test_latency() -> None:
    guard = OutputGuard(Objectives(p95_ms=100.0))
    assert all(guard.observe(latency_ms=100.0, is_finite=True) is None for _ in range(200))
    assert guard.verdicts() == {"p95_ms": Verdict.KEPT} or guard.verdicts() == {
        "p95_ms": Verdict.INCONCLUSIVE
    }
    faults = [guard.observe(latency_ms=101.0, is_finite=True) for _ in range(60)]
    fault = next(f for f in faults if f is not None)
    assert fault.code == "SLA"
    assert "answers took over 100 ms" in fault.message
    guard.reset()
    assert guard.verdicts() == {"p95_ms": Verdict.INCONCLUSIVE}


def test_nothing_asked_for_nothing_judged() -> None:
    guard = OutputGuard(Objectives())
    assert guard.verdicts() == {}
    assert guard.observe(latency_ms=1e9, is_finite=False) is None


F = np.float32


@pytest.mark.parametrize(
    ("array", "wanted"),
    [
        (np.ones((2, 3), F), True), (np.array([1, np.nan], F), False),
        (np.array([[np.inf]], np.float64), False), (np.array([-np.inf], np.float16), False),
        (np.full(70_000, 6e4, np.float16), True), (np.array([2**40]), True),
        (np.zeros((0, 4), F), True), (np.array(np.nan, F), False), (np.array([True]), True),
        (np.full(9, 3e38, F), True),
    ],
)  # fmt: skip
def test_finite(array: np.ndarray[tuple[int, ...], np.dtype[np.float32]], wanted: bool) -> None:
    assert all_finite([np.ones(3), array]) is wanted
