"""When a canary passes a step, fails it, or leaves it open."""

from __future__ import annotations

import math
import random
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paddlewheel.rollout.canary_judge import CHANCE, Judgement, binomial, fisher, judge
from registry.samples import MirrorSamples, RouteSamples, Window, add, bucket_of, merged
from registry.spec_canary import Gates

GATES = Gates(error_rate=0.01, p95_ratio=1.5, min_samples=100)


def route(requests: int, errors: int = 0, ms: float = 10.0, slow: int = 0) -> RouteSamples:
    """``slow`` of the answers take ten times as long as the others' ``ms``."""
    buckets = [0] * 80
    buckets[bucket_of(ms / 1e3)] += requests - errors - slow
    buckets[bucket_of(ms / 1e2)] += slow
    return RouteSamples(requests=requests, errors=errors, buckets=tuple(buckets))


def verdict(stable: RouteSamples, canary: RouteSamples, gates: Gates = GATES) -> str:
    return judged(stable, canary, gates).verdict


def judged(stable: RouteSamples, canary: RouteSamples, gates: Gates = GATES) -> Judgement:
    return judge(gates, Window(stable, canary), takes_traffic=True, leaves_traffic=True)


CASES = {
    "nothing yet": (route(0), route(0), "inconclusive"),
    "too little of the canary": (route(1000), route(99), "inconclusive"),
    "too little of the stable version": (route(99), route(1000), "inconclusive"),
    "just enough, alike": (route(100), route(100), "pass"),
    "alike, with errors of both": (route(2000, 100), route(500, 25), "pass"),
    "better": (route(2000, 100, ms=20), route(500), "pass"),
    "every request fails": (route(1000), route(100, 100), "fail"),
    "few, but they leave no doubt": (route(1000), route(12, 6), "fail"),
    "one error of many": (route(5000), route(1000, 1), "pass"),
    "two of a hundred may be chance": (route(2000), route(100, 2), "inconclusive"),
    "forty of two thousand are not": (route(20000), route(2000, 40), "fail"),
    "more errors, within what is allowed": (route(20000), route(20000, 150), "pass"),
    "no worse than a bad stable version": (route(2000, 400), route(500, 103), "pass"),
    "twice as slow": (route(1000), route(200, ms=20), "fail"),
    "slower within the limit": (route(1000), route(1000, ms=13), "pass"),
    "some are slow, perhaps by chance": (route(200), route(100, slow=7), "inconclusive"),
    "a tail of 15 %": (route(5000), route(2000, slow=300), "fail"),
    "slow and failing tells both": (route(5000), route(500, 100, ms=50), "fail"),
}


@pytest.mark.parametrize(("stable", "canary", "wanted"), CASES.values(), ids=CASES.keys())
def test_against_the_stable_version(
    stable: RouteSamples, canary: RouteSamples, wanted: str
) -> None:
    found = judged(stable, canary)
    assert found.verdict == wanted, found.detail


def test_the_detail_says_the_numbers() -> None:
    found = judged(route(1000, 2), route(200, 30))
    assert found.detail == (
        "errors: canary 30 of 200 (15.00%), stable 2 of 1000 (0.20%), limit 1.20%; "
        "by chance p = 2.4e-22"
    )
    assert judged(route(1000), route(3)).detail.startswith("requests: canary 3 of at least 100")


def test_every_gate_that_fails_is_told() -> None:
    detail = judged(*CASES["slow and failing tells both"][:2]).detail
    assert "errors: " in detail
    assert "p95: " in detail


AGREEMENT = {
    "too few": (MirrorSamples(agreed=99), "inconclusive"),
    "enough": (MirrorSamples(agreed=100), "pass"),
    "at the limit": (MirrorSamples(agreed=990, differed=10), "pass"),
    "a little below": (MirrorSamples(agreed=985, differed=15), "inconclusive"),
    "far below": (MirrorSamples(agreed=900, differed=100), "fail"),
    "failed ones do not agree": (MirrorSamples(agreed=900, failed=100), "fail"),
    "few, but they leave no doubt": (MirrorSamples(differed=10), "fail"),
    "dropped ones say nothing": (MirrorSamples(agreed=100, dropped=5000), "pass"),
}


@pytest.mark.parametrize(("mirror", "wanted"), AGREEMENT.values(), ids=AGREEMENT.keys())
def test_mirrored_answers_without_steps(mirror: MirrorSamples, wanted: str) -> None:
    gates = Gates(agreement=0.99, min_samples=100)
    found = judge(gates, Window(mirror=mirror), takes_traffic=False, leaves_traffic=True)
    assert found.verdict == wanted, found.detail


def test_the_worst_gate_counts() -> None:
    gates = Gates(agreement=0.99, min_samples=100)
    window = Window(route(500), route(500), MirrorSamples(differed=400))
    assert judge(gates, window, takes_traffic=True, leaves_traffic=True).verdict == "fail"
    window = Window(route(500), route(500), MirrorSamples(agreed=4))
    assert judge(gates, window, takes_traffic=True, leaves_traffic=True).verdict == "inconclusive"


def test_without_stable_traffic_errors_are_compared_with_none_at_all() -> None:
    def alone(canary: RouteSamples) -> str:
        window = Window(route(0), canary)
        return judge(GATES, window, takes_traffic=True, leaves_traffic=False).verdict

    assert alone(route(100)) == "pass"
    assert alone(route(99)) == "inconclusive"
    assert alone(route(1000, 60)) == "fail"
    assert alone(route(100, 2)) == "inconclusive"


counts = st.integers(0, 60)


@given(counts, counts, counts, counts)
def test_fisher_is_the_exact_tail(hits: int, misses: int, other_hits: int, others: int) -> None:
    count, other_count = hits + misses, other_hits + others
    drawn = hits + other_hits
    ways = sum(
        math.comb(count, k) * math.comb(other_count, drawn - k)
        for k in range(hits, min(count, drawn) + 1)
    )
    exact = Fraction(ways, math.comb(count + other_count, drawn))
    assert fisher(hits, count, other_hits, other_count) == pytest.approx(float(exact), rel=1e-8)


@given(st.integers(0, 200), st.integers(0, 200), st.integers(1, 99))
def test_the_binomial_tail_is_exact(hits: int, misses: int, percent: int) -> None:
    count, share = hits + misses, Fraction(percent, 100)
    exact = sum(
        (
            math.comb(count, k) * share**k * (1 - share) ** (count - k)
            for k in range(hits, count + 1)
        ),
        Fraction(0),
    )
    assert binomial(hits, count, percent / 100) == pytest.approx(float(exact), rel=1e-7, abs=1e-280)


@given(st.integers(0, 10**7), st.integers(0, 10**7), st.integers(0, 10**7), st.integers(0, 10**7))
def test_probabilities_stay_probabilities(a: int, b: int, c: int, d: int) -> None:
    assert 0.0 <= fisher(a, a + b, c, c + d) <= 1.0
    assert 0.0 <= binomial(a, a + b, 0.01) <= 1.0


@given(st.integers(0, 400), st.integers(0, 400), st.integers(0, 2000), st.integers(0, 2000))
def test_one_more_error_never_helps_the_canary(good: int, bad: int, fine: int, wrong: int) -> None:
    rank = {"pass": 0, "inconclusive": 1, "fail": 2}
    stable = route(fine + wrong, wrong)
    gates = Gates(error_rate=0.02, p95_ratio=1000, min_samples=50)
    before = verdict(stable, route(good + bad + 1, bad), gates)
    after = verdict(stable, route(good + bad + 1, bad + 1), gates)
    if good + bad + 1 - (bad + 1) >= 50 and fine >= 50:  # else answers are short, errors or not
        assert rank[after] >= rank[before]


def test_a_canary_that_is_no_worse_hardly_ever_fails_though_judged_all_the_time() -> None:
    """2 % errors and the same times on both sides; judged 100 times in each of 200 steps."""
    rng = random.Random(7)
    failed = sum(_step(rng, errors=0.02, slower=1.0) == "fail" for _ in range(200))
    assert failed <= 4


def test_a_canary_with_twice_the_limit_is_found_in_nearly_every_step() -> None:
    rng = random.Random(8)
    found = sum(_step(rng, errors=0.08, slower=1.0) == "fail" for _ in range(50))
    assert found >= 48
    found = sum(_step(rng, errors=0.02, slower=2.0) == "fail" for _ in range(50))
    assert found >= 48


def _step(rng: random.Random, *, errors: float, slower: float) -> str:
    """Up to 2,000 requests of the canary and 4,000 of the stable version; the last verdict."""
    sides = [RouteSamples(), RouteSamples()]
    latest = "inconclusive"
    for _ in range(100):
        for side, (count, rate, factor) in enumerate(((40, 0.02, 1.0), (20, errors, slower))):
            wrong = sum(rng.random() < rate for _ in range(count))
            buckets = [0] * 80
            for _ in range(count - wrong):
                buckets[bucket_of(factor * 0.01 * math.exp(rng.gauss(0, 0.5)))] += 1
            more = RouteSamples(requests=count, errors=wrong, buckets=tuple(buckets))
            sides[side] = add((sides[side], more))
        latest = verdict(sides[0], sides[1])
        if latest == "fail":
            break
    return latest


def test_histograms_know_quantiles_to_a_bucket() -> None:
    rng = random.Random(9)
    times = sorted(math.exp(rng.gauss(-4, 1)) for _ in range(5000))
    buckets = [0] * 85
    for each in times:
        buckets[bucket_of(each)] += 1
    samples = RouteSamples(requests=5000, buckets=tuple(buckets))
    for share in (0.1, 0.5, 0.95, 0.99):
        assert samples.quantile_s(share) == pytest.approx(times[int(share * 5000)], rel=0.05)
    assert samples.slower_than(times[4750]) == pytest.approx(250, abs=30)
    assert samples.slower_than(1e9) == 0
    assert samples.slower_than(0.0) == 5000
    assert RouteSamples().quantile_s(0.95) is None


def test_samples_that_do_not_add_up_are_refused() -> None:
    with pytest.raises(ValueError, match="more parts"):
        RouteSamples(requests=1, errors=1, buckets=(1,))
    with pytest.raises(ValueError, match="greater"):
        RouteSamples(requests=-1)
    assert merged(()) == Window()
    assert CHANCE < 0.01
