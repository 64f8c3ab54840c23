"""Connections: listening, limits on what clients may do to us, and closing in good order."""

from __future__ import annotations

import asyncio
import ssl
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import orjson
import structlog
from aiohttp import web
from aiohttp.http_exceptions import LineTooLong
from aiohttp.web_protocol import RequestHandler

log = structlog.get_logger()

Handler = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]

HEAD_S = 20.0
"""A new connection that has not sent one whole request head by then is closed; a later head gets
as long from its first byte on."""
SEND_S = 60.0
"""A client that takes nothing of its answer for so long is given up. (Under TLS the loop's own
buffer hides that from us; there `KEEPALIVE_S` and the end of TLS bound it.)"""
KEEPALIVE_S = 75.0
"""So is one that sends nothing, or only half a head, this long after an answer."""

_OPTIONS: dict[str, Any] = {
    "access_log": None,
    "auto_decompress": False,
    "keepalive_timeout": KEEPALIVE_S,
    "lingering_time": 5.0,
    "max_line_size": 8190,
    "max_field_size": 16_380,
    "read_bufsize": 256 * 1024,
}
_CLOSING_S = 0.5
_LOOK_S = 0.02
HANDSHAKE_S = 10.0


@dataclass(slots=True)
class ConnectionLimits:
    """What one client may do to us, for the connections to come; whoever owns it may change it."""

    head_timeout_s: float = HEAD_S
    send_timeout_s: float = SEND_S
    per_client: int | None = None
    """Connections from one address at a time."""
    open: Counter[str] = field(default_factory=Counter[str])


class _Connection(RequestHandler):
    """One client. Closed when a request's head is not here in time."""

    limits: ConnectionLimits
    _head: asyncio.TimerHandle | None = None
    """Runs while a head is awaited that has begun, or is the first."""
    _unread: asyncio.TimerHandle | None = None
    """Runs while the client leaves more of an answer unread than the transport likes to hold."""
    _address: str | None = None
    """As it was counted in ``limits.open``."""
    is_last_request = False
    """Whether the connection ends with what is under way."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        limits = self.limits
        if limits.per_client is not None:
            peer = transport.get_extra_info("peername")
            address = str(peer[0]) if peer else ""
            if limits.open[address] >= limits.per_client:
                self.force_close()
                return
            limits.open[address] += 1
            self._address = address
        self._expect_head()

    def connection_lost(self, exc: BaseException | None) -> None:
        if self._address is not None:
            left = self.limits.open[self._address] - 1
            if left > 0:
                self.limits.open[self._address] = left
            else:
                del self.limits.open[self._address]
            self._address = None
        self.head_is_here()
        self._is_read()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        waiter = self._waiter
        if self._head is None and waiter is not None and not waiter.done():
            self._expect_head()  # idle until now, and no whole head in it: a part of one

    def finish(self) -> None:
        """Close when idle, else after the request under way.

        aiohttp's own ``close`` and ``shutdown`` drop what still comes of that request's body.
        """
        self.is_last_request = True
        if self._waiter is not None and not self._waiter.done():
            self.force_close()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._is_read()
        self._watch_reading(None)

    def resume_writing(self) -> None:
        self._is_read()
        super().resume_writing()

    def _is_read(self) -> None:
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None

    def _watch_reading(self, left_bytes: int | None) -> None:
        """Look now and then whether the client took something; ``left_bytes`` at the last look."""
        self._unread = None
        transport = self.transport
        if transport is None:
            return
        left = transport.get_write_buffer_size()
        if left_bytes is not None and left >= left_bytes:
            transport.abort()  # closing would wait for the client to read
            return
        loop = asyncio.get_running_loop()
        self._unread = loop.call_later(self.limits.send_timeout_s, self._watch_reading, left)

    def head_is_here(self) -> None:
        if self._head is not None:
            self._head.cancel()
            self._head = None

    def _expect_head(self) -> None:
        loop = asyncio.get_running_loop()
        self._head = loop.call_later(self.limits.head_timeout_s, self._close_if_late)

    def _close_if_late(self) -> None:
        self._head = None
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            self.force_close()

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """Answer what is not HTTP, or broke the handler, in the shape of all our errors."""
        if status >= 500:
            log.error("connection_failed", error=repr(exc))
        if request.writer.output_size > 0:
            raise ConnectionError("the answer has begun already")
        if isinstance(exc, LineTooLong):
            return _error_response(431, "the request's head is too large")
        # The parser's own text shows the bytes it stumbled over, over several lines.
        text = (message or "bad request").strip() if status < 500 else "internal error"
        return _error_response(status, text.partition("\n")[0].rstrip(" :"))


class _Server(web.Server):
    limits: ConnectionLimits

    def __call__(self) -> RequestHandler:
        connection = _Connection(self, loop=asyncio.get_running_loop(), **_OPTIONS)
        connection.limits = self.limits
        return connection


def _error_response(status: int, text: str) -> web.Response:
    response = web.Response(
        status=status, body=orjson.dumps({"error": text}), content_type="application/json"
    )
    response.force_close()
    return response


class HttpServer:
    """A listening socket in front of one handler. Not restartable."""

    def __init__(self, handler: Handler, *, limits: ConnectionLimits | None = None) -> None:
        async def spoken(request: web.BaseRequest) -> web.StreamResponse:
            connection = request.protocol
            assert isinstance(connection, _Connection)
            connection.head_is_here()
            response = await handler(request)
            if connection.is_last_request:
                response.force_close()
            return response

        # A client that goes away cancels its request, and with it the wait in the queue.
        self._server = _Server(spoken, handler_cancellation=True)
        self._server.limits = limits or ConnectionLimits()
        self._listener: asyncio.Server | None = None

    async def start(self, host: str, port: int, *, tls: ssl.SSLContext | None = None) -> str:
        """Listen and return ``http://host:port``, ``https`` where ``tls`` is given.

        Port 0 takes a free one. Raises `OSError`.
        """
        loop = asyncio.get_running_loop()
        if tls is None:
            self._listener = await loop.create_server(self._server, host, port, backlog=1024)
        else:
            self._listener = await loop.create_server(
                self._server, host, port, backlog=1024, ssl=tls, ssl_handshake_timeout=HANDSHAKE_S
            )
        taken: int = self._listener.sockets[0].getsockname()[1]
        scheme = "http" if tls is None else "https"
        return f"{scheme}://[{host}]:{taken}" if ":" in host else f"{scheme}://{host}:{taken}"

    async def stop(self, *, drain_s: float) -> None:
        """Stop accepting, let what is under way finish for up to ``drain_s``, then close."""
        if self._listener is not None:
            self._listener.close()
        await asyncio.sleep(0)  # what was accepted in this turn starts before idle ones close
        until_s = asyncio.get_running_loop().time() + drain_s
        while connections := self._server.connections:
            for connection in connections:
                if isinstance(connection, _Connection):
                    connection.finish()  # again and again: one may just have been made
            if asyncio.get_running_loop().time() >= until_s:
                break
            await asyncio.sleep(_LOOK_S)
        await self._server.shutdown(_CLOSING_S)
