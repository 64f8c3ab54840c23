"""From a document to what is in force, through the whole manager."""

from __future__ import annotations

from pathlib import Path

import pytest

from loader.errors import LoadFailed, NotAdmitted
from registry.inference import Signature, TensorSpec
from registry.spec import ModelDocument
from tests.unit.manager_harness import MODEL, ManagedNode, document, managed, quarantine

pytestmark = pytest.mark.looptime

NO_BAKE = {"bake_s": 0}


async def test_a_document_is_loaded_routed_and_unloaded_again(tmp_path: Path) -> None:
    async with managed(tmp_path) as node:
        await node.put_and_settle(document("1"), 5)
        assert node.states == "1 LIVE"
        assert (node.route.revision, node.status.applied_revision) == (5, 5)
        assert (await node.infer()).choice.servable == node.route.live
        node.delete()
        await node.settle()
        assert node.told.withdrawn == [MODEL]
        assert (node.leased(), node.reserved_mb(), node.world.alive()) == ({}, 0, [])
        assert node.manager.views() == ()


async def test_the_version_before_is_the_standby_until_the_bake_is_over(tmp_path: Path) -> None:
    async with managed(tmp_path) as node:
        await node.put_and_settle(document("1"), 5)
        await node.put_and_settle(document("2", "1"), 6)
        assert node.states == "1 STANDBY, 2 LIVE"
        await node.passes(600)
        assert node.states == "2 LIVE"
        assert len(node.leased()) == 1


async def test_swaps_in_a_row_leave_nothing_behind(tmp_path: Path) -> None:
    async with managed(tmp_path) as node:
        for number in range(40):
            live = "12"[number % 2]
            await node.put_and_settle(document(live, "1", "2", rollback=NO_BAKE), 10 + number)
            assert node.live == live
        await node.passes(1)
        assert len(node.world.alive()) == len(node.leased()) == 1


async def test_a_newer_document_stops_the_load_for_an_older_one(tmp_path: Path) -> None:
    async with managed(tmp_path) as node:
        await node.put_and_settle(document("1"), 5)
        node.world.takes("2", "load", 60)
        await node.put_and_settle(document("2", "1"), 6)
        await node.put_and_settle(document("3", "1"), 7)
        assert node.live == "3"
        assert [w.recipe and w.recipe.version for w in node.world.alive()] == ["1", "3"]


async def test_a_document_that_wants_the_same_load_lets_it_go_on(tmp_path: Path) -> None:
    async with managed(tmp_path) as node:
        node.world.takes("1", "load", 10)
        node.put(document("1"), 5)
        await node.passes(6)
        node.put(document("1", limits={"timeout_s": 3}), 6)
        await node.passes(5)
        assert (node.live, node.route.revision, node.route.limits.timeout_s) == ("1", 6, 3)
        assert len(node.world.workers) == 1


async def test_documents_faster_than_loads(tmp_path: Path) -> None:
    """Whatever was begun is ended and given back, and the last document wins."""
    async with managed(tmp_path) as node:
        node.world.close_s = 0.5
        for version in "123456":
            node.world.takes(version, "load", 1.0)
        for number in range(60):
            node.put(document(str(1 + number % 6), rollback=NO_BAKE), 10 + number)
            await node.passes(0.37 * (number % 5))
        await node.passes(10)
        assert (node.live, node.states) == ("6", "6 LIVE")
        assert len(node.world.alive()) == len(node.leased()) == 1
        assert node.reserved_mb() == node.of_version("6").memory_mb


@pytest.mark.parametrize("phase", ["fetch", "check", "load", "warm", "serve"])
async def test_a_document_deleted_while_its_version_loads(tmp_path: Path, phase: str) -> None:
    async with managed(tmp_path) as node:
        node.world.waits("/models/1" if phase == "fetch" else "1", phase)
        node.put(document("1", placement={"replicas": 2}), 5)
        await node.passes(0.1)
        node.delete()
        await node.passes(3)
        assert (node.leased(), node.reserved_mb(), node.world.alive()) == ({}, 0, [])
        assert node.manager.views() == ()


async def test_the_same_version_with_other_bytes_is_swapped_like_any_other(tmp_path: Path) -> None:
    async with managed(tmp_path) as node:
        await node.put_and_settle(document("1"), 5)
        node.world.content["/models/1"] = "other bytes"
        await node.put_and_settle(document("1", limits={"queue": 9}), 6)
        assert node.states == "1 LIVE, 1 STANDBY"
        assert node.live_content == "other bytes"
        assert (await node.infer(version="1")).choice.servable == node.route.live


async def test_other_bytes_that_fail_leave_the_old_ones_serving(tmp_path: Path) -> None:
    async with managed(tmp_path) as node:
        await node.put_and_settle(document("1"), 5)
        node.world.content["/models/1"] = "other bytes"
        node.world.fails("1", "check", NotAdmitted("params", "cut short"))
        await node.put_and_settle(document("1", limits={"queue": 9}), 6)
        assert node.states == "1 FAILED, 1 LIVE"
        assert node.live_content == "/models/1"
        status = node.status
        assert (status.accepted, status.revision, status.applied_revision) == (True, 6, 5)
        assert status.reason == "1 failed: params: cut short"


async def test_live_and_canary_come_into_force_together(tmp_path: Path) -> None:
    async with managed(tmp_path) as node:
        await node.put_and_settle(document("1"), 5)
        node.world.takes("3", "load", 10)
        await node.put_and_settle(document("2", canary="3"), 6)
        assert (node.live, node.route.revision) == ("1", 5)
        await node.passes(11)
        assert (node.states, node.route.revision) == ("1 STANDBY, 2 LIVE, 3 CANARY", 6)


async def test_a_canary_that_fails_keeps_the_whole_document_out_of_force(tmp_path: Path) -> None:
    async with managed(tmp_path) as node:
        await node.put_and_settle(document("1"), 5)
        node.world.fails("3", "warm", NotAdmitted("golden", "output y is off"))
        await node.put_and_settle(document("2", canary="3"), 6)
        assert (node.live, node.route.canary, node.status.applied_revision) == ("1", None, 5)
        assert node.status.reason == "3 failed: golden: output y is off"


async def test_a_canary_is_promoted_without_another_load(tmp_path: Path) -> None:
    async with managed(tmp_path) as node:
        await node.put_and_settle(document("1", canary="2"), 5)
        await node.put_and_settle(document("2", "1"), 6)
        assert node.states == "1 STANDBY, 2 LIVE"
        assert len(node.world.workers) == 2


async def test_live_and_canary_change_places(tmp_path: Path) -> None:
    async with managed(tmp_path) as node:
        await node.put_and_settle(document("1", canary="2"), 5)
        await node.put_and_settle(document("2", canary="1"), 6)
        assert node.states == "1 CANARY, 2 LIVE"
        await node.put_and_settle(document("1", canary="2"), 7)
        assert node.states == "1 LIVE, 2 CANARY"


@pytest.mark.parametrize(
    ("change", "device"),
    [({"replicas": 2}, "cpu"), ({"device": "gpu:0"}, "gpu:0")],
    ids=["more replicas", "another device"],
)
async def test_a_change_of_placement_is_a_swap(
    tmp_path: Path, change: dict[str, object], device: str
) -> None:
    """The same bytes are loaded beside themselves, each with memory of its own."""
    async with managed(tmp_path, quotas_mb={"cpu": 10_000, "gpu:0": 10_000}) as node:
        await node.put_and_settle(document("1", rollback=NO_BAKE), 5)
        await node.put_and_settle(document("1", rollback=NO_BAKE, placement=change), 6)
        assert (node.states, node.status.applied_revision) == ("1 LIVE", 6)
        await node.passes(1)
        assert node.reserved_mb(device) == node.of_version("1").memory_mb
        assert node.reserved_mb("cpu") + node.reserved_mb("gpu:0") == node.reserved_mb(device)


async def test_deleted_and_put_again_while_the_workers_end(tmp_path: Path) -> None:
    async with managed(tmp_path) as node:
        node.world.close_s = 2
        await node.put_and_settle(document("1"), 5)
        node.delete()
        await node.settle()
        await node.put_and_settle(document("1"), 7)
        assert node.live == "1"
        await node.passes(5)
        assert node.reserved_mb() == node.of_version("1").memory_mb


async def test_deleted_and_put_again_while_it_loads(tmp_path: Path) -> None:
    async with managed(tmp_path) as node:
        node.world.takes("1", "load", 3)
        node.world.close_s = 2
        node.put(document("1"), 5)
        await node.passes(1)
        node.delete()
        await node.passes(0.01)
        node.put(document("1"), 6)
        await node.passes(10)
        assert node.live == "1"
        assert node.reserved_mb() == node.of_version("1").memory_mb
        assert sum(node.leased().values()) == 1


async def test_a_replica_that_fails_takes_the_others_with_it(tmp_path: Path) -> None:
    loads = 0

    async def third_fails() -> None:
        nonlocal loads
        loads += 1
        if loads == 3:
            raise LoadFailed("no room")

    async with managed(tmp_path) as node:
        await node.put_and_settle(document("1"), 5)
        node.world.steps["2", "load"] = third_fails
        await node.put_and_settle(document("2", "1", placement={"replicas": 3}), 6)
        assert node.states == "1 LIVE, 2 FAILED"
        assert len(node.world.alive()) == len(node.leased()) == 1


async def test_a_signature_is_held_against_the_version_it_would_replace(tmp_path: Path) -> None:
    other = Signature((TensorSpec("x", "float32", (-1, 3)),), (TensorSpec("y", "float32", (-1,)),))
    async with managed(tmp_path) as node:
        await node.put_and_settle(document("1"), 5)
        node.world.signatures["2"] = other
        await node.put_and_settle(document("2", "1", compatibility="strict"), 6)
        assert node.states == "1 LIVE, 2 FAILED"
        await node.put_and_settle(document("2", "1", compatibility="none"), 7)
        assert node.live == "2"


async def test_an_identical_revision_with_other_words(tmp_path: Path) -> None:
    """A store restored from a backup may reach the same revision with another document."""
    async with managed(tmp_path) as node:
        await node.put_and_settle(document("1", limits={"timeout_s": 5}), 5)
        await node.put_and_settle(document("1", limits={"timeout_s": 7}), 5)
        assert node.route.limits.timeout_s == 7


async def test_revisions_leave_no_trace(tmp_path: Path) -> None:
    """Records of what is gone would grow with every document, for as long as the node lives."""
    async with managed(tmp_path) as node:
        for number in range(50):
            node.world.content["/models/1"] = f"bytes {number}"
            node.world.content["/models/2"] = f"bad bytes {number}"
            node.world.fails("2", "check", NotAdmitted("params", "cut short"))
            good: ModelDocument = document("1", rollback=NO_BAKE)
            await node.put_and_settle(good, 10 + 2 * number)
            await node.put_and_settle(document("2", "1", rollback=NO_BAKE), 11 + 2 * number)
        assert {name: size for name, size in sizes(node).items() if size > 3} == {}


def sizes(node: ManagedNode) -> dict[str, int]:
    """How many entries each mapping of the model's record has."""
    # What grows in there is not seen from outside.
    model = node.manager._models[MODEL]  # pyright: ignore[reportPrivateUsage]
    held = {name: getattr(model, name) for name in model.__slots__}
    return {name: len(value) for name, value in held.items() if isinstance(value, dict | frozenset)}


async def test_two_models_with_the_same_bytes_keep_their_own(tmp_path: Path) -> None:
    async with managed(tmp_path) as node:
        await node.put_and_settle(document("1"), 5)
        await node.put_and_settle(document("1", model="other"), 6)
        node.delete("other")
        await node.passes(1)
        assert node.live == "1"
        assert node.reserved_mb() == node.of_version("1").memory_mb


async def test_a_route_never_names_what_is_not_loaded(tmp_path: Path) -> None:
    """`Routes.put` raises for one: both versions go, come back, and go with the document."""
    async with managed(tmp_path) as node:
        await node.put_and_settle(document("1"), 5)
        await node.put_and_settle(document("2", "1"), 6)
        node.quarantine(v1=quarantine(), v2=quarantine())
        await node.passes(1)
        assert (node.live, node.states) == (None, "2 QUARANTINED")
        node.quarantine()
        await node.passes(1)
        assert node.live == "2"
        node.quarantine(v2=quarantine())
        node.delete()
        await node.passes(1)
        assert node.states == ""
        await node.put_and_settle(document("1"), 9)
        assert node.live == "1"
