"""`nodes` and `events`: who is there, and what happened."""

from __future__ import annotations

import contextlib
from typing import Any

import click
import orjson

from paddlewheel.cli.connection import Connection, with_etcd
from paddlewheel.cli.options import OutputFormat, output_option
from paddlewheel.cli.output import cell, console, print_json, print_json_line, print_table, visible
from paddlewheel.etcd_options import EtcdOptions, etcd_options
from registry.records import BadRecord, DeviceRecord, NodeRecord, rfc3339_ms
from registry.store import KeyValue, Put


@click.command()
@etcd_options
@output_option
def nodes(etcd: EtcdOptions, output: OutputFormat) -> None:
    """List the registered nodes: a node whose lease ends is not among them."""
    found = with_etcd(etcd, _nodes)
    if output == "json":
        print_json({"nodes": [node.to_dict() for node in found]})
        return
    rows: list[list[object]] = [
        [
            node.id,
            node.http,
            cell("draining", "yellow") if node.draining else cell("serving", "green"),
            ", ".join(map(_device, node.devices)),
            ", ".join(f"{key}={value}" for key, value in node.labels.items()),
            node.version,
            rfc3339_ms(node.started_at),
        ]
        for node in found
    ]
    headings = ["NODE", "HTTP", "STATE", "DEVICES", "LABELS", "VERSION", "STARTED"]
    print_table(headings, rows, empty="no node is registered")


async def _nodes(connection: Connection) -> list[NodeRecord]:
    listing = await connection.store.list_prefix(connection.keys.nodes_prefix)
    found: list[NodeRecord] = []
    for kv in listing.kvs:
        with contextlib.suppress(BadRecord):
            found.append(NodeRecord.from_json(kv.value))
    return found


def _device(device: DeviceRecord) -> str:
    text = f"{device.id} {device.reserved_mb}/{device.memory_mb} MB"
    if device.cordoned is not None:
        text += f" CORDONED ({device.cordoned.reason})"
    return text


@click.command()
@click.option("--follow", is_flag=True, help="Go on with what happens, until Ctrl-C.")
@click.option("--model", help="Only events about this model.")
@click.option(
    "--limit",
    type=click.IntRange(min=0),
    default=50,
    show_default=True,
    metavar="N",
    help="How many past events to show; 0: all of the last 7 days.",
)
@etcd_options
@output_option
def events(
    follow: bool, model: str | None, limit: int, etcd: EtcdOptions, output: OutputFormat
) -> None:
    """List what happened, oldest first: one line an event, or CloudEvents as JSON lines."""

    async def work(connection: Connection) -> None:
        prefix = connection.keys.events_prefix
        listing = await connection.store.list_prefix(prefix)
        # Keys are ULIDs: their order is that of time.
        past = [event for kv in listing.kvs if _is_about(event := _event(kv), model)]
        past = past[-limit:] if limit else past
        if not follow and output == "json":
            print_json({"events": past})
            return
        for event in past:
            _print_event(event, output)
        if not follow:
            return
        async for batch in connection.store.watch_prefix(prefix, known=listing):
            for change in batch.events:
                if isinstance(change, Put) and _is_about(event := _event(change.kv), model):
                    _print_event(event, output)

    with_etcd(etcd, work)


def _event(kv: KeyValue) -> dict[str, Any]:
    """A CloudEvent; whatever else stands there is shown as one with nothing but data."""
    try:
        event: object = orjson.loads(kv.value)
    except orjson.JSONDecodeError:
        event = kv.value.decode("utf-8", "replace")
    return event if isinstance(event, dict) else {"id": kv.key.rpartition("/")[2], "data": event}


def _is_about(event: dict[str, Any], model: str | None) -> bool:
    if model is None:
        return True
    subject = str(event.get("subject") or "")
    return subject == model or subject.startswith((f"{model}/", f"{model}:"))


def _print_event(event: dict[str, Any], output: OutputFormat) -> None:
    if output == "json":
        print_json_line(event)
        return
    data = event.get("data")
    shown = data if isinstance(data, str) else orjson.dumps(data).decode() if data else ""
    time, kind, subject, source = (
        str(event.get(field) or "-") for field in ("time", "type", "subject", "source")
    )
    node = source.rpartition("/")[2]
    console().print(
        cell(f"{time}  "), cell(node), cell(kind, "bold"), cell(subject), visible(shown)
    )
