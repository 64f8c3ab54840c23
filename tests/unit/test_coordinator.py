"""A coordinator, or several, over a played fleet: in memory, in virtual time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress

import pytest

from paddlewheel.rollout.coordinator import Coordinator
from paddlewheel.rollout.plan import next_record
from paddlewheel.rollout.world import World
from registry.events import EventType
from registry.memory_store import Fate, MemoryStore
from registry.names import ModelName, NodeId, Revision
from registry.records import BadRecord, HistoryEntry
from registry.rollouts import OrderKind, Phase, RolloutRecord
from registry.store import Ambiguous
from tests.eventually import eventually
from tests.rollouts import AT, K, M, PlayedNode, order, parse_here, played_fleet, record_of, text

pytestmark = pytest.mark.looptime

BARRIER = "strategy: barrier, timeout_s: 30"
WAVES = "strategy: waves, waves: [{percent: 25, bake_s: 10}, {labels: {zone: a}, bake_s: 10}]"


@asynccontextmanager
async def coordinating(store: MemoryStore, *names: str) -> AsyncGenerator[list[Coordinator]]:
    coordinators = [
        Coordinator(store, K, name, now=lambda: AT, parse=parse_here)
        for name in names or ("c1",)
    ]  # fmt: skip
    tasks = [asyncio.create_task(each.run()) for each in coordinators]
    try:
        yield coordinators
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def until(
    store: MemoryStore, holds: Callable[[RolloutRecord], bool], within_s: float = 60.0
) -> RolloutRecord:
    found: RolloutRecord | None = None

    async def reached() -> bool:
        nonlocal found
        with suppress(BadRecord):
            found = await record_of(store)
        return found is not None and holds(found)

    await eventually(reached, within_s=within_s)
    assert found is not None
    return found


async def ended(store: MemoryStore, revision: Revision) -> RolloutRecord:
    return await until(store, lambda r: r.revision == revision and r.has_ended)


async def converged(nodes: list[PlayedNode], revision: Revision) -> None:
    await eventually(lambda: all(n.in_force == revision for n in nodes), within_s=20)


async def test_a_barrier_is_committed_when_every_node_is_ready() -> None:
    store = MemoryStore()
    async with coordinating(store), played_fleet(store) as nodes:
        nodes[2].load_s = 5.0
        first = await store.put(K.model(M), text("1"))
        await converged(nodes, first)
        assert await record_of(store) is None
        second = await store.put(K.model(M), text("2", BARRIER))
        record = await until(store, lambda r: r.revision == second)
        assert (record.phase, record.previous) == (Phase.PREPARING, first)
        await asyncio.sleep(4)
        assert {node.in_force for node in nodes} == {first}
        record = await ended(store, second)
        assert (record.phase, record.refused, record.coordinator) == (Phase.COMMITTED, (), "c1")
        await converged(nodes, second)


async def test_a_node_that_cannot_load_it_aborts_with_its_reason() -> None:
    store = MemoryStore()
    async with coordinating(store), played_fleet(store) as nodes:
        first = await store.put(K.model(M), text("1"))
        await converged(nodes, first)
        nodes[1].fails.add("2")
        second = await store.put(K.model(M), text("2", BARRIER))
        record = await ended(store, second)
        assert record.phase is Phase.ABORTED
        assert record.reason == "1 of 3 nodes can't take it: n2: 2 is FAILED: no such weights"
        assert [(r.node, r.reason) for r in record.refused] == [
            ("n2", "2 is FAILED: no such weights")
        ]
        await asyncio.sleep(1)
        assert all(node.applied == [first] for node in nodes)
        third = await store.put(K.model(M), text("3", BARRIER))
        record = await ended(store, third)
        assert (record.phase, record.previous) == (Phase.COMMITTED, first)


async def test_waves_go_one_after_the_other_and_bake() -> None:
    store = MemoryStore()
    async with coordinating(store), played_fleet(store, 4) as nodes:
        await nodes[3].stop()
        nodes[3].labels["zone"] = "a"
        await nodes[3].start()
        first = await store.put(K.model(M), text("1"))
        await converged(nodes, first)
        second = await store.put(K.model(M), text("2", WAVES))
        record = await until(store, lambda r: r.is_baking and r.wave == 0)
        assert record.released == ("n1",)
        await asyncio.sleep(9)
        assert [node.in_force for node in nodes] == [second, first, first, first]
        record = await until(store, lambda r: r.is_baking and r.wave == 1)
        assert record.released == ("n1", "n4")
        await asyncio.sleep(9)
        assert [node.in_force for node in nodes] == [second, first, first, second]
        record = await ended(store, second)
        assert record.phase is Phase.COMMITTED
        assert record.wave == 2
        await converged(nodes, second)


async def test_orders() -> None:
    store = MemoryStore()
    async with coordinating(store), played_fleet(store, 4) as nodes:
        first = await store.put(K.model(M), text("1"))
        await converged(nodes, first)
        second = await store.put(K.model(M), text("2", WAVES))
        await until(store, lambda r: r.wave == 0)
        await order(store, OrderKind.PAUSE, second)
        await until(store, lambda r: r.paused)
        await asyncio.sleep(1000)
        assert [node.in_force for node in nodes] == [second, first, first, first]
        await order(store, OrderKind.PROMOTE, first)  # of another document: not obeyed
        await asyncio.sleep(1)
        assert (await until(store, lambda r: True)).paused
        await order(store, OrderKind.RESUME, second)
        await until(store, lambda r: not r.paused)
        await order(store, OrderKind.PROMOTE, second)
        assert (await ended(store, second)).phase is Phase.COMMITTED
        await converged(nodes, second)
        third = await store.put(K.model(M), text("3", WAVES))
        await until(store, lambda r: r.revision == third and r.is_baking)
        await order(store, OrderKind.ABORT, third)
        record = await ended(store, third)
        assert (record.phase, record.reason) == (Phase.ABORTED, "aborted by tester")
        await converged(nodes, second)


async def test_a_newer_document_takes_the_place_of_a_rollout_under_way() -> None:
    store = MemoryStore()
    async with coordinating(store), played_fleet(store) as nodes:
        first = await store.put(K.model(M), text("1"))
        await converged(nodes, first)
        nodes[0].load_s = 1000.0
        await store.put(K.model(M), text("2", BARRIER + "0"))
        await asyncio.sleep(1)
        nodes[0].load_s = 0.1
        third = await store.put(K.model(M), text("3", BARRIER))
        record = await until(store, lambda r: r.revision == third)
        assert record.previous == first
        fourth = await store.put(K.model(M), text("4"))
        record = await ended(store, fourth)
        assert (record.phase, record.strategy) == (Phase.COMMITTED, "immediate")


async def test_a_deleted_document_takes_its_rollout_and_orders_with_it() -> None:
    store = MemoryStore()
    async with coordinating(store), played_fleet(store):
        second = await store.put(K.model(M), text("2", BARRIER))
        await ended(store, second)
        await order(store, OrderKind.PAUSE, second)
        await store.delete(K.model(M))

        async def gone() -> bool:
            return await record_of(store) is None and await store.get(K.order(M)) is None

        await eventually(gone, within_s=10)


async def test_the_first_document_of_a_model_has_none_before_it() -> None:
    store = MemoryStore()
    async with coordinating(store), played_fleet(store) as nodes:
        revision = await store.put(K.model(M), text("1", BARRIER))
        record = await ended(store, revision)
        assert (record.phase, record.previous) == (Phase.COMMITTED, 0)
        await converged(nodes, revision)


@pytest.mark.parametrize("is_written", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("kill_at", range(1, 6))
async def test_a_coordinator_killed_at_any_write_is_replaced_and_the_rollout_goes_on(
    kill_at: int, is_written: bool
) -> None:
    """Five writes: preparing, the first wave, its bake, the second, the commit."""
    store = MemoryStore()
    clients = [store.client(), store.client()]
    writes: list[str] = []

    def dying(client: MemoryStore) -> Callable[[str], Awaitable[None]]:
        async def count(name: str) -> None:
            if name != "txn" or await store.get(K.coordinator) is None:
                return
            writes.append(name)
            # Its election, when it happens after the write, is a write too.
            if len(writes) == kill_at + is_written:
                client.cut_off()
                if is_written:
                    raise Ambiguous("killed before the answer")

        return count

    async with played_fleet(store, 2) as nodes:
        first = await store.put(K.model(M), text("1"))
        await converged(nodes, first)
        for client in clients:
            if is_written:
                client.faults.after = dying(client)
            else:
                client.faults.before = dying(client)
        async with coordinating(clients[0], "c0"), coordinating(clients[1], "c1") as others:
            second = await store.put(
                K.model(M), text("2", "strategy: waves, waves: [{percent: 50, bake_s: 2}]")
            )
            record = await ended(store, second)
            assert record.phase is Phase.COMMITTED
            await converged(nodes, second)
            assert all(node.applied == [first, second] for node in nodes)
            assert {client.faults.unavailable for client in clients} == {True, False}
            assert others


@pytest.mark.parametrize("fate", ["applied", "lost", "late"])
async def test_writes_whose_answer_was_lost_are_told_like_all_others(fate: Fate) -> None:
    store = MemoryStore()
    client = store.client()
    told: list[str] = []

    def emit(type_: EventType, *_: object, id_: str | None = None, **__: object) -> None:
        told.append(f"{type_.rpartition('.')[2]} {id_}")

    coordinator = Coordinator(client, K, "c", emit=emit, now=lambda: AT, parse=parse_here)
    async with played_fleet(store) as nodes:
        task = asyncio.create_task(coordinator.run())
        await eventually(lambda: coordinator.terms == 1, within_s=10)
        client.faults.ambiguous = [fate, fate]
        second = await store.put(K.model(M), text("2", BARRIER))
        record = await ended(store, second)
        client.deliver_late()
        await asyncio.sleep(1)
        assert await record_of(store) == record
        assert [each.split()[0] for each in dict.fromkeys(told)] == ["started", "committed"]
        await converged(nodes, second)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_nodes_that_are_late_abort_it() -> None:
    store = MemoryStore()
    async with coordinating(store), played_fleet(store) as nodes:
        nodes[2].load_s = 100.0
        began_s = asyncio.get_running_loop().time()
        revision = await store.put(K.model(M), text("1", BARRIER))
        record = await ended(store, revision)
        assert record.reason == "not ready within 30 s: n3 (loading)"
        assert asyncio.get_running_loop().time() - began_s == pytest.approx(30, abs=0.5)


async def test_a_document_that_comes_just_before_the_commit_prevents_it() -> None:
    """It is no use to say that all are ready for a document that has been replaced."""
    store = MemoryStore()
    client = store.client()
    third = Revision(0)

    async def replace_it(name: str) -> None:
        nonlocal third
        if name != "txn" or third or not all(n.is_ready_for(second) for n in nodes):
            return
        third = await store.put(K.model(M), text("3", BARRIER))

    async with coordinating(client), played_fleet(store) as nodes:
        first = await store.put(K.model(M), text("1"))
        await converged(nodes, first)
        second = await store.put(K.model(M), text("2", BARRIER))
        client.faults.before = replace_it
        await eventually(lambda: third > 0, within_s=10)
        record = await ended(store, third)
        assert (record.phase, record.previous) == (Phase.COMMITTED, first)
        await converged(nodes, third)
        assert all(node.applied == [first, third] for node in nodes)


async def test_a_coordinator_frozen_before_its_write_cannot_do_it_later() -> None:
    store = MemoryStore()
    client, heir = store.client(), store.client()
    frozen = asyncio.Event()
    thaw = asyncio.Event()

    async def freeze(name: str) -> None:
        if frozen.is_set() and name != "txn":
            await thaw.wait()
        if name == "txn" and not frozen.is_set() and all(n.is_ready_for(second) for n in nodes):
            frozen.set()
            await thaw.wait()

    async with played_fleet(store) as nodes, coordinating(client, "ghost") as ghosts:
        second = await store.put(K.model(M), text("2", BARRIER))
        await until(store, lambda r: r.coordinator == "ghost")
        client.faults.before = freeze
        await asyncio.wait_for(frozen.wait(), 20)
        await store.delete(K.coordinator)  # as when its lease is over
        await store.put(K.coordinator, b"another, which has written nothing so far")
        thaw.set()
        await asyncio.sleep(1)
        assert (await until(store, lambda _: True)).phase is Phase.PREPARING
        client.cut_off()
        await store.delete(K.coordinator)
        async with coordinating(heir, "heir"):
            await order(store, OrderKind.ABORT, second)
            record = await ended(store, second)
            assert (record.phase, record.coordinator) == (Phase.ABORTED, "heir")
            client.heal()
            await asyncio.sleep(1)
            assert await record_of(store) == record
            assert ghosts[0].terms == 1


async def test_a_document_that_does_not_parse_stops_no_rollout() -> None:
    """Nor for a coordinator that never saw the one before: history has it."""
    store = MemoryStore()
    async with played_fleet(store) as nodes:
        first = await store.put(K.model(M), text("1"))
        await converged(nodes, first)
        nodes[0].load_s = 20.0
        async with coordinating(store, "a"):
            second = await store.put(K.model(M), text("2", BARRIER))
            entry = HistoryEntry.of(second, text("2", BARRIER), AT)
            await store.put(K.history(M, second), entry.to_json())
            await until(store, lambda r: r.revision == second)
            await store.put(K.model(M), b"spec: [")
            await asyncio.sleep(1)
        async with coordinating(store, "b"):
            record = await ended(store, second)
            assert (record.phase, record.coordinator) == (Phase.COMMITTED, "b")
            await converged(nodes, second)


async def test_a_record_that_cannot_be_read_is_written_anew() -> None:
    store = MemoryStore()
    async with coordinating(store), played_fleet(store) as nodes:
        await store.put(K.rollout(M), b"garbage")
        await store.put(K.order(M), b"[]")
        await store.put(K.node(NodeId("odd")), b"{}")
        await store.put(K.status(M, NodeId("n1")), b"\xff")
        revision = await store.put(K.model(M), text("1", BARRIER))
        record = await ended(store, revision)
        assert (record.phase, record.previous) == (Phase.COMMITTED, 0)
        await converged(nodes, revision)


async def test_a_bug_met_by_one_model_stops_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    def choosy(world: World) -> RolloutRecord | None:
        if world.model == "bad":
            raise ZeroDivisionError
        return next_record(world)

    monkeypatch.setattr("paddlewheel.rollout.term.next_record", choosy)
    store = MemoryStore()
    async with coordinating(store) as coordinators, played_fleet(store):
        bad = text("1", BARRIER).replace(b"name: m", b"name: bad")
        await store.put(K.model(ModelName("bad")), bad)
        revision = await store.put(K.model(M), text("1", BARRIER))
        assert (await ended(store, revision)).phase is Phase.COMMITTED
        assert await store.get(K.rollout(ModelName("bad"))) is None
        assert coordinators[0].terms == 1


async def test_the_time_without_any_node_does_not_count() -> None:
    store = MemoryStore()
    async with coordinating(store):
        revision = await store.put(K.model(M), text("1", BARRIER))
        await asyncio.sleep(1000)
        assert (await until(store, lambda _: True)).phase is Phase.PREPARING
        async with played_fleet(store) as nodes:
            nodes[0].load_s = 20.0
            assert (await ended(store, revision)).phase is Phase.COMMITTED


async def test_a_fleet_without_gated_documents_is_not_watched() -> None:
    store = MemoryStore()
    client = store.client()
    calls: list[str] = []

    async def note(name: str) -> None:
        calls.append(name)

    client.faults.after = note
    async with played_fleet(store), coordinating(client):
        await store.put(K.model(M), text("1"))
        await asyncio.sleep(60)
    assert calls.count("list_prefix") <= 3
