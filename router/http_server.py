"""Connections: listening, limits on what clients may do to us, and closing in good order."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import orjson
import structlog
from aiohttp import web
from aiohttp.web_protocol import RequestHandler

log = structlog.get_logger()

Handler = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]

FIRST_REQUEST_S = 20.0
"""A new connection that has not sent one whole request head by then is closed."""
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


class _Connection(RequestHandler):
    """One client. Closed when its first request's head is not here in time."""

    has_spoken = False
    _silence: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        loop = asyncio.get_running_loop()
        self._silence = loop.call_later(FIRST_REQUEST_S, self._close_if_silent)

    def connection_lost(self, exc: BaseException | None) -> None:
        if self._silence is not None:
            self._silence.cancel()
        super().connection_lost(exc)

    def _close_if_silent(self) -> None:
        self._silence = None
        if not self.has_spoken:
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
        text = (message or "bad request").strip() if status < 500 else "internal error"
        return _error_response(status, text)


class _Server(web.Server):
    def __call__(self) -> RequestHandler:
        return _Connection(self, loop=asyncio.get_running_loop(), **_OPTIONS)


def _error_response(status: int, text: str) -> web.Response:
    response = web.Response(
        status=status, body=orjson.dumps({"error": text}), content_type="application/json"
    )
    response.force_close()
    return response


class HttpServer:
    """A listening socket in front of one handler. Not restartable."""

    def __init__(self, handler: Handler) -> None:
        async def spoken(request: web.BaseRequest) -> web.StreamResponse:
            request.protocol.has_spoken = True  # type: ignore[attr-defined]
            return await handler(request)

        # A client that goes away cancels its request, and with it the wait in the queue.
        self._server = _Server(spoken, handler_cancellation=True)
        self._listener: asyncio.Server | None = None

    async def start(self, host: str, port: int) -> str:
        """Listen and return ``http://host:port``; port 0 takes a free one. Raises `OSError`."""
        loop = asyncio.get_running_loop()
        self._listener = await loop.create_server(self._server, host, port, backlog=1024)
        taken: int = self._listener.sockets[0].getsockname()[1]
        return f"http://[{host}]:{taken}" if ":" in host else f"http://{host}:{taken}"

    async def stop(self, *, drain_s: float) -> None:
        """Stop accepting, let what is under way finish for up to ``drain_s``, then close."""
        if self._listener is not None:
            self._listener.close()
        await asyncio.sleep(0)  # what was accepted in this turn starts before idle ones close
        self._server.pre_shutdown()
        try:
            async with asyncio.timeout(drain_s + _CLOSING_S):
                await self._server.shutdown(drain_s)
        except TimeoutError:
            await self._server.shutdown(_CLOSING_S)
