"""Asks each node of a rotation, again and again, whether it is ready."""

from __future__ import annotations

import asyncio
import contextlib
import random

from registry.names import NodeId
from router.fleet.probes import (
    PROBE_PATH,
    UNKNOWN,
    Vitals,
    after_refusal,
    after_timeout,
    read_probe,
)
from router.rotation import Rotation
from router.upstream import AnswerBroken, Upstream, UpstreamFailed

INTERVAL_S = 1.0
JITTER = 0.2
"""Gateways do not probe in step."""
TIMEOUT_S = 1.0
AT_ONCE_MIN_S = 0.05
"""Between two probes of one node, however often somebody suspects it."""


class Prober:
    """One task for each node there is. `wake` has one probed at once."""

    def __init__(self, rotation: Rotation) -> None:
        self._rotation = rotation
        self._tasks: dict[NodeId, asyncio.Task[None]] = {}
        self._woken: dict[NodeId, asyncio.Event] = {}
        self.silent_since_s: dict[NodeId, float] = {}
        """The loop's time since which a node has not answered, for those that do not."""

    def follow(self) -> None:
        """Probe the nodes that the rotation has now, and no others."""
        there = self._rotation.upstreams.keys()
        for node in self._tasks.keys() - there:
            self._tasks.pop(node).cancel()
            self._woken.pop(node, None)
            self.silent_since_s.pop(node, None)
        for node in there - self._tasks.keys():
            self._woken[node] = asyncio.Event()
            self._tasks[node] = asyncio.create_task(self._keep(node), name=f"probe {node}")

    def wake(self, node: NodeId) -> None:
        """Probe ``node`` now rather than at its next turn."""
        event = self._woken.get(node)
        if event is not None:
            event.set()

    async def close(self) -> None:
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    async def _keep(self, node: NodeId) -> None:
        woken, loop = self._woken[node], asyncio.get_running_loop()
        while (upstream := self._rotation.upstreams.get(node)) is not None:
            woken.clear()
            before = self._rotation.vitals.get(node, UNKNOWN)
            vitals = await probe(upstream, before)
            if vitals.answers:
                self.silent_since_s.pop(node, None)
            else:
                self.silent_since_s.setdefault(node, loop.time())
            if self._rotation.upstreams.get(node) is upstream:  # else: another process's answer
                self._rotation.observe(node, vitals)
            if vitals.timeouts and vitals.answers:
                continue  # late once: ask again at once, to know
            await asyncio.sleep(AT_ONCE_MIN_S)
            pause_s = INTERVAL_S * random.uniform(1 - JITTER, 1 + JITTER) - AT_ONCE_MIN_S
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause_s):
                    await woken.wait()


async def probe(upstream: Upstream, before: Vitals) -> Vitals:
    """Ask one node once, over a connection of its own: that it accepts is part of the answer."""
    host, port = upstream.address
    head = f"GET {PROBE_PATH} HTTP/1.1\r\nHost: {host}:{port}\r\nConnection: close\r\n\r\n"
    deadline_s = asyncio.get_running_loop().time() + TIMEOUT_S
    try:
        exchange = await upstream.send(head.encode(), b"", deadline_s=deadline_s, fresh=True)
        try:
            async with asyncio.timeout_at(deadline_s):
                return read_probe(exchange.status, await exchange.read())
        finally:
            exchange.close()
    except TimeoutError:
        return after_timeout(before)
    except (UpstreamFailed, AnswerBroken) as exc:
        if isinstance(exc.__cause__, TimeoutError):
            return after_timeout(before)  # a connection that is neither made nor refused
        return after_refusal(before)
