"""`paddlewheel status`: what runs, against what the documents mean."""

from __future__ import annotations

import sys
from contextlib import aclosing

import click
from rich.live import Live
from rich.table import Table
from rich.text import Text

from paddlewheel.cli.connection import Connection, with_etcd
from paddlewheel.cli.fleet_view import Fleet, follow_fleet, read_fleet
from paddlewheel.cli.options import OutputFormat, output_option
from paddlewheel.cli.output import cell, console, print_json, print_json_line, say, show, table
from paddlewheel.cli.verdict import BAD, ModelView, Standing, Verdict, view
from paddlewheel.etcd_options import EtcdOptions, etcd_options
from registry.names import ModelName
from registry.records import ModelStatus
from registry.rollouts import Phase

_HEADINGS = ["MODEL", "REVISION", "WANTED", "NODE", "SERVES", "STANDBY", "STANDING", "DETAIL"]


@click.command()
@click.argument("model", required=False)
@click.option("--watch", is_flag=True, help="Stay, and show every change until Ctrl-C.")
@etcd_options
@output_option
def status(model: str | None, watch: bool, etcd: EtcdOptions, output: OutputFormat) -> None:
    """Show for every model, or for MODEL, what each node makes of its document.

    \b
    converged  in force, and what serves is what the document means
    unseen     the node has not seen this revision yet
    loading    accepted, being made ready
    refused    not accepted; the document before stays in force
    failed     accepted, but a version could not be made ready
    held       ready, in force as soon as the rollout says so
    aborted    not in force, or not any more: the rollout was aborted
    deviates   in force, but something else serves: a version is quarantined
    """
    only = None if model is None else ModelName(model)
    if watch:
        with_etcd(etcd, lambda conn: _watch(conn, only, output))
        return
    views = _views(with_etcd(etcd, read_fleet), only)
    if only is not None and not views:
        say(f"paddlewheel: no document for {model!r}, and no node has it", "red")
        raise click.exceptions.Exit(1)
    if output == "json":
        print_json({"models": [seen.as_json() for seen in views]})
    elif views:
        show(render(views))
        for line in notes(views):
            console().print(line)
    else:
        say("no models")


def _views(fleet: Fleet, only: ModelName | None) -> list[ModelView]:
    models = [model for model in fleet.models() if only is None or model == only]
    return [view(fleet, model) for model in models]


async def _watch(connection: Connection, only: ModelName | None, output: OutputFormat) -> None:
    """On a terminal the table, drawn again; elsewhere a line, or a JSON line, for each change."""
    async with aclosing(follow_fleet(connection)) as looks:
        if output == "json":
            async for fleet in looks:
                print_json_line({"models": [seen.as_json() for seen in _views(fleet, only)]})
        elif sys.stdout.isatty():
            with Live(console=console(), auto_refresh=False, screen=False) as live:
                async for fleet in looks:
                    live.update(_screen(_views(fleet, only)), refresh=True)
        else:
            shown: dict[tuple[str, ...], str] = {}
            async for fleet in looks:
                shown = _print_changes(_views(fleet, only), shown)


def _screen(views: list[ModelView]) -> Table:
    grid = Table.grid()
    grid.add_row(render(views))
    for line in notes(views):
        grid.add_row(line)
    return grid


def _print_changes(
    views: list[ModelView], shown: dict[tuple[str, ...], str]
) -> dict[tuple[str, ...], str]:
    now: dict[tuple[str, ...], str] = {}
    for row in (row for seen in views for row in _rows(seen)):
        plain = [cell.plain for cell in row]
        now[plain[0], plain[3]] = "  ".join(plain)
    for key, line in now.items():
        if shown.get(key) != line:
            click.echo(line)
    for key in shown.keys() - now.keys():
        click.echo(f"{'  '.join(key)}  gone")
    return now


def render(views: list[ModelView]) -> Table:
    """One row for each model and node."""
    return table(_HEADINGS, [row for seen in views for row in _rows(seen)])


def notes(views: list[ModelView]) -> list[Text]:
    """What is wrong with documents, and which versions are quarantined."""
    lines: list[Text] = []
    for seen in views:
        if seen.problem is not None:
            lines.append(cell(f"{seen.model}: document refused: {seen.problem}", "red"))
        lines += _rollout_notes(seen)
        if seen.canary is not None:
            lines.append(cell(f"{seen.model}: {seen.canary.line}", seen.canary.style))
        lines += [
            cell(f"{seen.model}: {entry['version']} is quarantined: {entry['reason']}", "yellow")
            for entry in seen.quarantine
        ]
    return lines


def _rollout_notes(seen: ModelView) -> list[Text]:
    """An unfinished rollout, or one that left the document out of force."""
    record = seen.decided
    if record is None or record.phase is Phase.COMMITTED:
        if record is None and seen.is_gated and seen.revision is not None:
            return [cell(f"{seen.model}: the rollout of {seen.revision} has not begun", "yellow")]
        return []
    if record.phase is Phase.ABORTED:
        return [cell(f"{seen.model}: the rollout was aborted: {record.reason}", "red")]
    wave = "" if record.wave is None else f", wave {record.wave + 1}"
    baking = ", baking" if record.is_baking else ""
    paused = ", paused" if record.paused else ""
    said = f"{seen.model}: {record.strategy} rollout {record.phase}{wave}{baking}{paused}"
    return [cell(said, "yellow")]


def _rows(seen: ModelView) -> list[list[Text]]:
    wanted = "deleted" if seen.revision is None else _versions(seen.intent.live, seen.intent.canary)
    head = [cell(seen.model, "bold"), cell(seen.revision), cell(wanted)]
    statuses = {status.node: status for status in seen.statuses}
    names = sorted({*statuses, *seen.verdicts})
    if not names:
        return [[*head, cell(None), cell(None), cell(None), cell("no node", "yellow"), cell(None)]]
    return [
        [*head, cell(name), *_row(statuses.get(name), seen.verdicts.get(name))] for name in names
    ]


def _row(status: ModelStatus | None, verdict: Verdict | None) -> list[Text]:
    serves = None if status is None else _versions(status.live, status.canary)
    standby = None if status is None else status.standby
    if verdict is None:
        return [cell(serves), cell(standby), cell("not asked for", "dim"), cell(None)]
    return [
        cell(serves),
        cell(standby),
        cell(verdict.standing, _style(verdict.standing)),
        cell(verdict.detail),
    ]


def _versions(live: str | None, canary: str | None) -> str | None:
    if canary is None:
        return live
    return f"{live or '-'} + canary {canary}"


def _style(standing: Standing) -> str:
    if standing is Standing.CONVERGED:
        return "green"
    return "red" if standing in BAD else "yellow"
