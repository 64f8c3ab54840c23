"""What is under way when a server stops is finished, uploads too; what is idle is closed."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field

import pytest
from aiohttp import web

from router.http_server import HttpServer
from tests.eventually import eventually

SLOW_S = 0.3


@dataclass
class World:
    port: int
    server: HttpServer
    asked: list[str] = field(default_factory=list[str])

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection("127.0.0.1", self.port)

    async def until_asked(self, count: int = 1) -> None:
        await eventually(lambda: len(self.asked) == count, within_s=2)


@contextlib.asynccontextmanager
async def served() -> AsyncGenerator[World]:
    """``/body`` says how long the body was, ``/slow`` answers late, ``/never`` does not."""
    asked: list[str] = []

    async def handle(request: web.BaseRequest) -> web.StreamResponse:
        asked.append(request.path)
        if request.path == "/slow":
            await asyncio.sleep(SLOW_S)
        if request.path == "/never":
            await asyncio.Event().wait()
        return web.Response(text=f"{len(await request.read())} bytes")

    server = HttpServer(handle)
    url = await server.start("127.0.0.1", 0)
    try:
        yield World(int(url.rpartition(":")[2]), server, asked)
    finally:
        await server.stop(drain_s=0)


def head(path: str, length: int) -> bytes:
    return f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n\r\n".encode()


@pytest.mark.parametrize("length", [20, 900_000])
async def test_an_upload_is_finished(length: int) -> None:
    async with served() as world:
        reader, writer = await world.connect()
        writer.write(head("/body", length) + b"x" * 10)
        await world.until_asked()
        stopping = asyncio.create_task(world.server.stop(drain_s=10))
        for _ in range(3):
            await asyncio.sleep(0.03)
        assert not stopping.done()
        writer.write(b"x" * (length - 10))
        answer = await asyncio.wait_for(reader.read(), 3)
        assert answer.startswith(b"HTTP/1.1 200")
        assert b"Connection: close" in answer
        assert answer.endswith(b"%d bytes" % length)
        writer.close()
        await asyncio.wait_for(stopping, 1)


async def test_an_answer_is_finished() -> None:
    async with served() as world:
        reader, writer = await world.connect()
        writer.write(head("/slow", 0))
        await world.until_asked()
        await asyncio.wait_for(world.server.stop(drain_s=10), SLOW_S + 1)
        assert b"200 OK" in await reader.read()
        writer.close()


async def test_what_is_idle_is_closed_at_once() -> None:
    async with served() as world:
        fresh, _ = await world.connect()
        used, writer = await world.connect()
        writer.write(head("/body", 0))
        assert b"0 bytes" in await used.readuntil(b"bytes")
        began_s = asyncio.get_running_loop().time()
        await world.server.stop(drain_s=10)
        assert asyncio.get_running_loop().time() - began_s < 0.5
        assert await fresh.read() == await used.read() == b""


async def test_nobody_connects_any_more() -> None:
    async with served() as world:
        _, writer = await world.connect()
        writer.write(head("/slow", 0))
        await world.until_asked()
        stopping = asyncio.create_task(world.server.stop(drain_s=10))
        await asyncio.sleep(0.05)
        with pytest.raises(ConnectionRefusedError):
            await world.connect()
        await stopping
        writer.close()


@pytest.mark.parametrize("body", [b"", b"x" * 10])
async def test_what_does_not_end_is_cut_off(body: bytes) -> None:
    """A handler that hangs, a client that sends no more."""
    async with served() as world:
        reader, writer = await world.connect()
        writer.write(head("/body", 20) + body if body else head("/never", 0))
        await world.until_asked()
        await asyncio.wait_for(world.server.stop(drain_s=0.2), 3)
        assert await asyncio.wait_for(reader.read(), 1) == b""
        writer.close()
