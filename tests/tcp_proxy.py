"""A TCP proxy whose connections can be cut, limited or silenced."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class TcpProxy:
    """Listens on a free loopback port and passes everything to ``target_port``."""

    def __init__(self, target_port: int) -> None:
        self.port = 0
        self.connections = 0
        self.is_open = True
        """When False new connections are refused by closing them at once."""
        self.down_limit_bytes: int | None = None
        """Each connection is cut after so many bytes towards the client."""
        self.passes = asyncio.Event()
        """Cleared: bytes are kept back, connections stay open, as with a dead network."""
        self.passes.set()
        self.up_delay_s = 0.0
        """Before the first bytes of each connection go on."""
        self._target_port = target_port
        self._open: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    def cut(self) -> None:
        """Close every connection now."""
        for writer in list(self._open):
            writer.transport.abort()

    def refuse(self) -> None:
        self.is_open = False
        self.cut()

    async def serve(self, client: asyncio.StreamReader, answer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self._open.add(answer)
        try:
            if not self.is_open:
                return
            server, ask = await asyncio.open_connection("127.0.0.1", self._target_port)
            self._open.add(ask)
            pumps = [
                asyncio.create_task(self._pump(client, ask, None)),
                asyncio.create_task(self._pump(server, answer, self.down_limit_bytes)),
            ]
            self._tasks.update(pumps)
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
            for pump in pumps:
                pump.cancel()
            ask.transport.abort()
            self._open.discard(ask)
        except OSError:
            return
        finally:
            answer.transport.abort()
            self._open.discard(answer)

    async def _pump(
        self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, limit_bytes: int | None
    ) -> None:
        passed_bytes = 0
        try:
            if limit_bytes is None and self.up_delay_s:
                await asyncio.sleep(self.up_delay_s)
            while data := await source.read(16384):
                await self.passes.wait()
                if limit_bytes is not None and passed_bytes + len(data) > limit_bytes:
                    return
                passed_bytes += len(data)
                sink.write(data)
                await sink.drain()
        except OSError:
            return

    async def close(self) -> None:
        self.cut()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


@asynccontextmanager
async def tcp_proxy(target_port: int) -> AsyncIterator[TcpProxy]:
    proxy = TcpProxy(target_port)
    server = await asyncio.start_server(proxy.serve, "127.0.0.1", 0)
    proxy.port = server.sockets[0].getsockname()[1]
    try:
        yield proxy
    finally:
        server.close()
        await proxy.close()
