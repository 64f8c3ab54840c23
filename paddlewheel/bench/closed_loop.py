"""A closed-loop client for throughput: each connection sends again as soon as it has its answer.

For latency under a given load use `paddlewheel.bench.load`, which does not wait for answers. This
one asks how much a server can do, so it has to cost little itself: plain sockets, one poll for all
of them, prebuilt bytes, and of an answer only its status and its length are looked at (some 10 us
a request).
"""

from __future__ import annotations

import select
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass

from paddlewheel.bench.samples import percentile
from registry.errors import PaddlewheelError

_TIMEOUT_S = 30.0
_LENGTH = b"\r\ncontent-length:"


class BadAnswer(PaddlewheelError):
    """Anything but a 200 with a Content-Length: what is measured does not work."""


@dataclass(frozen=True, slots=True)
class Throughput:
    """What came of one run."""

    requests: int
    duration_s: float
    p50_s: float
    p99_s: float

    @property
    def per_s(self) -> float:
        return self.requests / self.duration_s


def closed_loop(
    host: str, port: int, requests: Iterator[bytes], *, concurrency: int, duration_s: float
) -> Throughput:
    """Send ``requests``, one after the other, over ``concurrency`` connections. Blocks.

    Raises `BadAnswer` for the first answer that is not a 200, `OSError` when there is none.
    """
    poll = select.epoll()
    connections: dict[int, socket.socket] = {}
    try:
        for _ in range(concurrency):
            sock = socket.create_connection((host, port), timeout=_TIMEOUT_S)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connections[sock.fileno()] = sock
            poll.register(sock.fileno(), select.EPOLLIN)
        return _drive(poll, connections, requests, duration_s)
    finally:
        poll.close()
        for sock in connections.values():
            sock.close()


def _drive(
    poll: select.epoll,
    connections: dict[int, socket.socket],
    requests: Iterator[bytes],
    duration_s: float,
) -> Throughput:
    clock = time.perf_counter
    started: dict[int, float] = {}
    latencies: list[float] = []
    began_s = now_s = clock()
    end_s = began_s + duration_s
    for fd, sock in connections.items():
        started[fd] = clock()
        sock.sendall(next(requests))
    while started:
        ready = poll.poll(_TIMEOUT_S)
        if not ready:
            raise BadAnswer(f"no answer within {_TIMEOUT_S:g} s")
        for fd, _ in ready:
            sock = connections[fd]
            _read_answer(sock)
            now_s = clock()
            latencies.append(now_s - started[fd])
            if now_s < end_s:
                started[fd] = now_s
                sock.sendall(next(requests))
            else:
                del started[fd]
    return Throughput(
        len(latencies), now_s - began_s, percentile(latencies, 50), percentile(latencies, 99)
    )


def _read_answer(sock: socket.socket) -> None:
    """Read one answer whole; the rest of one that has begun is waited for."""
    data = sock.recv(262_144)
    head_bytes = data.find(b"\r\n\r\n") + 4
    while head_bytes < 4:
        if not (more := sock.recv(262_144)):
            raise BadAnswer(f"the connection ended after {data[:200]!r}")
        data += more
        head_bytes = data.find(b"\r\n\r\n") + 4
    if not data.startswith(b"HTTP/1.1 200 "):
        raise BadAnswer(f"want 200, got {data[:500]!r}")
    head = data[:head_bytes].lower()
    _, found, rest = head.partition(_LENGTH)
    if not found:
        raise BadAnswer(f"no Content-Length: {data[:500]!r}")
    left_bytes = int(rest.partition(b"\r")[0]) - (len(data) - head_bytes)
    while left_bytes > 0:
        if not (more := sock.recv(262_144)):
            raise BadAnswer("the connection ended within an answer")
        left_bytes -= len(more)
