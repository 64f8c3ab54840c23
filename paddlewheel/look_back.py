"""What only older documents know, found in ``P/history`` apart from everything else.

etcd may be away for long, or history may be large: nothing else waits for it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

import structlog
from tenacity import AsyncRetrying, retry_if_exception, wait_random_exponential

from paddlewheel.history import is_passing
from registry.names import ModelName
from registry.store import StoreError

log = structlog.get_logger(__name__)

Search = Callable[[ModelName], Awaitable[None]]
"""Looks for one thing; what it may raise is `StoreError`."""


class LookBack:
    """Models of which history may know more, one after the other."""

    def __init__(self, searches: Sequence[Search]) -> None:
        self._searches = searches
        self._unsure: asyncio.Queue[ModelName] = asyncio.Queue()

    def ask(self, model: ModelName) -> None:
        self._unsure.put_nowait(model)

    async def run(self) -> None:
        """Search until cancelled."""
        retrying = AsyncRetrying(
            retry=retry_if_exception(is_passing),
            wait=wait_random_exponential(multiplier=0.2, max=5.0),
        )
        while True:
            model = await self._unsure.get()
            try:
                for search in self._searches:
                    await retrying(search, model)
            except StoreError as exc:
                log.warning("history_not_read", model=model, error=str(exc))
