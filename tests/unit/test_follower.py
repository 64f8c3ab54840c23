"""The follower between a store in memory and a manager whose surroundings are played."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator
from datetime import UTC, datetime
from pathlib import Path

import orjson
import pytest

from loader.errors import NotAdmitted
from loader.model import ModelView
from paddlewheel import follower as follower_module
from paddlewheel.admission import DocumentAdmission
from paddlewheel.follower import Follower
from registry.keys import Keys
from registry.memory_store import MemoryStore
from registry.names import ModelName, Revision, Version
from registry.records import HistoryEntry, LastGood
from registry.spec import ModelDocument
from registry.store import Batch, KeyValue, Listing, PermissionDenied, Put, Unavailable
from tests.eventually import eventually
from tests.unit.manager_harness import MODEL, NODE, ManagedNode, document, managed

KEYS = Keys("/p")
BROKEN = b"spec: ["


def text(document: ModelDocument) -> bytes:
    return orjson.dumps(document.model_dump(mode="json", by_alias=True, exclude_defaults=True))


def follower_of(
    node: ManagedNode,
    store: MemoryStore,
    folder: Path,
    *,
    zone: str = "a",
    allow: tuple[str, ...] = (),
    keys: Keys = KEYS,
) -> Follower:
    follower = Follower(
        store=store,
        keys=keys,
        node=NODE,
        manager=node.manager,
        admission=DocumentAdmission(allow, node.devices, node.manager),
        labels={"zone": zone},
        snapshot_path=folder / "snapshot.json",
        on_seen=lambda _model: None,
    )
    node.told.seen = follower.seen
    return follower


@contextlib.asynccontextmanager
async def running(follower: Follower) -> AsyncGenerator[Follower]:
    """``run`` in a task; it must not end by itself."""
    task = asyncio.create_task(follower.run())
    try:
        yield follower
        assert not task.done(), task.exception()
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def put_with_history(store: MemoryStore, document: ModelDocument) -> Revision:
    revision = await store.put(KEYS.model(document.name), text(document))
    entry = HistoryEntry.of(revision, text(document), datetime.now(UTC))
    await store.put(KEYS.history(document.name, revision), entry.to_json())
    return revision


async def has_history(store: MemoryStore, model: ModelName) -> bool:
    return bool((await store.list_prefix(KEYS.history_prefix(model))).kvs)


def good(version: str, revision: Revision) -> bytes:
    at = datetime.now(UTC)
    return LastGood(version=Version(version), revision=revision, at=at).to_json()


async def test_a_start_with_a_broken_document_serves_the_one_before_it(tmp_path: Path) -> None:
    store = MemoryStore()
    revision = await put_with_history(store, document("1"))
    await store.put(KEYS.model(MODEL), BROKEN)
    async with managed(tmp_path) as node, running(follower_of(node, store, tmp_path)) as follower:
        await eventually(lambda: node.live == "1", within_s=3)
        assert node.status.applied_revision == revision
        assert not follower.seen[MODEL].accepted


@pytest.mark.parametrize("why", ["placed elsewhere", "not an allowed source"])
async def test_an_old_document_is_held_to_what_a_new_one_is(tmp_path: Path, why: str) -> None:
    store = MemoryStore()
    placement = {"labels": {"zone": "b" if why == "placed elsewhere" else "a"}}
    await put_with_history(store, document("1", placement=placement))
    await store.put(KEYS.model(MODEL), BROKEN)
    allow = ("/safe",) if why == "not an allowed source" else ()
    async with managed(tmp_path) as node:
        follower = follower_of(node, store, tmp_path, allow=allow)
        async with running(follower):
            await eventually(lambda: MODEL in follower.seen, within_s=3)
            await node.passes(0.1)
            assert node.states == ""


async def test_an_old_document_found_in_history_is_kept_for_the_next_start(tmp_path: Path) -> None:
    store = MemoryStore()
    await put_with_history(store, document("1"))
    await store.put(KEYS.model(MODEL), BROKEN)
    async with managed(tmp_path) as node, running(follower_of(node, store, tmp_path)):
        await eventually(lambda: node.live == "1", within_s=3)
        await eventually((tmp_path / "snapshot.json").exists, within_s=3)
        await eventually(
            lambda: b"/models/1" in (tmp_path / "snapshot.json").read_bytes(), within_s=3
        )
    again = tmp_path / "again"
    again.mkdir()
    async with managed(again) as node:
        await follower_of(node, MemoryStore(), tmp_path).restore()
        await eventually(lambda: node.live == "1", within_s=3)


async def test_the_last_good_version_is_found_in_an_older_document(tmp_path: Path) -> None:
    store = MemoryStore()
    revision = await put_with_history(store, document("1"))
    await store.put(KEYS.lastgood(MODEL), good("1", revision))
    await store.put(KEYS.model(MODEL), text(document("2")))
    async with managed(tmp_path) as node:
        node.world.fails("2", "check", NotAdmitted("params", "cut"))
        async with running(follower_of(node, store, tmp_path)):
            await eventually(lambda: node.live == "1", within_s=3)


@pytest.mark.parametrize("sees_it_deleted", [True, False])
async def test_the_last_good_version_of_a_deleted_model_is_over(
    tmp_path: Path, sees_it_deleted: bool
) -> None:
    store = MemoryStore()
    revision = await put_with_history(store, document("1"))
    await store.put(KEYS.lastgood(MODEL), good("1", revision))
    async with managed(tmp_path) as node:
        node.world.fails("2", "check", NotAdmitted("params", "cut"))
        if not sees_it_deleted:
            await store.delete(KEYS.model(MODEL))
            await store.put(KEYS.model(MODEL), text(document("2")))
        async with running(follower_of(node, store, tmp_path)) as follower:
            if sees_it_deleted:
                await eventually(lambda: node.live == "1", within_s=3)
                await store.delete(KEYS.model(MODEL))
                await eventually(lambda: MODEL not in follower.seen, within_s=3)
                await store.put(KEYS.model(MODEL), text(document("2")))
            await eventually(lambda: "2 FAILED" in node.states, within_s=3)
            await node.passes(0.2)
            assert node.states == "2 FAILED"


async def test_a_start_without_etcd_does_not_wait_for_it(tmp_path: Path) -> None:
    """Last-good versions that only history knows are looked up later, whatever their number."""
    store = MemoryStore()
    names = [ModelName(f"m{number}") for number in range(5)]
    async with managed(tmp_path) as node, running(follower_of(node, store, tmp_path)):
        for name in names:
            revision = await store.put(KEYS.model(name), text(document("1", model=name)))
            await store.put(KEYS.lastgood(name), good("1", revision))
            await store.put(KEYS.model(name), text(document("2", model=name)))
        path = tmp_path / "snapshot.json"
        await eventually(
            lambda: path.exists() and path.read_bytes().count(b"/models/2") == len(names),
            within_s=3,
        )

    class Away(MemoryStore):
        async def get(self, key: str) -> KeyValue | None:
            await asyncio.sleep(30)
            raise Unavailable(key)

    again = tmp_path / "again"
    again.mkdir()
    async with managed(again) as node:
        follower = follower_of(node, Away(), tmp_path)
        async with asyncio.timeout(2):
            await follower.restore()
        assert follower.configs_known.is_set()
        assert set(follower.seen) == set(names)


async def test_the_snapshot_of_another_fleet_is_not_ours(tmp_path: Path) -> None:
    store = MemoryStore()
    await store.put(KEYS.model(MODEL), text(document("1")))
    async with managed(tmp_path) as node, running(follower_of(node, store, tmp_path)):
        await eventually((tmp_path / "snapshot.json").exists, within_s=3)
    async with managed(tmp_path) as node:
        other = follower_of(node, MemoryStore(), tmp_path, keys=Keys("/other"))
        await other.restore()
        assert not other.configs_known.is_set(), "ready, with no documents known"


async def test_one_document_too_large_for_history_does_not_stop_history(tmp_path: Path) -> None:
    store = MemoryStore()
    async with managed(tmp_path) as node, running(follower_of(node, store, tmp_path)):
        big = ModelName("big")
        await store.put(KEYS.model(big), b'"\n' * 500_000)
        await store.put(KEYS.model(MODEL), text(document("1")))
        await eventually(lambda: has_history(store, MODEL), within_s=3)
        assert not await has_history(store, big)


async def test_a_store_that_turns_us_away_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(follower_module, "REFUSED_RETRY_S", 0.05)

    class Guarded(MemoryStore):
        is_open = False

        async def list_prefix(self, prefix: str) -> Listing:
            if not self.is_open:
                raise PermissionDenied("invalid user or password")
            return await super().list_prefix(prefix)

    store = Guarded()
    await store.put(KEYS.model(MODEL), text(document("1")))
    async with managed(tmp_path) as node, running(follower_of(node, store, tmp_path)) as follower:
        await node.passes(0.1)
        assert not follower.configs_known.is_set()
        store.is_open = True
        await eventually(lambda: node.live == "1", within_s=3)


async def test_a_bug_met_by_one_model_does_not_stop_the_others(tmp_path: Path) -> None:
    store = MemoryStore()

    def odd(view: ModelView) -> None:
        if view.name == "odd":
            raise ZeroDivisionError

    async with managed(tmp_path) as node, running(follower_of(node, store, tmp_path)):
        node.told.faulty = odd
        await store.put(KEYS.model(ModelName("odd")), text(document("1", model="odd")))
        await store.put(KEYS.model(MODEL), text(document("1")))
        await eventually(lambda: node.live == "1", within_s=3)


async def test_a_snapshot_and_then_a_store_made_anew(tmp_path: Path) -> None:
    """The new store counts from 1: what it says is true all the same."""
    store = MemoryStore()
    for _ in range(5):
        await store.put(KEYS.model(MODEL), text(document("1")))
    async with managed(tmp_path) as node, running(follower_of(node, store, tmp_path)):
        await eventually((tmp_path / "snapshot.json").exists, within_s=3)
    again, anew = tmp_path / "again", MemoryStore()
    again.mkdir()
    revision = await anew.put(KEYS.model(MODEL), text(document("2")))
    async with managed(again) as node:
        follower = follower_of(node, anew, tmp_path)
        await follower.restore()
        await eventually(lambda: node.live == "1", within_s=3)
        async with running(follower):
            await eventually(lambda: node.live == "2", within_s=3)
            assert node.status.applied_revision == revision


async def test_a_store_restored_from_a_backup_while_we_follow(tmp_path: Path) -> None:
    """Its revisions go back; a document of a lower revision than the last one is applied."""
    later: asyncio.Queue[Batch] = asyncio.Queue()

    class Restored(MemoryStore):
        async def watch_prefix(
            self, prefix: str, *, known: Listing | None = None
        ) -> AsyncIterator[Batch]:
            if prefix != KEYS.models_prefix:
                await asyncio.Event().wait()
            while True:
                yield await later.get()

    store = Restored()
    for _ in range(5):
        await store.put(KEYS.model(MODEL), text(document("1")))
    async with managed(tmp_path) as node, running(follower_of(node, store, tmp_path)):
        await eventually(lambda: node.live == "1", within_s=3)
        store.cluster = MemoryStore().cluster
        revision = await store.put(KEYS.model(MODEL), text(document("2")))
        kv = store.cluster.get(KEYS.model(MODEL))
        assert kv is not None
        later.put_nowait(Batch(revision, (Put(kv),)))
        await eventually(lambda: node.live == "2", within_s=3)
