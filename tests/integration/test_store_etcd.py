"""The contract on real etcd: one member, three, and one behind TLS and a password."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest

from registry.etcd import EtcdStore
from tests.etcd import EtcdCluster, etcd_cluster
from tests.integration.store_contract import StoreContract, World


class OnEtcd(StoreContract):
    """The cluster is a class's; what a test wrote is deleted after it."""

    @pytest.fixture
    async def world(self, cluster: EtcdCluster) -> AsyncIterator[World]:
        stores: list[EtcdStore] = []

        def client() -> EtcdStore:
            # Each begins with another member: what one wrote, the next has to see elsewhere.
            first = len(stores) % cluster.size
            stores.append(EtcdStore.connect(cluster.settings(first=first)))
            return stores[-1]

        store = client()

        def break_watches() -> None:
            store.leave_member()

        try:
            yield World(store, client, store.compact, break_watches)
        finally:
            await store.delete_prefix("")
            for opened in stores:
                await opened.close()


class TestOneMember(OnEtcd):
    @pytest.fixture(scope="class")
    def cluster(self) -> Iterator[EtcdCluster]:
        with etcd_cluster(1) as cluster:
            yield cluster


class TestThreeMembers(OnEtcd):
    @pytest.fixture(scope="class")
    def cluster(self) -> Iterator[EtcdCluster]:
        with etcd_cluster(3) as cluster:
            yield cluster


class TestTlsAndPassword(OnEtcd):
    @pytest.fixture(scope="class")
    def cluster(self) -> Iterator[EtcdCluster]:
        with etcd_cluster(1, tls=True) as cluster:
            cluster.enable_auth("paddlewheel", "pa55 wörd:/")
            yield cluster


async def test_a_proxy_is_not_asked_for_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the environment names one for the world outside, without a `no_proxy`."""
    with etcd_cluster() as cluster:
        for name in ("no_proxy", "NO_PROXY", "no_grpc_proxy"):
            monkeypatch.delenv(name, raising=False)
        for name in ("grpc_proxy", "https_proxy", "http_proxy"):
            monkeypatch.setenv(name, "http://127.0.0.1:1")
        store = EtcdStore.connect(cluster.settings(timeout_s=3))
        try:
            assert await store.put("/a", b"1")
        finally:
            await store.close()
