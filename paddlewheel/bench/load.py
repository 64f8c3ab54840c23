"""An open-loop load generator: requests leave on schedule, whether answers come or not.

Closed loops (send, wait, send) stop asking while the server stalls and so measure the stall once
instead of once per request that users would have sent: coordinated omission. Here the schedule is
fixed beforehand, and latency counts from the time a request was *due*.

Times are ``time.monotonic()``: the event loop's own clock may be coarser (uvloop's counts
milliseconds).

Made to cost little, since it often shares the machine with what it measures: prebuilt request
bytes, one `asyncio.Protocol` per connection, no HTTP library. To leave the loop of the measured
server alone too, run it as a process: `paddlewheel.bench.load_process`, or by hand
``python -m paddlewheel.bench.load --help``.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

from paddlewheel.bench.samples import Result, Sample

Headers = Mapping[str, str]
"""Response headers; names in lower case."""

Verify = Callable[[int, Headers, bytes], str | None]
"""Judges ``(status, headers, body)``: ``None`` when the answer is right, else why it is not."""

_IDLE_MAX_S = 10.0
"""Idle connections are closed by us before a server would: it may do so just as we send."""
_HEAD_MAX_BYTES = 65536
_REQUESTS_MAX = 5_000_000
"""Every request is remembered, at about 200 bytes each."""


@dataclass(frozen=True, slots=True)
class Request:
    """One kind of request, as the bytes that go over the wire."""

    name: str
    data: bytes
    verify: Verify | None = None
    """``None``: status 200 is enough."""
    weight: int = 1
    """How often it is sent, relative to the others."""


def http_request(
    method: str,
    path: str,
    body: bytes = b"",
    *,
    host: str = "localhost",
    headers: Mapping[str, str] | None = None,
) -> bytes:
    """Build the bytes of one HTTP/1.1 request with a Content-Length."""
    lines = [f"{method} {path} HTTP/1.1", f"Host: {host}", f"Content-Length: {len(body)}"]
    lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


def mix(requests: Sequence[Request]) -> Iterator[Request]:
    """Interleave the requests for ever by weight, the same way every time."""
    if not requests or min(request.weight for request in requests) < 1:
        raise ValueError("want at least one request, and weights of at least 1")
    spread = [
        ((turn + 0.5) / request.weight, index)
        for index, request in enumerate(requests)
        for turn in range(request.weight)
    ]
    return itertools.cycle([requests[index] for _, index in sorted(spread)])


@dataclass(slots=True)
class _Pending:
    request: Request
    due_s: float


class _Connection(asyncio.Protocol):
    """One keep-alive connection; one request at a time."""

    def __init__(self, generator: _Generator) -> None:
        self._generator = generator
        self._transport: asyncio.Transport | None = None
        self._buffer = bytearray()
        self._pending: _Pending | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._head_bytes = 0
        self._body_bytes = 0
        self._status = 0
        self._headers: dict[str, str] = {}
        self.idle_since_s = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def send(self, pending: _Pending, timeout_s: float) -> None:
        assert self._transport is not None
        assert self._pending is None
        self._pending = pending
        self._head_bytes = 0
        left_s = pending.due_s + timeout_s - time.monotonic()
        self._timer = asyncio.get_running_loop().call_later(max(left_s, 0.0), self._give_up)
        self._transport.write(pending.request.data)

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    @property
    def is_open(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        if self._pending is None:
            self.close()  # an answer that nobody asked for
            return
        if not self._head_bytes and not self._read_head():
            return
        end = self._head_bytes + self._body_bytes
        if len(self._buffer) < end:
            return
        body = bytes(self._buffer[self._head_bytes : end])
        del self._buffer[:end]
        if self._headers.get("connection", "").lower() == "close":
            self._finish(None, body)
            self.close()
        else:
            self._finish(None, body)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._pending is not None:
            self._finish(f"connection lost: {exc!r}" if exc else "connection closed", b"")
        self._generator.forget(self)

    def _read_head(self) -> bool:
        """Parse status and headers when they are complete."""
        end = self._buffer.find(b"\r\n\r\n")
        if end < 0:
            if len(self._buffer) > _HEAD_MAX_BYTES:
                self._broken("headers without end")
            return False
        status_line, *lines = self._buffer[:end].decode("latin-1").split("\r\n")
        self._headers = {
            name.strip().lower(): value.strip()
            for name, _, value in (line.partition(":") for line in lines)
        }
        try:
            self._status = int(status_line.split(" ", 2)[1])
            self._body_bytes = int(self._headers["content-length"])
        except (IndexError, ValueError, KeyError) as exc:
            self._broken(f"not an answer with a Content-Length: {status_line!r} ({exc!r})")
            return False
        self._head_bytes = end + 4
        return True

    def _give_up(self) -> None:
        self._broken("timeout")

    def _broken(self, why: str) -> None:
        self._finish(why, b"")
        self.close()

    def _finish(self, failure: str | None, body: bytes) -> None:
        pending, self._pending = self._pending, None
        assert pending is not None
        if self._timer is not None:
            self._timer.cancel()
        answered = failure is None
        self._generator.record(
            pending,
            failure,
            self._status if answered else 0,
            self._headers if answered else {},
            body,
        )
        if answered:
            self._generator.release(self)


class _Generator:
    """The pool and the schedule of one run."""

    def __init__(
        self,
        host: str,
        port: int,
        *,
        connections_max: int,
        timeout_s: float,
        on_sample: Callable[[Sample], None] | None,
    ) -> None:
        self._host, self._port = host, port
        self._connections_max = connections_max
        self._timeout_s = timeout_s
        self._on_sample = on_sample
        self._idle: deque[_Connection] = deque()
        """Most recently used on the right, so that few stay in use and the rest can be closed."""
        self._open: set[_Connection] = set()
        self._opening = 0
        self._waiting: deque[_Pending] = deque()
        self._dials: set[asyncio.Task[None]] = set()
        self._under_way = 0
        self._quiet = asyncio.Event()
        self.result = Result()

    def submit(self, pending: _Pending) -> None:
        """Send now, or as soon as a connection is free."""
        self._under_way += 1
        self._quiet.clear()
        while self._idle:
            connection = self._idle.pop()
            if connection.is_open:
                connection.send(pending, self._timeout_s)
                return
        self._waiting.append(pending)
        self._dial_if_needed()

    def _dial_if_needed(self) -> None:
        room = self._connections_max - len(self._open) - self._opening
        if self._opening < len(self._waiting) and room > 0:
            self._opening += 1
            task = asyncio.get_running_loop().create_task(self._dial())
            self._dials.add(task)
            task.add_done_callback(self._dials.discard)

    async def _dial(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(self._timeout_s):
                _, connection = await loop.create_connection(
                    lambda: _Connection(self), self._host, self._port
                )
        except OSError as exc:  # includes TimeoutError
            self._opening -= 1
            if self._waiting:
                self.record(self._waiting.popleft(), f"no connection: {exc!r}", 0, {}, b"")
                self._dial_if_needed()
            return
        self._opening -= 1
        self._open.add(connection)
        self.release(connection)

    def release(self, connection: _Connection) -> None:
        """A connection is free: the request that has waited longest takes it."""
        if not connection.is_open:
            return
        while self._waiting:
            pending = self._waiting.popleft()
            if time.monotonic() > pending.due_s + self._timeout_s:
                self.record(pending, "timeout", 0, {}, b"")
                continue
            connection.send(pending, self._timeout_s)
            return
        connection.idle_since_s = time.monotonic()
        self._idle.append(connection)

    def forget(self, connection: _Connection) -> None:
        self._open.discard(connection)
        self._dial_if_needed()

    def retire_idle(self, now_s: float) -> None:
        while self._idle and now_s - self._idle[0].idle_since_s > _IDLE_MAX_S:
            self._idle.popleft().close()

    def record(
        self, pending: _Pending, failure: str | None, status: int, headers: Headers, body: bytes
    ) -> None:
        latency_s = time.monotonic() - pending.due_s
        if failure is None:
            if pending.request.verify is not None:
                failure = _verdict(pending.request.verify, status, headers, body)
            elif status != 200:
                failure = f"status {status}"
        sample = Sample(
            name=pending.request.name,
            due_s=pending.due_s,
            latency_s=latency_s,
            status=status,
            version=headers.get("x-model-version", ""),
            route=headers.get("x-model-route", "").partition(";")[0].strip(),
            failure=failure,
        )
        self.result.samples.append(sample)
        self._under_way -= 1
        if self._under_way == 0:
            self._quiet.set()
        if self._on_sample is not None:
            self._on_sample(sample)

    async def drain(self) -> None:
        """Wait for what is under way; the timeouts of the requests bound the wait."""
        while self._under_way:
            await self._quiet.wait()

    async def close(self) -> None:
        for task in self._dials:
            task.cancel()
        await asyncio.gather(*self._dials, return_exceptions=True)
        for connection in list(self._open):
            connection.close()
        await asyncio.sleep(0)  # lets the transports close their sockets


def _verdict(verify: Verify, status: int, headers: Headers, body: bytes) -> str | None:
    """A verifier that stumbles over an answer has found a wrong answer."""
    try:
        return verify(status, headers, body)
    except Exception as exc:
        return f"status {status}, answer not understood: {exc!r}"


async def run(
    host: str,
    port: int,
    requests: Sequence[Request],
    *,
    rate_per_s: float,
    duration_s: float,
    connections_max: int = 64,
    timeout_s: float = 30.0,
    stop: asyncio.Event | None = None,
    on_sample: Callable[[Sample], None] | None = None,
) -> Result:
    """Send ``rate_per_s`` requests per second for ``duration_s`` seconds, or until ``stop``.

    The n-th request is due ``n / rate_per_s`` seconds after the start, whatever became of those
    before it. With all ``connections_max`` connections busy requests wait here, and the wait
    counts as their latency. Returns once every request was answered, failed or timed out: at
    most ``timeout_s`` after the last was due.
    """
    if rate_per_s * duration_s > _REQUESTS_MAX:
        raise ValueError(f"{rate_per_s}/s for {duration_s} s: more than {_REQUESTS_MAX} requests")
    generator = _Generator(
        host, port, connections_max=connections_max, timeout_s=timeout_s, on_sample=on_sample
    )
    result = generator.result
    result.started_s = time.monotonic()
    try:
        due: Iterable[tuple[int, Request]] = enumerate(mix(requests))
        for number, request in due:
            due_s = result.started_s + number / rate_per_s
            if due_s >= result.started_s + duration_s:
                break
            while (wait_s := due_s - time.monotonic()) > 0 and not _is_set(stop):
                await asyncio.sleep(min(wait_s, 0.25))  # wakes now and then to see ``stop``
                generator.retire_idle(time.monotonic())
            if _is_set(stop):
                break
            generator.submit(_Pending(request, due_s))
        await generator.drain()
    finally:
        result.ended_s = time.monotonic()
        await generator.close()
    return result


def _is_set(stop: asyncio.Event | None) -> bool:
    return stop is not None and stop.is_set()


if __name__ == "__main__":
    from paddlewheel.bench.load_process import main

    main()
