"""What commands print: tables and text for people, JSON for programs.

Everything from outside (names, reasons, documents) is printed as plain text, never as rich markup,
so a ``[red]`` in a document is just that. Control characters are shown, not obeyed: an event's
message must not be able to move the cursor of who reads it.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import click
import orjson
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

_PIPE_WIDTH = 100_000
"""Columns where stdout is not a terminal: a line is never wrapped or cut for grep and awk."""

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def console(*, stderr: bool = False) -> Console:
    """A console on stdout or stderr: colours and wrapping on a terminal only."""
    stream = sys.stderr if stderr else sys.stdout
    terminal = stream.isatty()
    return Console(
        file=stream,
        force_terminal=terminal,
        width=None if terminal else _PIPE_WIDTH,
        markup=False,
        highlight=False,
        emoji=False,
        soft_wrap=not terminal,
    )


def visible(text: str) -> str:
    """``text`` with control characters other than tab and newline written as escapes."""
    return _CONTROL.sub(lambda m: f"\\x{ord(m[0]):02x}", text)


def print_json(value: object) -> None:
    """One JSON document on stdout, indented."""
    sys.stdout.write(
        orjson.dumps(
            value, option=orjson.OPT_INDENT_2 | orjson.OPT_NON_STR_KEYS | orjson.OPT_APPEND_NEWLINE
        ).decode()
    )
    sys.stdout.flush()


def print_json_line(value: object) -> None:
    """One JSON document on one line, at once: for what is followed."""
    sys.stdout.write(orjson.dumps(value, option=orjson.OPT_APPEND_NEWLINE).decode())
    sys.stdout.flush()


def cell(text: object, style: str = "") -> Text:
    return Text(visible("-" if text is None or text == "" else str(text)), style=style)


def table(headings: Sequence[str], rows: Iterable[Sequence[object]]) -> Table:
    """A table without frames; cells are text or `rich.text.Text`."""
    made = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 2, 0, 0))
    if not sys.stdout.isatty():
        made.box = None
    for heading in headings:
        made.add_column(heading, overflow="fold", header_style="bold")
    for row in rows:
        made.add_row(*(item if isinstance(item, Text) else cell(item) for item in row))
    return made


def print_table(headings: Sequence[str], rows: Sequence[Sequence[object]], *, empty: str) -> None:
    """The table on stdout, or the sentence ``empty`` on stderr when there is no row."""
    if rows:
        show(table(headings, rows))
    else:
        say(empty)


def show(made: Table) -> None:
    """The table on stdout; without the padding at line ends where nobody sees it."""
    out = console()
    if out.is_terminal:
        out.print(made)
        return
    with out.capture() as captured:
        out.print(made)
    for line in captured.get().splitlines():
        sys.stdout.write(f"{line.rstrip()}\n")
    sys.stdout.flush()


def print_pairs(rows: Sequence[tuple[str, object]]) -> None:
    """``name: value`` lines, the values in one column."""
    width = max((len(name) for name, _ in rows), default=0) + 2
    out = console()
    for name, value in rows:
        out.print(cell(f"{name}:".ljust(width), "bold") + cell(value))


def say(text: str, style: str = "") -> None:
    """A line for people on stderr, where it does not mix with what a program reads."""
    console(stderr=True).print(Text(visible(text), style=style))


def fail(text: str) -> Any:
    """Say why on stderr and leave with exit code 1."""
    say(f"paddlewheel: {text}", "red")
    raise click.exceptions.Exit(1)
