"""A gateway's front door in this process, over nodes in this process or servers that misbehave."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import orjson

from registry.names import ModelName, Revision
from registry.spec import ModelDocument, parse_model
from router.fleet.members import Fleet
from router.gateway_app import GatewayApp
from router.ports import Health
from router.rotation import Rotation
from tests.fleets import M, fold, node_record, put, status

REVISION = Revision(10)


def document(model: ModelName = M, **spec: Any) -> ModelDocument:
    versions = [{"version": v, "source": f"/models/{v}"} for v in ("1", "2")]
    return parse_model(
        orjson.dumps(
            {
                "apiVersion": "paddlewheel/v1",
                "kind": "Model",
                "metadata": {"name": model},
                "spec": {"live": "1", "versions": versions, **spec},
            }
        ),
        name=model,
    )


def fleet_at(
    nodes: Mapping[str, str], said: Mapping[str, Mapping[str, Any]] | None = None
) -> Fleet:
    """nodes: id to URL. said: more of the status of some of them."""
    given = said or {}
    return fold(
        event
        for node, url in nodes.items()
        for event in (
            put(node_record(node, http=url)), put(status(node, **given.get(node, {})))
        )
    )  # fmt: skip


@dataclass
class Gateway:
    rotation: Rotation
    app: GatewayApp
    url: str
    suspected: list[str] = field(default_factory=list[str])


@contextlib.asynccontextmanager
async def gateway(
    nodes: Mapping[str, str],
    *,
    said: Mapping[str, Mapping[str, Any]] | None = None,
    **spec: Any,
) -> AsyncGenerator[Gateway]:
    suspected: list[str] = []
    rotation = Rotation(on_suspect=suspected.append)
    rotation.publish(fleet_at(nodes, said), {M: {REVISION: document(**spec)}})
    app = GatewayApp(
        rotation,
        product_version="1.2.3",
        read_health=lambda: Health(ready=True, started=True, live=True),
    )
    url = await app.start()
    try:
        yield Gateway(rotation, app, url, suspected)
        assert all(upstream.in_flight == 0 for upstream in rotation.upstreams.values())
    finally:
        await app.stop(drain_s=1)
        rotation.close()


Script = Callable[[bytes, asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@dataclass
class RawNode:
    """Reads requests and does with the connection what ``script`` says; counts."""

    script: Script
    url: str = ""
    heads: list[bytes] = field(default_factory=list[bytes])
    connections: int = 0


@contextlib.asynccontextmanager
async def raw_node(script: Script) -> AsyncGenerator[RawNode]:
    """script: called for each request with its head (the body is left to read)."""
    node = RawNode(script)
    open_writers: set[asyncio.StreamWriter] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        node.connections += 1
        open_writers.add(writer)
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            while not writer.is_closing():
                head = await reader.readuntil(b"\r\n\r\n")
                node.heads.append(head)
                await node.script(head, reader, writer)
        open_writers.discard(writer)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    node.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield node
    finally:
        server.close()
        for writer in open_writers:
            writer.close()


def answer(status_line: str = "200 OK", body: bytes = b"{}", **headers: str) -> Script:
    """Read the body, and answer this."""

    async def script(
        head: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        await read_request_body(head, reader)
        shown = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items())
        text = f"HTTP/1.1 {status_line}\r\nContent-Length: {len(body)}\r\n{shown}\r\n"
        writer.write(text.encode() + body)

    return script


async def read_request_body(head: bytes, reader: asyncio.StreamReader) -> bytes:
    for line in head.lower().split(b"\r\n"):
        if line.startswith(b"content-length:"):
            return await reader.readexactly(int(line.partition(b":")[2]))
    return b""


async def reset(head: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Take the request and end the connection."""
    await read_request_body(head, reader)
    writer.transport.abort()


async def silence(head: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Take the request, and never answer."""
    await reader.read()
    writer.close()
