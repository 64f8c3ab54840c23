"""A node and the coordinator's word: records in a store in memory, a manager, played workers."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from loader.errors import NotAdmitted
from paddlewheel.applied import Applied
from registry.memory_store import MemoryStore
from registry.names import Revision, Version
from registry.records import LastGood
from registry.rollouts import Phase, RolloutRecord
from registry.spec import ModelDocument
from tests.eventually import eventually
from tests.unit.manager_harness import MODEL, NODE, ManagedNode, document, managed
from tests.unit.test_follower import KEYS, follower_of, put_with_history, running, text

pytestmark = pytest.mark.looptime

BARRIER: dict[str, Any] = {"rollout": {"strategy": "barrier"}}
WAVES: dict[str, Any] = {"rollout": {"strategy": "waves", "waves": [{"percent": 50, "bake_s": 60}]}}
BROKEN = b"spec: ["


async def say(
    store: MemoryStore, revision: int, phase: str, *, previous: int = 0, **given: Any
) -> None:
    record = RolloutRecord(
        model=MODEL, revision=Revision(revision), previous=Revision(previous),
        strategy="barrier", phase=Phase(phase), since=datetime.now(UTC), **given,
    )  # fmt: skip
    await store.put(KEYS.rollout(MODEL), record.to_json())


async def put(store: MemoryStore, document: ModelDocument) -> Revision:
    return await store.put(KEYS.model(MODEL), text(document))


async def until(node: ManagedNode, states: str, revision: int | None) -> None:
    def is_so() -> bool:
        return (node.states, node.status.applied_revision) == (states, revision)

    try:
        await eventually(is_so, within_s=5)
    except AssertionError:
        raise AssertionError((node.states, node.status.to_dict())) from None


async def save_applied(node: ManagedNode, path: Path) -> None:
    """What a node keeps of what it has in force."""
    applied = Applied(path)
    task = asyncio.create_task(applied.run())
    for view in node.manager.views():
        applied.note(view)
    await eventually(path.exists, within_s=3)
    task.cancel()


async def until_saved(folder: Path, content: bytes) -> None:
    path = folder / "snapshot.json"
    await eventually(lambda: path.exists() and content in path.read_bytes(), within_s=3)


async def held(store: MemoryStore, node: ManagedNode) -> tuple[Revision, Revision]:
    """Version 1 in force, version 2 ready beside it; the revisions of both."""
    first = await put(store, document("1"))
    await until(node, "1 LIVE", first)
    second = await put(store, document("2", "1", **BARRIER))
    await until(node, "1 LIVE, 2 READY", first)
    return first, second


async def test_a_document_waits_for_the_commit(tmp_path: Path) -> None:
    store = MemoryStore()
    async with managed(tmp_path) as node, running(follower_of(node, store, tmp_path)):
        first, second = await held(store, node)
        status = node.status
        assert (status.revision, status.accepted, status.prepared_revision) == (
            second,
            True,
            second,
        )
        assert (status.intent.live, status.reason) == ("2", "rollout not started")
        await say(store, second, "preparing", previous=first)
        await eventually(
            lambda: node.status.reason == "rollout: waiting for the commit", within_s=2
        )
        loads = len(node.world.workers)
        await say(store, second, "committed", previous=first)
        await until(node, "1 STANDBY, 2 LIVE", second)
        assert (len(node.world.workers), node.status.reason) == (loads, None)


async def test_a_deleted_document_is_nothing_to_go_back_to(tmp_path: Path) -> None:
    """The record is still the one of the document before, until a coordinator comes to it."""
    store = MemoryStore()
    async with managed(tmp_path) as node, running(follower_of(node, store, tmp_path)) as follower:
        first = await put_with_history(store, document("1", **BARRIER))
        await say(store, first, "committed")
        await until(node, "1 LIVE", first)
        await store.delete(KEYS.model(MODEL))
        await eventually(lambda: MODEL not in follower.seen, within_s=3)
        await put(store, document("2", **BARRIER))
        await until(node, "2 READY", None)
        await node.passes(0.2)
        assert node.states == "2 READY"


async def test_an_abort_ends_what_was_prepared(tmp_path: Path) -> None:
    store = MemoryStore()
    async with managed(tmp_path) as node, running(follower_of(node, store, tmp_path)):
        first, second = await held(store, node)
        await say(store, second, "aborted", previous=first, reason="n2: weights cut")
        await until(node, "1 LIVE", first)
        status = node.status
        assert (status.revision, status.accepted, status.intent.live) == (second, True, "2")
        assert status.reason == "rollout aborted: n2: weights cut"


async def test_a_node_of_a_wave_goes_back_by_a_change_of_pointer(tmp_path: Path) -> None:
    store = MemoryStore()
    async with managed(tmp_path) as node, running(follower_of(node, store, tmp_path)):
        first = await put(store, document("1"))
        await until(node, "1 LIVE", first)
        second = await put(store, document("2", "1", **WAVES))
        await say(store, second, "waving", previous=first, released=("n0",))
        await until(node, "1 LIVE, 2 READY", first)
        await eventually(lambda: "this node's wave" in str(node.status.reason), within_s=2)
        await say(store, second, "waving", previous=first, released=("n0", NODE))
        await until(node, "1 STANDBY, 2 LIVE", second)
        loads, fetches = len(node.world.workers), node.repository.fetches.total()
        await say(store, second, "aborted", previous=first, reason="too slow")
        await eventually(lambda: node.live == "1", within_s=2)
        assert node.status.applied_revision == first
        assert (len(node.world.workers), node.repository.fetches.total()) == (loads, fetches)


async def test_one_that_fails_to_get_ready_says_so(tmp_path: Path) -> None:
    store = MemoryStore()
    async with managed(tmp_path) as node, running(follower_of(node, store, tmp_path)):
        node.world.fails("2", "check", NotAdmitted("params", "cut short"))
        first = await put(store, document("1"))
        await until(node, "1 LIVE", first)
        second = await put(store, document("2", "1", **BARRIER))
        await until(node, "1 LIVE, 2 FAILED", first)
        assert node.status.prepared_revision == first
        assert node.status.reason == "rollout not started; 2 failed: params: cut short"
        await say(store, second, "aborted", previous=first, reason="n1: 2 failed")
        await until(node, "1 LIVE", first)


async def test_a_first_document_is_served_at_the_commit(tmp_path: Path) -> None:
    store = MemoryStore()
    async with managed(tmp_path) as node, running(follower_of(node, store, tmp_path)):
        first = await put(store, document("1", **BARRIER))
        await say(store, first, "preparing")
        await until(node, "1 READY", None)
        await say(store, first, "committed")
        await until(node, "1 LIVE", first)


async def test_a_first_document_that_was_aborted_is_not_served(tmp_path: Path) -> None:
    store = MemoryStore()
    async with managed(tmp_path) as node, running(follower_of(node, store, tmp_path)):
        first = await put(store, document("1", **BARRIER))
        await say(store, first, "preparing")
        await until(node, "1 READY", None)
        await say(store, first, "aborted", reason="n2 refused")
        await until(node, "", None)
        assert node.told.withdrawn == [MODEL]
        assert node.status.reason == "rollout aborted: n2 refused"
        second = await put(store, document("1"))
        await until(node, "1 LIVE", second)


@pytest.mark.parametrize(
    ("phase", "states"),
    [
        (None, "1 LIVE, 2 READY"),
        ("preparing", "1 LIVE, 2 READY"),
        ("aborted", "1 LIVE"),
        ("committed", "2 LIVE"),  # after 1, where that is what it served last
    ],
)
@pytest.mark.parametrize("keeps", ["its disk", "nothing"])
async def test_a_restart_in_any_phase(
    tmp_path: Path, phase: str | None, states: str, keeps: str
) -> None:
    store = MemoryStore()
    path = tmp_path / "applied.json"
    async with managed(tmp_path) as node, running(follower_of(node, store, tmp_path)):
        first = await put_with_history(store, document("1"))
        await until(node, "1 LIVE", first)
        second = await put_with_history(store, document("2", "1", **BARRIER))
        await until(node, "1 LIVE, 2 READY", first)
        await until_saved(tmp_path, b"/models/2")
        await save_applied(node, path)
    if phase is not None:
        await say(store, second, phase, previous=first, reason="x" if phase == "aborted" else None)
    again = tmp_path / "again"
    again.mkdir()
    async with managed(again) as node:
        follower = follower_of(node, store, tmp_path if keeps == "its disk" else again)
        if keeps == "its disk":
            Applied(path).restore(node.manager)
            await follower.restore()
        async with running(follower):
            if phase is None and keeps == "nothing":
                # Which document was in force, only the coordinator can tell a new node.
                await until(node, "2 READY", None)
                return
            await eventually(lambda: node.states.endswith(states), within_s=5)
            assert node.status.applied_revision == (second if phase == "committed" else first)


async def test_a_start_without_etcd_serves_what_was_in_force(tmp_path: Path) -> None:
    store = MemoryStore()
    path = tmp_path / "applied.json"
    async with managed(tmp_path) as node, running(follower_of(node, store, tmp_path)):
        first, second = await held(store, node)
        await say(store, second, "preparing", previous=first)
        await until_saved(tmp_path, b"preparing")
        await save_applied(node, path)
    again = tmp_path / "again"
    again.mkdir()
    async with managed(again) as node:
        Applied(path).restore(node.manager)
        follower = follower_of(node, MemoryStore(), tmp_path)
        await follower.restore()
        await until(node, "1 LIVE, 2 READY", first)
        assert node.route.required


async def test_a_new_node_serves_the_document_before_and_prepares_the_other(tmp_path: Path) -> None:
    """It is known from history alone; what serves is loaded first."""
    store = MemoryStore()
    first = await put_with_history(store, document("1"))
    second = await put_with_history(store, document("2", "1", **BARRIER))
    await say(store, second, "preparing", previous=first)
    async with managed(tmp_path) as node, running(follower_of(node, store, tmp_path)):
        await until(node, "1 LIVE, 2 READY", first)
        loads = [worker.recipe.version for worker in node.world.workers if worker.recipe]
        assert loads == ["1", "2"]


async def test_a_document_before_that_history_lost(tmp_path: Path) -> None:
    store = MemoryStore()
    second = await put(store, document("2", **BARRIER))
    await say(store, second, "preparing", previous=1)
    async with managed(tmp_path) as node, running(follower_of(node, store, tmp_path)):
        await until(node, "2 READY", None)
        await say(store, second, "committed", previous=1)
        await until(node, "2 LIVE", second)


async def test_a_document_before_that_this_node_would_refuse(tmp_path: Path) -> None:
    store = MemoryStore()
    first = await put_with_history(store, document("1"))
    second = await put_with_history(store, document("2", sources={"2": "/safe/2"}, **BARRIER))
    await say(store, second, "preparing", previous=first)
    async with managed(tmp_path) as node:
        follower = follower_of(node, store, tmp_path, allow=("/safe",))
        async with running(follower):
            await until(node, "2 READY", None)


async def test_the_record_comes_before_its_document(tmp_path: Path) -> None:
    store = MemoryStore()
    async with managed(tmp_path) as node, running(follower_of(node, store, tmp_path)):
        first = await put(store, document("1", **BARRIER))
        await say(store, first, "committed")
        await until(node, "1 LIVE", first)
        await say(store, first + 2, "preparing", previous=first)
        await node.passes(0.5)
        assert (node.states, node.status.applied_revision) == ("1 LIVE", first)
        second = await put(store, document("2", "1", **BARRIER))
        await say(store, second, "committed", previous=first)
        await until(node, "1 STANDBY, 2 LIVE", second)


async def test_a_record_that_is_none_is_ignored(tmp_path: Path) -> None:
    store = MemoryStore()
    async with managed(tmp_path) as node, running(follower_of(node, store, tmp_path)):
        first, second = await held(store, node)
        for value in (b"", b"{", b"[]", b'{"model": "m", "revision": "x"}', b"\xff"):
            await store.put(KEYS.rollout(MODEL), value)
        await node.passes(0.5)
        assert node.states == "1 LIVE, 2 READY"
        await say(store, second, "committed", previous=first)
        await until(node, "1 STANDBY, 2 LIVE", second)


async def test_a_record_that_is_deleted_takes_nothing_back(tmp_path: Path) -> None:
    store = MemoryStore()
    async with managed(tmp_path) as node, running(follower_of(node, store, tmp_path)):
        first, second = await held(store, node)
        await say(store, second, "committed", previous=first)
        await until(node, "1 STANDBY, 2 LIVE", second)
        await store.delete(KEYS.rollout(MODEL))
        await node.passes(0.5)
        await until(node, "1 STANDBY, 2 LIVE", second)


async def test_a_newer_document_that_waits_for_nobody(tmp_path: Path) -> None:
    store = MemoryStore()
    async with managed(tmp_path) as node, running(follower_of(node, store, tmp_path)):
        await held(store, node)
        third = await put(store, document("3", "1"))
        await until(node, "1 STANDBY, 3 LIVE", third)


async def test_a_node_that_refuses_stays_where_it_is(tmp_path: Path) -> None:
    store = MemoryStore()
    async with managed(tmp_path) as node:
        follower = follower_of(node, store, tmp_path, allow=("/models",))
        async with running(follower):
            first = await put(store, document("1"))
            await until(node, "1 LIVE", first)
            second = await put(store, document("2", sources={"2": "/elsewhere/2"}, **BARRIER))
            await say(store, second, "preparing", previous=first)
            await eventually(lambda: not node.status.accepted, within_s=2)
            await say(store, second, "committed", previous=first)
            await node.passes(0.5)
            await until(node, "1 LIVE", first)
            assert (node.status.revision, node.status.accepted) == (second, False)


async def test_a_model_that_moves_is_left_only_at_the_commit(tmp_path: Path) -> None:
    store = MemoryStore()
    here, there = ({"labels": {"zone": zone}} for zone in "ab")
    async with managed(tmp_path) as node, running(follower_of(node, store, tmp_path)):
        first = await put(store, document("1", placement=here))
        await until(node, "1 LIVE", first)
        second = await put(store, document("1", placement=there, **BARRIER))
        await say(store, second, "preparing", previous=first)
        await node.passes(1)
        await until(node, "1 LIVE", first)
        await say(store, second, "committed", previous=first)
        await eventually(lambda: node.told.withdrawn == [MODEL], within_s=2)


async def test_a_superseded_wave_goes_back_to_what_the_fleet_has(tmp_path: Path) -> None:
    store = MemoryStore()
    async with managed(tmp_path) as node, running(follower_of(node, store, tmp_path)):
        first = await put(store, document("1"))
        await until(node, "1 LIVE", first)
        second = await put(store, document("2", "1", **WAVES))
        await say(store, second, "waving", previous=first, released=(NODE,))
        await until(node, "1 STANDBY, 2 LIVE", second)
        third = await put(store, document("3", "1", **BARRIER))
        await say(store, third, "preparing", previous=first)
        await eventually(lambda: node.states == "1 LIVE, 3 READY", within_s=5)
        assert node.status.applied_revision == first


async def test_the_last_good_version_is_another_than_the_one_in_force(tmp_path: Path) -> None:
    """While a document is held, not its live version is what may fail, but the base's."""
    store = MemoryStore()
    at = datetime.now(UTC)
    async with managed(tmp_path) as node, running(follower_of(node, store, tmp_path)):
        zeroth = await put_with_history(store, document("0"))
        before = LastGood(version=Version("0"), revision=zeroth, at=at)
        first = await put(store, document("1", rollback={"bake_s": 0}))
        await eventually(lambda: node.states == "1 LIVE", within_s=5)
        await put(store, document("2", "1", **BARRIER))
        await until(node, "1 LIVE, 2 READY", first)
        good = LastGood(version=Version("1"), revision=first, at=at).after(before)
        await store.put(KEYS.lastgood(MODEL), good.to_json())
        await node.passes(1)
        await node.fail("/models/1")
        await eventually(lambda: node.live == "0", within_s=5)


async def test_an_abort_with_nothing_to_go_back_to_leaves_what_serves(tmp_path: Path) -> None:
    """A node that refused all before serves the last good version when that is aborted."""
    store = MemoryStore()
    async with managed(tmp_path) as node:
        node.manager.set_fallback(document("0"), Version("0"), Revision(1))
        async with running(follower_of(node, store, tmp_path)):
            first = await put(store, document("1", **BARRIER))
            await say(store, first, "preparing")
            await until(node, "0 LIVE, 1 READY", 1)
            await say(store, first, "aborted", reason="n2 refused")
            await until(node, "0 LIVE", 1)
            assert node.status.reason == "rollout aborted: n2 refused"


async def test_the_way_back_from_a_wave_is_kept_open(tmp_path: Path) -> None:
    """However long the waves take, and where no standby is asked for."""
    store = MemoryStore()
    async with managed(tmp_path) as node, running(follower_of(node, store, tmp_path)):
        first = await put(store, document("1"))
        await until(node, "1 LIVE", first)
        second = await put(store, document("2", "1", rollback={"bake_s": 0}, **WAVES))
        await say(store, second, "waving", previous=first, released=(NODE,))
        await until(node, "1 STANDBY, 2 LIVE", second)
        await node.passes(10_000)
        assert node.states == "1 STANDBY, 2 LIVE"
        await say(store, second, "committed", previous=first)
        await until(node, "2 LIVE", second)
