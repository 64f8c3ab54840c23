"""What was written and what was seen while etcd was harmed, and whether both agree.

The truth is etcd's own history, read once all is well again. Watchers must have seen exactly that;
a write that was confirmed must be in it exactly once.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from registry.cas import Conflict, put_if
from registry.names import Revision
from registry.store import Ambiguous, Batch, Listing, Put, Store, Unavailable
from tests.eventually import eventually

PREFIX = "/fault/"


@dataclass
class History:
    """One writer and its watchers."""

    start: Listing
    confirmed: list[tuple[Revision, bytes]] = field(default_factory=list[tuple[Revision, bytes]])
    seen: list[list[Batch]] = field(default_factory=list[list[Batch]])
    """By watcher."""
    stop: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def written(self) -> int:
        return len(self.confirmed)

    async def until_written(self, more: int, *, within_s: float) -> None:
        """Until ``more`` writes were confirmed from now on."""
        wanted = self.written + more
        await eventually(
            lambda: self.written >= wanted, within_s=within_s, what=f"{more} more writes"
        )

    async def until_seen(self, *, within_s: float) -> None:
        """Until every watcher has seen the last confirmed write."""
        head = self.confirmed[-1][0]
        await eventually(
            lambda: all(bool(seen) and seen[-1].revision >= head for seen in self.seen),
            within_s=within_s,
            what=f"all watchers at {head}",
        )

    async def check(self, healthy: Store) -> None:
        """Compare with etcd's history, read by a new watch from the start."""
        await self.until_seen(within_s=20)
        head = (await healthy.list_prefix(PREFIX)).revision
        truth: list[Batch] = []
        async with asyncio.timeout(10):
            async for batch in healthy.watch_prefix(PREFIX, known=self.start):
                truth.append(batch)
                if batch.revision >= self.confirmed[-1][0]:
                    break
        for index, seen in enumerate(self.seen):
            upto = [batch for batch in seen if batch.revision <= truth[-1].revision]
            assert upto == truth, f"watcher {index}: {_first_difference(upto, truth)}"
        values = [e.kv.value for batch in truth for e in batch.events if isinstance(e, Put)]
        assert len(values) == len(set(values)), "a write happened twice"
        at = {e.kv.value: b.revision for b in truth for e in b.events if isinstance(e, Put)}
        for revision, value in self.confirmed:
            assert at.get(value) == revision, f"{value!r} was confirmed at {revision}"
        assert truth[-1].revision <= head


def _first_difference(seen: list[Batch], truth: list[Batch]) -> str:
    for index, (a, b) in enumerate(zip(seen, truth, strict=False)):
        if a != b:
            return f"at {index}: saw {a}, want {b}"
    return f"saw {len(seen)} batches, want {len(truth)}"


@asynccontextmanager
async def history(writer: Store, *watchers: Store) -> AsyncIterator[History]:
    """A writer that never stops and a watch on each of ``watchers``, from one listing on."""
    record = History(await writer.list_prefix(PREFIX))
    tasks = [asyncio.create_task(_write(writer, record))]
    for store in watchers:
        seen: list[Batch] = []
        record.seen.append(seen)
        tasks.append(asyncio.create_task(_watch(store, record.start, seen)))
    try:
        await record.until_written(5, within_s=10)
        yield record
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def end_writing(record: History) -> None:
    """No further write begins; the one under way is finished."""
    record.stop.set()
    await asyncio.sleep(0.05)


async def _write(store: Store, record: History) -> None:
    revisions: dict[str, Revision] = {kv.key: kv.mod_revision for kv in record.start.kvs}
    number = 0
    while not record.stop.is_set():
        number += 1
        key, value = f"{PREFIX}{number % 5}", f"{record.start.revision}-{number}".encode()
        expected = revisions.get(key, Revision(0))
        while True:
            try:
                done = await put_if(store, key, value, expected, retry_s=60)
                break
            except (Ambiguous, Unavailable):
                continue
        assert not isinstance(done, Conflict), f"nobody else writes {key}: {done}"
        revisions[key] = done
        record.confirmed.append((done, value))
        await asyncio.sleep(0.01)


async def _watch(store: Store, start: Listing, seen: list[Batch]) -> None:
    async for batch in store.watch_prefix(PREFIX, known=start):
        seen.append(batch)  # noqa: PERF401 the list is looked at while it grows
