"""A lease kept alive, and this node's keys under it.

Two tasks: one keeps the lease, one writes the keys, so that a slow write never costs the lease.
Callers only say what the keys should hold; the writer compares that with what it knows to be
written under the present lease and does the difference, and again after every surprise.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType

import structlog

from registry.names import Revision
from registry.store import (
    DeleteOp,
    GetOp,
    LeaseNotFound,
    ModRevisionIs,
    Op,
    PutOp,
    Store,
    StoreError,
)

log = structlog.get_logger("registry.session")

_CLOCK_STEP_S = 0.001
"""uvloop's clock counts milliseconds: what is nearer than one cannot be waited for."""


@dataclass(slots=True)
class Counters:
    """For metrics. All grow only."""

    grants: int = 0
    losses: int = 0
    """Leases that ended against our will, by etcd's word or by our clock."""
    writes: int = 0
    rewrites: int = 0
    """Keys found missing or foreign under a living lease, and put again."""
    failures: int = 0
    """Attempts to write a key or to renew that failed."""


@dataclass(slots=True)
class _Written:
    """What the writer knows of one key."""

    revision: Revision = Revision(0)
    """The key's mod_revision as last seen; 0: not there, or never looked."""
    value: bytes | None = None
    lease: int = 0


class Session:
    """The node's presence in etcd. Loop-bound; `set` and `remove` never block and never fail."""

    def __init__(
        self,
        store: Store,
        ttl_s: int = 10,
        *,
        now_s: Callable[[], float] | None = None,
        rng: random.Random | None = None,
    ) -> None:
        """ttl_s: the lease's life after its last renewal, in whole seconds as etcd counts.
        now_s: a monotonic clock, the event loop's by default."""
        self.counters = Counters()
        self._store = store
        self._ttl_s = ttl_s
        self._now_s = now_s
        self._rng = rng or random.Random()
        self._wanted: dict[str, bytes] = {}
        self._written: dict[str, _Written] = {}
        """Every key that may exist because of us: those wanted, and removed ones until deleted."""
        self._lease = 0
        self._expires_s = 0.0
        """By our clock: the start of the last successful renewal + TTL. etcd's own is later."""
        self._failing: set[str] = set()
        """What was logged as failing and has not succeeded since."""
        self._lost = asyncio.Event()
        self._wake = asyncio.Event()
        self._settled = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    # --- what callers see -------------------------------------------------------------------

    @property
    def has_lease(self) -> bool:
        """Whether others may still count on us. True only while our own clock agrees."""
        return self._lease != 0 and self._clock_s() < self._expires_s

    @property
    def lease(self) -> int:
        """The lease's id, 0 without one."""
        return self._lease if self.has_lease else 0

    @property
    def lease_remaining_s(self) -> float:
        return max(0.0, self._expires_s - self._clock_s()) if self._lease else 0.0

    @property
    def ttl_s(self) -> int:
        return self._ttl_s

    def set(self, key: str, value: bytes) -> None:
        """Want ``key`` to hold ``value`` for as long as we live. The newest wish wins."""
        if self._wanted.get(key) != value:
            self._wanted[key] = value
            self._stir()

    def remove(self, key: str) -> None:
        """Want ``key`` gone; nothing happens when it was never set."""
        if self._wanted.pop(key, None) is not None:
            self._stir()

    async def settled(self, timeout_s: float) -> bool:
        """Whether every wish is written under the present lease, waiting at most ``timeout_s``."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._settled.wait()
        return self._settled.is_set()

    async def __aenter__(self) -> Session:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self.stop()

    async def start(self) -> None:
        """Begin. Does not wait for etcd, which may be away."""
        if not self._tasks:
            self._tasks = [
                asyncio.create_task(self._keep_lease(), name="session-lease"),
                asyncio.create_task(self._write_keys(), name="session-keys"),
            ]

    async def stop(self, timeout_s: float = 2.0) -> None:
        """End, and revoke the lease so that the keys vanish at once rather than after the TTL.

        Returns within ``timeout_s`` even if etcd is away; then the lease ends by itself.
        """
        tasks, self._tasks = self._tasks, []
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        lease, self._lease = self._lease, 0
        self._settled.clear()
        if lease:
            try:
                async with asyncio.timeout(timeout_s):
                    await self._store.lease_revoke(lease)
            except (StoreError, TimeoutError) as exc:
                log.warning("lease_left_to_expire", lease=f"{lease:x}", error=repr(exc))

    # --- the lease --------------------------------------------------------------------------

    async def _keep_lease(self) -> None:
        failures = 0
        while True:
            self._lost.clear()
            if not self._lease:
                done = await self._grant()
            else:
                done = await self._renew()
                if done:
                    await self._check_keys()
            failures = 0 if done else failures + 1
            if done:
                await self._sleep_unless_lost(self._expires_s - self._ttl_s * 2 / 3)
            elif self._lease:
                next_s = self._clock_s() + self._backoff_s(failures)
                await self._sleep_unless_lost(min(next_s, self._expires_s))
            else:
                await asyncio.sleep(self._backoff_s(failures))

    async def _sleep_unless_lost(self, until_s: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(max(0.0, until_s - self._clock_s())):
                await self._lost.wait()

    async def _grant(self) -> bool:
        started_s = self._clock_s()
        try:
            async with asyncio.timeout(self._ttl_s / 3):
                lease = await self._store.lease_grant(self._ttl_s)
        except (StoreError, TimeoutError) as exc:
            self._failed("lease_not_granted", exc)
            return False
        self._lease, self._expires_s = lease, started_s + self._ttl_s
        self.counters.grants += 1
        self._failing.clear()
        log.info("lease_granted", lease=f"{lease:x}", ttl_s=self._ttl_s)
        self._stir()
        return True

    async def _renew(self) -> bool:
        """One renewal; ends the lease when etcd says so or when our clock does."""
        started_s = self._clock_s()
        # No later than the lease itself: by then it has to be given up and asked for anew.
        patience_s = min(self._ttl_s / 3, self._expires_s - started_s)
        try:
            if patience_s <= _CLOCK_STEP_S:
                raise LeaseNotFound("no renewal within the TTL, by our clock")
            async with asyncio.timeout(patience_s):
                await self._store.lease_keepalive(self._lease)
        except LeaseNotFound as exc:
            self._lose(str(exc))
            return False
        except (StoreError, TimeoutError) as exc:
            self._failed("lease_not_renewed", exc)
            if self._clock_s() >= self._expires_s - _CLOCK_STEP_S:
                self._lose("no renewal within the TTL, by our clock")
            return False
        self._expires_s = started_s + self._ttl_s
        self._failing.discard("lease_not_renewed")
        return True

    async def _check_keys(self) -> None:
        """Notice keys that somebody deleted, or overwrote without our lease: one call for all."""
        lease = self._lease
        under_lease_before = {key for key, seen in self._written.items() if seen.lease == lease}
        try:
            async with asyncio.timeout(self._ttl_s / 3):
                attached = await self._store.lease_keys(lease)
        except LeaseNotFound as exc:
            self._lose(str(exc))
            return
        except (StoreError, TimeoutError) as exc:
            self._failed("lease_keys_not_read", exc)
            return
        for key in under_lease_before - attached:
            seen = self._written.get(key)
            if seen is not None and seen.lease == lease and key in self._wanted:
                log.warning("key_lost", key=key, lease=f"{lease:x}")
                self.counters.rewrites += 1
                seen.lease = 0
                self._stir()
        for key in attached - self._wanted.keys() - self._written.keys():
            # The creation of a key that was deleted since: its answer was lost, it came late, and
            # there was no revision left to tell it from a new one.
            log.warning("key_came_late", key=key, lease=f"{lease:x}")
            self._written[key] = _Written()
            self._stir()

    def _lose(self, why: str) -> None:
        log.warning("lease_lost", lease=f"{self._lease:x}", why=why)
        self._lease = 0
        self.counters.losses += 1
        self._lost.set()
        self._settled.clear()

    # --- the keys ---------------------------------------------------------------------------

    async def _write_keys(self) -> None:
        failures = 0
        while True:
            self._wake.clear()
            failed = False
            for key in (*self._wanted, *self._removed()):
                # Everything is looked up here and now: it may have changed at any await.
                if self._lease and not self._is_right(key):
                    failed = not await self._write(key) or failed
            if failed:
                failures += 1
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(self._backoff_s(failures)):
                        await self._wake.wait()
                continue
            failures = 0
            if not self._wake.is_set():
                if self._lease:
                    self._settled.set()
                await self._wake.wait()

    def _removed(self) -> list[str]:
        return [key for key in self._written if key not in self._wanted]

    def _is_right(self, key: str) -> bool:
        seen = self._written.get(key)
        if key not in self._wanted:
            return seen is None
        return seen is not None and seen.value == self._wanted[key] and seen.lease == self._lease

    async def _write(self, key: str) -> bool:
        """Bring one key to what is wanted; ``False`` when it has to be tried again.

        By compare-and-swap on the revision last seen: a write whose answer was lost and that
        arrives late must not undo a newer one. We are the only rightful writer, so whatever else
        stands there is overwritten, at the revision at which it was seen.
        """
        seen = self._written.setdefault(key, _Written())
        value, lease = self._wanted.get(key), self._lease
        op: Op = DeleteOp(key) if value is None else PutOp(key, value, lease)
        try:
            done = await self._store.txn([ModRevisionIs(key, seen.revision)], [op], [GetOp(key)])
        except LeaseNotFound as exc:
            if self._lease == lease:
                self._lose(str(exc))
            return False
        except StoreError as exc:
            self._failed("key_not_written", exc, key=key)
            return False
        if done.succeeded:
            self.counters.writes += 1
            self._failing.discard("key_not_written")
            if value is None:
                self._forget(key)
            else:
                seen.revision, seen.value, seen.lease = done.revision, value, lease
            return True
        current = done.got[0]
        if current is None:
            seen.revision, seen.value, seen.lease = Revision(0), None, 0
            if value is None:
                self._forget(key)
                return True
        else:
            seen.revision, seen.value = current.mod_revision, current.value
            seen.lease = current.lease
        # Perhaps it is ours, from an answer that was lost; else the next round has the revision.
        if not self._is_right(key):
            self._wake.set()
        return True

    def _forget(self, key: str) -> None:
        self._written.pop(key, None)

    # --- small things -----------------------------------------------------------------------

    def _stir(self) -> None:
        self._settled.clear()
        self._wake.set()

    def _failed(self, event: str, exc: Exception, **fields: str) -> None:
        self.counters.failures += 1
        if event not in self._failing:
            self._failing.add(event)
            log.info(event, error=repr(exc), **fields)

    def _backoff_s(self, failures: int) -> float:
        """Jittered and short: registration has to be back within two seconds of etcd's return."""
        return self._rng.uniform(0.5, 1.0) * min(1.0, 0.1 * 2.0 ** min(failures, 5))

    def _clock_s(self) -> float:
        return asyncio.get_running_loop().time() if self._now_s is None else self._now_s()
