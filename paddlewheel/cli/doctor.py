"""`paddlewheel doctor`: is this machine, and the etcd it would use, fit to run a node?"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import click

from paddlewheel.cli.checks import (
    Check,
    Finding,
    cache_checks,
    gpu_checks,
    host_checks,
    package_checks,
    paddle_checks,
)
from paddlewheel.cli.etcd_checks import etcd_checks
from paddlewheel.cli.options import OutputFormat, output_option
from paddlewheel.cli.output import cell, console, print_json, show, table
from paddlewheel.etcd_options import EtcdOptions, etcd_options

_MARKS: dict[Finding, tuple[str, str]] = {
    "ok": ("ok", "green"),
    "warn": ("warn", "yellow"),
    "fail": ("FAIL", "bold red"),
}


def default_cache_dir() -> Path:
    """Where a node keeps fetched models unless told otherwise."""
    from paddlewheel.settings import DEFAULT_CACHE

    return DEFAULT_CACHE


@click.command()
@etcd_options
@click.option(
    "--cache",
    type=click.Path(file_okay=False, path_type=Path),
    default=default_cache_dir,
    show_default="~/.cache/paddlewheel",
    help="The folder in which a node here would keep models.",
)
@click.option(
    "--skip-paddle", is_flag=True, help="Do not try to import Paddle, which takes seconds."
)
@output_option
def doctor(etcd: EtcdOptions, cache: Path, skip_paddle: bool, output: OutputFormat) -> None:
    """Check this machine and the etcd it would use.

    Looks at Python, packages, Paddle, disk, shared memory, GPU, limits and every etcd member.
    """
    groups: list[tuple[str, Callable[[], list[Check]]]] = [
        ("host", host_checks),
        ("packages", package_checks),
        ("cache", lambda: cache_checks(cache.expanduser())),
        ("gpu", gpu_checks),
        ("etcd", lambda: etcd_checks(etcd)),
    ]
    if not skip_paddle:
        groups.append(("paddle", paddle_checks))
    checks: list[Check] = []
    status = console(stderr=True).status("", spinner="dots") if sys.stderr.isatty() else None
    if status is not None:
        status.start()
    try:
        for name, group in groups:
            if status is not None:
                status.update(f"checking {name}")
            checks += group()
    finally:
        if status is not None:
            status.stop()
    failed = any(check.finding == "fail" for check in checks)
    if output == "json":
        print_json({"ok": not failed, "checks": [check.as_json() for check in checks]})
    else:
        rows = [
            [
                cell(*_MARKS[check.finding]),
                check.name,
                check.detail if check.hint is None else f"{check.detail}; {check.hint}",
            ]
            for check in checks
        ]
        show(table(["", "CHECK", "FOUND"], rows))
    if failed:
        raise click.exceptions.Exit(1)
