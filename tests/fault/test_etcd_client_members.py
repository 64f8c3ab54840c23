"""Members die, freeze and come back; nobody loses, repeats or reorders anything."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator

import pytest

from registry.etcd import EtcdStore
from registry.store import Unavailable
from tests.etcd import EtcdCluster, etcd_cluster
from tests.fault.etcd_history import PREFIX, end_writing, history


@pytest.fixture(scope="module")
def cluster() -> Iterator[EtcdCluster]:
    with etcd_cluster(3) as cluster:
        yield cluster


@pytest.fixture
async def stores(cluster: EtcdCluster) -> AsyncIterator[list[EtcdStore]]:
    """A writer and three watchers, each beginning with another member; health before and after."""
    await asyncio.to_thread(cluster.wait_healthy)
    stores = [EtcdStore.connect(cluster.settings(first=first)) for first in (0, 0, 1, 2)]
    try:
        yield stores
        await asyncio.to_thread(cluster.heal)
        await stores[0].delete_prefix(PREFIX)
    finally:
        for store in stores:
            await store.close()


async def test_the_leader_is_killed(cluster: EtcdCluster, stores: list[EtcdStore]) -> None:
    async with history(*stores) as record:
        leader = cluster.members[await asyncio.to_thread(cluster.leader)]
        leader.kill()
        await record.until_written(20, within_s=15)
        leader.start()
        await asyncio.to_thread(cluster.wait_healthy)
        await record.until_written(5, within_s=10)
        await end_writing(record)
        await record.check(stores[0])


async def test_a_follower_is_killed(cluster: EtcdCluster, stores: list[EtcdStore]) -> None:
    async with history(*stores) as record:
        leader = await asyncio.to_thread(cluster.leader)
        follower = cluster.members[(leader + 1) % 3]
        follower.kill()
        await record.until_written(20, within_s=10)
        follower.start()
        await record.until_written(20, within_s=10)
        await end_writing(record)
        await record.check(stores[0])


async def test_all_members_are_away_for_five_seconds(
    cluster: EtcdCluster, stores: list[EtcdStore]
) -> None:
    async with history(*stores) as record:
        for member in cluster.members:
            member.kill()
        loop = asyncio.get_running_loop()
        killed_s = loop.time()
        with pytest.raises(Unavailable):
            await stores[1].get(f"{PREFIX}0")
        assert loop.time() - killed_s < 5.5
        for member in cluster.members:
            member.start()
        await asyncio.to_thread(cluster.wait_healthy)
        await record.until_written(10, within_s=10)
        await end_writing(record)
        await record.check(stores[0])


@pytest.mark.parametrize("which", ["leader", "follower"])
async def test_a_member_is_frozen(
    cluster: EtcdCluster, stores: list[EtcdStore], which: str
) -> None:
    """SIGSTOP: its connections stay open and say nothing."""
    async with history(*stores) as record:
        leader = await asyncio.to_thread(cluster.leader)
        member = cluster.members[leader if which == "leader" else (leader + 1) % 3]
        member.freeze()
        await record.until_written(20, within_s=20)
        # Watchers on the frozen member have to notice, by gRPC's keepalive, and move.
        await record.until_seen(within_s=15)
        member.thaw()
        await record.until_written(5, within_s=10)
        await end_writing(record)
        await record.check(stores[0])


async def test_quorum_is_lost_and_comes_back(cluster: EtcdCluster, stores: list[EtcdStore]) -> None:
    async with history(*stores) as record:
        leader = await asyncio.to_thread(cluster.leader)
        killed = [cluster.members[leader], cluster.members[(leader + 1) % 3]]
        for member in killed:
            member.kill()
        before = record.written
        with pytest.raises(Unavailable):
            await stores[1].get(f"{PREFIX}0")
        assert record.written <= before + 1
        for member in killed:
            member.start()
        await asyncio.to_thread(cluster.wait_healthy)
        await record.until_written(10, within_s=15)
        await end_writing(record)
        await record.check(stores[0])
