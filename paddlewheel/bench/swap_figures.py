"""The figures of `paddlewheel bench swap`, from samples and the times of the swaps (pure)."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from paddlewheel.bench.criteria import Criterion
from paddlewheel.bench.footprint import Footprint
from paddlewheel.bench.samples import Result, Sample, percentile

WINDOW_AFTER_S = 0.25
"""A swap's window ends this long after its document is in force."""
_P99_FACTOR, _P99_MARGIN_S = 1.5, 0.030
_LATEST_BEYOND_S = 0.250
_GROWTH_SHARE = 0.05
"""Of the memory before: allocators keep some of what was used at the busiest moment."""


@dataclass(frozen=True, slots=True)
class Swap:
    """One document, from its put to its being in force (monotonic seconds)."""

    kind: str
    """``live`` or ``canary``: what it changed."""
    put_s: float
    in_force_s: float

    @property
    def took_s(self) -> float:
        return self.in_force_s - self.put_s


def split(result: Result, swaps: Sequence[Swap]) -> tuple[Result, dict[str, Result]]:
    """The requests that met no swap, and for each kind those that met one of it.

    A request met a swap when any part of it, from due to answered, lay between the put and
    `WINDOW_AFTER_S` after the document was in force. swaps: in order, without overlap.
    """
    starts = [swap.put_s for swap in swaps]
    met: dict[str, list[Sample]] = {swap.kind: [] for swap in swaps}
    steady: list[Sample] = []
    for sample in result:
        last = bisect_right(starts, sample.done_s) - 1  # the last swap that began before its end
        if last >= 0 and sample.due_s < swaps[last].in_force_s + WINDOW_AFTER_S:
            met[swaps[last].kind].append(sample)
        else:
            steady.append(sample)
    span = (result.started_s, result.ended_s)
    return Result(steady, *span), {kind: Result(samples, *span) for kind, samples in met.items()}


def figures(
    result: Result,
    swaps: Sequence[Swap],
    before: Footprint,
    after: Footprint,
    swaps_us: Sequence[float],
) -> dict[str, Any]:
    """Everything that the tables show, as JSON values."""
    steady, met = split(result, swaps)
    during = Result.merged(met.values())
    return {
        "swaps": len(swaps),
        "requests": len(result),
        "failed": result.failed,
        "failures": dict(result.failures()),
        "mixed": sum(n for reason, n in result.failures().items() if is_mixed(reason)),
        "per_s": result.summary()["per_s"],
        "versions": dict(result.by(lambda sample: sample.version)),
        "kinds": dict(result.by(lambda sample: sample.name)),
        "steady": latencies(steady),
        "swap": latencies(during),
        "by_kind": {
            kind: {
                **latencies(requests),
                "swaps": sum(1 for swap in swaps if swap.kind == kind),
                "to_in_force": _times_ms(swap.took_s for swap in swaps if swap.kind == kind),
            }
            for kind, requests in met.items()
        },
        "p99_allowed_ms": _ms(_allowed_s(steady)),
        "longest_gap_ms": _ms(result.longest_gap_s()),
        "pointer_swap_us": {
            "p50": round(percentile(swaps_us, 50), 1),
            "p99": round(percentile(swaps_us, 99), 1),
            "max": round(percentile(swaps_us, 100), 1),
        },
        "pss_mb": {"before": round(before.pss_mb, 1), "after": round(after.pss_mb, 1)},
        "own_mb": {"before": round(before.own_mb, 1), "after": round(after.own_mb, 1)},
        "open_files": {"before": before.open_files, "after": after.open_files},
        "processes": {"before": before.processes, "after": after.processes},
    }


def is_mixed(failure: str) -> bool:
    """Whether a judge's complaint is about numbers that are not those of the version named."""
    return failure.startswith(("header says version", "wrong numbers"))


def criteria(run: Mapping[str, Any]) -> list[Criterion]:
    """What must hold of one run's `figures`."""
    allowed_ms = run["p99_allowed_ms"]
    latest_ms = allowed_ms + _LATEST_BEYOND_S * 1e3
    own, files, processes = run["own_mb"], run["open_files"], run["processes"]
    own_allowed_mb = own["before"] * (1 + _GROWTH_SHARE)
    found = [
        Criterion("failed requests", str(run["failed"]), "0", run["failed"] == 0, True),
        Criterion("answers mixing versions", str(run["mixed"]), "0", run["mixed"] == 0, True),
    ]
    for kind, seen in run["by_kind"].items():
        p99_ms, max_ms = seen["p99_ms"], seen["max_ms"]
        found += [
            Criterion(
                f"p99 while {kind} changes", f"{p99_ms:.1f} ms", f"<= {allowed_ms:.1f} ms",
                p99_ms <= allowed_ms,
            ),
            Criterion(
                f"latest answer while {kind} changes", f"{max_ms:.1f} ms", f"<= {latest_ms:.1f} ms",
                max_ms <= latest_ms,
            ),
        ]  # fmt: skip
    return [
        *found,
        Criterion(
            "allocated memory (PSS) after", f"{own['after']:.1f} MB",
            f"<= {own_allowed_mb:.1f} MB", own["after"] <= own_allowed_mb,
        ),
        Criterion(
            "open files after", str(files["after"]), f"<= {files['before']}",
            files["after"] <= files["before"], True,
        ),
        Criterion(
            "processes after", str(processes["after"]), f"<= {processes['before']}",
            processes["after"] <= processes["before"], True,
        ),
    ]  # fmt: skip


def latencies(result: Result) -> dict[str, Any]:
    """Count and percentiles in milliseconds."""
    return {
        "requests": len(result),
        "failed": result.failed,
        **{
            f"{name}_ms": _ms(result.latency_s(percent))
            for name, percent in (("p50", 50), ("p90", 90), ("p99", 99), ("max", 100))
        },
    }


def _allowed_s(steady: Result) -> float:
    p99_s = steady.latency_s(99)
    return max(_P99_FACTOR * p99_s, p99_s + _P99_MARGIN_S)


def _times_ms(values: Iterable[float]) -> dict[str, float | None]:
    taken_s = list(values)
    return {
        f"{name}_ms": _ms(percentile(taken_s, percent))
        for name, percent in (("p50", 50), ("p99", 99), ("max", 100))
    }


def _ms(seconds: float) -> float | None:
    return None if math.isnan(seconds) else round(seconds * 1e3, 3)
