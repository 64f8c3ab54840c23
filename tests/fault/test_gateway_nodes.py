"""Nodes that die, leave, freeze or lose their etcd behind a gateway: no client sees it."""

from __future__ import annotations

import asyncio
import base64
import os
import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import orjson
import pytest

from tests.etcd import EtcdCluster, etcd_cluster
from tests.eventually import eventually
from tests.fleet import TTL_S, FleetUnderTest, fleet
from tests.node import SERVES_WITHIN_S, http_get
from tests.served import KEYS, traffic

RATE_PER_S = 120.0
BACK_WITHIN_S = 3.0
ETCD_AWAY_S = float(os.environ.get("ETCD_AWAY_S", "8"))
"""Four times the lease. ``ETCD_AWAY_S=60`` makes it the minute that we promise."""

pytestmark = pytest.mark.timeout(300)


@pytest.fixture
def cluster() -> Iterator[EtcdCluster]:
    with etcd_cluster() as cluster:
        yield cluster


@pytest.fixture
async def world(cluster: EtcdCluster, tmp_path: Path) -> AsyncIterator[FleetUnderTest]:
    async with fleet(cluster, tmp_path) as world:
        yield world


async def test_a_node_is_killed_and_comes_back(world: FleetUnderTest) -> None:
    first, *others = world.nodes
    async with traffic(world.gateway.http, world.models, rate_per_s=RATE_PER_S) as running:
        first.process.kin()
        first.process.signal(signal.SIGKILL)
        await first.process.wait(5)
        await world.until_taking(*others, within_s=2)
        await first.process.end()
        await first.start()

        async def serves() -> bool:
            return (await http_get(f"{first.process.http}/v2/models/mlp/ready"))[0] == 200

        await eventually(serves, within_s=SERVES_WITHIN_S)
        await world.until_taking(*world.nodes, within_s=BACK_WITHIN_S)
        result = await running.stop()
    assert result.by(lambda sample: sample.version).keys() == {"1"}


async def test_a_node_is_stopped(world: FleetUnderTest) -> None:
    first, *others = world.nodes
    async with traffic(world.gateway.http, world.models, rate_per_s=RATE_PER_S):
        assert await first.process.stop() == 0
        await world.until_taking(*others, within_s=1)


async def test_a_node_that_drains_is_out_before_it_stops_accepting(
    cluster: EtcdCluster, tmp_path: Path
) -> None:
    async with fleet(cluster, tmp_path, 2, node_flags=[("--drain-delay", "5")]) as world:
        leaving, other = world.nodes
        leaving.process.signal(signal.SIGTERM)
        await world.until_taking(other, within_s=1)
        assert leaving.process.is_running
        assert (await http_get(f"{leaving.process.http}/v2"))[0] == 200
        assert await leaving.process.wait(10) == 0


async def test_a_node_is_frozen(world: FleetUnderTest) -> None:
    """What is in flight on it is run elsewhere once its probes find it silent."""
    first, *others = world.nodes
    async with traffic(world.gateway.http, world.models, rate_per_s=RATE_PER_S) as running:
        first.process.signal(signal.SIGSTOP)
        try:
            await world.until_taking(*others, within_s=5)

            async def nobody_waits() -> bool:
                return (await world.seen())[first.id]["in_flight"] == 0

            await eventually(nobody_waits, within_s=2, what="run elsewhere")
        finally:
            first.process.signal(signal.SIGCONT)
        await world.until_taking(*world.nodes, within_s=BACK_WITHIN_S + TTL_S)
        result = await running.stop()
    (silent,) = world.gateway.events("node_silent")
    assert silent["in_flight"] > 0, "nothing was in flight on it"
    slow = [sample for sample in result.samples if sample.latency_s > 0.5]
    assert len(slow) < 0.1 * len(result), result.summary()
    assert result.latency_s(100) < 6, "waited for its deadline"


async def test_one_node_is_killed_frozen_and_another_at_once(world: FleetUnderTest) -> None:
    """Two of three within a second, one of them while requests wait on it."""
    first, second, third = world.nodes
    async with traffic(world.gateway.http, world.models, rate_per_s=RATE_PER_S) as running:
        first.process.kin()
        second.process.kin()
        first.process.signal(signal.SIGSTOP)

        async def some_wait() -> bool:
            return (await world.seen())[first.id]["in_flight"] > 0

        await eventually(some_wait, within_s=2)
        second.process.signal(signal.SIGKILL)
        first.process.signal(signal.SIGKILL)
        await world.until_taking(third, within_s=3)
        result = await running.stop()
    assert result.latency_s(100) < 3, result.summary()


async def test_etcd_is_down(world: FleetUnderTest) -> None:
    async with traffic(world.gateway.http, world.models, rate_per_s=RATE_PER_S):
        member = world.cluster.members[0]
        member.kill()
        loop = asyncio.get_running_loop()
        back_s = loop.time() + ETCD_AWAY_S
        await eventually(lambda: loop.time() >= back_s, within_s=ETCD_AWAY_S + 1)
        assert await world.taking() == {node.id for node in world.nodes}
        assert (await http_get(f"{world.gateway.http}/readyz"))[0] == 200
        member.start()
        await asyncio.to_thread(world.cluster.wait_healthy)
        revision = await world.models.put(world.store, "2")
        await world.until_applied(revision)
        await world.until_taking(*world.nodes, within_s=5)


async def test_every_lease_vanishes_at_once(world: FleetUnderTest) -> None:
    """The nodes' keys go, the nodes do not: whoever answers its probes is kept."""
    async with traffic(world.gateway.http, world.models, rate_per_s=RATE_PER_S):
        for node in world.nodes:
            node.process.signal(signal.SIGSTOP)  # so that nobody writes its key again
        try:
            for kv in (await world.store.list_prefix(KEYS.nodes_prefix)).kvs:
                await world.store.lease_revoke(kv.lease)
        finally:
            for node in world.nodes:
                node.process.signal(signal.SIGCONT)
        await world.until_taking(*world.nodes, within_s=5)


async def test_versions_are_swapped_while_nodes_die(world: FleetUnderTest) -> None:
    first = world.nodes[0]
    async with traffic(world.gateway.http, world.models, rate_per_s=RATE_PER_S):
        for live in ("2", "1"):
            revision = await world.models.put(world.store, live)
            first.process.kin()
            first.process.signal(signal.SIGKILL)
            await first.process.wait(5)
            await first.process.end()
            await first.start()
            await world.until_applied(revision)


async def test_a_gateway_starts_while_etcd_is_away(cluster: EtcdCluster, tmp_path: Path) -> None:
    """From what etcd last said to it; then it takes up what changed meanwhile."""
    async with fleet(cluster, tmp_path, 2) as world:
        first, second = world.nodes
        kept = tmp_path / "gateway/state/paddlewheel/gateway/gateway.snapshot"

        def is_known() -> bool:
            """Both nodes, and that both serve."""
            if not kept.exists():
                return False
            listings = orjson.loads(kept.read_bytes().partition(b"\n")[2])["listings"]
            statuses = [base64.b64decode(kv[1]) for kv in listings[KEYS.status_prefix()]["kvs"]]
            lives = [orjson.loads(status)["live"] for status in statuses]
            return (len(listings[KEYS.nodes_prefix]["kvs"]), lives) == (2, ["1", "1"])

        await eventually(is_known, within_s=5)
        cluster.members[0].kill()
        await world.restart_gateway(tmp_path / "gateway")
        await world.until_taking(first, second, within_s=4)
        assert (await http_get(f"{world.gateway.http}/readyz"))[0] == 200
        async with traffic(world.gateway.http, world.models, rate_per_s=RATE_PER_S):
            second.process.kin()
            second.process.signal(signal.SIGKILL)
            await second.process.wait(5)
            await world.until_taking(first, within_s=2)
            cluster.members[0].start()
            await asyncio.to_thread(cluster.wait_healthy)
            await second.process.end()
            await second.start()
            revision = await world.models.put(world.store, "2")
            await world.until_applied(revision)
            await world.until_taking(first, second, within_s=5)
