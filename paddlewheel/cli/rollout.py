"""`promote`, `rollback`, `release`: a rollout's decisions, each one write that can be seen."""

from __future__ import annotations

import click

from paddlewheel.cli.apply import carry_out, converge
from paddlewheel.cli.connection import Connection, with_etcd
from paddlewheel.cli.history import choose_rollback, read_history
from paddlewheel.cli.options import dry_run_option, wait_options
from paddlewheel.cli.output import say
from paddlewheel.cli.rollouts import promote_waves
from paddlewheel.cli.writing import Change
from paddlewheel.etcd_options import EtcdOptions, etcd_options
from paddlewheel.promotion import promote_text
from registry.errors import PaddlewheelError
from registry.names import ModelName, Revision, Version
from registry.records import BadRecord, Quarantine
from registry.spec import parse_model


class NoSuchModel(PaddlewheelError):
    """There is no document of this name."""


@click.command()
@click.argument("model")
@dry_run_option
@wait_options
@etcd_options
def promote(model: str, dry_run: bool, wait: bool, timeout_s: float, etcd: EtcdOptions) -> None:
    """Make MODEL's canary the live version, or let the rest of its rollout follow at once.

    While a rollout by waves is under way, all waves that are left are released together. Otherwise
    the canary is promoted: one new write of the document with live set to the canary's version and
    the canary removed; comments and layout stay as they are.
    """

    async def work(connection: Connection) -> None:
        name = ModelName(model)
        released = None if dry_run else await promote_waves(connection, name)
        if released is not None:
            click.echo(f"{model}@{released}: all waves that were left are released")
            if wait:
                await converge(connection, {name: released}, timeout_s)
            return
        key = connection.keys.model(name)
        current = await connection.store.get(key)
        if current is None:
            raise NoSuchModel(f"no document for {model!r}")
        done = promote_text(current.value.decode("utf-8", "replace"))
        parse_model(done.text, name=name)
        if done.redumped:
            say("comments and layout are lost: the text could not be edited in place", "yellow")
        say(f"{model}: {done.was_live} -> {done.version}")
        change = Change(name, key, current, done.text.encode(), f"{model} promoted")
        await carry_out(connection, [change], dry_run, timeout_s if wait else None)

    with_etcd(etcd, work)


@click.command()
@click.argument("model")
@click.option(
    "--to",
    "revision",
    type=click.IntRange(min=1),
    metavar="REVISION",
    help="A revision of `paddlewheel history`.  [the last good one that differs]",
)
@dry_run_option
@wait_options
@etcd_options
def rollback(
    model: str,
    revision: int | None,
    dry_run: bool,
    wait: bool,
    timeout_s: float,
    etcd: EtcdOptions,
) -> None:
    """Restore an earlier document of MODEL, as a new write of the old text.

    Without --to: the newest revision before the current one that has another text and is valid.
    A deleted document is restored the same way.
    """

    async def work(connection: Connection) -> None:
        name = ModelName(model)
        key = connection.keys.model(name)
        current = await connection.store.get(key)
        entries = await read_history(connection, name)
        wanted = None if revision is None else Revision(revision)
        entry = choose_rollback(name, entries, current, wanted)
        say(f"{model}: back to revision {entry.revision}")
        source = f"{model}@{entry.revision}"
        change = Change(name, key, current, entry.document.encode(), source)
        await carry_out(connection, [change], dry_run, timeout_s if wait else None)

    with_etcd(etcd, work)


class NotQuarantined(PaddlewheelError):
    """There is nothing to release."""


@click.command()
@click.argument("model")
@click.argument("version")
@etcd_options
def release(model: str, version: str, etcd: EtcdOptions) -> None:
    """Lift the quarantine of VERSION of MODEL, so that nodes may serve it again."""

    async def work(connection: Connection) -> None:
        key = connection.keys.quarantine(ModelName(model), Version(version))
        held = await connection.store.get(key)
        faults = connection.keys.faults_prefix(ModelName(model), Version(version))
        forgotten = await connection.store.delete_prefix(faults)
        if held is None and forgotten:
            # One node, or fewer than the quorum, took it out for themselves.
            click.echo(f"{model} {version} released ({forgotten} nodes had taken it out)")
            return
        if held is None:
            listed = await connection.store.list_prefix(
                connection.keys.quarantine_prefix(ModelName(model))
            )
            others = ", ".join(kv.key.rpartition("/")[2] for kv in listed.kvs)
            hint = f"; quarantined: {others}" if others else ""
            raise NotQuarantined(f"{model} {version} is not quarantined{hint}")
        await connection.store.delete(key)
        try:
            reason = Quarantine.from_json(held.value).reason
        except BadRecord:
            reason = "unreadable record"
        click.echo(f"{model} {version} released (was quarantined: {reason})")

    with_etcd(etcd, work)
