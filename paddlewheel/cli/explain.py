"""`paddlewheel explain`: ask a node how it would route a request with these headers, and why."""

from __future__ import annotations

import contextlib
import json
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from typing import Any

import click

from paddlewheel.cli.connection import Connection, with_etcd
from paddlewheel.cli.node_http import BadCredential, open_node
from paddlewheel.cli.options import OutputFormat, output_option
from paddlewheel.cli.output import print_json, print_pairs
from paddlewheel.etcd_options import EtcdOptions, etcd_options
from registry.errors import PaddlewheelError
from registry.names import ModelName
from registry.records import BadRecord, NodeRecord

HTTP_TIMEOUT_S = 5.0


class NoNode(PaddlewheelError):
    """No node to ask, or none that answers."""


class NodeRefused(PaddlewheelError):
    """The node answered with an error: the model is not known there, for instance."""


@click.command()
@click.argument("model")
@click.option(
    "-H",
    "--header",
    "headers",
    multiple=True,
    metavar="'K: V'",
    help="A header of the request. May be given several times.",
)
@click.option(
    "--node", metavar="ID|URL", help="Which node to ask.  [one that has the model loaded]"
)
@etcd_options
@output_option
def explain(
    model: str, headers: tuple[str, ...], node: str | None, etcd: EtcdOptions, output: OutputFormat
) -> None:
    """Say which version of MODEL a request with these headers gets, and by which rule.

    The node itself answers, so it is its routing table of this moment. With --node URL etcd is
    not needed.
    """
    pairs = [_header(each) for each in headers]
    if node is not None and "://" in node:
        answer = ask(node, model, pairs)
    else:
        answer = _ask_any(with_etcd(etcd, lambda conn: _addresses(conn, model, node)), model, pairs)
    if output == "json":
        print_json(answer)
        return
    rule = answer.get("rule")
    shown = (
        "-" if rule is None else f"{rule.get('kind')} #{rule.get('index')}: {rule.get('detail')}"
    )
    rows = [
        ("model", answer.get("model")),
        ("version", answer.get("version")),
        ("route", answer.get("route")),
        ("rule", shown),
        ("bucket", "-" if answer.get("bucket") is None else f"{answer['bucket']} of 10000"),
        ("by chance", _chance(answer)),
        ("config revision", answer.get("config_revision")),
    ]
    if answer.get("reason"):
        rows.append(("because", answer["reason"]))
    taken_out = answer.get("unavailable")
    if isinstance(taken_out, Mapping):
        rows += [(f"not {version}", why) for version, why in sorted(taken_out.items())]
    print_pairs(rows)


def _chance(answer: Mapping[str, Any]) -> str:
    """What chance would do to such requests: the answer above is that of the unlucky."""
    percent = answer.get("canary_percent")
    if not isinstance(percent, int | float) or not 0 < percent < 100:
        return "no"
    return f"{percent:g} % of such requests go to the canary"


def _header(text: str) -> tuple[str, str]:
    name, colon, value = text.partition(":")
    if not colon or not name.strip():
        raise click.BadParameter(f"want 'Name: value', got {text!r}", param_hint="-H")
    return name.strip(), value.strip()


async def _addresses(connection: Connection, model: str, node: str | None) -> list[str]:
    """The nodes' HTTP addresses, those that have the model first."""
    nodes: list[NodeRecord] = []
    for kv in (await connection.store.list_prefix(connection.keys.nodes_prefix)).kvs:
        with contextlib.suppress(BadRecord):
            nodes.append(NodeRecord.from_json(kv.value))
    if node is not None:
        found = [each.http for each in nodes if each.id == node]
        if not found:
            known = ", ".join(each.id for each in nodes) or "none"
            raise NoNode(f"node {node!r} is not registered; registered: {known}")
        return found
    statuses = await connection.store.list_prefix(connection.keys.status_prefix(ModelName(model)))
    having = {kv.key.rpartition("/")[2] for kv in statuses.kvs}
    nodes.sort(key=lambda each: (each.id not in having, each.draining))
    return [each.http for each in nodes]


def _ask_any(addresses: list[str], model: str, headers: list[tuple[str, str]]) -> dict[str, Any]:
    """The first node that can be reached answers. Raises `NoNode` or `NodeRefused`."""
    problems: list[str] = []
    for address in addresses:
        try:
            return ask(address, model, headers)
        except NoNode as exc:
            problems.append(str(exc))
    raise NoNode("; ".join(problems) or "no node is registered")


def ask(base: str, model: str, headers: list[tuple[str, str]]) -> dict[str, Any]:
    """``GET /admin/explain`` on one node. Raises `NoNode`, `NodeRefused`."""
    query = [("model", model), *(("header", f"{name}:{value}") for name, value in headers)]
    url = f"{base.rstrip('/')}/admin/explain?{urllib.parse.urlencode(query)}"
    if not url.startswith(("http://", "https://")):
        raise NoNode(f"{base}: want an http:// or https:// URL")
    try:
        with open_node(urllib.request.Request(url), timeout_s=HTTP_TIMEOUT_S) as reply:
            body: object = json.loads(reply.read())
    except BadCredential as exc:
        raise NodeRefused(str(exc)) from exc
    except urllib.error.HTTPError as exc:
        raise NodeRefused(f"{base}: {_problem(exc)}") from exc
    except (OSError, ValueError) as exc:
        reason = exc.reason if isinstance(exc, urllib.error.URLError) else exc
        raise NoNode(f"{base}: no answer: {reason}") from exc
    if not isinstance(body, dict):
        raise NoNode(f"{base}: the answer is not one of a Paddlewheel node")
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
