"""An event loop whose time jumps: no sockets, no threads, the same order for the same program.

What the loop would wait for has happened at once; when nothing is left to run, time moves to the
next timer. Everything that runs in it sees consistent times, and a minute costs what happens in it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

START_S = 1_000.0
"""Where the loop's clock begins: zero would hide who mixes it up with a span."""


class NothingToDo(Exception):
    """Nothing runs and nothing is timed: whoever is waited for has been forgotten."""


class TimeStandsStill(Exception):
    """Something runs again and again and waits for nothing: with real time, a busy loop."""


TURNS_MAX = 1_000_000
"""Turns of the loop at one and the same time."""


class _Selector:
    """Stands where a real loop would wait for sockets."""

    def __init__(self, loop: VirtualLoop) -> None:
        self._loop = loop
        self._turns = 0

    def select(self, timeout: float | None) -> list[Any]:
        if timeout is None:
            raise NothingToDo
        self._turns = 0 if timeout else self._turns + 1
        if self._turns > TURNS_MAX:
            raise TimeStandsStill(f"{TURNS_MAX} turns at {self._loop.now_s:.3f}")
        self._loop.now_s += timeout
        return []


class VirtualLoop(asyncio.BaseEventLoop):
    """Run with `asyncio.Runner(loop_factory=VirtualLoop)` or `run_until_complete`."""

    def __init__(self) -> None:
        super().__init__()
        self.now_s = START_S
        self._selector = _Selector(self)
        self._clock_resolution = 1e-7
        self.slow_callback_duration = float("inf")

    def time(self) -> float:
        return self.now_s

    def run_in_executor(  # type: ignore[override]
        self, executor: Any, func: Callable[..., Any], *args: Any
    ) -> Any:
        """Run ``func`` here and now; its result comes a turn later, as from a thread."""
        future = self.create_future()
        try:
            result = func(*args)
        except StopIteration as exc:
            future.set_exception(RuntimeError(f"raised {exc!r}"))
        except Exception as exc:
            future.set_exception(exc)
        else:
            future.set_result(result)
        return future

    def add_signal_handler(  # type: ignore[override]
        self, sig: int, callback: Callable[..., Any], *args: Any
    ) -> None:
        """Nobody sends signals here; a node is stopped by its own means."""

    # --- what a loop needs of its selector, and this one does not ------------------------------

    def _process_events(self, event_list: list[Any]) -> None:
        pass

    def _write_to_self(self) -> None:
        pass
