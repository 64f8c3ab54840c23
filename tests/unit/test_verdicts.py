"""What a node writes of its verdicts, on a store in memory and virtual time."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from loader.faults import from_code
from paddlewheel.verdicts import Verdicts
from registry.keys import Keys
from registry.memory_store import MemoryStore
from registry.names import NodeId, Revision, ServableId, Version
from registry.records import FaultRecord, LastGood, Quarantine
from registry.store import Batch, Listing, PermissionDenied, StoreRefused, Unavailable
from tests.unit.manager_harness import (
    MODEL,
    NODE,
    ManagedNode,
    digest_of,
    document,
    managed,
    quarantine,
)

pytestmark = pytest.mark.looptime

KEYS = Keys("/p")
V2 = Version("2")
OTHER = NodeId("n2")
QUORUM_2 = {"quorum": 2}


@contextlib.asynccontextmanager
async def running(node: ManagedNode, store: MemoryStore, folder: Path) -> AsyncGenerator[Verdicts]:
    """One life of a node's verdicts, from what the life before left on disk."""
    verdicts = Verdicts(
        store=store, keys=KEYS, node=NODE, manager=node.manager, path=folder / "quarantines.json"
    )
    verdicts.restore()
    task = asyncio.create_task(verdicts.run())
    try:
        yield verdicts
        assert not task.done(), task.exception()
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def took_out(verdicts: Verdicts, content: str = "/models/2") -> None:
    """This node took version 2 out, of these bytes."""
    digest = digest_of(content)
    servable = ServableId(MODEL, V2, digest)
    verdicts.quarantined(MODEL, servable, quarantine(digest), from_code(700))


def quarantine_key(store: MemoryStore) -> Quarantine | None:
    kv = store.cluster.get(KEYS.quarantine(MODEL, V2))
    return None if kv is None else Quarantine.from_json(kv.value)


def fault_key(store: MemoryStore) -> bool:
    return store.cluster.get(KEYS.fault(MODEL, V2, NODE)) is not None


async def put_fault_of(store: MemoryStore, node: NodeId) -> None:
    at = datetime.now(UTC)
    record = FaultRecord(code=700, fault_class="sticky", count=3, first_at=at, last_at=at)
    await store.put(KEYS.fault(MODEL, V2, node), record.to_json())


async def test_one_node_is_a_quorum_of_one(tmp_path: Path) -> None:
    store = MemoryStore()
    async with managed(tmp_path) as node, running(node, store, tmp_path) as verdicts:
        await node.put_and_settle(document("2"), 5)
        took_out(verdicts)
        await node.settle()
        assert fault_key(store)
        assert (found := quarantine_key(store)) is not None
        assert (found.digest, found.nodes) == (digest_of("/models/2"), (NODE,))
        assert not (tmp_path / "quarantines.json").exists()


async def test_the_node_that_completes_the_quorum_writes_it(tmp_path: Path) -> None:
    store = MemoryStore()
    async with managed(tmp_path) as node, running(node, store, tmp_path) as verdicts:
        await node.put_and_settle(document("2", rollback=QUORUM_2), 5)
        took_out(verdicts)
        await node.settle()
        assert quarantine_key(store) is None
        await put_fault_of(store, OTHER)
        await node.settle()
        assert (found := quarantine_key(store)) is not None
        assert found.nodes == (NODE, OTHER)


async def test_other_bytes_of_a_quarantined_version_are_told_too(tmp_path: Path) -> None:
    store = MemoryStore()
    async with managed(tmp_path) as node, running(node, store, tmp_path) as verdicts:
        await node.put_and_settle(document("2"), 5)
        took_out(verdicts, "old bytes")
        await node.settle()
        took_out(verdicts, "new bytes")
        await node.settle()
        assert (found := quarantine_key(store)) is not None
        assert found.digest == digest_of("new bytes")


async def test_the_first_quarantine_of_the_same_bytes_stands(tmp_path: Path) -> None:
    store = MemoryStore()
    first = quarantine(digest_of("/models/2"), code=719)
    await store.put(KEYS.quarantine(MODEL, V2), first.to_json())
    async with managed(tmp_path) as node, running(node, store, tmp_path) as verdicts:
        await node.put_and_settle(document("2"), 5)
        took_out(verdicts)
        await node.settle()
        assert quarantine_key(store) == first


@pytest.mark.parametrize("was_released", [False, True], ids=["not released", "released"])
async def test_a_restart_keeps_a_quarantine_without_quorum_unless_it_was_released(
    tmp_path: Path, was_released: bool
) -> None:
    store = MemoryStore()
    two = document("2", rollback=QUORUM_2)
    async with managed(tmp_path) as node, running(node, store, tmp_path) as verdicts:
        await node.put_and_settle(two, 5)
        took_out(verdicts)
        await node.settle()
    if was_released:
        await store.delete_prefix(KEYS.faults_prefix(MODEL, V2))
    async with managed(tmp_path) as node, running(node, store, tmp_path):
        await node.put_and_settle(two, 5)
        assert node.states == ("2 LIVE" if was_released else "2 QUARANTINED")
        assert fault_key(store) is not was_released


async def test_a_verdict_that_etcd_never_heard_of_is_written_after_a_restart(
    tmp_path: Path,
) -> None:
    class Away(MemoryStore):
        async def get(self, key: str) -> None:
            raise Unavailable(key)

    two = document("2")
    async with managed(tmp_path) as node, running(node, Away(), tmp_path) as verdicts:
        await node.put_and_settle(two, 5)
        took_out(verdicts)
        await node.passes(30)
    store = MemoryStore()
    async with managed(tmp_path) as node, running(node, store, tmp_path):
        await node.put_and_settle(two, 5)
        assert node.states == "2 QUARANTINED"
        assert quarantine_key(store) is not None


async def test_a_release_while_we_run_lifts_it(tmp_path: Path) -> None:
    store = MemoryStore()
    async with managed(tmp_path) as node, running(node, store, tmp_path) as verdicts:
        await node.put_and_settle(document("2", rollback=QUORUM_2), 5)
        node.manager.keep_quarantined(MODEL, V2, quarantine(digest_of("/models/2")))
        took_out(verdicts)
        await node.settle()
        assert node.states == "2 QUARANTINED"
        await store.delete_prefix(KEYS.faults_prefix(MODEL, V2))
        await node.settle()
        assert node.states == "2 LIVE"
        assert not (tmp_path / "quarantines.json").exists()


async def test_a_write_that_etcd_refuses_does_not_hold_up_the_others(tmp_path: Path) -> None:
    class Picky(MemoryStore):
        async def put(self, key: str, value: bytes, *, lease: int = 0) -> Revision:
            if "/faults/" in key:
                raise StoreRefused("request is too large")
            return await super().put(key, value, lease=lease)

    store = Picky()
    async with managed(tmp_path) as node, running(node, store, tmp_path) as verdicts:
        took_out(verdicts)
        one = ServableId(MODEL, Version("1"), digest_of("/models/1"))
        verdicts.baked(MODEL, one, Revision(5), datetime.now(UTC))
        await node.passes(1)
        assert store.cluster.get(KEYS.lastgood(MODEL)) is not None


async def test_a_store_that_turns_us_away_ends_nothing(tmp_path: Path) -> None:
    class Guarded(MemoryStore):
        is_open = False

        async def watch_prefix(
            self, prefix: str, *, known: Listing | None = None
        ) -> AsyncIterator[Batch]:
            if not self.is_open:
                raise PermissionDenied("invalid user or password")
            async for batch in super().watch_prefix(prefix, known=known):
                yield batch

    store = Guarded()
    async with managed(tmp_path) as node, running(node, store, tmp_path) as verdicts:
        await node.put_and_settle(document("2", rollback=QUORUM_2), 5)
        took_out(verdicts)
        await node.passes(60)
        store.is_open = True
        await node.passes(10)
        await put_fault_of(store, OTHER)
        await node.settle()
        assert quarantine_key(store) is not None


async def test_the_revision_of_the_last_good_version_only_grows(tmp_path: Path) -> None:
    store = MemoryStore()
    async with managed(tmp_path) as node, running(node, store, tmp_path) as verdicts:
        for version, revision in (("1", 5), ("2", 9), ("1", 7)):
            id = ServableId(MODEL, Version(version), digest_of(version))
            verdicts.baked(MODEL, id, Revision(revision), datetime.now(UTC))
            await node.settle()
        kv = store.cluster.get(KEYS.lastgood(MODEL))
        assert kv is not None
        good = LastGood.from_json(kv.value)
        assert (good.version, good.revision) == ("2", 9)
        assert good.previous is not None
        assert good.previous.version == "1"
