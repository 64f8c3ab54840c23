"""A session against the store in memory, on the loop's virtual time."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable

import pytest

from registry.memory_store import MemoryStore
from registry.session import Session
from registry.store import Put
from tests.eventually import eventually

pytestmark = pytest.mark.looptime

TTL_S = 9
NODE, STATUS = "/p/nodes/n1", "/p/status/m/n1"


def session_on(store: MemoryStore, **more: Callable[[], float]) -> Session:
    return Session(store, TTL_S, rng=random.Random(7), **more)


def value(store: MemoryStore, key: str) -> bytes | None:
    kv = store.cluster.get(key)
    return None if kv is None else kv.value


async def test_keys_are_there_while_the_session_lives_and_vanish_when_it_stops() -> None:
    store = MemoryStore()
    session = session_on(store)
    session.set(NODE, b"node")
    async with session:
        session.set(STATUS, b"status")
        assert await session.settled(1)
        assert session.has_lease
        assert (value(store, NODE), value(store, STATUS)) == (b"node", b"status")
        await asyncio.sleep(5 * TTL_S)
        assert (value(store, NODE), session.counters.grants) == (b"node", 1)
    assert not session.has_lease
    assert (value(store, NODE), value(store, STATUS)) == (None, None)


async def test_a_key_is_written_on_change_only() -> None:
    store = MemoryStore()
    async with session_on(store) as session:
        session.set(NODE, b"node")
        assert await session.settled(1)
        revision = store.cluster.revision
        for _ in range(20):
            session.set(NODE, b"node")
            await asyncio.sleep(1)
        assert store.cluster.revision == revision
        session.set(NODE, b"changed")
        assert await session.settled(1)
        assert store.cluster.revision == revision + 1


async def test_the_newest_of_many_wishes_wins() -> None:
    store = MemoryStore()
    async with session_on(store) as session:
        for n in range(100):
            session.set(STATUS, b"%d" % n)
        assert await session.settled(1)
        assert value(store, STATUS) == b"99"
        assert session.counters.writes < 5


async def test_a_removed_key_goes_and_the_others_stay() -> None:
    store = MemoryStore()
    async with session_on(store) as session:
        session.set(NODE, b"node")
        session.set(STATUS, b"status")
        assert await session.settled(1)
        session.remove(STATUS)
        session.remove("/never/set")
        assert await session.settled(1)
        assert (value(store, NODE), value(store, STATUS)) == (b"node", None)
        session.set(STATUS, b"again")
        assert await session.settled(1)
        assert value(store, STATUS) == b"again"


async def test_all_is_back_after_every_lease_vanished() -> None:
    store = MemoryStore()
    async with session_on(store) as session:
        session.set(NODE, b"node")
        session.set(STATUS, b"status")
        assert await session.settled(1)
        store.cluster.revoke_all()
        assert value(store, NODE) is None
        await eventually(
            lambda: (value(store, NODE), value(store, STATUS)) == (b"node", b"status"),
            within_s=TTL_S + 2,
        )
        assert (session.counters.losses, session.counters.grants) == (1, 2)


async def test_a_write_that_finds_the_lease_gone_brings_everything_back_at_once() -> None:
    store = MemoryStore()
    async with session_on(store) as session:
        session.set(NODE, b"node")
        assert await session.settled(1)
        store.cluster.revoke_all()
        session.set(STATUS, b"status")
        assert await session.settled(0.5)
        assert (value(store, NODE), value(store, STATUS)) == (b"node", b"status")


@pytest.mark.parametrize("harm", ["deleted", "overwritten"])
async def test_a_key_harmed_under_a_living_lease_is_put_again(harm: str) -> None:
    store = MemoryStore()
    other = store.client()
    async with session_on(store) as session:
        session.set(NODE, b"node")
        session.set(STATUS, b"status")
        assert await session.settled(1)
        status = store.cluster.get(STATUS)
        if harm == "deleted":
            await other.delete(NODE)
        else:
            await other.put(NODE, b"somebody else's")
        await eventually(lambda: value(store, NODE) == b"node", within_s=TTL_S)
        assert session.counters.rewrites == 1
        assert session.counters.losses == 0
        assert store.cluster.get(STATUS) == status


async def test_without_answers_the_lease_is_lost_by_our_own_clock() -> None:
    """The others must not count on a node that cannot know whether it still has its lease."""
    store = MemoryStore()
    async with session_on(store) as session:
        session.set(NODE, b"node")
        assert await session.settled(1)
        started_s = asyncio.get_running_loop().time()
        store.cut_off()
        await eventually(lambda: not session.has_lease, within_s=TTL_S + 1)
        gone_after_s = asyncio.get_running_loop().time() - started_s
        assert gone_after_s <= TTL_S
        await eventually(lambda: session.counters.losses == 1, within_s=1)
        await asyncio.sleep(30)
        assert value(store, NODE) is None
        store.heal()
        await eventually(lambda: value(store, NODE) == b"node", within_s=2)
        assert session.has_lease


async def test_a_cut_shorter_than_the_ttl_costs_nothing() -> None:
    store = MemoryStore()
    async with session_on(store) as session:
        session.set(NODE, b"node")
        assert await session.settled(1)
        for _ in range(5):
            store.cut_off()
            await asyncio.sleep(TTL_S / 2)
            store.heal()
            await asyncio.sleep(TTL_S / 2)
        assert session.counters.losses == 0
        assert value(store, NODE) == b"node"


async def test_renewals_that_hang_do_not_hold_the_lease_past_its_time() -> None:
    store = MemoryStore()

    async def hang(call: str) -> None:
        if call == "lease_keepalive":
            await asyncio.sleep(1000)

    async with session_on(store) as session:
        session.set(NODE, b"node")
        assert await session.settled(1)
        store.faults.before = hang
        await eventually(lambda: not session.has_lease, within_s=TTL_S)
        store.heal()
        assert await session.settled(2)
        assert session.has_lease


async def test_a_slow_write_does_not_cost_the_lease() -> None:
    store = MemoryStore()

    async def slow(call: str) -> None:
        if call == "txn":
            await asyncio.sleep(3 * TTL_S)

    async with session_on(store) as session:
        session.set(NODE, b"node")
        assert await session.settled(1)
        store.faults.before = slow
        session.set(STATUS, b"status")
        await asyncio.sleep(2 * TTL_S)
        assert session.has_lease
        assert session.counters.losses == 0


@pytest.mark.parametrize("fates", [["applied"], ["lost"], ["lost", "applied", "lost"]])
async def test_lost_answers_leave_the_newest_value(fates: list[str]) -> None:
    store = MemoryStore()
    async with session_on(store) as session:
        session.set(NODE, b"1")
        assert await session.settled(1)
        store.faults.ambiguous.extend(fates)  # type: ignore[arg-type]
        session.set(NODE, b"2")
        await asyncio.sleep(0)
        session.set(NODE, b"3")
        assert await session.settled(5)
        assert value(store, NODE) == b"3"


async def test_a_write_that_arrives_late_does_not_undo_a_newer_one() -> None:
    store = MemoryStore()
    async with session_on(store) as session:
        session.set(NODE, b"1")
        assert await session.settled(1)
        store.faults.ambiguous.append("late")
        session.set(NODE, b"2")
        await eventually(lambda: not store.faults.ambiguous, within_s=1)
        session.set(NODE, b"3")
        assert await session.settled(5)
        store.deliver_late()
        assert value(store, NODE) == b"3"


async def test_a_key_that_is_created_after_it_was_removed_goes_again() -> None:
    """A creation compares with no revision: late, it finds what it wants once the key is gone."""
    store = MemoryStore()
    async with session_on(store) as session:
        session.set(NODE, b"node")
        assert await session.settled(1)
        store.faults.ambiguous.append("late")
        session.set(STATUS, b"old")
        await eventually(lambda: not store.faults.ambiguous, within_s=1)
        assert await session.settled(5)  # written by the next attempt
        session.remove(STATUS)
        assert await session.settled(1)
        store.deliver_late()
        assert value(store, STATUS) == b"old"
        await eventually(lambda: value(store, STATUS) is None, within_s=TTL_S)
        assert value(store, NODE) == b"node"


async def test_stopping_while_etcd_is_away_is_bounded() -> None:
    store = MemoryStore()

    async def hang(_: str) -> None:
        await asyncio.sleep(1000)

    session = session_on(store)
    await session.start()
    session.set(NODE, b"node")
    assert await session.settled(1)
    store.faults.before = hang
    started_s = asyncio.get_running_loop().time()
    await session.stop(timeout_s=1.5)
    assert asyncio.get_running_loop().time() - started_s <= 1.6


async def test_it_starts_without_etcd_and_registers_when_it_comes() -> None:
    store = MemoryStore()
    store.cut_off()
    async with session_on(store) as session:
        session.set(NODE, b"node")
        await asyncio.sleep(100)
        assert not session.has_lease
        store.heal()
        await eventually(lambda: value(store, NODE) == b"node", within_s=2)


async def test_random_weather_never_leaves_a_wrong_key() -> None:
    """Seeded cuts, lost answers, vanished leases and foreign writes; after them all is right."""
    for seed in range(20):
        rng = random.Random(seed)
        store = MemoryStore()
        other = store.client()
        wanted: dict[str, bytes] = {}
        async with session_on(store) as session:
            for step in range(60):
                key = f"/p/status/m{rng.randrange(4)}/n1"
                match rng.randrange(9):
                    case 0:
                        store.cut_off()
                    case 1:
                        store.heal()
                    case 2:
                        store.faults.ambiguous.append(rng.choice(["applied", "lost", "late"]))
                    case 3:
                        store.cluster.revoke_all()
                    case 4:
                        await other.delete(key)
                        store.deliver_late()
                    case 5:
                        session.remove(key)
                        wanted.pop(key, None)
                    case _:
                        wanted[key] = b"%d" % step
                        session.set(key, wanted[key])
                await asyncio.sleep(rng.choice([0, 0, 0.01, 1, TTL_S]))
            store.heal()
            await asyncio.sleep(TTL_S + 2)
            there = {kv.key: kv.value for kv in store.cluster.list_prefix("/p/").kvs}
            assert there == wanted, f"seed {seed}"
            lease = session.lease
            assert all(kv.lease == lease for kv in store.cluster.list_prefix("/p/").kvs)
        assert store.cluster.list_prefix("/p/").kvs == (), f"seed {seed}"


async def test_statuses_are_seen_in_the_order_in_which_they_were_true() -> None:
    store = MemoryStore()
    seen: list[int] = []

    async def watch() -> None:
        async for batch in store.client().watch_prefix(STATUS):
            seen.extend(int(e.kv.value) for e in batch.events if isinstance(e, Put))

    watching = asyncio.create_task(watch())
    async with session_on(store) as session:
        for n in range(200):
            session.set(STATUS, b"%d" % n)
            if n % 10 == 0:
                store.faults.ambiguous.append("applied" if n % 20 else "lost")
            await asyncio.sleep(0.002)
        assert await session.settled(5)
        await eventually(lambda: seen[-1:] == [199], within_s=1)
    watching.cancel()
    assert seen == sorted(set(seen))
