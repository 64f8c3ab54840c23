"""Members die, freeze and come back; nobody loses, repeats or reorders anything.

Members that come back were ended by SIGTERM. etcd 3.5.0 to 3.5.2, the `etcd` extra's among them,
may skip entries after a kill -9 under load, and then serve a history of their own: that is theirs,
and no client can mend it (decision 0004).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator

import pytest

from registry.etcd import EtcdStore
from registry.store import Unavailable
from tests.etcd import EtcdCluster, EtcdMember, etcd_cluster
from tests.fault.etcd_history import PREFIX, end_writing, history


@pytest.fixture
def cluster() -> Iterator[EtcdCluster]:
    """A fresh one for every test: what was killed does not come back (see below)."""
    with etcd_cluster(3) as cluster:
        yield cluster


@pytest.fixture
async def stores(cluster: EtcdCluster) -> AsyncIterator[list[EtcdStore]]:
    """A writer and three watchers, each beginning with another member."""
    stores = [EtcdStore.connect(cluster.settings(first=first)) for first in (0, 0, 1, 2)]
    try:
        yield stores
    finally:
        for store in stores:
            await store.close()


@pytest.mark.parametrize("which", ["leader", "follower"])
async def test_a_member_is_killed(
    cluster: EtcdCluster, stores: list[EtcdStore], which: str
) -> None:
    """kill -9, and two go on."""
    async with history(*stores) as record:
        leader = await asyncio.to_thread(cluster.leader)
        cluster.members[leader if which == "leader" else (leader + 1) % 3].kill()
        await record.until_written(30, within_s=15)
        await end_writing(record)
        await record.check(stores[0])


async def test_the_leader_leaves_and_comes_back(
    cluster: EtcdCluster, stores: list[EtcdStore]
) -> None:
    async with history(*stores) as record:
        member = cluster.members[await asyncio.to_thread(cluster.leader)]
        await asyncio.to_thread(member.stop)
        await record.until_written(20, within_s=15)
        member.start()
        await asyncio.to_thread(cluster.wait_healthy)
        for store in stores:
            store.leave_member()
        await record.until_written(20, within_s=10)
        await end_writing(record)
        await record.check(stores[0])


async def test_all_members_are_away_for_seconds(
    cluster: EtcdCluster, stores: list[EtcdStore]
) -> None:
    async with history(*stores) as record:
        await stop_all(cluster.members)
        await says_unavailable_in_time(cluster)
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
        away = [cluster.members[leader], cluster.members[(leader + 1) % 3]]
        await stop_all(away)
        before = record.written
        await says_unavailable_in_time(cluster)
        assert record.written <= before + 1
        for member in away:
            member.start()
        await asyncio.to_thread(cluster.wait_healthy)
        await record.until_written(10, within_s=15)
        await end_writing(record)
        await record.check(stores[0])


async def stop_all(members: list[EtcdMember]) -> None:
    """SIGTERM to all at once, and wait until they ended."""
    await asyncio.gather(*(asyncio.to_thread(member.stop) for member in members))


async def says_unavailable_in_time(cluster: EtcdCluster) -> None:
    """A read ends at its deadline of one second, give or take."""
    store = EtcdStore.connect(cluster.settings(timeout_s=1))
    loop = asyncio.get_running_loop()
    asked_s = loop.time()
    try:
        with pytest.raises(Unavailable):
            await store.get(f"{PREFIX}0")
        assert loop.time() - asked_s < 2
    finally:
        await store.close()
