"""What was promised, what was measured, and whether the one holds against the other (pure)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from paddlewheel.bench.report import grid_table


@dataclass(frozen=True, slots=True)
class Criterion:
    """One line of a verdict."""

    what: str
    measured: str
    wanted: str
    holds: bool
    is_promise: bool = False
    """Whether breaking it is a failure on any machine: a lost request is, a slow one depends."""


def to_json(criteria: Iterable[Criterion]) -> list[dict[str, Any]]:
    """As values for a result file."""
    return [
        {"what": c.what, "measured": c.measured, "wanted": c.wanted, "holds": c.holds}
        for c in criteria
    ]


def verdict_table(criteria: Iterable[Criterion]) -> Table:
    rows: list[Sequence[str]] = [
        (
            c.what,
            c.measured,
            c.wanted,
            "holds" if c.holds else "BROKEN" if c.is_promise else "missed",
        )
        for c in criteria
    ]
    return grid_table("Verdict", ("what", "measured", "wanted", ""), rows)


def is_kept(criteria: Iterable[Criterion]) -> bool:
    """Whether no promise is broken."""
    return all(c.holds for c in criteria if c.is_promise)
