"""Figures as tables for people; the same figures go out as JSON for programs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from rich.console import Console
from rich.table import Table

from paddlewheel.bench.samples import Result


def milliseconds(seconds: float) -> str:
    """A latency for a table: ``12.3 ms``, or ``-`` when nothing was measured."""
    return "-" if math.isnan(seconds) else f"{seconds * 1e3:.1f} ms"


def microseconds(seconds: float) -> str:
    """A duration for a table, in whole microseconds."""
    return "-" if math.isnan(seconds) else f"{seconds * 1e6:.0f} us"


def counts(values: Mapping[str, int]) -> str:
    """``{"1": 20, "2": 10}`` as ``1: 20, 2: 10``; an empty label shows as ``none``."""
    return ", ".join(f"{label or 'none'}: {number}" for label, number in values.items()) or "-"


def fact_table(title: str, facts: Iterable[tuple[str, str]]) -> Table:
    """Two columns: what, and how much."""
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for what, value in facts:
        table.add_row(what, value)
    return table


def grid_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """A table whose first column is text and whose others are figures."""
    table = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right")
    for row in rows:
        table.add_row(*row)
    return table


def load_table(result: Result, title: str = "load") -> Table:
    """Everything about one run of the load generator."""
    facts = [
        ("requests", str(len(result))),
        ("failed", str(result.failed)),
        *((f"  {reason}", str(number)) for reason, number in result.failures().items()),
        ("per version", counts(result.by(lambda sample: sample.version))),
        ("per route", counts(result.by(lambda sample: sample.route))),
        *((f"p{percent}", milliseconds(result.latency_s(percent))) for percent in (50, 90, 99)),
        ("slowest", milliseconds(result.latency_s(100))),
        ("longest gap", milliseconds(result.longest_gap_s())),
    ]
    return fact_table(title, facts)


def print_table(table: Table, *, console: Console | None = None) -> None:
    """Print to standard output; colours only on a terminal, never narrower than 100 columns."""
    console = console or Console()
    if not console.is_terminal:
        console = Console(width=100, no_color=True)
    console.print(table)
