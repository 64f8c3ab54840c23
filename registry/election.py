"""One leader at a time: a key created under a lease, and a fence for everything the leader writes.

Two candidates may both believe for a moment that they lead: one was frozen, or its clock runs
slow. The fence decides, in the store: every write of a leader compares the key's create_revision
with the one that made it the leader, so a write of a deposed one fails, however late it arrives.

Source: the recipe is etcd's own (clientv3/concurrency, election.go), with one key for all
candidates rather than one each: they are few, and the waiting ones cost nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import random
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager

import structlog

from registry.cas import Conflict
from registry.errors import PaddlewheelError
from registry.names import Revision
from registry.store import (
    Ambiguous,
    Compare,
    CreateRevisionIs,
    DeleteOp,
    GetOp,
    LeaseNotFound,
    ModRevisionIs,
    Op,
    PermissionDenied,
    Put,
    PutOp,
    Store,
    StoreError,
    StoreRefused,
)

log = structlog.get_logger("registry.election")

BACKOFF_MAX_S = 1.0
RESIGN_S = 1.0
_CLOCK_STEP_S = 0.001
"""uvloop's clock counts milliseconds: what is nearer than one cannot be waited for."""


class Deposed(PaddlewheelError):
    """A leader's write was refused by the fence: somebody else leads, or nobody."""


class Leadership:
    """Held from one won election on, until it is lost or given up. Loop-bound."""

    def __init__(
        self, store: Store, key: str, fence: Revision, lease: int, ttl_s: int, expires_s: float
    ) -> None:
        self.fence = fence
        """The key's create_revision: grows with every leader."""
        self.lost = asyncio.Event()
        """Set once it is over, against our will; never cleared."""
        self._store = store
        self._key = key
        self._lease = lease
        self._ttl_s = ttl_s
        self._expires_s = expires_s
        """By our clock: the start of the last successful renewal + TTL. etcd's own is later."""

    @property
    def is_held(self) -> bool:
        """As far as our own clock knows; the fence knows better."""
        return not self.lost.is_set() and clock_s() < self._expires_s

    async def put(
        self, key: str, value: bytes, revision: Revision, *also: Compare
    ) -> Revision | Conflict:
        """Write ``key`` if its mod_revision still is ``revision`` (0: absent), as the leader.

        also: what else has to hold, or it is a `Conflict` too.
        Raises `Deposed`, and what the store raises: after `Ambiguous`, read before anything else.
        """
        return await self._change(PutOp(key, value), revision, also)

    async def delete(
        self, key: str, revision: Revision, *also: Compare, and_delete: Sequence[str] = ()
    ) -> Revision | Conflict:
        """As `put`. and_delete: keys that go with it, whatever they hold."""
        more = [DeleteOp(each) for each in and_delete]
        return await self._change(DeleteOp(key), revision, also, more)

    async def _change(
        self,
        op: PutOp | DeleteOp,
        revision: Revision,
        also: Sequence[Compare],
        more: Sequence[Op] = (),
    ) -> Revision | Conflict:
        if not self.is_held:
            self._lose("no renewal within the TTL, by our clock")
            raise Deposed("the lease is over")
        fence = CreateRevisionIs(self._key, self.fence)
        compares = [fence, ModRevisionIs(op.key, revision), *also]
        looks: list[Op] = [GetOp(self._key), GetOp(op.key)]
        done = await self._store.txn(compares, [op, *more], looks)
        if done.succeeded:
            return done.revision
        held, current = done.got
        if held is None or held.create_revision != self.fence:
            self._lose("another leads" if held is not None else "the key is gone")
            raise Deposed(f"fence {self.fence} does not hold any more")
        return Conflict(current)

    async def keep(self, rng: random.Random) -> None:
        """Renew until it is lost. For `leadership` alone."""
        failures = 0
        while not self.lost.is_set():
            if failures == 0:
                pause_s = self._expires_s - self._ttl_s * 2 / 3 - clock_s()
            else:
                pause_s = min(backoff_s(rng, failures), self._expires_s - clock_s())
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(max(0.0, pause_s)):
                    await self.lost.wait()
            if not self.lost.is_set():
                failures = 0 if await self._renew() else failures + 1

    async def _renew(self) -> bool:
        started_s = clock_s()
        patience_s = min(self._ttl_s / 3, self._expires_s - started_s)
        try:
            if patience_s <= _CLOCK_STEP_S:
                raise LeaseNotFound("no renewal within the TTL, by our clock")
            async with asyncio.timeout(patience_s):
                await self._store.lease_keepalive(self._lease)
            self._expires_s = started_s + self._ttl_s
            async with asyncio.timeout(self._ttl_s / 3):
                if self._key not in await self._store.lease_keys(self._lease):
                    raise LeaseNotFound("the key is gone")
        except LeaseNotFound as exc:
            self._lose(str(exc))
            return False
        except (StoreError, TimeoutError) as exc:
            log.debug("leadership_not_renewed", key=self._key, error=repr(exc))
            return False
        return True

    def _lose(self, why: str) -> None:
        if not self.lost.is_set():
            log.warning("leadership_lost", key=self._key, fence=self.fence, why=why)
            self.lost.set()

    async def resign(self) -> None:
        """Let go at once, for the next leader's sake. For `leadership` alone."""
        self._expires_s = -math.inf
        await _revoke(self._store, self._key, self._lease)


@asynccontextmanager
async def leadership(
    store: Store,
    key: str,
    value: Callable[[], bytes],
    *,
    ttl_s: int,
    rng: random.Random | None = None,
) -> AsyncGenerator[Leadership]:
    """Wait until elected, for ever if need be; lead inside the block; resign at its end.

    value: what the key says while we lead, asked for when it is written.
    ttl_s: a leader that is killed is replaced that many seconds later at most, and the moment it
        takes the store to notice.
    A block whose leadership is lost has to end by itself: watch `Leadership.lost`.
    Raises `registry.store.PermissionDenied` and `registry.store.StoreRefused`.
    """
    chance = rng or random.Random()
    elected = await _elected(store, key, value, ttl_s, chance)
    log.info("leadership_won", key=key, fence=elected.fence)
    keeping = asyncio.create_task(elected.keep(chance), name="leadership")
    try:
        yield elected
    finally:
        keeping.cancel()
        await asyncio.gather(keeping, return_exceptions=True)
        await elected.resign()


async def _elected(
    store: Store, key: str, value: Callable[[], bytes], ttl_s: int, rng: random.Random
) -> Leadership:
    failures = 0
    while True:
        try:
            await _until_absent(store, key)
            won = await _candidate(store, key, value(), ttl_s)
            if won is not None:
                return won
            failures = 0
        except (PermissionDenied, StoreRefused):
            raise
        except (StoreError, TimeoutError) as exc:
            log.debug("election_repeated", key=key, error=repr(exc))
            failures += 1
            await asyncio.sleep(backoff_s(rng, failures))


async def _until_absent(store: Store, key: str) -> None:
    """Return once nobody holds ``key``."""
    batches = store.watch_prefix(key)
    is_held = False
    try:
        async for batch in batches:
            for event in batch.events:
                if isinstance(event, Put):
                    is_held = is_held or event.kv.key == key
                elif event.key == key:
                    is_held = False
            if not is_held:
                return
    finally:
        if isinstance(batches, AsyncGenerator):
            await batches.aclose()


async def _candidate(store: Store, key: str, value: bytes, ttl_s: int) -> Leadership | None:
    """Try once; ``None`` when another was faster. Leaves no lease behind but that of the leader."""
    started_s = clock_s()
    async with asyncio.timeout(ttl_s / 3):
        lease = await store.lease_grant(ttl_s)
    won: Leadership | None = None
    try:
        async with asyncio.timeout(ttl_s / 3):
            fence = await _create(store, key, value, lease)
        if fence is not None:
            won = Leadership(store, key, fence, lease, ttl_s, started_s + ttl_s)
        return won
    finally:
        if won is None:
            await _revoke(store, key, lease)


async def _create(store: Store, key: str, value: bytes, lease: int) -> Revision | None:
    """The key's create_revision, if it is ours now. Its lease tells: no other has the same."""
    while True:
        try:
            absent = ModRevisionIs(key, Revision(0))
            done = await store.txn([absent], [PutOp(key, value, lease)], [GetOp(key)])
        except Ambiguous:
            continue  # asked again, with the same lease: it cannot happen twice
        if done.succeeded:
            return done.revision
        held = done.got[0]
        return held.create_revision if held is not None and held.lease == lease else None


async def _revoke(store: Store, key: str, lease: int) -> None:
    try:
        async with asyncio.timeout(RESIGN_S):
            await store.lease_revoke(lease)
    except (StoreError, TimeoutError) as exc:
        log.info("leadership_left_to_expire", key=key, error=repr(exc))


def clock_s() -> float:
    return asyncio.get_running_loop().time()


def backoff_s(rng: random.Random, failures: int) -> float:
    return rng.uniform(0.5, 1.0) * min(BACKOFF_MAX_S, 0.05 * 2.0 ** min(failures, 6))
