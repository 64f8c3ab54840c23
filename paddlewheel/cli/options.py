"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypeVar

import click

Decorated = TypeVar("Decorated", bound=Callable[..., Any])
OutputFormat = Literal["table", "json"]


def output_option(command: Decorated) -> Decorated:
    """``-o json``, on every command that reads. Passes ``output``: ``table`` or ``json``."""
    return click.option(
        "-o",
        "--output",
        type=click.Choice(["table", "json"]),
        default="table",
        show_default=True,
        help="A table for people or JSON for programs.",
    )(command)


def dry_run_option(command: Decorated) -> Decorated:
    return click.option(
        "--dry-run", is_flag=True, help="Validate and show the difference; write nothing."
    )(command)


def wait_options(command: Decorated) -> Decorated:
    """``--wait`` and ``--timeout``. Passes ``wait`` and ``timeout_s``."""
    command = click.option(
        "--timeout",
        "timeout_s",
        type=click.FloatRange(min=0, min_open=True),
        default=300.0,
        show_default=True,
        metavar="S",
        help="How many seconds --wait waits.",
    )(command)
    return click.option(
        "--wait", is_flag=True, help="Wait until every node has it in force, or one refuses it."
    )(command)


def file_option(command: Decorated) -> Decorated:
    """``-f``, several times. Passes ``files``: paths, ``-`` for stdin."""
    return click.option(
        "-f",
        "--file",
        "files",
        multiple=True,
        required=True,
        type=click.Path(exists=True, allow_dash=True),
        metavar="FILE|DIR|-",
        help="Documents, YAML or JSON; a folder with all below it, or - for stdin.",
    )(command)
