"""`paddlewheel up --nodes 3 --gateway`: nodes and etcd fail under traffic, and nobody sees it."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from paddlewheel.bench.samples import Result
from registry.records import ModelStatus
from registry.store import Store
from tests.eventually import eventually
from tests.node import SERVES_WITHIN_S, Command, http_get, store_of
from tests.served import KEYS, MLP, Models, traffic

RATE_PER_S = 200.0
BACK_WITHIN_S = 3.0
ETCD_AWAY_S = float(os.environ.get("ETCD_AWAY_S", "5"))
"""Two and a half times the lease. ``ETCD_AWAY_S=60`` makes it the minute that we promise."""


@dataclass
class World:
    """A running `up`, three nodes of which serve the model."""

    up: Command
    store: Store
    models: Models

    @property
    def url(self) -> str:
        return str(self.up.ready["gateway"])

    @property
    def nodes(self) -> list[dict[str, Any]]:
        """As they were at the start; each is started again at its address."""
        return list(self.up.ready["nodes"])

    def pid(self, node: str) -> int:
        """Of the process that is this node now."""
        (found,) = [kin.pid for kin in self.up.kin() if ["--id", node] == _arguments(kin.pid)[4:6]]
        return found

    async def taking(self) -> set[str]:
        _, routes = await http_get(f"{self.url}/admin/routes")
        return set(routes["models"].get(MLP, {}).get("nodes", ()))

    async def until_taking(self, *nodes: str, within_s: float) -> None:
        async def they_are() -> bool:
            return await self.taking() == set(nodes)

        await eventually(they_are, within_s=within_s, what=f"traffic goes to {nodes}")

    async def until_it_serves(self, node: dict[str, Any]) -> None:
        async def serves() -> bool:
            try:
                return (await http_get(f"{node['http']}/v2/models/{MLP}/ready"))[0] == 200
            except OSError:
                return False

        await eventually(serves, within_s=SERVES_WITHIN_S)


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    models = Models(tmp_path / "models")
    up = await Command.start(
        ("up", "--listen", "127.0.0.1:0", "--cache", str(tmp_path / "cache"), "--ephemeral",
         "--nodes", "3", "--gateway", "--lease-ttl", "2", "--device", "cpu,memoryMB=4000"),
        tmp_path,
    )  # fmt: skip
    try:
        async with store_of(up.ready["etcd"]) as store:
            world = World(up, store, models)
            assert world.url not in [line["http"] for line in world.nodes]
            await models.put(store, "1")
            names = [line["node"] for line in world.nodes]
            await world.until_taking(*names, within_s=SERVES_WITHIN_S)
            yield world
            await world.until_taking(*names, within_s=SERVES_WITHIN_S)
        kin = up.kin()
        assert await up.stop(30) == 0
        assert not any(each.is_alive for each in kin)
    finally:
        await up.end()


def _arguments(pid: int) -> list[str]:
    try:
        return psutil.Process(pid).cmdline()
    except psutil.Error:
        return []


def slow(result: Result) -> int:
    return sum(sample.latency_s > 0.5 for sample in result.samples)


@pytest.mark.timeout(300)
async def test_nodes_and_etcd_fail_behind_the_gateway(world: World) -> None:
    await nodes_die_and_leave(world)
    await a_node_freezes(world)
    await etcd_is_away(world)


async def nodes_die_and_leave(world: World) -> None:
    """kill -9, then SIGTERM: no error, and each is back within seconds of its return."""
    names = [line["node"] for line in world.nodes]
    async with traffic(world.url, world.models, rate_per_s=RATE_PER_S):
        for node, number in zip(world.nodes[:2], (signal.SIGKILL, signal.SIGTERM), strict=True):
            os.kill(world.pid(node["node"]), number)
            others = [name for name in names if name != node["node"]]
            await world.until_taking(*others, within_s=3)
            await world.until_it_serves(node)
            await world.until_taking(*names, within_s=BACK_WITHIN_S)


async def a_node_freezes(world: World) -> None:
    """Only what is in flight on it waits, until it is run elsewhere."""
    first, *others = [line["node"] for line in world.nodes]
    pid = world.pid(first)
    async with traffic(world.url, world.models, rate_per_s=RATE_PER_S) as running:
        os.kill(pid, signal.SIGSTOP)
        try:
            await world.until_taking(*others, within_s=5)
        finally:
            os.kill(pid, signal.SIGCONT)
        await world.until_taking(first, *others, within_s=BACK_WITHIN_S + 2)
        result = await running.stop()
    assert slow(result) < 0.1 * len(result), result.summary()
    assert result.latency_s(100) < 6, "waited for its deadline"


async def etcd_is_away(world: World) -> None:
    names = {line["node"] for line in world.nodes}
    (etcd,) = world.up.named("etcd")
    loop = asyncio.get_running_loop()
    async with traffic(world.url, world.models, rate_per_s=RATE_PER_S) as running:
        os.kill(etcd.pid, signal.SIGSTOP)
        try:
            back_s = loop.time() + ETCD_AWAY_S
            await eventually(lambda: loop.time() >= back_s, within_s=ETCD_AWAY_S + 1)
            assert await world.taking() == names
        finally:
            os.kill(etcd.pid, signal.SIGCONT)
        revision = await world.models.put(world.store, "2")

        async def applied() -> bool:
            listing = await world.store.list_prefix(KEYS.status_prefix(MLP))
            said = [ModelStatus.from_json(kv.value).applied_revision for kv in listing.kvs]
            return said == [revision] * 3

        await eventually(applied, within_s=SERVES_WITHIN_S)
        result = await running.stop()
    assert slow(result) < 0.02 * len(result), result.summary()
