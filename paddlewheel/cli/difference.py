"""Unified differences between two texts of a document, and how they are shown."""

from __future__ import annotations

import difflib
from collections.abc import Iterator

_STYLES = {"+": "green", "-": "red", "@": "cyan"}


def unified(old: str | None, new: str | None, *, old_name: str, new_name: str) -> list[str]:
    """The lines of a unified difference without line ends; none when the texts are equal.

    ``None`` is a document that is not there. A missing last newline is said, as diff(1) does.
    """
    if old == new:
        return []
    lines = difflib.unified_diff(
        _lines(old),
        _lines(new),
        "/dev/null" if old is None else old_name,
        "/dev/null" if new is None else new_name,
        lineterm="",
    )
    return list(lines)


def _lines(text: str | None) -> list[str]:
    if not text:
        return []
    lines = text.split("\n")
    if lines[-1] == "":
        return lines[:-1]
    return [*lines[:-1], f"{lines[-1]}\n\\ No newline at end of file"]


def styled(lines: list[str]) -> Iterator[tuple[str, str]]:
    """Each line with its style: additions green, removals red, as everywhere."""
    for number, line in enumerate(lines):
        head = number < 2
        yield line, "bold" if head else _STYLES.get(line[:1], "")


def print_difference(lines: list[str]) -> None:
    """The difference on stdout: it is what the command was asked for, and ``patch`` reads it."""
    from rich.text import Text

    from paddlewheel.cli.output import console, visible

    out = console()
    for line, style in styled(lines):
        out.print(Text(visible(line), style=style))
