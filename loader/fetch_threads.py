"""Threads for reading sources, of which some may never answer."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

_T = TypeVar("_T")

AT_ONCE = 4
PATIENCE_S = 2.0
"""How long the next one in line waits for one of the others to end."""
GOODBYE_S = 2.0


class FetchThreads:
    """Blocking calls beside the loop: a few at once, and never stuck behind a stuck one.

    A mount or a server that hangs keeps its thread, which nothing can interrupt. So whoever is
    next in line begins after `PATIENCE_S` all the same; and the threads are daemons, which the
    end of the process does not wait for (those of a `ThreadPoolExecutor` it does).
    """

    def __init__(self, at_once: int = AT_ONCE, *, patience_s: float = PATIENCE_S) -> None:
        self._patience_s = patience_s
        self._places = asyncio.Semaphore(at_once)
        self._turn = asyncio.Lock()
        self._running: set[asyncio.Future[Any]] = set()

    async def run(self, work: Callable[[], _T]) -> _T:
        """``work()`` on a thread. When cancelled, the thread goes on, unheard."""
        has_place = await self._wait_for_place()
        try:
            loop = asyncio.get_running_loop()
            outcome: asyncio.Future[_T] = loop.create_future()
            outcome.add_done_callback(self._ended)
            threading.Thread(
                target=_work, args=(work, loop, outcome), name="fetch", daemon=True
            ).start()
            self._running.add(outcome)
            return await asyncio.shield(outcome)
        finally:
            if has_place:
                self._places.release()

    async def close(self) -> None:
        """Wait a moment for those that can end."""
        if self._running:
            await asyncio.wait(self._running, timeout=GOODBYE_S)

    def _ended(self, outcome: asyncio.Future[Any]) -> None:
        self._running.discard(outcome)
        outcome.exception()  # seen, even if nobody waits any more

    async def _wait_for_place(self) -> bool:
        async with self._turn:  # one by one, in order: patience is not lost by all at once
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._patience_s):
                    return await self._places.acquire()
        return False


def _work(
    work: Callable[[], _T], loop: asyncio.AbstractEventLoop, outcome: asyncio.Future[_T]
) -> None:
    tell: Callable[[], None]
    try:
        tell = partial(outcome.set_result, work())
    except BaseException as exc:
        tell = partial(outcome.set_exception, exc)
    with contextlib.suppress(RuntimeError):  # the loop has ended
        loop.call_soon_threadsafe(tell)
