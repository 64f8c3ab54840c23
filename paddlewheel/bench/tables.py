"""The figures of each bench as tables (pure)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from paddlewheel.bench.criteria import Criterion
from paddlewheel.bench.report import counts, fact_table, grid_table

ROUTING_P99_US = 10.0
_PERCENTILES = ("p50_ms", "p90_ms", "p99_ms", "max_ms")

Run = Mapping[str, Any]


def routing(run: Run) -> list[Table]:
    names = ("p50_us", "p99_us", "p999_us", "max_us", "mean_us", "clock_p50_us")
    facts = [(name.removesuffix("_us"), f"{run[name]:.2f} us") for name in names]
    title = f"Routing decision, {run['models']} models, {run['rules']} rules each"
    return [fact_table(title, [*facts, ("decisions", counts(run["routes"]))])]


def routing_criteria(run: Run) -> list[Criterion]:
    p99_us = run["p99_us"]
    return [
        Criterion(
            "p99 of a routing decision", f"{p99_us:.2f} us", f"<= {ROUTING_P99_US:g} us",
            p99_us <= ROUTING_P99_US,
        )
    ]  # fmt: skip


def swap(run: Run) -> list[Table]:
    kinds = run["by_kind"]
    rows = [["steady", *_latencies(run["steady"])]]
    rows += [[f"while {kind} changes", *_latencies(seen)] for kind, seen in kinds.items()]
    capacity = run["capacity_per_s"]
    facts = [
        ("swaps", ", ".join(f"{seen['swaps']} {kind}" for kind, seen in kinds.items())),
        ("requests", f"{run['requests']} at {run['rate_per_s']:g}/s"
         + (f", of {capacity:g}/s possible" if capacity else "")),
        ("failed", " ".join([str(run["failed"]), *run["failures"]])),
        ("answered by version", counts(run["versions"])),
        ("kinds of request", counts(run["kinds"])),
        ("longest gap between answers", _ms(run["longest_gap_ms"])),
        *(
            (f"put to in force, {kind}", _spread(seen["to_in_force"], "_ms", "ms"))
            for kind, seen in kinds.items()
        ),
        ("swap of the routing table", _spread(run["pointer_swap_us"], "", "us")),
        ("memory (PSS) before, after", _change(run["pss_mb"], "MB")),
        ("of that allocated", _change(run["own_mb"], "MB")),
        ("open files before, after", _change(run["open_files"], "")),
    ]  # fmt: skip
    return [
        fact_table(f"Swaps of {run['model']}", facts),
        grid_table("Latency", ("requests", "count", "p50", "p90", "p99", "max"), rows),
    ]


def responsiveness(run: Run) -> list[Table]:
    rows = [[spell, *_latencies(seen)] for spell, seen in run["livez"].items()]
    start = [(phase.replace("_", " "), f"{ms:.0f} ms") for phase, ms in run["start_ms"].items()]
    return [
        fact_table("From `paddlewheel node` to the first small model live", start),
        grid_table("/livez", ("while", "count", "p50", "p90", "p99", "max"), rows),
    ]


def front(run: Run) -> list[Table]:
    rows = [
        [system, f"{seen['per_s']:.0f}", _ms(seen.get("p50_ms")), _ms(seen.get("p99_ms"))]
        for system, seen in run["systems"].items()
    ]
    ratios = [[pair, f"{ratio:.2f}"] for pair, ratio in run["ratios"].items()]
    return [
        grid_table("Closed loop, 1 or 8 at once", ("system", "per second", "p50", "p99"), rows),
        grid_table("Requests per second, ratios", ("", "ratio"), ratios),
    ]


def _latencies(seen: Run) -> list[str]:
    return [str(seen["requests"]), *(_ms(seen[name]) for name in _PERCENTILES)]


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f} ms"


def _spread(values: Run, suffix: str, unit: str) -> str:
    return ", ".join(f"{name} {values[name + suffix]:.0f} {unit}" for name in ("p50", "p99", "max"))


def _change(values: Run, unit: str) -> str:
    return f"{values['before']}, {values['after']} {unit}".strip()
