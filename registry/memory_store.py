"""A Store in memory: the same contract as etcd's, with faults on demand.

One `MemoryCluster` is the truth; every node of a simulation has its own `MemoryStore` on it, so
one can be cut off while another writes. Time is the event loop's (virtual in tests that make it
so) unless a clock is given; then leases expire when `MemoryCluster.tick` is called.
"""

from __future__ import annotations

import asyncio
from bisect import bisect_right
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import groupby
from typing import Literal, TypeVar

from registry.known import Known
from registry.names import Revision
from registry.store import (
    Ambiguous,
    Batch,
    Compare,
    CreateRevisionIs,
    Delete,
    DeleteOp,
    Event,
    GetOp,
    KeyValue,
    LeaseNotFound,
    Listing,
    ModRevisionIs,
    Op,
    Put,
    PutOp,
    StoreRefused,
    TxnResult,
    Unavailable,
)

T = TypeVar("T")

INF_S = float("inf")
MAX_REQUEST_BYTES = 1536 * 1024
"""etcd's default for --max-request-bytes."""

Fate = Literal["applied", "lost", "late"]
"""What really happened to a write whose answer was lost; a late one waits in some member's queue
until `MemoryStore.deliver_late`."""


@dataclass(slots=True)
class _Lease:
    ttl_s: int
    expires_s: float
    keys: set[str] = field(default_factory=set[str])


class MemoryCluster:
    """The keys, their history and the leases. Everything here happens at once, as in raft."""

    def __init__(self, *, now_s: Callable[[], float] | None = None) -> None:
        """now_s: a monotonic clock; with one, nothing expires by itself (see `tick`)."""
        self.revision = Revision(1)
        self.compacted = Revision(0)
        self._now_s = now_s
        self._kvs: dict[str, KeyValue] = {}
        self._history: list[Event] = []
        self._leases: dict[int, _Lease] = {}
        self._next_lease = 1
        self._expiry_s = INF_S
        """No lease ends before."""
        self._listeners: dict[str, dict[asyncio.Event, None]] = {}
        """By prefix, in order of arrival: a fleet's watches are many, their prefixes few."""
        self._told: dict[str, list[Event]] = {}
        """The part of history under each prefix that was ever watched."""

    # --- keys -------------------------------------------------------------------------------

    def get(self, key: str) -> KeyValue | None:
        return self._kvs.get(key)

    def list_prefix(self, prefix: str) -> Listing:
        found = sorted(key for key in self._kvs if key.startswith(prefix))
        return Listing(tuple(self._kvs[key] for key in found), self.revision)

    def apply(self, ops: Sequence[Op]) -> tuple[KeyValue | None, ...]:
        """Do ``ops`` as one revision, or raise `LeaseNotFound`, `StoreRefused` and do nothing."""
        written = [op.key for op in ops if not isinstance(op, GetOp)]
        if any(times > 1 for times in Counter(written).values()):
            raise StoreRefused("Txn: duplicate key given in txn request")
        if sum(len(op.value) for op in ops if isinstance(op, PutOp)) > MAX_REQUEST_BYTES:
            raise StoreRefused("request is too large")
        for op in ops:
            if isinstance(op, PutOp) and op.lease and op.lease not in self._leases:
                raise LeaseNotFound("requested lease not found")
        revision = Revision(self.revision + 1)
        got: list[KeyValue | None] = []
        events: list[Event] = []
        for op in ops:
            if isinstance(op, GetOp):
                got.append(self._kvs.get(op.key))
            elif isinstance(op, PutOp):
                events.append(self._put(op, revision))
            elif op.key in self._kvs:
                events.append(self._delete(op.key, revision))
        self._record(revision, events)
        return tuple(got)

    def holds(self, compare: Compare) -> bool:
        kv = self._kvs.get(compare.key)
        if isinstance(compare, ModRevisionIs):
            return (kv.mod_revision if kv else 0) == compare.revision
        if isinstance(compare, CreateRevisionIs):
            return (kv.create_revision if kv else 0) == compare.revision
        return kv is not None and kv.value == compare.value

    def _put(self, op: PutOp, revision: Revision) -> Put:
        old = self._kvs.get(op.key)
        if old is not None and old.lease in self._leases:
            self._leases[old.lease].keys.discard(op.key)
        if op.lease:
            self._leases[op.lease].keys.add(op.key)
        created, version = (old.create_revision, old.version) if old else (revision, 0)
        kv = KeyValue(op.key, op.value, revision, created, version + 1, op.lease)
        self._kvs[op.key] = kv
        return Put(kv)

    def _delete(self, key: str, revision: Revision) -> Delete:
        lease = self._leases.get(self._kvs.pop(key).lease)
        if lease is not None:
            lease.keys.discard(key)
        return Delete(key, revision)

    def _record(self, revision: Revision, events: Sequence[Event]) -> None:
        if events:
            self.revision = revision
            self._history.extend(events)
            for prefix, wakes in self._listeners.items():
                under = [event for event in events if event_key(event).startswith(prefix)]
                if under:
                    self._told[prefix].extend(under)
                    for wake in wakes:
                        wake.set()

    # --- history ----------------------------------------------------------------------------

    def since(self, prefix: str, after: Revision) -> list[Batch] | None:
        """What happened under ``prefix`` after ``after``; ``None`` when that was compacted away."""
        if after + 1 < self.compacted:
            return None
        told = self._told.get(prefix)
        if told is None:
            told = [event for event in self._history if event_key(event).startswith(prefix)]
        events = told[bisect_right(told, after, key=event_revision) :]
        return [
            Batch(revision, tuple(same)) for revision, same in groupby(events, key=event_revision)
        ]

    def compact(self, revision: Revision | None = None) -> None:
        """Forget everything before ``revision`` (the present one by default)."""
        self.compacted = self.revision if revision is None else revision
        for kept in (self._history, *self._told.values()):
            kept[:] = [event for event in kept if event_revision(event) >= self.compacted]

    def listen(self, wake: asyncio.Event, prefix: str) -> None:
        """Set ``wake`` at every change under ``prefix``."""
        if prefix not in self._listeners:
            self._listeners[prefix] = {}
            self._told[prefix] = [
                event for event in self._history if event_key(event).startswith(prefix)
            ]
        self._listeners[prefix][wake] = None

    def unlisten(self, wake: asyncio.Event, prefix: str) -> None:
        self._listeners[prefix].pop(wake, None)

    # --- leases -----------------------------------------------------------------------------

    def grant(self, ttl_s: int) -> int:
        lease, self._next_lease = self._next_lease, self._next_lease + 1
        self._leases[lease] = _Lease(ttl_s, self.now_s() + ttl_s)
        self._expiry_s = min(self._expiry_s, self._leases[lease].expires_s)
        self._watch_over(ttl_s)
        return lease

    def renew(self, lease: int) -> float:
        found = self._living(lease)
        found.expires_s = self.now_s() + found.ttl_s
        self._watch_over(found.ttl_s)
        return float(found.ttl_s)

    def lease_keys(self, lease: int) -> frozenset[str]:
        return frozenset(self._living(lease).keys)

    def revoke(self, lease: int) -> None:
        if lease in self._leases:
            keys = sorted(self._leases[lease].keys)
            self.apply([DeleteOp(key) for key in keys])
            del self._leases[lease]

    def revoke_all(self) -> None:
        """Every lease vanishes at once, as etcd#15247 did to people."""
        for lease in list(self._leases):
            self.revoke(lease)

    def tick(self) -> None:
        """End the leases whose time is over."""
        now_s = self.now_s()
        if now_s < self._expiry_s:
            return
        for lease, found in list(self._leases.items()):
            if found.expires_s <= now_s:
                self.revoke(lease)
        self._expiry_s = min((each.expires_s for each in self._leases.values()), default=INF_S)

    def now_s(self) -> float:
        return asyncio.get_running_loop().time() if self._now_s is None else self._now_s()

    def _living(self, lease: int) -> _Lease:
        self.tick()
        found = self._leases.get(lease)
        if found is None:
            raise LeaseNotFound(f"lease {lease:x} is gone")
        return found

    def _watch_over(self, ttl_s: float) -> None:
        if self._now_s is None:
            asyncio.get_running_loop().call_later(ttl_s, self.tick)


@dataclass(slots=True)
class Faults:
    """What is wrong with one client's way to the cluster. Changing a field takes effect at once,
    but for a watch that waits: call `MemoryStore.heal` or `MemoryStore.cut_watches` after it."""

    unavailable: bool = False
    """Calls raise `Unavailable`, watches stand still."""
    ambiguous: list[Fate] = field(default_factory=list[Fate])
    """The fate of the next writes, in order; each raises `Ambiguous`."""
    before: Callable[[str], Awaitable[None]] | None = None
    """Awaited before each call and each delivered batch, with its name: delays, interleavings."""
    after: Callable[[str], Awaitable[None]] | None = None
    """Awaited after each call took effect and before its answer."""


class MemoryStore:
    """One client of a `MemoryCluster`; `registry.store.Store` says what it does."""

    def __init__(self, cluster: MemoryCluster | None = None) -> None:
        self.cluster = cluster or MemoryCluster()
        self.faults = Faults()
        self.watch_restarts: Counter[str] = Counter()
        self._cuts = 0
        self._late: list[Callable[[], object]] = []
        self._wakes: dict[asyncio.Event, None] = {}

    def client(self) -> MemoryStore:
        """Another client of the same cluster, with its own faults."""
        return MemoryStore(self.cluster)

    # --- faults -----------------------------------------------------------------------------

    def cut_off(self) -> None:
        self.faults.unavailable = True

    def heal(self) -> None:
        self.faults = Faults()
        self._wake_watches()

    def cut_watches(self) -> None:
        """Break every stream; each resumes where it stood, or lists again when that is gone."""
        self._cuts += 1
        self._wake_watches()

    def deliver_late(self) -> None:
        """The writes of fate ``late`` arrive now, after whatever was written meanwhile."""
        late, self._late = self._late, []
        for do in late:
            with suppress(LeaseNotFound):
                do()

    def _wake_watches(self) -> None:
        for wake in self._wakes:
            wake.set()

    async def _call(self, name: str, do: Callable[[], T], *, is_write: bool = False) -> T:
        await self._before(name)
        if self.faults.unavailable:
            raise Unavailable(f"{name}: cut off")
        self.cluster.tick()
        if is_write and self.faults.ambiguous:
            fate = self.faults.ambiguous.pop(0)
            if fate == "applied":
                do()
            elif fate == "late":
                self._late.append(do)
            raise Ambiguous(f"{name}: the answer was lost")
        result = do()
        if self.faults.after is not None:
            await self.faults.after(name)
        return result

    async def _before(self, name: str) -> None:
        # Always lets others run: with real etcd every call does.
        await asyncio.sleep(0)
        if self.faults.before is not None:
            await self.faults.before(name)

    # --- keys -------------------------------------------------------------------------------

    async def get(self, key: str) -> KeyValue | None:
        return await self._call("get", lambda: self.cluster.get(key))

    async def list_prefix(self, prefix: str) -> Listing:
        return await self._call("list_prefix", lambda: self.cluster.list_prefix(prefix))

    async def put(self, key: str, value: bytes, *, lease: int = 0) -> Revision:
        def do() -> Revision:
            self.cluster.apply([PutOp(key, value, lease)])
            return self.cluster.revision

        return await self._call("put", do, is_write=True)

    async def delete(self, key: str) -> bool:
        return await self._call("delete", lambda: self._delete([key]) > 0, is_write=True)

    async def delete_prefix(self, prefix: str) -> int:
        def do() -> int:
            return self._delete([kv.key for kv in self.cluster.list_prefix(prefix).kvs])

        return await self._call("delete_prefix", do, is_write=True)

    def _delete(self, keys: Sequence[str]) -> int:
        there = [key for key in keys if self.cluster.get(key) is not None]
        self.cluster.apply([DeleteOp(key) for key in there])
        return len(there)

    async def txn(
        self,
        compares: Sequence[Compare],
        success: Sequence[Op] = (),
        failure: Sequence[Op] = (),
    ) -> TxnResult:
        def do() -> TxnResult:
            succeeded = all(self.cluster.holds(compare) for compare in compares)
            got = self.cluster.apply(success if succeeded else failure)
            return TxnResult(succeeded, self.cluster.revision, got)

        writes = any(not isinstance(op, GetOp) for op in (*success, *failure))
        return await self._call("txn", do, is_write=writes)

    # --- watch ------------------------------------------------------------------------------

    async def watch_prefix(
        self, prefix: str, *, known: Listing | None = None
    ) -> AsyncIterator[Batch]:
        wake = asyncio.Event()
        self.cluster.listen(wake, prefix)
        self._wakes[wake] = None
        try:
            listing = known
            if listing is None:
                listing = await self._list_until_answered(prefix, wake)
                yield Batch(listing.revision, tuple(map(Put, listing.kvs)))
            seen = Known(listing)
            while True:
                wake.clear()
                cuts = self._cuts
                batches = [] if self.faults.unavailable else self._since(prefix, seen)
                for batch in batches:
                    await self._before("watch")
                    if self.faults.unavailable or cuts != self._cuts:
                        # Cut in the middle: the rest is asked for again from where we stand.
                        self.watch_restarts["broken"] += 1
                        break
                    seen.note(batch)
                    if batch.events:
                        yield batch
                else:
                    await wake.wait()
        finally:
            self.cluster.unlisten(wake, prefix)
            self._wakes.pop(wake, None)

    async def _list_until_answered(self, prefix: str, wake: asyncio.Event) -> Listing:
        while True:
            wake.clear()
            try:
                return await self.list_prefix(prefix)
            except Unavailable:
                await wake.wait()

    def _since(self, prefix: str, seen: Known) -> list[Batch]:
        batches = self.cluster.since(prefix, seen.revision)
        if batches is not None:
            return batches
        self.watch_restarts["compacted"] += 1
        return [seen.difference(self.cluster.list_prefix(prefix))]

    # --- leases -----------------------------------------------------------------------------

    async def lease_grant(self, ttl_s: int) -> int:
        return await self._call("lease_grant", lambda: self.cluster.grant(ttl_s))

    async def lease_keepalive(self, lease: int) -> float:
        return await self._call("lease_keepalive", lambda: self.cluster.renew(lease))

    async def lease_keys(self, lease: int) -> frozenset[str]:
        return await self._call("lease_keys", lambda: self.cluster.lease_keys(lease))

    async def lease_revoke(self, lease: int) -> None:
        await self._call("lease_revoke", lambda: self.cluster.revoke(lease))

    async def close(self) -> None:
        self.cut_watches()


def event_revision(event: Event) -> Revision:
    return event.kv.mod_revision if isinstance(event, Put) else event.mod_revision


def event_key(event: Event) -> str:
    return event.kv.key if isinstance(event, Put) else event.key
