"""Loads give way to requests: a worker that is being made ready stops while others are waited for.

A low priority alone does not do it. Two threads on the two halves of one core slow each other down
whatever their priorities, and a serving worker that is half busy becomes a full one, with a queue,
for as long as a load lasts.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Generator
from typing import Protocol

TICK_S = 0.002
PAUSE_MAX_S = 0.03
"""The longest stop at once. With `RUN_MIN_S` it leaves a load a quarter of its time on a node whose
queues never empty: slower, and sure to end."""
RUN_MIN_S = 0.01
"""How long it then runs, whoever waits."""


class Pausable(Protocol):
    """A worker that is not serving yet."""

    def pause(self) -> None: ...

    def resume(self) -> None: ...


def is_to_pause(*, is_paused: bool, is_waited: bool, for_s: float) -> bool:
    """Whether a load stands still from now on (pure).

    is_waited: whether requests wait behind others for a serving worker.
    for_s: how long the load has been paused, or has been running.
    """
    if is_paused:
        return is_waited and for_s < PAUSE_MAX_S
    return is_waited and for_s >= RUN_MIN_S


class Courtesy:
    """One a node. It ticks only while something loads."""

    def __init__(self, is_waited: Callable[[], bool]) -> None:
        """is_waited: whether requests wait anywhere for a worker that is there, but busy."""
        self._is_waited = is_waited
        self._loading: list[Pausable] = []
        self._is_paused = False
        self._since_s = 0.0
        self._timer: asyncio.TimerHandle | None = None

    @contextlib.contextmanager
    def of(self, worker: Pausable) -> Generator[None]:
        """While the block runs, ``worker`` gives way; at its end it runs."""
        if not self._loading:
            self._turn(is_paused=False)
            self._wind()
        elif self._is_paused:
            worker.pause()
        self._loading.append(worker)
        try:
            yield
        finally:
            self._loading.remove(worker)
            if self._is_paused:
                worker.resume()
            if not self._loading and self._timer is not None:
                self._timer.cancel()

    def _wind(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(TICK_S, self._tick)

    def _tick(self) -> None:
        for_s = asyncio.get_running_loop().time() - self._since_s
        wanted = is_to_pause(is_paused=self._is_paused, is_waited=self._is_waited(), for_s=for_s)
        if wanted != self._is_paused:
            for worker in self._loading:
                worker.pause() if wanted else worker.resume()
            self._turn(is_paused=wanted)
        self._wind()

    def _turn(self, *, is_paused: bool) -> None:
        self._is_paused = is_paused
        self._since_s = asyncio.get_running_loop().time()
