"""One request through the gateway: to a node, and once more to another where that one failed.

Inference has no side effects, so a request may be run again; a client sees an answer, not the
node's death. The answer's first byte to the client ends that.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass

import structlog
from aiohttp import StreamReader, web
from aiohttp.http_exceptions import HttpProcessingError

from registry.inference import DeadlineExceeded, Overloaded
from registry.names import ModelName, NodeId, Revision
from router.deadline import TIMEOUT_HEADER, show_timeout_ms
from router.errors import BadRequest, BodyTooLarge, NothingServes, SlowUpload
from router.fleet.selection import Want
from router.floor import FLOOR_HEADER, REVISION_HEADER, ROLLOUT_HEADER
from router.http_body import UPLOAD_TIMEOUT_S
from router.rotation import Rotation
from router.table import NO_REVISION
from router.upstream import AnswerBroken, Exchange, Upstream, UpstreamFailed

log = structlog.get_logger(__name__)

ANSWER_MAX_BYTES = 2**20
"""A larger answer passes as a stream; a smaller one is here whole before its first byte goes."""
GRACE_S = 0.25
"""For the node's own 504, which says more than ours."""
RETRY_AFTER_S = 1.0
LOST_MAX = 2
"""How often a request may be lost with its node, or by its silence, and run again."""
AGAIN = frozenset({404, 503})
"""Answers that another node may give otherwise: this one has no such version, or no room."""
_NODE_FAULTS = frozenset({500})

HOP_BY_HOP = frozenset(
    (
        b"connection", b"keep-alive", b"proxy-authenticate", b"proxy-authorization",
        b"proxy-connection", b"te", b"trailer", b"transfer-encoding", b"upgrade", b"expect",
        b"content-length",
    )
)  # fmt: skip
"""Headers about one connection, and those that we say ourselves."""
_OURS = frozenset((TIMEOUT_HEADER.lower().encode(), FLOOR_HEADER.lower().encode(), b"x-request-id"))


class StreamedBody:
    """A body that passes piece by piece.

    What passed is kept up to ``keep_bytes``; until then it can be sent from its start again, to
    another node.
    """

    def __init__(
        self,
        content: StreamReader,
        limit_bytes: int,
        *,
        chunked: bool,
        keep_bytes: int,
        timeout_s: float = UPLOAD_TIMEOUT_S,
    ) -> None:
        self.timeout_s = timeout_s
        self._content = content
        self._limit_bytes = limit_bytes
        self._chunked = chunked
        self._keep_bytes = keep_bytes
        self._kept: list[bytes] | None = []
        self._size = 0
        self.ended = False

    @property
    def can_replay(self) -> bool:
        """Whether all that was taken from the client is still here."""
        return self._kept is not None

    async def __aiter__(self) -> AsyncIterator[bytes]:
        """From the body's start. Raises `BadRequest`, `BodyTooLarge`."""
        for piece in [*(self._kept or ())]:
            yield self._framed(piece)
        while not self.ended:
            try:
                piece = await self._content.readany()
            except (web.RequestPayloadError, HttpProcessingError) as exc:
                raise BadRequest(f"the body broke off: {exc}") from exc
            if not piece:
                self.ended = True
                break
            self._size += len(piece)
            if self._size > self._limit_bytes:
                raise too_large(self._limit_bytes)
            if self._kept is not None:
                self._kept.append(piece)
                if self._size > self._keep_bytes:
                    self._kept = None
            yield self._framed(piece)
        if self._chunked:
            yield b"0\r\n\r\n"

    def _framed(self, piece: bytes) -> bytes:
        return b"%x\r\n%b\r\n" % (len(piece), piece) if self._chunked else piece


Body = bytes | StreamedBody


def too_large(limit_bytes: int) -> BodyTooLarge:
    return BodyTooLarge(f"the body is over {limit_bytes / 1e6:g} MB (limits.max_body_mb)")


async def take_body(
    request: web.BaseRequest,
    limit_bytes: int,
    *,
    replay_max_bytes: int,
    timeout_s: float | None = None,
) -> Body:
    """Return the body as it was sent, packed or not: whole where it is small, else as a stream.

    Raises `BodyTooLarge`, `BadRequest`, `SlowUpload`.
    """
    timeout_s = timeout_s or UPLOAD_TIMEOUT_S
    content, length = request.content, request.content_length
    if length is not None and length > limit_bytes:
        raise too_large(limit_bytes)
    if "Expect" in request.headers:
        if request.headers["Expect"].lower() != "100-continue":
            raise BadRequest("Expect: want 100-continue")
        await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        request.writer.output_size = 0  # the answer's headers are still to come
    if content.is_eof():
        body = content.read_nowait()
        if len(body) > limit_bytes:
            raise too_large(limit_bytes)
        return body
    if length is None or length > replay_max_bytes:
        return StreamedBody(
            content, limit_bytes, chunked=length is None, keep_bytes=replay_max_bytes,
            timeout_s=timeout_s,
        )  # fmt: skip
    try:
        async with asyncio.timeout(timeout_s):
            return await content.read()
    except TimeoutError as exc:
        raise SlowUpload(f"the body did not arrive within {timeout_s:g} s") from exc
    except (web.RequestPayloadError, HttpProcessingError) as exc:
        raise BadRequest(f"the body broke off: {exc}") from exc


def request_head(
    method: str,
    path: str,
    headers: Iterable[tuple[bytes, bytes]],
    *,
    length: int | None,
    request_id: str,
    peer: str | None,
) -> bytes:
    """Return the head for a node, but for the deadline and the empty line: `with_deadline`.

    headers: the client's, passed on as they are but for those about its connection.
    length: ``None`` for a chunked body.
    """
    lines = [f"{method} {path} HTTP/1.1".encode("utf-8", "surrogateescape")]
    forwarded = (peer or "unknown").encode()
    named: frozenset[bytes] = frozenset()
    kept: list[tuple[bytes, bytes, bytes]] = []
    for name, value in headers:
        lower = name.lower()
        if lower == b"connection":
            named |= {part.strip() for part in value.lower().split(b",")}
        elif lower == b"x-forwarded-for":
            forwarded = value + b", " + forwarded
        elif lower not in HOP_BY_HOP and lower not in _OURS:
            kept.append((lower, name, value))
    lines += [name + b": " + value for lower, name, value in kept if lower not in named]
    lines += (
        b"X-Forwarded-For: " + forwarded,
        b"X-Request-Id: " + request_id.encode(),
        b"Transfer-Encoding: chunked" if length is None else b"Content-Length: %d" % length,
        b"",
    )
    return b"\r\n".join(lines)


def with_deadline(head: bytes, left_s: float, floor: Revision = NO_REVISION) -> bytes:
    """Return the whole head. floor: the oldest document to be answered from; 0: any."""
    shown = f"{FLOOR_HEADER}: {floor}\r\n" if floor else ""
    return head + f"{shown}{TIMEOUT_HEADER}: {show_timeout_ms(left_s)}\r\n\r\n".encode()


@dataclass(frozen=True, slots=True)
class Forward:
    """A request, ready to go to any node."""

    model: ModelName
    want: Want
    head: bytes
    body: Body
    is_head: bool = False
    has_floor: bool = False
    """Whether the model's floor applies: an inference that pins no version."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back. Where ``body`` is ``None`` it is to be streamed from ``exchange``."""

    upstream: Upstream
    exchange: Exchange
    body: bytes | None

    @property
    def node(self) -> NodeId:
        return self.upstream.id

    def close(self) -> None:
        """Once, when the body is read or given up; done already where ``body`` is there."""
        self.exchange.close()
        self.upstream.in_flight -= 1


Retried = Callable[[ModelName, str], None]


class Proxy:
    """Forwards requests by a `Rotation`. ``on_retry`` is told the model and why, for metrics."""

    def __init__(self, rotation: Rotation, *, on_retry: Retried = lambda _m, _w: None) -> None:
        self._rotation = rotation
        self._on_retry = on_retry

    async def run(self, forward: Forward, *, deadline_s: float) -> Answer:
        """Return an answer, whoever gave it; the caller closes it if its body is to be streamed.

        deadline_s: the loop's time after which nobody waits. Raises `NothingServes` where there
        is no node at all, `Overloaded` where each one asked failed, `DeadlineExceeded`, and what
        is wrong with a streamed body.
        """
        rotation, model = self._rotation, forward.model
        upstream = rotation.pick(model, forward.want)
        if upstream is None:
            raise NothingServes(model, rotation.table.route(model).reason)
        tried: list[NodeId] = []
        problems: list[str] = []
        answered: Answer | None = None
        retries = LOST_MAX if rotation.tuning.retries else 0
        while True:
            try:
                answer = await self._attempt(upstream, forward, deadline_s)
            except (UpstreamFailed, AnswerBroken) as exc:
                problems.append(str(exc))
                is_refused = isinstance(exc, UpstreamFailed) and exc.refused
                why = "refused" if is_refused else "reset"
                # Nobody saw a refused one; how many nodes are down says nothing about it.
                retries -= 0 if is_refused else 1
            except DeadlineExceeded:
                if answered is not None:
                    return answered
                raise
            else:
                if answered or answer.exchange.status not in AGAIN or answer.body is None:
                    return answer
                answered, why = answer, str(answer.exchange.status)
                retries = min(retries, 1) - 1
            tried.append(upstream.id)
            again = rotation.pick(model, forward.want, tried)
            if again is None and rotation.is_behind(model, upstream.id) and len(tried) == 1:
                again = upstream  # nobody has what was asked for: it may answer as it is
            body, is_spent = forward.body, retries < 0 or not rotation.tuning.retries
            can_replay = isinstance(body, bytes) or body.can_replay
            if again is None or is_spent or not can_replay:
                if answered is not None:
                    return answered
                said = "; then ".join(problems)
                raise Overloaded(f"model {model!r}: {said}", retry_after_s=RETRY_AFTER_S)
            self._on_retry(model, why)
            upstream = again

    async def _attempt(self, upstream: Upstream, forward: Forward, deadline_s: float) -> Answer:
        """Ask one node. Raises `UpstreamFailed`, `AnswerBroken`, `DeadlineExceeded`."""
        model, body = forward.model, forward.body
        loop = asyncio.get_running_loop()
        until_s = deadline_s + GRACE_S
        if isinstance(body, StreamedBody):
            until_s += body.timeout_s
        floor = self._rotation.floor(model, forward.want) if forward.has_floor else NO_REVISION
        upstream.in_flight += 1
        keeps_place = False
        try:
            exchange = await self._send(upstream, forward, deadline_s, until_s, floor)
            if forward.has_floor:
                # Before a byte of it goes on: who has seen this answer gets no older one.
                shown = exchange.message.headers
                self._rotation.answered_from(
                    model,
                    upstream.id,
                    shown.get(REVISION_HEADER, ""),
                    is_barrier=ROLLOUT_HEADER in shown,
                    floor=floor,
                )
            try:
                answer = Answer(upstream, exchange, await _whole(exchange, forward, until_s))
            except BaseException:
                exchange.close()
                raise
            keeps_place = True
        except (UpstreamFailed, AnswerBroken) as exc:
            self._node_failed(upstream, model, exc)
            raise
        except TimeoutError as exc:
            is_abandoned = until_s - loop.time() > _CLOCK_S
            if isinstance(body, StreamedBody) and not body.ended and not is_abandoned:
                raise SlowUpload("the body did not arrive in time") from exc
            silent = UpstreamFailed(upstream.id, "no answer", refused=False, stale=False)
            self._node_failed(upstream, model, silent)
            if is_abandoned:
                raise silent from exc  # its probes found it silent
            raise DeadlineExceeded(
                f"model {model!r}: no answer from node {upstream.id!r} in the time it had"
            ) from exc
        finally:
            if not keeps_place:
                upstream.in_flight -= 1
        self._rotation.report(model, upstream.id, failed=exchange.status in _NODE_FAULTS)
        if answer.body is not None:
            answer.close()
        return answer

    async def _send(
        self,
        upstream: Upstream,
        forward: Forward,
        deadline_s: float,
        until_s: float,
        floor: Revision,
    ) -> Exchange:
        """Send it; a second time over a fresh connection where an idle one had been closed.

        That is no attempt: a node may close what is idle at any time.
        """
        loop = asyncio.get_running_loop()
        fresh = isinstance(forward.body, StreamedBody)
        while True:
            left_s = deadline_s - loop.time()
            if left_s <= 0:
                raise DeadlineExceeded(
                    f"model {forward.model!r}: no time left to ask node {upstream.id!r}"
                )
            try:
                return await upstream.send(
                    with_deadline(forward.head, left_s, floor),
                    forward.body,
                    deadline_s=until_s,
                    is_head=forward.is_head,
                    fresh=fresh,
                )
            except UpstreamFailed as exc:
                if not exc.stale:
                    raise
                fresh = True

    def _node_failed(self, upstream: Upstream, model: ModelName, error: Exception) -> None:
        log.info("attempt_failed", node=upstream.id, model=model, reason=str(error))
        self._rotation.report(model, upstream.id, failed=True)
        self._rotation.on_suspect(upstream.id)


_CLOCK_S = 0.005
"""The loop's clock counts milliseconds."""


async def _whole(exchange: Exchange, forward: Forward, until_s: float) -> bytes | None:
    """The answer's body where it is small or here already; ``None``: to be streamed."""
    if exchange.is_whole or forward.is_head:
        return await exchange.read()
    length = exchange.message.headers.get("Content-Length")
    if length is None or int(length) > ANSWER_MAX_BYTES:
        return None
    async with asyncio.timeout_at(until_s):
        return await exchange.read()
