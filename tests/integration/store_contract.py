"""What every Store promises. Each implementation runs all of it (test_store_*.py)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

import pytest

from registry.cas import Conflict, create_if_absent, put_if, update
from registry.names import Revision
from registry.store import (
    Batch,
    CreateRevisionIs,
    Delete,
    DeleteOp,
    GetOp,
    LeaseNotFound,
    Listing,
    ModRevisionIs,
    Put,
    PutOp,
    Store,
    StoreRefused,
    ValueIs,
)
from tests.eventually import eventually


@dataclass
class World:
    """A store under test, and what is done to it from outside."""

    store: Store
    client: Callable[[], Store]
    """Another client of the same cluster."""
    compact: Callable[[Revision], Awaitable[None]]
    break_watches: Callable[[], None]
    """Every stream of ``store`` ends."""


def words(batch: Batch) -> tuple[str, ...]:
    """``+key=value`` and ``-key``, in order."""
    return tuple(
        f"+{event.kv.key}={event.kv.value.decode()}" if isinstance(event, Put) else f"-{event.key}"
        for event in batch.events
    )


@asynccontextmanager
async def watching(
    store: Store, prefix: str, known: Listing | None = None
) -> AsyncIterator[list[Batch]]:
    """The batches as they come, in a list that grows."""
    seen: list[Batch] = []

    async def collect() -> None:
        async for batch in store.watch_prefix(prefix, known=known):
            seen.append(batch)  # noqa: PERF401 what came before the end is looked at meanwhile

    task = asyncio.create_task(collect())
    try:
        yield seen
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def until_seen(seen: list[Batch], count: int, within_s: float = 10.0) -> None:
    await eventually(lambda: len(seen) >= count, within_s=within_s, what=f"{count} batches: {seen}")


class StoreContract:
    """Subclasses give the fixture ``world``; every test has an empty store."""

    async def test_a_key_is_absent_until_put_and_knows_its_revisions(self, world: World) -> None:
        store = world.store
        assert await store.get("/k") is None
        first = await store.put("/k", b"one")
        second = await store.put("/k", b"")
        assert second > first
        kv = await store.get("/k")
        assert kv is not None
        assert (kv.key, kv.value, kv.lease) == ("/k", b"", 0)
        assert (kv.create_revision, kv.mod_revision, kv.version) == (first, second, 2)

    async def test_values_are_bytes_and_keys_are_text(self, world: World) -> None:
        value = bytes(range(256))
        await world.store.put("/模型/ü", value)
        kv = await world.store.get("/模型/ü")
        assert kv is not None
        assert kv.value == value

    async def test_a_listing_is_sorted_whole_and_of_one_revision(self, world: World) -> None:
        store = world.store
        await store.put("/lis", b"not under the prefix")
        await store.put("/list0", b"not under the prefix either: 0 comes after /")
        for start in range(0, 2300, 100):
            ops = [PutOp(f"/list/{n:05}", b"%d" % n) for n in range(start, start + 100)]
            done = await store.txn([], ops)
        listing = await store.list_prefix("/list/")
        assert [kv.key for kv in listing.kvs] == [f"/list/{n:05}" for n in range(2300)]
        assert listing.revision == done.revision

    async def test_the_empty_prefix_lists_everything(self, world: World) -> None:
        await world.store.put("a", b"")
        await world.store.put("z", b"")
        listing = await world.store.list_prefix("")
        assert [kv.key for kv in listing.kvs] == ["a", "z"]

    async def test_delete_says_whether_there_was_something(self, world: World) -> None:
        store = world.store
        await store.put("/d/1", b"")
        await store.put("/d/2", b"")
        await store.put("/e", b"")
        assert await store.delete("/d/1") is True
        assert await store.delete("/d/1") is False
        assert await store.delete_prefix("/d/") == 1
        assert await store.delete_prefix("/d/") == 0
        assert await store.get("/e") is not None

    async def test_a_transaction_takes_one_branch_whole(self, world: World) -> None:
        store = world.store
        put = await store.put("/t", b"old")
        taken = await store.txn(
            [ModRevisionIs("/t", put), CreateRevisionIs("/t", put), ValueIs("/t", b"old")],
            [GetOp("/t"), PutOp("/t2", b"new"), DeleteOp("/t"), GetOp("/none")],
            [PutOp("/never", b"")],
        )
        assert taken.succeeded
        assert [kv and kv.value for kv in taken.got] == [b"old", None]
        assert taken.revision == put + 1
        refused = await store.txn(
            [ValueIs("/t2", b"new"), ModRevisionIs("/t", put)],
            [PutOp("/never", b"")],
            [GetOp("/t2")],
        )
        assert not refused.succeeded
        assert [kv and kv.value for kv in refused.got] == [b"new"]
        assert await store.get("/never") is None
        assert refused.revision == taken.revision

    async def test_a_key_twice_in_one_transaction_is_refused(self, world: World) -> None:
        with pytest.raises(StoreRefused):
            await world.store.txn([], [PutOp("/twice", b"1"), PutOp("/twice", b"2")])
        assert await world.store.get("/twice") is None

    @pytest.mark.parametrize("size_bytes", [1_700_000, 5_000_000])
    async def test_a_value_too_large_is_refused_for_good(
        self, world: World, size_bytes: int
    ) -> None:
        with pytest.raises(StoreRefused):
            await world.store.put("/large", b"x" * size_bytes)
        assert await world.store.get("/large") is None

    # --- compare-and-swap -----------------------------------------------------------------------

    async def test_of_two_creators_one_wins(self, world: World) -> None:
        stores = [world.store, *(world.client() for _ in range(3))]
        won = await asyncio.gather(
            *(create_if_absent(s, "/new", b"%d" % n) for n, s in enumerate(stores))
        )
        assert sum(won) == 1
        kv = await world.store.get("/new")
        assert kv is not None
        assert kv.value == b"%d" % won.index(True)

    async def test_a_stale_revision_conflicts_and_shows_what_stands(self, world: World) -> None:
        first = await world.store.put("/doc", b"1")
        second = await put_if(world.store, "/doc", b"2", first)
        assert isinstance(second, int)
        stale = await put_if(world.store, "/doc", b"3", first)
        assert isinstance(stale, Conflict)
        assert stale.current is not None
        assert (stale.current.value, stale.current.mod_revision) == (b"2", second)

    async def test_updates_of_many_writers_all_count(self, world: World) -> None:
        async def add_ten(store: Store) -> None:
            for _ in range(10):
                await update(
                    store, "/sum", lambda kv: b"%d" % (int(kv.value) + 1 if kv is not None else 1)
                )

        await asyncio.gather(add_ten(world.store), add_ten(world.client()), add_ten(world.client()))
        kv = await world.store.get("/sum")
        assert kv is not None
        assert kv.value == b"30"

    # --- watches ----------------------------------------------------------------------------

    async def test_a_watch_lists_then_follows(self, world: World) -> None:
        store = world.store
        await store.put("/w/a", b"1")
        async with watching(store, "/w/") as seen:
            await until_seen(seen, 1)
            await store.put("/v", b"elsewhere")
            await store.put("/w/b", b"2")
            await store.delete("/w/a")
            await until_seen(seen, 3)
        assert [words(batch) for batch in seen] == [("+/w/a=1",), ("+/w/b=2",), ("-/w/a",)]
        assert seen[1].revision + 1 == seen[2].revision
        deleted = seen[2].events[0]
        assert isinstance(deleted, Delete)
        assert deleted.mod_revision == seen[2].revision

    async def test_a_watch_of_nothing_says_so_first(self, world: World) -> None:
        async with watching(world.store, "/nothing/") as seen:
            await until_seen(seen, 1)
        assert seen[0].events == ()

    async def test_a_watch_continues_after_a_listing(self, world: World) -> None:
        store = world.store
        await store.put("/w/a", b"1")
        known = await store.list_prefix("/w/")
        await store.put("/w/a", b"2")
        await store.put("/w/a", b"3")
        async with watching(store, "/w/", known) as seen:
            await until_seen(seen, 2)
        assert [words(batch) for batch in seen] == [("+/w/a=2",), ("+/w/a=3",)]

    async def test_events_of_one_revision_come_together(self, world: World) -> None:
        store = world.store
        await store.put("/w/old", b"")
        async with watching(store, "/w/") as seen:
            await until_seen(seen, 1)
            ops = [PutOp(f"/w/{n:03}", b"x") for n in range(100)]
            await store.txn([], [*ops, DeleteOp("/w/old")])
            await until_seen(seen, 2)
        assert len(seen[1].events) == 101
        assert words(seen[1])[-1] == "-/w/old"

    async def test_revisions_stay_whole_when_etcd_fragments_them(self, world: World) -> None:
        """A catch-up larger than a message: etcd cuts it wherever the message is full."""
        store = world.store
        known = await store.list_prefix("/w/")
        for n in range(5):
            await store.txn([], [PutOp(f"/w/{n}/{m}", b"%d" % m * 190_000) for m in range(7)])
        async with watching(store, "/w/", known) as seen:
            await until_seen(seen, 5)
        assert [len(batch.events) for batch in seen] == [7] * 5
        assert [batch.revision for batch in seen] == [known.revision + n for n in range(1, 6)]

    async def test_a_broken_watch_goes_on_where_it_stood(self, world: World) -> None:
        store, writer = world.store, world.client()
        async with watching(store, "/w/") as seen:
            await until_seen(seen, 1)
            for n in range(30):
                await writer.put(f"/w/{n % 7}", b"%d" % n)
                if n % 10 == 5:
                    world.break_watches()
            await until_seen(seen, 31)
        assert [words(batch) for batch in seen[1:]] == [(f"+/w/{n % 7}={n}",) for n in range(30)]

    async def test_after_a_compaction_the_difference_is_delivered(self, world: World) -> None:
        store = world.store
        for key in ("/w/changed", "/w/gone", "/w/same"):
            await store.put(key, b"1")
        known = await store.list_prefix("/w/")
        await store.put("/w/changed", b"2")
        await store.put("/w/changed", b"3")
        await store.put("/w/new", b"1")
        await store.put("/w/fleeting", b"1")
        await store.delete("/w/fleeting")
        await store.delete("/w/gone")
        head = await store.put("/elsewhere", b"")
        await world.compact(head)
        async with watching(store, "/w/", known) as seen:
            await until_seen(seen, 1)
            await store.put("/w/same", b"2")
            await until_seen(seen, 2)
        assert words(seen[0]) == ("-/w/gone", "+/w/changed=3", "+/w/new=1")
        assert seen[0].revision == head
        assert words(seen[1]) == ("+/w/same=2",)

    # --- leases -----------------------------------------------------------------------------

    async def test_keys_go_with_their_lease(self, world: World) -> None:
        store = world.store
        lease = await store.lease_grant(30)
        await store.put("/l/a", b"", lease=lease)
        await store.put("/l/b", b"", lease=lease)
        await store.put("/l/c", b"", lease=lease)
        await store.put("/l/c", b"now without")
        assert await store.lease_keys(lease) == {"/l/a", "/l/b"}
        assert 0 < await store.lease_keepalive(lease) <= 30
        async with watching(store, "/l/") as seen:
            await until_seen(seen, 1)
            await store.lease_revoke(lease)
            await eventually(
                lambda: {word for batch in seen[1:] for word in words(batch)} == {"-/l/a", "-/l/b"},
                within_s=5,
            )
        assert await store.get("/l/c") is not None

    async def test_a_lease_ends_without_renewal(self, world: World) -> None:
        store = world.store
        lease = await store.lease_grant(1)
        await store.put("/l/x", b"", lease=lease)

        async def gone() -> bool:
            return await store.get("/l/x") is None

        await eventually(gone, within_s=8)
        with pytest.raises(LeaseNotFound):
            await store.lease_keepalive(lease)

    async def test_a_lease_that_is_gone_says_so(self, world: World) -> None:
        store = world.store
        lease = await store.lease_grant(30)
        await store.lease_revoke(lease)
        await store.lease_revoke(lease)
        with pytest.raises(LeaseNotFound):
            await store.lease_keepalive(lease)
        with pytest.raises(LeaseNotFound):
            await store.lease_keys(lease)
        with pytest.raises(LeaseNotFound):
            await store.put("/l/y", b"", lease=lease)
        with pytest.raises(LeaseNotFound):
            await store.txn([], [PutOp("/l/y", b"", lease)])
        assert await store.get("/l/y") is None
