"""Is the canary worse than what serves? Pass, inconclusive or fail, with the numbers (pure).

Each gate asks two things. Is what was *observed* within the limit? If not, could that be chance:
how probable is so much, or more, where the canary is no worse at all? Within: pass. Beyond it, and
less probable than `CHANCE`: fail. Beyond it, and yet perhaps chance: inconclusive, more samples
decide. Fewer than ``min_samples`` never pass, but may fail where they leave no doubt.

The probabilities are exact for small samples: Fisher's test between the two versions (errors;
answers slower than the limit), the binomial distribution where the limit is a number by itself.
A step is judged again and again, so `CHANCE` is small: tests simulate how often a canary that is
no worse fails over a whole step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from math import exp, lgamma, log

from registry.samples import MirrorSamples, RouteSamples, Window
from registry.spec_canary import Gates

CHANCE = 0.001
"""What is less probable than this is not taken for chance, each time a gate is judged."""
_P95 = 0.95
_LnTerm = Callable[[int], float]
_Ratio = Callable[[int], float]
_ENOUGH = 1e-12
"""A tail's terms that add less than this share are left out."""


class Verdict(StrEnum):
    PASS = "pass"  # noqa: S105
    INCONCLUSIVE = "inconclusive"
    FAIL = "fail"


_ORDER = (Verdict.FAIL, Verdict.INCONCLUSIVE, Verdict.PASS)


@dataclass(frozen=True, slots=True)
class Judgement:
    verdict: Verdict
    detail: str
    """One sentence with the numbers, those that decided first."""


def judge(gates: Gates, window: Window, *, takes_traffic: bool, leaves_traffic: bool) -> Judgement:
    """Judge one step by all its gates: the worst verdict counts.

    takes_traffic: whether the step sends requests to the canary; without, only agreement is judged.
    leaves_traffic: whether it leaves any to the stable version. Where nothing is left there is
    nothing to compare with: errors are compared with none at all, times not judged.
    """
    found: list[Judgement] = []
    if takes_traffic:
        baseline = window.stable if leaves_traffic else None
        found.append(errors(gates, window.canary, baseline))
        if baseline is not None:
            found.append(times(gates, window.canary, baseline))
    if gates.agreement is not None:
        found.append(agreement(gates.agreement, gates.min_samples, window.mirror))
    if not found:
        return Judgement(Verdict.PASS, "nothing to judge by")
    verdict = next(each for each in _ORDER if any(one.verdict is each for one in found))
    deciding = [one.detail for one in found if one.verdict is verdict]
    return Judgement(verdict, "; ".join(dict.fromkeys(deciding)))


def errors(gates: Gates, canary: RouteSamples, stable: RouteSamples | None) -> Judgement:
    """The share of failed requests, against the stable version's; ``None``: against zero."""
    if stable is not None:
        limit = stable.error_rate + gates.error_rate
        chance = fisher(canary.errors, canary.requests, stable.errors, stable.requests)
        numbers = f"{_share('canary', canary)}, {_share('stable', stable)}"
    else:
        limit = gates.error_rate
        chance = binomial(canary.errors, canary.requests, limit)
        numbers = _share("canary", canary)
    allowed = f"limit {limit:.2%}"
    if canary.error_rate > limit and chance < CHANCE:
        return Judgement(Verdict.FAIL, f"errors: {numbers}, {allowed}; by chance {_odds(chance)}")
    missing = _missing(gates, canary.requests, None if stable is None else stable.requests)
    if missing is not None:
        return Judgement(Verdict.INCONCLUSIVE, missing)
    if canary.error_rate > limit:
        return Judgement(
            Verdict.INCONCLUSIVE,
            f"errors: {numbers}, {allowed}, but that may be chance ({_odds(chance)})",
        )
    return Judgement(Verdict.PASS, f"errors: {numbers}, {allowed}")


def times(gates: Gates, canary: RouteSamples, stable: RouteSamples) -> Judgement:
    """The 95th percentile of time, against the stable version's.

    The test asks whether more of the canary's answers than of the stable version's are beyond
    their limit: ``p95_ratio`` times the stable p95 for the one, that p95 for the other.
    """
    missing = _missing(gates, canary.answered, stable.answered, "answers")
    mine_s, its_s = canary.quantile_s(_P95), stable.quantile_s(_P95)
    if mine_s is None or its_s is None:
        return Judgement(Verdict.INCONCLUSIVE, missing or "no answers")
    limit_s = gates.p95_ratio * its_s
    slow, usual = canary.slower_than(limit_s), stable.slower_than(its_s)
    chance = fisher(slow, canary.answered, usual, stable.answered)
    numbers = (
        f"p95: canary {_ms(mine_s)} of {canary.answered}, stable {_ms(its_s)} of "
        f"{stable.answered}, limit {_ms(limit_s)}"
    )
    if mine_s > limit_s and chance < CHANCE:
        return Judgement(Verdict.FAIL, f"{numbers}; by chance {_odds(chance)}")
    if missing is not None:
        return Judgement(Verdict.INCONCLUSIVE, missing)
    if mine_s > limit_s:
        return Judgement(
            Verdict.INCONCLUSIVE, f"{numbers}, but that may be chance ({_odds(chance)})"
        )
    return Judgement(Verdict.PASS, numbers)


def agreement(wanted: float, min_samples: int, mirror: MirrorSamples) -> Judgement:
    """The share of mirrored requests with an answer that agrees; a failed one does not."""
    count = mirror.compared + mirror.failed
    apart = mirror.differed + mirror.failed
    numbers = f"agreement: {mirror.agreed} of {count}" + (
        f" ({mirror.agreed / count:.2%}), limit {wanted:.2%}" if count else ""
    )
    chance = binomial(apart, count, 1.0 - wanted)
    is_short = count > 0 and mirror.agreed < wanted * count
    if is_short and chance < CHANCE:
        return Judgement(Verdict.FAIL, f"{numbers}; by chance {_odds(chance)}")
    if count < min_samples:
        return Judgement(
            Verdict.INCONCLUSIVE, f"mirrored answers: {count} of at least {min_samples}"
        )
    if is_short:
        return Judgement(
            Verdict.INCONCLUSIVE, f"{numbers}, but that may be chance ({_odds(chance)})"
        )
    return Judgement(Verdict.PASS, numbers)


def fisher(hits: int, count: int, other_hits: int, other_count: int) -> float:
    """Fisher's exact test, one-sided: the probability of ``hits`` or more among ``count`` when
    both groups' hits, in all ``hits + other_hits``, fell on them without regard to the group.
    """
    total, drawn = count + other_count, hits + other_hits
    if not hits or not other_count:
        return 1.0
    return _tail(
        hits,
        min(count, drawn),
        lambda k: _ln_choose(count, k) + _ln_choose(other_count, drawn - k)
        - _ln_choose(total, drawn),
        lambda k: (count - k) * (drawn - k) / ((k + 1) * (other_count - drawn + k + 1)),
    )  # fmt: skip


def binomial(hits: int, count: int, share: float) -> float:
    """The probability of ``hits`` or more in ``count`` tries of ``share`` each."""
    if not hits or share >= 1.0:
        return 1.0
    if share <= 0.0:
        return 0.0
    odds = share / (1.0 - share)
    return _tail(
        hits,
        count,
        lambda k: _ln_choose(count, k) + k * log(share) + (count - k) * log(1.0 - share),
        lambda k: (count - k) / (k + 1) * odds,
    )


_TINY = 1e-290
_STEPS_MAX = 100_000
"""Terms that are added up: enough for billions of requests, and over in some 20 ms."""


def _tail(low: int, high: int, ln_term: _LnTerm, ratio: _Ratio) -> float:
    """The sum of a distribution's terms from ``low`` to ``high``, each from the one before."""
    rises = ratio(low) > 1.0
    if rises and high - low > _STEPS_MAX:
        return 1.0  # the middle of it all is still to come: nothing is improbable about it
    term = exp(ln_term(low))
    if term < _TINY:
        # Too small to go on from: so is all of a tail that falls from here.
        return 1.0 if rises else 0.0
    total = term
    for k in range(low, min(high, low + _STEPS_MAX)):
        factor = ratio(k)
        term *= factor
        total += term
        if factor < 1.0 and term < total * _ENOUGH:
            break
    return min(1.0, total)


def _ln_choose(n: int, k: int) -> float:
    return lgamma(n + 1) - lgamma(k + 1) - lgamma(n - k + 1)


def _missing(gates: Gates, mine: int, its: int | None, what: str = "requests") -> str | None:
    short = [
        f"{name} {count}"
        for name, count in (("canary", mine), ("stable", its))
        if count is not None and count < gates.min_samples
    ]
    return f"{what}: {', '.join(short)} of at least {gates.min_samples}" if short else None


def _share(name: str, samples: RouteSamples) -> str:
    return f"{name} {samples.errors} of {samples.requests} ({samples.error_rate:.2%})"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms"


def _odds(chance: float) -> str:
    return f"p = {chance:.2g}"
