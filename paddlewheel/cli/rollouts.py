"""`rollouts`, `pause`, `resume`, `abort`: how a document goes through the fleet, and orders to it.

An order is a key of its own, which the fleet's coordinator obeys; the record it then writes is the
answer waited for here.
"""

from __future__ import annotations

import asyncio
import getpass
import socket
from collections.abc import Callable
from datetime import UTC, datetime

import click

from paddlewheel.cli.canary_view import CanaryView, canary_view
from paddlewheel.cli.connection import Connection, with_etcd
from paddlewheel.cli.fleet_view import Fleet, read_fleet
from paddlewheel.cli.options import OutputFormat, output_option
from paddlewheel.cli.output import cell, print_json, print_table, say
from paddlewheel.etcd_options import EtcdOptions, etcd_options
from registry.errors import PaddlewheelError
from registry.names import ModelName, Revision
from registry.records import BadRecord, rfc3339_ms
from registry.rollouts import Order, OrderKind, Phase, RolloutRecord, is_gated

OBEYED_WITHIN_S = 15.0
"""A killed coordinator is replaced in 5 s, and a little."""
POLL_S = 0.1

_STYLES = {Phase.COMMITTED: "green", Phase.ABORTED: "red"}
_HEADINGS = [
    "MODEL", "REVISION", "BEFORE", "STRATEGY", "PHASE", "WAVE", "RELEASED", "SINCE",
    "CANARY", "STEP", "SHARE", "VERDICT", "WHY",
]  # fmt: skip


class NoRollout(PaddlewheelError):
    """There is nothing to order."""


class NotObeyed(PaddlewheelError):
    """The order stands in etcd, but no coordinator has acted on it."""


@click.command()
@click.argument("model", required=False)
@etcd_options
@output_option
def rollouts(model: str | None, etcd: EtcdOptions, output: OutputFormat) -> None:
    """Show how far the newest document of every model, or of MODEL, is in the fleet.

    Only documents with a rollout other than the default, or with a canary that grows by steps,
    have one.
    """
    fleet = with_etcd(etcd, read_fleet)
    found = [
        record for name, record in sorted(fleet.rollouts.items()) if model is None or name == model
    ]
    if output == "json":
        print_json({"rollouts": [record.to_dict() for record in found]})
        return
    rows = [_row(record, _canary(fleet, record)) for record in found]
    print_table(_HEADINGS, rows, empty="no rollout" + (f" of {model!r}" if model else ""))
    for record in found:
        for refusal in record.refused:
            say(f"{record.model}: {refusal.node}: {refusal.reason}", "yellow")


def _canary(fleet: Fleet, record: RolloutRecord) -> CanaryView | None:
    stored = fleet.documents.get(record.model)
    return canary_view(None if stored is None else stored.parsed, record)


def _row(record: RolloutRecord, canary: CanaryView | None) -> list[object]:
    canary_cells: list[object] = [None, None, None, None]
    why = record.reason
    if canary is not None:
        canary_cells = [
            canary.version,
            canary.step,
            f"{canary.percent:g} %",
            cell(canary.verdict, canary.style),
        ]
        why = why or canary.detail
    return [
        record.model,
        record.revision,
        record.previous or None,
        record.strategy,
        cell(record.phase.value + (" (paused)" if record.paused else ""), _style(record)),
        None
        if record.wave is None
        else f"{record.wave + 1}{' (baking)' if record.is_baking else ''}",
        ",".join(record.released),
        rfc3339_ms(record.since),
        *canary_cells,
        why,
    ]


def _style(record: RolloutRecord) -> str:
    return _STYLES.get(record.phase, "yellow")


# --- orders -------------------------------------------------------------------------------------


@click.command()
@click.argument("model")
@etcd_options
def pause(model: str, etcd: EtcdOptions) -> None:
    """Hold MODEL's rollout where it is: nothing advances, nothing is taken back."""
    _command(etcd, model, OrderKind.PAUSE, lambda record: record.paused, "paused")


@click.command()
@click.argument("model")
@etcd_options
def resume(model: str, etcd: EtcdOptions) -> None:
    """Let MODEL's paused rollout go on. Waiting times and bakes start anew."""
    _command(etcd, model, OrderKind.RESUME, lambda record: not record.paused, "goes on")


@click.command()
@click.argument("model")
@etcd_options
def abort(model: str, etcd: EtcdOptions) -> None:
    """End MODEL's rollout: every node keeps, or goes back to, the document before.

    A rollout that is committed is not taken back by this; see `rollback`. The steps of a canary
    under way end, and its share of the traffic with them.
    """
    _command(etcd, model, OrderKind.ABORT, _is_aborted, "aborted")


def _is_aborted(record: RolloutRecord) -> bool:
    canary = record.canary
    return record.phase is Phase.ABORTED or (canary is not None and canary.phase == "failed")


def _command(
    etcd: EtcdOptions,
    model: str,
    kind: OrderKind,
    is_done: Callable[[RolloutRecord], bool],
    done: str,
) -> None:
    async def work(connection: Connection) -> None:
        name = ModelName(model)
        revision = under_way(await read_fleet(connection), name)
        if revision is None:
            raise NoRollout(f"no rollout of {model!r} is under way: nothing to {kind}")
        record = await order(connection, name, kind, revision, is_done)
        if not is_done(record):
            raise NoRollout(f"{model}@{revision} was {record.phase} before it could be obeyed")
        click.echo(f"{model}@{revision} {done}")

    with_etcd(etcd, work)


def under_way(fleet: Fleet, model: ModelName) -> Revision | None:
    """The revision whose rollout (or canary's steps) can be ordered; ``None`` without one."""
    record, stored = fleet.rollouts.get(model), fleet.documents.get(model)
    is_newer = stored is not None and (record is None or record.revision < stored.revision)
    if stored is not None and is_newer and stored.parsed is not None and is_gated(stored.parsed):
        return stored.revision  # about to begin
    if record is None or stored is None:
        return None
    return record.revision if not record.has_ended or _is_stepping(record) else None


def _is_stepping(record: RolloutRecord) -> bool:
    return record.canary is not None and record.canary.phase == "stepping"


async def order(
    connection: Connection,
    model: ModelName,
    kind: OrderKind,
    revision: Revision,
    is_done: Callable[[RolloutRecord], bool],
) -> RolloutRecord:
    """Write the order and wait until the record shows it; an end of the rollout is an answer too.

    Raises `NotObeyed` when nobody obeys within `OBEYED_WITHIN_S`.
    """
    given = Order(order=kind, revision=revision, at=datetime.now(UTC), by=_who())
    await connection.store.put(connection.keys.order(model), given.to_json())
    loop = asyncio.get_running_loop()
    deadline_s = loop.time() + OBEYED_WITHIN_S
    while loop.time() < deadline_s:
        record = await _record(connection, model)
        if record is not None and record.revision == revision:
            if is_done(record) or (record.has_ended and not _is_stepping(record)):
                return record
        elif record is not None and record.revision > revision:
            raise NoRollout(f"{model}: a newer document, {record.revision}, took its place")
        await asyncio.sleep(POLL_S)
    raise NotObeyed(
        f"{model}@{revision}: the order to {kind} stands, but no coordinator obeyed it within "
        f"{OBEYED_WITHIN_S:g} s"
    )


async def _record(connection: Connection, model: ModelName) -> RolloutRecord | None:
    kv = await connection.store.get(connection.keys.rollout(model))
    if kv is None:
        return None
    try:
        return RolloutRecord.from_json(kv.value)
    except BadRecord:
        return None


def _who() -> str:
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # no such user in this container
        user = "unknown"
    return f"{user}@{socket.gethostname()}"


async def promote_waves(connection: Connection, model: ModelName) -> Revision | None:
    """Order all waves that are left, at once, of a rollout under way; its revision.

    ``None`` when there is none: then `promote` is about the canary. Raises `NoRollout` for a
    rollout that has no waves.
    """
    fleet = await read_fleet(connection)
    revision, record = under_way(fleet, model), fleet.rollouts.get(model)
    if revision is None or (
        record is not None and record.revision == revision and record.has_ended
    ):
        return None
    stored = fleet.documents.get(model)
    if stored is not None and stored.parsed is not None:
        strategy = stored.parsed.spec.rollout.strategy
        if strategy != "waves":
            raise NoRollout(
                f"{model}@{revision} is being rolled out ({strategy}): it has no waves to promote"
            )
    await order(connection, model, OrderKind.PROMOTE, revision, _is_on_its_last_wave(fleet, model))
    return revision


def _is_on_its_last_wave(fleet: Fleet, model: ModelName) -> Callable[[RolloutRecord], bool]:
    stored = fleet.documents.get(model)
    waves = 0 if stored is None or stored.parsed is None else len(stored.parsed.spec.rollout.waves)

    def is_done(record: RolloutRecord) -> bool:
        return record.wave == waves

    return is_done
