"""Faults, suspicion, quarantine, release: what the manager makes of them."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from loader.counting import Rule, Tripped
from loader.devices import Cordon
from loader.faults import from_code
from loader.oversight import FaultReport
from registry.inference import ServableFailed
from registry.names import Revision, Version
from tests.unit.manager_harness import (
    FEEDS,
    MODEL,
    ManagedNode,
    digest_of,
    document,
    managed,
    quarantine,
    sticky,
)

pytestmark = pytest.mark.looptime

CORDON = Cordon("700", "context poisoned", "2024-01-01T00:00:00.000Z")
BAD_2 = quarantine(digest_of("/models/2"))


async def with_standby(node: ManagedNode) -> None:
    """2 is live over 1."""
    await node.put_and_settle(document("1"), 5)
    await node.put_and_settle(document("2", "1"), 6)
    assert node.states == "1 STANDBY, 2 LIVE"


def suspect_2(node: ManagedNode) -> None:
    """As the third fault does whose cause is not known yet."""
    servable = node.of_version("2")
    fault = from_code(700)
    tripped = Tripped(Rule.CONSECUTIVE, 3, 1.0, fault)
    # Nothing is on record against it, so what is to blame stays open.
    node.manager.desk._tripped(  # pyright: ignore[reportPrivateUsage]
        node.manager._models[MODEL],  # pyright: ignore[reportPrivateUsage]
        servable,
        FaultReport(fault, 1, None),
        tripped,
        None,
    )


async def test_the_third_fault_rolls_back_and_the_request_is_answered(tmp_path: Path) -> None:
    async with managed(tmp_path) as node:
        await with_standby(node)
        await node.fail("/models/2", times=2)
        assert node.live == "2"
        await node.fail("/models/2", times=1)
        assert node.states == "1 LIVE, 2 QUARANTINED"
        ((servable, told),) = node.told.quarantines
        assert (servable.version, told.code, told.digest) == ("2", 700, servable.digest)
        assert node.status.reason == "quarantined: 2: code 700 (sticky): 3 faults in a row"
        assert node.status.intent.live == "2"


async def test_other_bytes_of_one_version_are_judged_apart(tmp_path: Path) -> None:
    """The old bytes are the control: their device is not to blame for what the new ones do."""
    async with managed(tmp_path) as node:
        await node.put_and_settle(document("1"), 5)
        node.world.content["/models/1"] = "new bytes"
        await node.put_and_settle(document("1", limits={"queue": 9}), 6)
        await node.fail("new bytes")
        await node.passes(5)
        assert node.live_content == "/models/1"
        assert node.states == "1 LIVE, 1 QUARANTINED"
        assert node.devices.cordoned("cpu") is None


@pytest.mark.parametrize("phase", ["check", "load", "warm"])
async def test_a_version_taken_out_elsewhere_while_it_loads_here(
    tmp_path: Path, phase: str
) -> None:
    async with managed(tmp_path) as node:
        await node.put_and_settle(document("1"), 5)
        node.world.takes("2", phase, 5)
        await node.put_and_settle(document("2", "1"), 6)
        node.quarantine(v2=BAD_2)
        for _ in range(20):
            await node.passes(0.5)
            assert node.live == "1"
        assert node.states == "1 LIVE, 2 QUARANTINED"
        assert len(node.leased()) == 1


async def test_a_new_document_with_other_bytes_ends_a_quarantine(tmp_path: Path) -> None:
    async with managed(tmp_path) as node:
        await with_standby(node)
        node.quarantine(v2=BAD_2)
        await node.settle()
        await node.put_and_settle(document("2", "1", limits={"queue": 9}), 7)
        assert node.states == "1 LIVE, 2 QUARANTINED"
        node.world.content["/models/2"] = "repaired"
        await node.put_and_settle(document("2", "1"), 8)
        assert (node.live_content, node.status.applied_revision) == ("repaired", 8)


async def test_a_release_loads_it_again(tmp_path: Path) -> None:
    async with managed(tmp_path) as node:
        await with_standby(node)
        node.world.close_s = 3
        node.quarantine(v2=BAD_2)
        await node.settle()
        node.quarantine()
        await node.passes(10)
        assert node.states == "1 STANDBY, 2 LIVE"


async def test_after_a_release_faults_are_counted_anew(tmp_path: Path) -> None:
    """Even where the servable was forgotten meanwhile, because no document named it."""
    async with managed(tmp_path) as node:
        await with_standby(node)
        for _ in range(20):
            await node.infer()
        await node.fail("/models/2")
        node.quarantine(v2=BAD_2)
        await node.put_and_settle(document("1"), 7)
        assert node.states == "1 LIVE"
        node.quarantine()
        await node.put_and_settle(document("2", "1"), 8)
        await node.passes(60)
        await node.infer()
        await node.fail("/models/2", times=1)
        assert node.live == "2"


async def test_what_was_suspected_and_unloaded_is_not_suspected_later(tmp_path: Path) -> None:
    async with managed(tmp_path) as node:
        await with_standby(node)
        suspect_2(node)
        assert node.live == "1"
        await node.put_and_settle(document("1", rollback={"bake_s": 0}), 7)
        await node.passes(10)
        assert node.states == "1 LIVE"
        await node.put_and_settle(document("2", "1"), 8)
        assert node.live == "2"


async def test_a_suspect_that_the_fleet_takes_out_and_releases(tmp_path: Path) -> None:
    async with managed(tmp_path) as node:
        await with_standby(node)
        suspect_2(node)
        node.quarantine(v2=BAD_2)
        await node.passes(10)
        node.quarantine()
        await node.passes(10)
        assert node.live == "2"


async def test_a_suspect_is_routed_again_once_its_device_is_well(tmp_path: Path) -> None:
    async with managed(tmp_path) as node:
        await with_standby(node)
        suspect_2(node)
        node.manager.cordon("cpu", CORDON)
        node.manager.uncordon("cpu")
        await node.passes(10)
        assert node.live == "2"


async def test_a_verdict_on_what_was_unloaded_meanwhile_has_no_effect(tmp_path: Path) -> None:
    """The experiment takes seconds; a document may come in between."""
    async with managed(tmp_path) as node:
        await with_standby(node)
        node.world.run_s = 3
        suspect_2(node)
        await node.passes(3)
        await node.put_and_settle(document("1", rollback={"bake_s": 0}), 7)
        await node.passes(20)
        assert node.told.quarantines == []
        node.world.run_s = 0.001
        await node.put_and_settle(document("2", "1"), 8)
        assert node.live == "2"


async def test_without_anything_better_a_failing_version_goes_on(tmp_path: Path) -> None:
    """The last good version is no way out when it is quarantined itself."""
    async with managed(tmp_path) as node:
        await node.put_and_settle(document("2", "1"), 6)
        node.quarantine(v1=quarantine(digest_of("/models/1")))
        node.manager.set_fallback(document("1"), Version("1"), Revision(3))
        node.world.always["/models/2"] = sticky
        await node.fail("/models/2")
        assert node.live == "2"
        assert str(node.status.reason).endswith("of 2, nothing to roll back to")
        node.world.always.clear()
        await node.passes(30)
        await node.infer()
        await node.passes(2)
        assert node.status.reason is None


async def test_with_a_last_good_version_a_failing_one_goes(tmp_path: Path) -> None:
    async with managed(tmp_path) as node:
        await node.put_and_settle(document("2", "1"), 6)
        node.manager.set_fallback(document("1"), Version("1"), Revision(3))
        await node.fail("/models/2", times=3)
        await node.passes(1)
        assert node.states == "1 LIVE, 2 QUARANTINED"


async def test_requests_in_flight_on_what_is_taken_out_run_elsewhere(tmp_path: Path) -> None:
    async with managed(tmp_path) as node:
        await with_standby(node)
        node.world.run_s = 1
        requests = [asyncio.create_task(node.infer()) for _ in range(5)]
        await node.passes(0.1)
        node.quarantine(v2=BAD_2)
        served = await asyncio.gather(*requests)
        # The first was running, and may end where it is; the others were only waiting.
        assert [s.choice.servable.version for s in served][1:] == ["1"] * 4


async def test_a_model_deleted_as_its_version_is_taken_out(tmp_path: Path) -> None:
    async with managed(tmp_path) as node:
        await node.put_and_settle(document("1"), 5)
        node.delete()
        node.quarantine(v1=quarantine())
        await node.settle()
        assert MODEL not in node.told.routes.serving.table.models
        assert (node.leased(), node.reserved_mb()) == ({}, 0)


async def test_a_pinned_request_is_told_that_its_version_is_retired(tmp_path: Path) -> None:
    """It asked for this one: no other may answer in its place."""
    async with managed(tmp_path) as node:
        await with_standby(node)
        serving, two = node.told.routes.serving, node.route.live
        assert two is not None
        node.quarantine(v2=BAD_2)
        deadline_s = asyncio.get_running_loop().time() + 5
        with pytest.raises(ServableFailed):
            await serving.predictors[two].infer(FEEDS, deadline_s=deadline_s)
