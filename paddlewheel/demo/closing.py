"""The closing tables of the demo."""

from __future__ import annotations

from collections.abc import Iterable

from rich.table import Table

from paddlewheel.bench.report import fact_table, grid_table, milliseconds
from paddlewheel.bench.samples import Result, Sample
from paddlewheel.demo.play import Edit, Report
from paddlewheel.demo.traffic import WRONG

_SETTLE_S = 1.0
"""How long after an edit's outcome a request still counts as "during" it."""


def is_well(report: Report) -> bool:
    """Whether there was traffic, none of it failed, and every edit came out as it must."""
    return len(report.result) > 0 and report.result.failed == 0 and not report.problems


def tables(report: Report) -> Iterable[Table]:
    """Whole run, texts per version, one row per edit."""
    yield summary_table(report)
    yield texts_table(report.result)
    yield edits_table(report)


def summary_table(report: Report) -> Table:
    result = report.result
    interval = ""
    if report.rate_per_s:
        interval = f" (a request was due every {milliseconds(1 / report.rate_per_s)})"
    facts = [
        ("requests", str(len(result))),
        ("failed", str(result.failed)),
        *((f"  {reason}", str(number)) for reason, number in result.failures().items()),
        ("longest gap between two answers", f"{milliseconds(result.longest_gap_s())}{interval}"),
        ("swap of the routing table", _swap(report.swaps_us)),
        *(("not as expected", problem) for problem in report.problems),
    ]
    return fact_table("The whole run", facts)


def _swap(swaps_us: list[float]) -> str:
    if not swaps_us:
        return "-"
    ordered = sorted(swaps_us)
    median, slowest = ordered[len(ordered) // 2], ordered[-1]
    return f"median {median:.0f} us, slowest {slowest:.0f} us, of {len(ordered)}"


def texts_table(result: Result) -> Table:
    """What each version of each model read, right and wrong."""
    groups: dict[tuple[str, str], list[Sample]] = {}
    for sample in result:
        model = "direction" if sample.name == "cls" else "recognition"
        groups.setdefault((model, sample.version or "no answer"), []).append(sample)
    rows: list[list[str]] = []
    for (model, version), samples in sorted(groups.items()):
        right = sum(1 for sample in samples if sample.failure is None)
        wrong = sum(1 for sample in samples if (sample.failure or "").startswith(WRONG))
        rows.append([f"{model} {version}", str(len(samples)), str(right), str(wrong)])
    return grid_table("Texts", ("model and version", "requests", "right", "wrong"), rows)


def edits_table(report: Report) -> Table:
    """For each edit the time to its outcome, and p99 before, during and after it."""
    edits, result = report.edits, report.result
    rows: list[list[str]] = []
    for number, edit in enumerate(edits):
        before_s = _end(edits[number - 1]) if number else result.started_s
        after_s = edits[number + 1].started_s if number + 1 < len(edits) else result.ended_s
        spans = ((before_s, edit.started_s), (edit.started_s, _end(edit)), (_end(edit), after_s))
        windows = [result.window(*span) for span in spans]
        rows.append(
            [
                edit.title,
                f"{edit.settled_s - edit.started_s:.2f} s",
                *(milliseconds(window.latency_s(99)) for window in windows),
                milliseconds(windows[1].longest_gap_s()),
            ]
        )
    columns = ("edit", "outcome after", "p99 before", "during", "after", "longest gap")
    return grid_table("Edits", columns, rows)


def _end(edit: Edit) -> float:
    return edit.settled_s + _SETTLE_S
