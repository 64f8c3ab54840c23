"""Two nodes under one id: the second refuses and the first goes on; a restart is no second node."""

from __future__ import annotations

import asyncio
import shutil
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from registry.records import NodeRecord
from tests.etcd import EtcdCluster, etcd_cluster
from tests.eventually import eventually
from tests.node import Node, store_of
from tests.served import KEYS

TTL_S = 2
KEY = KEYS.node(Node.id)

pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def cluster() -> Iterator[EtcdCluster]:
    with etcd_cluster() as cluster:
        yield cluster


class World:
    """Starts nodes under one id, and ends them all."""

    def __init__(self, cluster: EtcdCluster, stack: AsyncExitStack) -> None:
        self.cluster = cluster
        self._stack = stack

    async def start(self, folder: Path, *, ttl_s: int = TTL_S) -> Node:
        started = await Node.start(
            ("node", "--etcd", self.cluster.endpoints[0], "--id", Node.id,
             "--listen", "127.0.0.1:0", "--device", "cpu,memoryMB=100",
             "--cache", str(folder / "cache"), "--lease-ttl", str(ttl_s)),
            folder,
        )  # fmt: skip
        self._stack.push_async_callback(started.end)
        return started

    async def record(self) -> tuple[NodeRecord, int] | None:
        async with store_of(self.cluster.endpoints) as store:
            kv = await store.get(KEY)
        return None if kv is None else (NodeRecord.from_json(kv.value), kv.mod_revision)

    async def until_held_by(self, node: Node, *, within_s: float) -> int:
        """The revision of the key since then."""
        revision = 0

        async def held() -> bool:
            nonlocal revision
            found = await self.record()
            revision = 0 if found is None else found[1]
            return found is not None and found[0].http == node.http

        await eventually(held, within_s=within_s, what=f"held by {node.http}")
        return revision


@pytest.fixture
async def world(cluster: EtcdCluster) -> AsyncIterator[World]:
    async with AsyncExitStack() as stack:
        yield World(cluster, stack)


def reason(node: Node) -> str:
    (event,) = node.events("node_id_taken")
    return str(event["reason"])


async def test_a_second_node_on_this_machine(world: World, tmp_path: Path) -> None:
    first = await world.start(tmp_path)
    await world.until_held_by(first, within_s=5)
    with pytest.raises(AssertionError, match="no ready line") as refused:
        await world.start(tmp_path)
    assert f"taken on this machine by {first.http}, started 2" in str(refused.value)
    assert "give this one another --id" in str(refused.value)
    assert first.is_running


async def test_a_second_node_elsewhere(world: World, tmp_path: Path) -> None:
    """It never writes: the first one's key stays as it is."""
    first = await world.start(tmp_path / "1")
    revision = await world.until_held_by(first, within_s=5)
    second = await world.start(tmp_path / "2")
    assert await second.wait(TTL_S + 4) == 1
    assert f"taken by {first.http}, started 2" in reason(second)
    found = await world.record()
    assert found is not None
    assert (found[0].http, found[1]) == (first.http, revision)
    assert not first.events("key_lost")


async def test_a_node_is_killed_and_started_again_at_once(world: World, tmp_path: Path) -> None:
    """At another port, while its old key stands."""
    first = await world.start(tmp_path, ttl_s=30)
    await world.until_held_by(first, within_s=5)
    first.signal(signal.SIGKILL)
    await first.wait(5)
    again = await world.start(tmp_path, ttl_s=30)
    found = await world.record()
    assert found is not None, "the old key was to stand still"
    await world.until_held_by(again, within_s=3)
    assert not again.events("node_id_in_use")


async def test_a_killed_nodes_id_goes_to_a_new_machine(world: World, tmp_path: Path) -> None:
    first = await world.start(tmp_path / "1")
    await world.until_held_by(first, within_s=5)
    first.signal(signal.SIGKILL)
    await first.wait(5)
    new = await world.start(tmp_path / "2")
    await world.until_held_by(new, within_s=TTL_S + 3)
    assert new.is_running


@pytest.mark.parametrize("share", ["nothing", "a copied folder"])
async def test_two_that_started_without_etcd(share: str, world: World, tmp_path: Path) -> None:
    """One of them goes when etcd is there to tell; the other is the node."""
    if share == "a copied folder":
        await (await world.start(tmp_path / "1")).stop()
        shutil.copytree(tmp_path / "1" / "cache", tmp_path / "2" / "cache")
    world.cluster.members[0].kill()
    nodes = [await world.start(tmp_path / name) for name in ("1", "2")]
    world.cluster.members[0].start()
    await asyncio.to_thread(world.cluster.wait_healthy)
    await eventually(lambda: not all(node.is_running for node in nodes), within_s=4 * TTL_S)
    (stays,) = [node for node in nodes if node.is_running]
    (gone,) = [node for node in nodes if node is not stays]
    assert await gone.wait(1) == 1
    assert stays.http in reason(gone)
    await world.until_held_by(stays, within_s=TTL_S)
