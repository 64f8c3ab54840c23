"""`paddlewheel sync`: a folder kept applied until Ctrl-C or SIGTERM."""

from __future__ import annotations

import asyncio
import logging
import signal
from pathlib import Path

import click
import structlog

from paddlewheel.cli.connection import Connection, with_etcd
from paddlewheel.cli.output import say
from paddlewheel.etcd_options import EtcdOptions, etcd_options
from paddlewheel.sync import DEBOUNCE_S, Did, FolderSync, Report

_STYLES = {Did.APPLIED: "green", Did.REFUSED: "red", Did.DELETED: "yellow", Did.RETRYING: "yellow"}


@click.command()
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option(
    "--prune", is_flag=True, help="Delete documents in etcd when they go away in the folder."
)
@click.option(
    "--debounce",
    "debounce_s",
    type=click.FloatRange(min=0),
    default=DEBOUNCE_S,
    show_default=True,
    metavar="S",
    help="Quiet time after a change before the folder is read.",
)
@etcd_options
def sync(folder: Path, prune: bool, debounce_s: float, etcd: EtcdOptions) -> None:
    """Apply FOLDER's documents, and again whatever changes in it, until Ctrl-C.

    A broken file is reported and what it said before stays. What others write into etcd stays too
    until the file itself changes. Outages of etcd are waited out.
    """
    # Retries are reported as lines of ours; the library's own log would say them twice.
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    with_etcd(etcd, lambda connection: _run(connection, folder, prune, debounce_s))


async def _run(connection: Connection, folder: Path, prune: bool, debounce_s: float) -> None:
    work = asyncio.create_task(
        FolderSync(
            folder, connection.store, connection.keys, _show, prune=prune, debounce_s=debounce_s
        ).run()
    )
    # Ctrl-C and SIGTERM are how this command is meant to end: exit code 0.
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, work.cancel)
    say(f"syncing {folder} into etcd at {','.join(connection.located.endpoints)}")
    try:
        await work
    except asyncio.CancelledError:
        say("stopped")


def _show(report: Report) -> None:
    revision = "" if report.revision is None else f" (revision {report.revision})"
    detail = f": {report.detail}" if report.detail else ""
    line = f"{report.what} {report.did}{revision}{detail}"
    if report.did is Did.REFUSED:
        line = f"refused: {report.detail}"
    say(line, _STYLES.get(report.did, ""))
