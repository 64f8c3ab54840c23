"""`paddlewheel drill`: have the next runs of a version fail, on every node that has it or on one.

The nodes do it themselves (``/admin/drill``); this finds them and asks. Each answers for itself, so
a fleet may end up drilled in part: what every node said is printed, and one refusal is exit 1.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import click

from paddlewheel.cli.connection import Connection, with_etcd
from paddlewheel.cli.node_http import BadCredential, open_node
from paddlewheel.cli.options import OutputFormat, output_option
from paddlewheel.cli.output import cell, print_json, print_table
from paddlewheel.etcd_options import EtcdOptions, etcd_options
from registry.errors import PaddlewheelError
from registry.names import ModelName, is_model_name
from registry.records import BadRecord, NodeRecord

HTTP_TIMEOUT_S = 5.0
KINDS = ("code", "crash", "hang", "slow", "nan", "oom")
"""`loader.drills.KINDS`; the command line does not import the loader."""


class NoNode(PaddlewheelError):
    """No node to ask."""


class Refused(PaddlewheelError):
    """A node said no, or nothing; the text says why."""


@dataclass(frozen=True, slots=True)
class Address:
    """One node to ask."""

    node: str
    http: str


@dataclass(frozen=True, slots=True)
class Reply:
    """What came of one node. ``drills``: those armed there now that the question was about."""

    address: Address
    drills: tuple[Mapping[str, Any], ...] = ()
    error: str | None = None

    def as_json(self) -> dict[str, Any]:
        return {
            "node": self.address.node, "http": self.address.http,
            "drills": [dict(drill) for drill in self.drills], "error": self.error,
        }  # fmt: skip


@click.command()
@click.argument("model")
@click.option(
    "--code",
    metavar="CODE",
    help="What to raise: 700, -101, CUDNN:8; how to end: SIGSEGV, SIGSTOP, EXIT:1; or NAN.",
)
@click.option("--kind", type=click.Choice(KINDS), help="What to do.  [as the code suggests]")
@click.option(
    "--count",
    type=click.IntRange(1, 1_000_000),
    default=1,
    show_default=True,
    metavar="N",
    help="How many runs fail on each node before it is over.",
)
@click.option("--version", metavar="V", help="Which version fails.  [the live one of this moment]")
@click.option("--node", metavar="ID|URL", help="One node only.  [every node that has the model]")
@click.option(
    "--share",
    type=click.FloatRange(0, 1, min_open=True),
    default=1.0,
    show_default=True,
    metavar="S",
    help="The share of the runs that fail, at random, until the count is used up.",
)
@click.option(
    "--delay-ms",
    type=click.IntRange(0, 600_000),
    default=0,
    show_default=True,
    metavar="D",
    help="Be this much slower first; alone, or with --kind slow, the only harm done.",
)
@click.option("--list", "listing", is_flag=True, help="Arm nothing: show what is armed.")
@click.option("--disarm", is_flag=True, help="Arm nothing: call off every drill of MODEL.")
@etcd_options
@output_option
def drill(
    model: str,
    code: str | None,
    kind: str | None,
    count: int,
    version: str | None,
    node: str | None,
    share: float,
    delay_ms: int,
    listing: bool,
    disarm: bool,
    etcd: EtcdOptions,
    output: OutputFormat,
) -> None:
    """Inject faults into MODEL, through the path that real ones take.

    Works on nodes started with --enable-drills only. A drill is over after --count runs; replaced
    workers, and restarts of anything but the node itself, do not end it.
    """
    if not is_model_name(model):
        raise click.BadParameter(f"no model can be called {model!r}", param_hint="MODEL")
    asks = [code is not None or kind is not None or delay_ms > 0, listing, disarm]
    if sum(asks) != 1:
        raise click.UsageError("want one of: --code or --kind or --delay-ms, --list, --disarm")
    if listing:
        work: _Work = lambda at: armed(at, model)  # noqa: E731
    elif disarm:
        work = lambda at: call_off(at, model)  # noqa: E731
    else:
        document = order(model, code, kind, count, version, share, delay_ms)
        work = lambda at: (arm(at, document),)  # noqa: E731
    replies = with_etcd_or_url(etcd, model, node, work)
    if output == "json":
        print_json({"model": model, "nodes": [reply.as_json() for reply in replies]})
    else:
        _print(replies, "nothing is armed" if not disarm else "nothing was armed")
    if any(reply.error is not None for reply in replies):
        raise click.exceptions.Exit(1)


_Work = Callable[[Address], tuple[Mapping[str, Any], ...]]
"""Asks one node; blocks, and raises `Refused`."""


def order(
    model: str,
    code: str | None,
    kind: str | None,
    count: int,
    version: str | None,
    share: float,
    delay_ms: int,
) -> dict[str, Any]:
    """The body of ``POST /admin/drill``. The node itself says what is wrong with it."""
    if code is None and kind is None and delay_ms:
        kind = "slow"
    given = {"kind": kind, "version": version, "code": code, "delay_ms": delay_ms or None}
    return {
        "model": model, "count": count, "share": share,
        **{name: value for name, value in given.items() if value is not None},
    }  # fmt: skip


def with_etcd_or_url(
    etcd: EtcdOptions, model: str, node: str | None, work: _Work
) -> tuple[Reply, ...]:
    """Ask every node at once. With a URL for a node etcd is not needed. Raises `NoNode`."""
    if node is not None and "://" in node:
        return asyncio.run(_ask_all([Address(node, node)], work))

    async def talk(connection: Connection) -> tuple[Reply, ...]:
        return await _ask_all(await _addresses(connection, model, node), work)

    return with_etcd(etcd, talk)


async def _ask_all(addresses: Sequence[Address], work: _Work) -> tuple[Reply, ...]:
    async def ask(address: Address) -> Reply:
        try:
            return Reply(address, await asyncio.to_thread(work, address))
        except Refused as exc:
            return Reply(address, error=str(exc))

    return tuple(await asyncio.gather(*map(ask, addresses)))


async def _addresses(connection: Connection, model: str, node: str | None) -> list[Address]:
    """The node asked for, or all that have the model."""
    nodes: list[NodeRecord] = []
    for kv in (await connection.store.list_prefix(connection.keys.nodes_prefix)).kvs:
        with contextlib.suppress(BadRecord):
            nodes.append(NodeRecord.from_json(kv.value))
    known = ", ".join(each.id for each in nodes) or "none"
    if node is not None:
        found = [Address(each.id, each.http) for each in nodes if each.id == node]
        if not found:
            raise NoNode(f"node {node!r} is not registered; registered: {known}")
        return found
    statuses = await connection.store.list_prefix(connection.keys.status_prefix(ModelName(model)))
    having = {kv.key.rpartition("/")[2] for kv in statuses.kvs}
    found = [Address(each.id, each.http) for each in nodes if each.id in having]
    if not found:
        raise NoNode(f"no node has a model {model!r}; registered: {known}")
    return found


# --- one node ---------------------------------------------------------------------------------


def arm(at: Address, document: Mapping[str, Any]) -> Mapping[str, Any]:
    """``POST /admin/drill``. Raises `Refused`."""
    return call(at, "POST", "", document)


def armed(at: Address, model: str) -> tuple[Mapping[str, Any], ...]:
    """The drills of ``model`` that are not over. Raises `Refused`."""
    drills = cast("list[dict[str, Any]]", call(at, "GET").get("drills", []))
    return tuple(each for each in drills if each.get("model") == model)


def call_off(at: Address, model: str) -> tuple[Mapping[str, Any], ...]:
    """End the drills of ``model`` and return them. Raises `Refused`."""
    drills = armed(at, model)
    for each in drills:
        call(at, "DELETE", f"/{urllib.parse.quote(str(each['id']))}")
    return tuple({**each, "armed": False} for each in drills)


def call(
    at: Address, method: str, path: str = "", document: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """One request to ``/admin/drill``. Blocks. Raises `Refused`."""
    url = f"{at.http.rstrip('/')}/admin/drill{path}"
    if not url.startswith(("http://", "https://")):
        raise Refused(f"{at.http}: want an http:// or https:// URL")
    data = None if document is None else json.dumps(document).encode()
    request = urllib.request.Request(
        url, data=data, method=method, headers={"Content-Type": "application/json"}
    )
    try:
        with open_node(request, timeout_s=HTTP_TIMEOUT_S) as reply:
            body: object = json.loads(reply.read())
    except BadCredential as exc:
        raise Refused(str(exc)) from exc
    except urllib.error.HTTPError as exc:
        raise Refused(_problem(exc)) from exc
    except (OSError, ValueError) as exc:
        reason = exc.reason if isinstance(exc, urllib.error.URLError) else exc
        raise Refused(f"no answer: {reason}") from exc
    if not isinstance(body, dict):
        raise Refused("the answer is not one of a Paddlewheel node")
    return body


def _problem(error: urllib.error.HTTPError) -> str:
    """The detail of an RFC 9457 body, else the status line."""
    try:
        body: object = json.loads(error.read())
    except (OSError, ValueError):
        body = None
    if isinstance(body, Mapping):
        for field in ("detail", "error", "title"):
            if body.get(field):
                return f"{body[field]} (HTTP {error.code})"
    return f"HTTP {error.code} {error.reason}"


def _print(replies: Sequence[Reply], empty: str) -> None:
    rows: list[list[object]] = []
    for reply in replies:
        if reply.error is not None:
            rows.append([reply.address.node, cell("refused", "red"), "", "", "", reply.error])
        for each in reply.drills:
            state = cell("armed", "yellow") if each.get("armed") else cell("off", "green")
            left = f"{each.get('left', '-')} of {each.get('count', '-')}"
            rows.append(
                [reply.address.node, state, each.get("id"), each.get("version"), left, _what(each)]
            )
    print_table(["NODE", "STATE", "DRILL", "VERSION", "LEFT", "WHAT"], rows, empty=empty)


def _what(each: Mapping[str, Any]) -> str:
    """``code 700``, ``crash SIGSEGV``, ``slow, 200 ms later, of 10 %``."""
    text = " ".join(str(each[name]) for name in ("kind", "code") if each.get(name))
    if each.get("delay_ms"):
        text += f", {each['delay_ms']} ms later"
    share = each.get("share", 1.0)
    return text if share == 1.0 else f"{text}, of {share:.0%}"
