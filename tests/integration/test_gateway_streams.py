"""Bodies that pass a gateway as streams, when the node that takes them fails."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import aiohttp
import pytest

from tests.eventually import eventually
from tests.fleets import M
from tests.gateways import Gateway, Script, gateway, raw_node, reset, silence

KEEP = 100_000
PIECE = bytes(range(256)) * 40
"""10 kB, so that a piece out of its place is seen."""


async def read_body(head: bytes, reader: asyncio.StreamReader) -> bytes:
    lower = head.lower()
    if b"transfer-encoding: chunked" not in lower:
        length = next(
            int(line.partition(b":")[2])
            for line in lower.split(b"\r\n")
            if line.startswith(b"content-length:")
        )
        return await reader.readexactly(length)
    body = b""
    while size := int(await reader.readline(), 16):
        body += await reader.readexactly(size)
        await reader.readexactly(2)
    await reader.readexactly(2)
    return body


class Echo:
    """Answers, and keeps what it got."""

    def __init__(self) -> None:
        self.got: list[bytes] = []

    async def __call__(
        self, head: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self.got.append(await read_body(head, reader))
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")


def dies_after(count: int) -> Script:
    """Take so many bytes and reset the connection."""

    async def script(
        head: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        await reader.readexactly(count)
        writer.transport.abort()

    return script


async def pieces(
    count: int, *, pause_after: int = -1, go_on: asyncio.Event
) -> AsyncIterator[bytes]:
    for number in range(count):
        if number == pause_after:
            await go_on.wait()
        yield PIECE


async def post(
    gw: Gateway, count: int, *, chunked: bool = True, pause_after: int = -1,
    go_on: asyncio.Event | None = None,
) -> tuple[int, bytes]:  # fmt: skip
    headers = {} if chunked else {"Content-Length": str(count * len(PIECE))}
    data = pieces(count, pause_after=pause_after, go_on=go_on or asyncio.Event())
    async with (
        aiohttp.ClientSession() as session,
        session.post(f"{gw.url}/v2/models/{M}/infer", data=data, headers=headers) as answer,
    ):
        return answer.status, await answer.read()


def ask_first(gw: Gateway, failing: str) -> None:
    """Have the next request go to ``failing`` first: every other node is busier."""
    for node, upstream in gw.rotation.upstreams.items():
        upstream.in_flight = 0 if node == failing else 50


def settle(gw: Gateway) -> None:
    for node, upstream in gw.rotation.upstreams.items():
        upstream.in_flight -= 0 if node == "a" else 50


@pytest.mark.parametrize("chunked", [True, False])
@pytest.mark.parametrize("died_after", [0, 1, 60_000])
async def test_what_passed_is_still_here(chunked: bool, died_after: int) -> None:
    """A small body without a length, too, which many clients send."""
    echo = Echo()
    async with (
        raw_node(dies_after(died_after)) as a,
        raw_node(echo) as b,
        gateway({"a": a.url, "b": b.url}) as gw,
    ):
        gw.rotation.tuning.replay_max_bytes = KEEP
        ask_first(gw, "a")
        paused = asyncio.Event()
        asking = asyncio.create_task(post(gw, 20, chunked=chunked, pause_after=7, go_on=paused))
        await eventually(lambda: len(b.heads) == 1, within_s=5, what="asked the other one")
        paused.set()  # while it is dead, the client has sent no more than we keep
        assert (await asking)[0] == 200
        settle(gw)
    assert echo.got == [PIECE * 20]
    assert len(a.heads) == 1


async def test_what_passed_is_gone() -> None:
    echo = Echo()
    async with (
        raw_node(dies_after(KEEP + 50_000)) as a,
        raw_node(echo) as b,
        gateway({"a": a.url, "b": b.url}) as gw,
    ):
        gw.rotation.tuning.replay_max_bytes = KEEP
        ask_first(gw, "a")
        status, body = await post(gw, 200)
        assert status == 503, body
        settle(gw)
    assert not b.heads


async def test_a_node_falls_silent_under_an_upload() -> None:
    """Its probes tell; that is no slow client."""
    echo = Echo()
    async with (
        raw_node(silence) as a,
        raw_node(echo) as b,
        gateway({"a": a.url, "b": b.url}) as gw,
    ):
        gw.rotation.tuning.replay_max_bytes = KEEP
        ask_first(gw, "a")
        go_on = asyncio.Event()
        asking = asyncio.create_task(post(gw, 9, pause_after=5, go_on=go_on))
        await eventually(lambda: len(a.heads) == 1, within_s=5)
        gw.rotation.upstreams["a"].abandon()  # type: ignore[index]
        await eventually(lambda: len(b.heads) == 1, within_s=5)
        go_on.set()
        assert (await asking)[0] == 200
        settle(gw)
    assert echo.got == [PIECE * 9]


async def test_nobody_takes_it() -> None:
    async with (
        raw_node(reset) as a,
        raw_node(dies_after(1)) as b,
        gateway({"a": a.url, "b": b.url}) as gw,
    ):
        status, body = await post(gw, 3)
    assert status == 503, body
