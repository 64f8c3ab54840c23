"""A serving node while its etcd is harmed: no request lost, no change lost, repeated or reordered.

The freeze lasts 8 s here, four times the lease; ``FREEZE_S=30`` in the environment makes it the
half minute that we promise:

    FREEZE_S=30 pytest tests/fault/test_node_etcd.py -k frozen
"""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from registry.etcd import EtcdStore
from registry.names import ModelName, Revision
from registry.store import Listing, StoreError
from tests.etcd import EtcdCluster, etcd_cluster
from tests.eventually import eventually
from tests.node import (
    Node,
    check_applied,
    node,
    registration,
    store_of,
    until_applied,
    until_registered,
)
from tests.served import KEYS, MLP, Models, traffic
from tests.tcp_proxy import TcpProxy, tcp_proxy

TTL_S = 2
BACK_WITHIN_S = TTL_S + 2.0
FREEZE_S = float(os.environ.get("FREEZE_S", "8"))


@dataclass
class World:
    """One etcd, one node that serves version 1, and a client of its own for the test."""

    cluster: EtcdCluster
    store: EtcdStore
    node: Node
    models: Models
    revisions: list[Revision]
    """Of all documents put so far."""
    proxy: TcpProxy
    """Between the node and etcd (the first member)."""

    async def put(self, live: str) -> None:
        self.revisions.append(await self.models.put(self.store, live, n=str(len(self.revisions))))

    async def serving(self, live: str, *, within_s: float = 15) -> None:
        """Until the last document is in force and says so."""
        status = await until_applied(self.store, self.revisions[-1], within_s=within_s)
        assert status.live == live

    async def back(self, *, within_s: float = BACK_WITHIN_S) -> None:
        await until_registered(self.store, self.node, within_s=within_s)


@pytest.fixture
def cluster() -> Iterator[EtcdCluster]:
    with etcd_cluster() as cluster:
        yield cluster


@pytest.fixture
async def world(cluster: EtcdCluster, tmp_path: Path) -> AsyncIterator[World]:
    models = Models(tmp_path / "models")
    async with (
        tcp_proxy(cluster.members[0].client_port) as proxy,
        store_of(cluster.endpoints) as store,
        node([f"127.0.0.1:{proxy.port}"], tmp_path, lease_ttl_s=TTL_S) as started,
    ):
        world = World(cluster, store, started, models, [], proxy)
        await world.put("1")
        await world.serving("1", within_s=40)
        yield world
        assert started.is_running
        assert (await started.get("/readyz"))[0] == 200
        await check_applied(store, started, world.revisions)


async def test_etcd_is_killed_and_restarted(world: World) -> None:
    async with traffic(world.node.http, world.models):
        member = world.cluster.members[0]
        member.kill()
        # Long enough for the lease to be given up by the node's own clock.
        await eventually(lambda: world.node.lease == 0, within_s=3 * TTL_S)
        assert (await world.node.get("/readyz"))[0] == 200
        member.start()
        await asyncio.to_thread(world.cluster.wait_healthy)
        for live in ("2", "1", "2"):
            await world.put(live)
        await world.back()
        await world.serving("2")


async def test_etcd_is_killed_again_and_again(world: World) -> None:
    """Back before the lease ends, each time in the middle of changes."""
    async with traffic(world.node.http, world.models):
        member = world.cluster.members[0]
        for live in ("2", "1", "2"):
            await world.put(live)
            member.kill()
            member.start()
            await asyncio.to_thread(world.cluster.wait_healthy)
        await world.back()
        await world.serving("2")


async def test_etcd_is_frozen(world: World) -> None:
    async with traffic(world.node.http, world.models):
        member = world.cluster.members[0]
        member.freeze()
        # Written to a socket that nobody reads: done once etcd goes on.
        async with store_of(world.cluster.endpoints) as other:
            waiting = asyncio.create_task(_put_until_done(other, world.models.document("2", n="x")))
            loop = asyncio.get_running_loop()
            thaw_s = loop.time() + FREEZE_S
            await eventually(lambda: world.node.lease == 0, within_s=3 * TTL_S)
            assert (await world.node.get("/readyz"))[0] == 200
            await eventually(lambda: loop.time() >= thaw_s, within_s=FREEZE_S + 1)
            member.thaw()
            await asyncio.to_thread(world.cluster.wait_healthy)
            await waiting
        put = await world.store.get(KEYS.model(MLP))
        assert put is not None
        world.revisions += await _revisions_since(world.store, world.revisions[-1])
        await world.back()
        await world.put("1")
        await world.serving("1")


async def test_the_node_is_cut_off_and_every_change_arrives_later(world: World) -> None:
    async with traffic(world.node.http, world.models):
        world.proxy.refuse()
        for live in ("2", "1", "2", "1", "2"):
            await world.put(live)
        await eventually(lambda: world.node.lease == 0, within_s=3 * TTL_S)
        await _until_gone(world.store)
        world.proxy.is_open = True
        await world.back()
        await world.serving("2")


async def test_the_network_goes_silent_and_every_change_arrives_later(world: World) -> None:
    """No connection ends; nothing gets through."""
    async with traffic(world.node.http, world.models):
        world.proxy.passes.clear()
        for live in ("2", "1", "2"):
            await world.put(live)
        await eventually(lambda: world.node.lease == 0, within_s=3 * TTL_S)
        await _until_gone(world.store)
        world.proxy.passes.set()
        await world.back()
        await world.serving("2")


async def test_etcd_was_compacted_while_the_node_was_cut_off(world: World) -> None:
    async with traffic(world.node.http, world.models):
        world.proxy.refuse()
        for live in ("2", "1", "2"):
            await world.put(live)
        await world.store.compact(world.revisions[-1])
        # What etcd forgot cannot be delivered: the document that stands is, once.
        world.revisions[1:-1] = []
        await _until_gone(world.store)
        world.proxy.is_open = True
        await world.back()
        await world.serving("2")
        await world.put("1")
        await world.serving("1")
    assert world.node.events("watch_restarted")


async def test_all_leases_are_revoked(world: World) -> None:
    async with traffic(world.node.http, world.models):
        for _ in range(2):
            leases = await asyncio.to_thread(world.cluster.etcdctl, "lease", "list")
            for lease in leases.split()[3:]:
                await asyncio.to_thread(world.cluster.etcdctl, "lease", "revoke", lease)
            assert await registration(world.store) == (None, None)
            await world.back()
        await world.put("2")
        await world.serving("2")


async def test_the_keys_are_deleted_by_somebody(world: World) -> None:
    """Under a lease that lives on: found missing at the next renewal."""
    await world.store.delete_prefix(KEYS.nodes_prefix)
    await world.store.delete_prefix(KEYS.status_prefix())
    await world.back()


@pytest.mark.parametrize("is_renamed", [False, True], ids=["emptied", "another_cluster"])
async def test_etcd_lost_its_data(cluster: EtcdCluster, tmp_path: Path, is_renamed: bool) -> None:
    """Deleted by nobody: served on. What is put there then counts, however low its revision."""
    models = Models(tmp_path / "models")
    member = cluster.members[0]
    async with (
        store_of(cluster.endpoints) as store,
        node(cluster.endpoints, tmp_path, lease_ttl_s=TTL_S) as started,
    ):
        for n in range(5):  # so that an empty etcd is behind
            await store.put(f"{KEYS.root}elsewhere", b"%d" % n)
        await until_applied(store, await models.put(store, "1"), within_s=40)
        async with traffic(started.http, models):
            member.kill()
            await asyncio.to_thread(shutil.rmtree, cluster.folder / member.name)
            if is_renamed:
                member.arguments += ("--initial-cluster-token=another",)
            member.start()
            await asyncio.to_thread(cluster.wait_healthy)
            await until_registered(store, started, within_s=20)
            await eventually(lambda: bool(started.events("document_missing_and_kept")), within_s=10)
            async with store_of(cluster.endpoints) as other:
                await until_applied(other, await models.put(other, "2"), within_s=15)
        assert not started.events("document_deleted")


async def _put_until_done(store: EtcdStore, document: bytes) -> None:
    """A client with a patience of its own; etcd may well do it twice."""
    while True:
        try:
            await store.put(KEYS.model(MLP), document)
            return
        except StoreError:
            await asyncio.sleep(0.05)


async def _revisions_since(store: EtcdStore, after: Revision) -> list[Revision]:
    """Every revision of the document after this one, from etcd itself."""
    head = await store.get(KEYS.model(MLP))
    assert head is not None
    found: list[Revision] = []
    known = Listing((), after)
    async with asyncio.timeout(10):
        async for batch in store.watch_prefix(KEYS.model(MLP), known=known):
            found.append(batch.revision)
            if batch.revision >= head.mod_revision:
                return found
    raise AssertionError("the watch ended")


async def _until_gone(store: EtcdStore) -> None:
    async def gone() -> bool:
        return await registration(store) == (None, None)

    await eventually(gone, within_s=2 * TTL_S + 3, what="keys gone with their lease")


# --- three members ----------------------------------------------------------------------------


async def test_the_leader_of_three_is_killed(tmp_path: Path) -> None:
    models = Models(tmp_path / "models")
    with etcd_cluster(3) as cluster:
        leader = await asyncio.to_thread(cluster.leader)
        # The node begins with the leader: the member it talks to is the one that dies.
        endpoints = cluster.endpoints[leader:] + cluster.endpoints[:leader]
        async with (
            store_of(endpoints[1:]) as store,
            node(endpoints, tmp_path, lease_ttl_s=TTL_S) as started,
        ):
            revisions = [await models.put(store, "1")]
            await until_applied(store, revisions[-1])
            async with traffic(started.http, models):
                cluster.members[leader].kill()
                for n, live in enumerate(("2", "1", "2")):
                    revisions += [await _put_once(store, models, live, n)]
                await until_registered(store, started, within_s=BACK_WITHIN_S)
                status = await until_applied(store, revisions[-1], within_s=15)
                assert status.live == "2"
                cluster.members[leader].start()
                await asyncio.to_thread(cluster.wait_healthy)
                revisions += [await _put_once(store, models, "1", 9)]
                await until_applied(store, revisions[-1], within_s=15)
            await check_applied(store, started, revisions)


async def _put_once(store: EtcdStore, models: Models, live: str, n: int) -> Revision:
    """Put until confirmed, and only where it is not there already."""
    document = models.document(live, n=str(n))
    for _ in range(100):
        try:
            kv = await store.get(KEYS.model(models.name))
            if kv is not None and kv.value == document:
                return kv.mod_revision
            return await store.put(KEYS.model(models.name), document)
        except StoreError:
            await asyncio.sleep(0.1)
    raise AssertionError("no member takes the document")


# --- without etcd from the start --------------------------------------------------------------


async def test_a_node_restarted_while_etcd_is_away_serves_and_then_follows(tmp_path: Path) -> None:
    changed = Models(tmp_path / "models")
    deleted = Models(tmp_path / "models", name=ModelName("other"), versions=("3",))
    kept = Models(tmp_path / "models", name=ModelName("kept"), versions=("4",))
    with etcd_cluster() as cluster:
        async with store_of(cluster.endpoints) as store:
            async with node(cluster.endpoints, tmp_path, lease_ttl_s=TTL_S) as first:
                for models, live in ((deleted, "3"), (kept, "4"), (changed, "1")):
                    revision = await models.put(store, live)
                    await until_applied(store, revision, model=models.name)
                assert await first.stop() == 0
            newest = await changed.put(store, "2")
            await store.delete(KEYS.model(deleted.name))
            cluster.members[0].kill()
            async with node(cluster.endpoints, tmp_path, lease_ttl_s=TTL_S) as again:

                async def ready() -> bool:
                    return (await again.get("/readyz"))[0] == 200

                await eventually(ready, within_s=40, what="ready without etcd")
                assert [e["models"] for e in again.events("snapshot_restored")] == [3]
                for models, live in ((changed, "1"), (deleted, "3"), (kept, "4")):
                    _, routes = await again.get("/admin/routes")
                    assert routes["models"][models.name]["live"] == live
                async with traffic(again.http, changed), traffic(again.http, kept):
                    cluster.members[0].start()
                    await asyncio.to_thread(cluster.wait_healthy)
                    await until_registered(store, again, within_s=BACK_WITHIN_S)
                    status = await until_applied(store, newest, within_s=15)
                    assert status.live == "2"

                    async def gone() -> bool:
                        return (await again.get("/v2/models/other"))[0] == 404

                    await eventually(gone, within_s=10, what="404 for the deleted document")
                assert await store.get(KEYS.status(deleted.name, Node.id)) is None
                # Once from the snapshot, once from etcd; what is unchanged is not taken twice.
                accepted = [(e["model"], e["revision"]) for e in again.events("document_accepted")]
                assert [m for m, _ in accepted] == ["kept", "mlp", "other", "mlp"]
                assert accepted[-1] == ("mlp", newest)
