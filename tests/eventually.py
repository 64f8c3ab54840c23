"""Waiting with a deadline instead of sleeping."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from inspect import isawaitable


async def eventually(
    holds: Callable[[], bool | Awaitable[bool]], *, within_s: float, what: str = ""
) -> None:
    """Return as soon as ``holds()``; fail the test when it does not ``within_s`` seconds."""
    loop = asyncio.get_running_loop()
    deadline_s = loop.time() + within_s
    while True:
        answer = holds()
        if await answer if isawaitable(answer) else answer:
            return
        if loop.time() > deadline_s:
            raise AssertionError(f"not within {within_s:g} s: {what or holds}")
        await asyncio.sleep(0.02)
