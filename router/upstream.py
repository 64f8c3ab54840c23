"""One node as a proxy sees it: a pool of connections, and single exchanges over them.

aiohttp's own client protocol (its C parser, flow control) without its session: a proxy has the
request's head and body as bytes already, and a session's URL, cookie, redirect and header
machinery would cost more than everything else here together (docs/decisions/0010).
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator
from dataclasses import dataclass

from aiohttp import ClientError, StreamReader
from aiohttp.client_proto import ResponseHandler
from aiohttp.http import RawResponseMessage
from aiohttp.http_exceptions import HttpProcessingError

from registry.names import NodeId
from router.errors import RouterError

IDLE_MAX = 200
"""Connections kept for later."""
IDLE_S = 60.0
"""For so long. Nodes close theirs after 75 s (`router.http_server`): whoever closes first decides
whether a request can be sent into a connection that is just being closed."""
CONNECT_S = 2.0
REPLAY_MAX_BYTES = 8_000_000
_READ_BYTES = 256 * 1024
_HEAD_BYTES_MAX = 32_768


@dataclass(slots=True)
class Tuning:
    """What all of a gateway's connections have in common; whoever owns it may change it."""

    connect_s: float = CONNECT_S
    idle_max: int = IDLE_MAX
    idle_s: float = IDLE_S
    replay_max_bytes: int = REPLAY_MAX_BYTES
    """A larger body passes as a stream; its request cannot be run again once part of it went."""
    retries: bool = True
    """Whether what failed on one node is run again on another."""


class UpstreamFailed(RouterError):
    """The node, or the way to it, failed before the first byte of an answer."""

    def __init__(self, node: NodeId, why: str, *, refused: bool, stale: bool) -> None:
        super().__init__(f"node {node!r}: {why}")
        self.node = node
        self.refused = refused
        """No connection could be made: the request was certainly not seen."""
        self.stale = stale
        """Over a connection that had been idle: the node may be as well as ever."""


class AnswerBroken(RouterError):
    """The answer's body broke off."""


class Exchange:
    """The answer to one request: its head at once, its body as it comes. `close` it."""

    __slots__ = ("_connection", "_upstream", "message", "payload")

    def __init__(
        self,
        upstream: Upstream,
        connection: ResponseHandler,
        message: RawResponseMessage,
        payload: StreamReader,
    ) -> None:
        self._upstream = upstream
        self._connection = connection
        self.message = message
        self.payload = payload

    @property
    def status(self) -> int:
        return self.message.code

    @property
    def is_whole(self) -> bool:
        """Whether the body is here to its end: `read` then does not wait."""
        return self.payload.is_eof()

    async def read(self) -> bytes:
        """Return what is left of the body. Raises `AnswerBroken`."""
        try:
            if self.payload.is_eof():
                return self.payload.read_nowait()
            return await self.payload.read()
        except (ClientError, HttpProcessingError, OSError) as exc:
            raise AnswerBroken(f"node {self._upstream.id!r}: the answer broke off") from exc

    async def chunk(self) -> bytes:
        """Return the next piece of the body, ``b""`` at its end. Raises `AnswerBroken`."""
        try:
            return await self.payload.readany()
        except (ClientError, HttpProcessingError, OSError) as exc:
            raise AnswerBroken(f"node {self._upstream.id!r}: the answer broke off") from exc

    def close(self) -> None:
        """Give the connection back when the body was read to its end; else end it."""
        self._upstream.release(self._connection)


class Upstream:
    """One node's connections. ``in_flight`` counts the requests that callers `claim`."""

    def __init__(
        self,
        node: NodeId,
        host: str,
        port: int,
        *,
        tls: ssl.SSLContext | None = None,
        tuning: Tuning | None = None,
    ) -> None:
        self.id = node
        self._tls = tls
        self._tuning = tuning or Tuning()
        self.in_flight = 0
        self._host = host
        self._port = port
        self._idle: deque[tuple[float, ResponseHandler]] = deque()
        """Most recently used on the right."""
        self._waiting: set[asyncio.Timeout] = set()
        self._is_closed = False

    @property
    def address(self) -> tuple[str, int]:
        return self._host, self._port

    @property
    def idle(self) -> int:
        return len(self._idle)

    def abandon(self) -> None:
        """Let everyone who waits here for the first byte of an answer stop waiting now.

        For a node that was found silent: its requests are run elsewhere rather than to their
        deadlines.
        """
        now_s = asyncio.get_running_loop().time()
        for timeout in self._waiting:
            timeout.reschedule(now_s)
        self._waiting.clear()

    async def send(
        self,
        head: bytes,
        body: bytes | AsyncIterable[bytes],
        *,
        deadline_s: float,
        is_head: bool = False,
        fresh: bool = False,
    ) -> Exchange:
        """Send one request and return once the head of the answer is here.

        head: request line and headers, the empty line after them included. body: as ``head``
        says; pieces of an iterable go out as they are.
        deadline_s: the loop's time after which nobody waits; also bounds the body's upload.
        fresh: not over a connection that has been idle.
        Raises `UpstreamFailed`, and `TimeoutError` at the deadline or when abandoned.
        """
        timeout = asyncio.timeout_at(deadline_s)
        connection: ResponseHandler | None = None
        async with timeout:
            self._waiting.add(timeout)
            try:
                connection = None if fresh else self._take()
                is_stale = connection is not None
                if connection is None:
                    connection = await self._connect(deadline_s)
                connection.set_response_params(
                    skip_payload=is_head,
                    read_until_eof=True,
                    auto_decompress=False,
                    read_bufsize=_READ_BYTES,
                    max_line_size=_HEAD_BYTES_MAX,
                    max_field_size=_HEAD_BYTES_MAX,
                )
                try:
                    if isinstance(body, bytes):
                        _write(connection, head, body)
                        message, payload = await _answer(connection)
                    else:
                        message, payload = await _upload(connection, head, body)
                except (ClientError, HttpProcessingError, OSError) as exc:
                    why = str(exc) or type(exc).__name__
                    raise UpstreamFailed(self.id, why, refused=False, stale=is_stale) from exc
            except BaseException:
                if connection is not None:
                    connection.abort()
                raise
            finally:
                self._waiting.discard(timeout)
        return Exchange(self, connection, message, payload)

    def release(self, connection: ResponseHandler) -> None:
        """Keep the connection for later where that is possible."""
        if self._is_closed or connection.should_close or not connection.is_connected():
            connection.abort()
            return
        now_s = time.monotonic()
        self._idle.append((now_s, connection))
        tuning = self._tuning
        while self._idle and (
            len(self._idle) > tuning.idle_max or self._idle[0][0] < now_s - tuning.idle_s
        ):
            self._idle.popleft()[1].close()

    def drop_idle(self) -> None:
        """Close the connections nobody uses: the node behind them is another process now."""
        while self._idle:
            self._idle.pop()[1].close()

    def close(self) -> None:
        """Close what is idle now, and the others as they come back."""
        self._is_closed = True
        self.drop_idle()

    def _take(self) -> ResponseHandler | None:
        while self._idle:
            since_s, connection = self._idle.pop()
            if connection.is_connected() and not connection.should_close:
                if time.monotonic() - since_s < self._tuning.idle_s:
                    return connection
                connection.close()
        return None

    async def _connect(self, deadline_s: float) -> ResponseHandler:
        loop = asyncio.get_running_loop()
        connect_s = self._tuning.connect_s
        try:
            async with asyncio.timeout_at(min(deadline_s, loop.time() + connect_s)):
                _, connection = await loop.create_connection(
                    lambda: ResponseHandler(loop), self._host, self._port, ssl=self._tls
                )
        except OSError as exc:  # includes TimeoutError
            why = f"no connection: {exc}" if str(exc) else f"no connection within {connect_s:g} s"
            raise UpstreamFailed(self.id, why, refused=True, stale=False) from exc
        return connection


def _write(connection: ResponseHandler, head: bytes, body: bytes) -> None:
    transport = connection.transport
    if transport is None:
        raise ConnectionResetError("closed by the node")
    if len(body) < 65_536:
        transport.write(head + body)
    else:
        transport.write(head)
        transport.write(body)


async def _answer(connection: ResponseHandler) -> tuple[RawResponseMessage, StreamReader]:
    while True:
        message, payload = await connection.read()
        if message.code >= 200:
            return message, payload


async def _upload(
    connection: ResponseHandler, head: bytes, body: AsyncIterable[bytes]
) -> tuple[RawResponseMessage, StreamReader]:
    """Send piece by piece; a node that answers before the end (413), or ends, is listened to."""
    answer = asyncio.ensure_future(_answer(connection))
    pieces = aiter(body)
    try:
        _write(connection, head, b"")
        while piece := await _next_unless(answer, pieces):
            _write(connection, piece, b"")
            await connection._drain_helper()  # pyright: ignore[reportPrivateUsage]
        if piece is None:
            connection.force_close()  # the rest of the body will never be sent
        return await answer
    except OSError:
        if answer.done() and not answer.cancelled() and answer.exception() is None:
            connection.force_close()
            return answer.result()
        raise
    finally:
        if isinstance(pieces, AsyncGenerator):
            await pieces.aclose()
        if not answer.done():
            answer.cancel()
        elif not answer.cancelled():
            answer.exception()  # looked at: it is this exchange's failure already


async def _next_unless(
    answer: asyncio.Future[tuple[RawResponseMessage, StreamReader]], pieces: AsyncIterator[bytes]
) -> bytes | None:
    """The next piece, ``b""`` at their end; ``None`` when there is an answer, or no node, first."""
    if answer.done():
        return None
    piece = asyncio.ensure_future(anext(pieces, b""))
    try:
        await asyncio.wait((piece, answer), return_when=asyncio.FIRST_COMPLETED)
        return piece.result() if piece.done() else None
    finally:
        if not piece.done():
            piece.cancel()
            await asyncio.wait((piece,))  # before anybody else asks for a piece
