"""Memory and files that servables hold: taken once, waited for, given back."""

from __future__ import annotations

from pathlib import Path

import pytest

from loader.devices import Cordon
from loader.errors import FetchFailed
from registry.names import ModelName
from tests.unit.manager_harness import document, managed

pytestmark = pytest.mark.looptime

TWO_FIT = {"cpu": 450}
"""A version takes 202 MB."""
CORDON = Cordon("700", "context poisoned", "2024-01-01T00:00:00.000Z")


async def test_a_standby_makes_room_for_the_next_version(tmp_path: Path) -> None:
    async with managed(tmp_path, quotas_mb=TWO_FIT) as node:
        await node.put_and_settle(document("1"), 5)
        await node.put_and_settle(document("2", "1"), 6)
        node.world.close_s = 2
        node.put(document("3", "2"), 7)
        await node.passes(1)
        assert node.states == "2 LIVE, 3 FETCHING"
        await node.passes(3)
        assert node.states == "2 STANDBY, 3 LIVE"


async def test_a_standby_makes_room_for_a_canary(tmp_path: Path) -> None:
    async with managed(tmp_path, quotas_mb=TWO_FIT) as node:
        await node.put_and_settle(document("1"), 5)
        await node.put_and_settle(document("2", "1"), 6)
        node.world.close_s = 1
        node.put(document("2", canary="3"), 7)
        await node.passes(5)
        assert node.states == "2 LIVE, 3 CANARY"


async def test_a_standby_is_not_given_up_where_that_does_not_help(tmp_path: Path) -> None:
    async with managed(tmp_path, quotas_mb={"cpu": 10_000, "gpu:0": 100}) as node:
        await node.put_and_settle(document("1"), 5)
        await node.put_and_settle(document("2", "1"), 6)
        node.put(document("3", "2", placement={"device": "gpu:0"}), 7)
        await node.passes(5)
        assert node.states == "1 STANDBY, 2 LIVE, 3 FAILED"
        assert node.status.reason == (
            "3 failed: memory: gpu:0: 202 MB wanted, 100 MB free (0 of 100 MB reserved)"
        )


async def test_memory_that_another_model_holds_is_waited_for(tmp_path: Path) -> None:
    async with managed(tmp_path, quotas_mb=TWO_FIT) as node:
        await node.put_and_settle(document("1"), 5)
        await node.put_and_settle(document("1", model="other"), 6)
        node.put(document("2", "1"), 7)
        await node.passes(5)
        assert node.states == "1 LIVE, 2 FETCHING"
        assert str(node.of_version("2").reason).startswith("waiting for memory: cpu: 202 MB wanted")
        node.delete("other")
        await node.passes(1)
        assert node.live == "2"


async def test_a_wait_that_took_too_long_is_begun_again(tmp_path: Path) -> None:
    async with managed(tmp_path, quotas_mb=TWO_FIT, load_timeout_s=60) as node:
        await node.put_and_settle(document("1"), 5)
        await node.put_and_settle(document("1", model="other"), 6)
        node.put(document("2", "1"), 7)
        await node.passes(61)
        assert node.states == "1 LIVE, 2 FAILED"
        await node.passes(10)
        node.delete("other")
        await node.passes(70)
        assert node.live == "2"


async def test_who_waits_for_memory_keeps_nobody_else_from_loading(tmp_path: Path) -> None:
    async with managed(tmp_path, quotas_mb={"cpu": 250, "gpu:0": 1000}, load_slots=1) as node:
        await node.put_and_settle(document("1"), 5)
        for name in ("b", "c"):
            node.put(document("1", model=name), 6)
        elsewhere = document("1", model="g", placement={"device": "gpu:0"})
        await node.put_and_settle(elsewhere, 7)
        view = node.manager.view(ModelName("g"))
        assert view is not None
        assert view.can_serve


async def test_a_wait_that_nobody_wants_any_more_leaves_the_line(tmp_path: Path) -> None:
    async with managed(tmp_path, quotas_mb=TWO_FIT) as node:
        await node.put_and_settle(document("1"), 5)
        await node.put_and_settle(document("1", model="other"), 6)
        await node.put_and_settle(document("2", "1"), 7)
        await node.put_and_settle(document("1"), 8)
        assert (node.states, node.status.applied_revision) == ("1 LIVE", 8)
        assert node.devices.waiting("cpu") == ()
        node.delete("other")
        await node.passes(1)
        assert node.reserved_mb() == node.of_version("1").memory_mb


async def test_a_version_for_a_cordoned_device_comes_when_it_is_well_again(tmp_path: Path) -> None:
    async with managed(tmp_path) as node:
        await node.put_and_settle(document("1"), 5)
        node.manager.cordon("cpu", CORDON)
        await node.put_and_settle(document("2", "1"), 6)
        assert node.live == "1"
        node.manager.uncordon("cpu")
        await node.passes(5)
        assert node.live == "2"


async def test_a_document_may_say_anew_how_much_memory_it_takes(tmp_path: Path) -> None:
    async with managed(tmp_path) as node:
        await node.put_and_settle(document("1", placement={"memoryMB": 100}), 5)
        await node.put_and_settle(document("1", placement={"memoryMB": 3000}), 6)
        assert (node.states, node.reserved_mb()) == ("1 LIVE", 3000)
        assert len(node.world.workers) == 1


async def test_a_failure_before_anything_was_taken_gives_back_nothing(tmp_path: Path) -> None:
    """Two servables of the same bytes: the one that fails must not take the other's files."""
    async with managed(tmp_path) as node:
        await node.put_and_settle(document("1"), 5)
        node.world.fails("file:///golden.npz", "golden", FetchFailed("gone", retryable=False))
        golden = {"golden": "file:///golden.npz"}
        await node.put_and_settle(document("1", model="other", warmup=golden), 6)
        node.check()
        assert list(node.leased().values()) == [1]


async def test_files_evicted_and_changed_meanwhile_are_another_servable(tmp_path: Path) -> None:
    """The digest in the status is that of the weights that answer."""
    async with managed(tmp_path) as node:
        await node.put_and_settle(document("1"), 5)
        await node.put_and_settle(document("2", "1"), 6)
        await node.fail("/models/2")
        assert node.states == "1 LIVE, 2 QUARANTINED"
        node.repository.evict("/models/2")
        node.world.content["/models/2"] = "repaired"
        node.manager.release(node.route.model, node.of_version("2").id.version)
        await node.passes(1)
        assert node.live == "2"
        assert node.route.live is not None
        assert node.content_of(node.route.live) == "repaired"
        assert node.route.live.digest in node.leased()
        assert len(node.leased()) == 2
