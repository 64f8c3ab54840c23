"""A key set that is fetched: kept, refreshed in time, and once more for a key that is not in it.

What was fetched last stays in use for as long as nothing newer comes: an identity provider that is
away takes nobody out who has a token. A token can make us fetch at most once in `UNKNOWN_KID_S`.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Awaitable, Callable

import structlog
from aiohttp import ClientError, ClientSession, ClientTimeout

from router.access.keyring import JWKS_BYTES_MAX, BadKeys, KeySet, read_jwks

log = structlog.get_logger(__name__)

FETCH_TIMEOUT_S = 5.0
UNKNOWN_KID_S = 30.0
"""Between two fetches for the sake of keys that tokens name."""
WAIT_S = 2.0
"""How long a request waits for such a fetch."""
BACKOFF_S = (1.0, 60.0)
JITTER = 0.1

Fetch = Callable[[str], Awaitable[bytes]]


class RemoteKeys:
    """One ``jwks_url``. `run` keeps it fresh."""

    def __init__(self, url: str, *, refresh_s: float, fetch: Fetch | None = None) -> None:
        self.url = url
        self.keys: KeySet | None = None
        """``None`` until it was fetched once."""
        self.error: str | None = "not fetched yet"
        """Why the last fetch failed; ``None`` after one that did not."""
        self.fetches = 0
        self.refresh_s = refresh_s
        self._fetch = fetch or fetch_url
        self._under_way: asyncio.Task[None] | None = None
        self._asked_at_s = float("-inf")

    async def run(self) -> None:
        """Fetch now and then, for ever; sooner while it fails."""
        backoff_s, longest_s = BACKOFF_S
        while True:
            await self.refresh()
            if self.error is None:
                pause_s, backoff_s = self.refresh_s, BACKOFF_S[0]
            else:
                pause_s = min(backoff_s, self.refresh_s)
                backoff_s = min(backoff_s * 2, longest_s)
            await asyncio.sleep(pause_s * random.uniform(1 - JITTER, 1 + JITTER))

    async def refresh(self) -> None:
        """Fetch once; whoever asks meanwhile waits for the same answer. Never raises."""
        task = self._under_way
        if task is None or task.done():
            task = self._under_way = asyncio.create_task(self._refresh(), name="jwks")
        await asyncio.shield(task)

    async def look_again(self) -> bool:
        """A token names a key that is not here: fetch, unless that was done just now.

        Returns whether there may be other keys now.
        """
        now_s = asyncio.get_running_loop().time()
        joins = self._under_way is not None and not self._under_way.done()
        if not joins:
            if now_s - self._asked_at_s < UNKNOWN_KID_S:
                return False
            self._asked_at_s = now_s
        before = self.keys
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(WAIT_S):
                await self.refresh()
        return self.keys is not before

    async def _refresh(self) -> None:
        self.fetches += 1
        try:
            async with asyncio.timeout(FETCH_TIMEOUT_S):
                keys = read_jwks(await self._fetch(self.url))
        except (ClientError, OSError, BadKeys, ValueError) as exc:  # OSError: TimeoutError too
            self.error = str(exc) or type(exc).__name__
            log.warning("jwks_not_fetched", url=self.url, reason=self.error)
            return
        if self.keys != keys:
            log.info("jwks_fetched", url=self.url, keys=len(keys.keys), ignored=keys.ignored)
            self.keys = keys
        self.error = None


async def fetch_url(url: str) -> bytes:
    """GET it: no redirects, no cookies, no proxy of the environment, a bounded answer."""
    timeout = ClientTimeout(total=FETCH_TIMEOUT_S)
    async with (
        ClientSession(timeout=timeout, trust_env=False) as session,
        session.get(url, allow_redirects=False, headers={"Accept": "application/json"}) as answer,
    ):
        if answer.status != 200:
            raise BadKeys(f"answered {answer.status}")
        content = bytearray()
        async for piece in answer.content.iter_chunked(65_536):
            content += piece
            if len(content) > JWKS_BYTES_MAX:
                raise BadKeys(f"the key set is over {JWKS_BYTES_MAX} bytes")
        return bytes(content)
