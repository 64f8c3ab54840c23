"""Rollouts through three real nodes under traffic: aborted, in waves, taken back."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from paddlewheel.models import make_mlp
from registry.names import Revision
from registry.rollouts import Phase, RolloutRecord
from tests.etcd import EtcdCluster, etcd_cluster
from tests.eventually import eventually
from tests.fleet import FleetUnderTest, fleet
from tests.served import KEYS, MLP, Models, traffic

BARRIER = {"strategy": "barrier", "timeout_s": 60}
WAVES = {"strategy": "waves", "waves": [{"percent": 30, "bake_s": 60}], "timeout_s": 60}
GETS_READY_WITHIN_S = 40.0
SMALL_CACHE = ("--cache-max-mb", "1")

pytestmark = pytest.mark.timeout(240)


@pytest.fixture
def cluster() -> Iterator[EtcdCluster]:
    with etcd_cluster() as cluster:
        yield cluster


@pytest.fixture
async def world(cluster: EtcdCluster, tmp_path: Path) -> AsyncIterator[FleetUnderTest]:
    async with fleet(cluster, tmp_path, node_flags=[(), (), SMALL_CACHE]) as world:
        yield world


async def test_aborts_and_waves(world: FleetUnderTest) -> None:
    async with traffic(world.gateway.http, world.models, rate_per_s=60) as running:
        await one_node_that_cannot_load_ends_it_everywhere(world)
        await a_wave_that_is_aborted_is_taken_back(world)
        await what_is_left_follows_when_it_is_promoted(world)
        result = await running.stop()
    assert result.by(lambda sample: sample.version).keys() == {"1", "2"}


async def one_node_that_cannot_load_ends_it_everywhere(world: FleetUnderTest) -> None:
    before = set((await world.applied()).values())
    large = Models(world.models.folder, ("1",), spec={"rollout": BARRIER})
    make_mlp(large.source("3"), seed=3, tag=3.0, hidden=512, layers=4)
    large.versions = ("1", "3")
    revision = await large.put(world.store, "3")
    record = await until(world, revision, Phase.ABORTED)
    why = "3 failed: cache full"
    assert record.reason is not None
    assert record.reason.startswith("1 of 3 nodes can't take it: n2:")
    assert why.removeprefix("3 failed: ") in record.reason
    assert [refusal.node for refusal in record.refused] == ["n2"]

    async def said_everywhere() -> bool:
        said = (await world.statuses()).values()
        return all(
            status.revision == revision
            and status.accepted
            and status.live == "1"
            and str(status.reason).startswith(f"rollout aborted: {record.reason}")
            for status in said
        )

    await eventually(said_everywhere, within_s=5, what="every node tells the reason")
    assert set((await world.applied()).values()) == before
    shown = (await paddlewheel(world, "rollouts", MLP))["rollouts"][0]
    assert (shown["phase"], shown["reason"]) == ("aborted", record.reason)
    assert (await paddlewheel(world, "status"))["models"][0]["converged"] is False


async def a_wave_that_is_aborted_is_taken_back(world: FleetUnderTest) -> None:
    before = await world.applied()
    revision = await waves_of(world).put(world.store, "2")
    record = await until(world, revision, Phase.WAVING)
    assert record.released == ("n0",)
    await until_live(world, n0="2", n1="1", n2="1")
    await paddlewheel(world, "abort", MLP, is_json=False)
    await until_live(world, n0="1", n1="1", n2="1")
    assert await world.applied() == before
    log = world.nodes[0].process
    loads = [event for event in log.events("servable_ready") if ":1@" in event["servable"]]
    assert len(loads) == 1, "taken back by loading, not by a change of pointer"


async def what_is_left_follows_when_it_is_promoted(world: FleetUnderTest) -> None:
    revision = await waves_of(world).put(world.store, "2", again="yes")
    await until(world, revision, Phase.WAVING)
    await until_live(world, n0="2", n1="1", n2="1")
    await paddlewheel(world, "promote", MLP, is_json=False)
    await until(world, revision, Phase.COMMITTED)
    await until_live(world, n0="2", n1="2", n2="2")
    assert set((await world.applied()).values()) == {revision}


def waves_of(world: FleetUnderTest) -> Models:
    return Models(world.models.folder, spec={"rollout": WAVES})


async def until(world: FleetUnderTest, revision: Revision, phase: Phase) -> RolloutRecord:
    last: list[RolloutRecord] = []

    async def is_so() -> bool:
        kv = await world.store.get(KEYS.rollout(MLP))
        last[:] = [] if kv is None else [RolloutRecord.from_json(kv.value)]
        return bool(last) and (last[0].revision, last[0].phase) == (revision, phase)

    try:
        await eventually(is_so, within_s=GETS_READY_WITHIN_S)
    except AssertionError:
        raise AssertionError(f"not {phase}: {[record.to_dict() for record in last]}") from None
    return last[0]


async def until_live(world: FleetUnderTest, **live: str) -> None:
    async def is_so() -> bool:
        said = await world.statuses()
        return {node: status.live for node, status in said.items()} == live

    try:
        await eventually(is_so, within_s=GETS_READY_WITHIN_S)
    except AssertionError:
        said = {node: status.to_dict() for node, status in (await world.statuses()).items()}
        raise AssertionError(f"not {live}: {said}") from None


async def paddlewheel(world: FleetUnderTest, *arguments: str, is_json: bool = True) -> Any:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "paddlewheel", *arguments,
        "--etcd", ",".join(world.cluster.endpoints), *(("-o", "json") if is_json else ()),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    async with asyncio.timeout(30):
        out, err = await process.communicate()
    assert process.returncode == 0, err.decode()
    return json.loads(out) if is_json else out.decode()
