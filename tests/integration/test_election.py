"""The contract of an election on the store in memory and on real etcd, and what kills a leader."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator

import pytest

from registry.election import Deposed, leadership
from registry.etcd import EtcdStore
from registry.memory_store import MemoryStore
from registry.names import Revision
from tests.etcd import EtcdCluster, etcd_cluster
from tests.eventually import eventually
from tests.integration.election_contract import (
    KEY,
    TTL_S,
    Candidate,
    ElectionContract,
    running,
    until_one_leads,
)
from tests.integration.store_contract import World


class TestInMemory(ElectionContract):
    pytestmark = pytest.mark.looptime

    @pytest.fixture
    def world(self) -> World:
        store = MemoryStore()

        async def compact(revision: Revision) -> None:
            store.cluster.compact(revision)

        return World(store, store.client, compact, store.cut_watches)

    async def test_a_leader_cut_off_is_replaced_within_its_ttl_and_knows_it(self) -> None:
        store = MemoryStore()
        ghost, heir = store.client(), store.client()
        first, second = Candidate(ghost, "a"), Candidate(heir, "b")
        loop = asyncio.get_running_loop()
        async with running(first) as tasks, running(second):
            await until_one_leads([first, second])
            ghost.cut_off()
            cut_s = loop.time()
            while not second.leads:
                # Never two by their own clocks.
                assert sum(each.leads for each in (first, second)) <= 1
                await asyncio.sleep(0.01)
            assert loop.time() - cut_s <= TTL_S + 0.5
            await eventually(lambda: tasks[0].done(), within_s=5)
            with pytest.raises(Deposed):
                await first.led[0].put("/k", b"", Revision(0))

    @pytest.mark.parametrize("fate", ["applied", "lost", "late"])
    async def test_an_election_whose_answer_was_lost(self, fate: str) -> None:
        store = MemoryStore()
        client = store.client()
        client.faults.ambiguous = [fate]  # type: ignore[list-item]
        async with leadership(client, KEY, lambda: b"a", ttl_s=TTL_S) as led:
            client.deliver_late()
            kv = await store.get(KEY)
            assert kv is not None
            assert kv.create_revision == led.fence
            done = await led.put("/k", b"", Revision(0))
            assert isinstance(done, int)
        assert await store.get(KEY) is None


class TestOnEtcd(ElectionContract):
    @pytest.fixture(scope="class")
    def cluster(self) -> Iterator[EtcdCluster]:
        with etcd_cluster(1) as cluster:
            yield cluster

    @pytest.fixture
    async def world(self, cluster: EtcdCluster) -> AsyncIterator[World]:
        stores: list[EtcdStore] = []

        def client() -> EtcdStore:
            stores.append(EtcdStore.connect(cluster.settings()))
            return stores[-1]

        store = client()
        try:
            yield World(store, client, store.compact, store.leave_member)
        finally:
            await store.delete_prefix("")
            for opened in stores:
                await opened.close()

    async def test_a_killed_leader_is_replaced_within_its_ttl(self, world: World) -> None:
        """Killed: its tasks are gone and nothing is revoked."""
        first, second = Candidate(world.client(), "a"), Candidate(world.client(), "b")
        loop = asyncio.get_running_loop()
        async with running(first) as tasks:
            await until_one_leads([first])
            async with running(second):
                await first.store.close()  # cut off first, so that it cannot resign
                killed_s = loop.time()
                tasks[0].cancel()
                await eventually(lambda: second.leads, within_s=TTL_S + 2)
                # etcd looks for expired leases twice a second.
                assert loop.time() - killed_s < TTL_S + 1.5
