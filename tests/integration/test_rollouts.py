"""Coordinators on real etcd, over played nodes; the commands that give them orders."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import pytest

from paddlewheel.rollout.coordinator import Coordinator
from registry.etcd import EtcdStore
from registry.event_writer import EventWriter
from registry.events import FLEET_SOURCE, read_events
from registry.names import NodeId, Revision
from registry.rollouts import CoordinatorRecord, Phase, Refusal, RolloutRecord
from registry.store import Put
from tests.etcd import EtcdCluster, etcd_cluster
from tests.eventually import eventually
from tests.rollouts import K, M, PlayedNode, played_fleet, record_of, text

COMMAND = (sys.executable, "-m", "paddlewheel")
WAVES = "strategy: waves, waves: [{percent: 25, bake_s: 0.2}, {percent: 75, bake_s: 0.2}]"
SLOW_WAVES = "strategy: waves, waves: [{percent: 25, bake_s: 600}]"
TTL_S = 2


@pytest.fixture(scope="module")
def cluster() -> Iterator[EtcdCluster]:
    with etcd_cluster(1) as started:
        yield started


@dataclass
class Candidate:
    """One coordinator with a client of its own, to be killed."""

    name: str
    store: EtcdStore
    task: asyncio.Task[None]

    async def kill(self) -> None:
        """Cut off first, so that it cannot resign: as kill -9 does."""
        await self.store.close()
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)


@dataclass
class World:
    cluster: EtcdCluster
    store: EtcdStore
    nodes: list[PlayedNode]
    candidates: list[Candidate]

    def client(self) -> EtcdStore:
        return EtcdStore.connect(self.cluster.settings())

    def stand(self, name: str) -> None:
        store = self.client()
        events = EventWriter(store, K, f"/paddlewheel/nodes/{name}")

        async def run() -> None:
            await events.start()
            await Coordinator(store, K, name, ttl_s=TTL_S, emit=events.emit).run()

        self.candidates.append(Candidate(name, store, asyncio.create_task(run())))

    async def leader(self) -> Candidate:
        found: list[Candidate] = []

        async def one() -> bool:
            kv = await self.store.get(K.coordinator)
            if kv is not None:
                id_ = CoordinatorRecord.from_json(kv.value).id
                found[:] = [c for c in self.candidates if c.name == id_]
            return bool(found) and kv is not None

        await eventually(one, within_s=10, what="a coordinator")
        return found[0]

    async def put(self, version: str, rollout: str = "") -> Revision:
        return await self.store.put(K.model(M), text(version, rollout))

    async def until(
        self, holds: Callable[[RolloutRecord], bool], within_s: float = 20
    ) -> RolloutRecord:
        found: RolloutRecord | None = None

        async def reached() -> bool:
            nonlocal found
            found = await record_of(self.store)
            return found is not None and holds(found)

        await eventually(reached, within_s=within_s, what=f"a record, not {found}")
        assert found is not None
        return found

    async def in_force(self, revision: Revision) -> None:
        await eventually(lambda: all(n.in_force == revision for n in self.nodes), within_s=20)

    async def run(self, *arguments: str, code: int = 0) -> str:
        """A command's two outputs in one."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith("PADDLEWHEEL_")}
        endpoints = {"PADDLEWHEEL_ETCD": ",".join(self.cluster.endpoints)}
        done = await asyncio.to_thread(
            subprocess.run,
            [*COMMAND, *arguments],
            capture_output=True,
            text=True,
            timeout=30,
            env=kept | endpoints,
            check=False,
        )
        assert done.returncode == code, (done.returncode, done.stdout, done.stderr)
        assert "Traceback" not in done.stderr
        return done.stdout + done.stderr

    async def json(self, *arguments: str) -> Any:
        return json.loads(await self.run(*arguments, "-o", "json"))


@pytest.fixture
async def world(cluster: EtcdCluster) -> AsyncIterator[World]:
    store = EtcdStore.connect(cluster.settings())
    async with played_fleet(store, 4) as nodes:
        world = World(cluster, store, nodes, [])
        try:
            yield world
        finally:
            for candidate in world.candidates:
                await candidate.kill()
    await store.delete_prefix("")
    await store.close()


@asynccontextmanager
async def recorded(world: World) -> AsyncGenerator[list[RolloutRecord]]:
    """Every record that was ever written, in order."""
    seen: list[RolloutRecord] = []

    async def watch() -> None:
        async for batch in world.store.watch_prefix(K.rollouts_prefix):
            seen.extend(
                RolloutRecord.from_json(event.kv.value)
                for event in batch.events
                if isinstance(event, Put)
            )

    task = asyncio.create_task(watch())
    try:
        yield seen
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_whoever_coordinates_is_killed_again_and_again(world: World) -> None:
    """Three coordinators die in one rollout by waves; another goes on from the record each time."""
    for at in range(5):
        world.stand(f"c{at}")
    first = await world.put("1")
    await world.in_force(first)
    async with recorded(world) as records:
        second = await world.put("2", WAVES)
        for phase in ("preparing", "waving", "waving"):
            count = len(records)
            await eventually(lambda count=count: len(records) > count, within_s=10)  # type: ignore[misc]
            assert records[-1].phase in {phase, "waving", "committed"}
            leader = await world.leader()
            await leader.kill()
            world.candidates.remove(leader)
        record = await world.until(lambda r: r.has_ended)
    assert (record.phase, record.revision, record.previous) == (Phase.COMMITTED, second, first)
    await world.in_force(second)
    assert all(node.applied == [first, second] for node in world.nodes)
    steps = [(r.phase.value, r.wave, r.is_baking) for r in records]
    assert steps == [
        ("preparing", None, False), ("waving", 0, False), ("waving", 0, True),
        ("waving", 1, False), ("waving", 1, True), ("waving", 2, False), ("committed", 2, False),
    ]  # fmt: skip
    assert len({r.coordinator for r in records}) >= 3


async def test_events_tell_each_step_once(world: World) -> None:
    world.stand("a")
    second = await world.put("2", WAVES)
    await world.until(lambda r: r.has_ended)
    leader = await world.leader()
    wanted = ["started", "wave", "wave", "wave", "committed"]

    async def told() -> list[str]:
        return [
            event.type.rpartition(".")[2]
            async for event in read_events(world.store, K)
            if event.source == FLEET_SOURCE and event.data["revision"] == second
        ]

    async def all_told() -> bool:
        return await told() == wanted

    await eventually(all_told, within_s=5)
    await leader.kill()  # the next one tells the last step again, under the same id
    world.candidates.remove(leader)
    world.stand("b")
    assert (await world.leader()).name == "b"
    third = await world.put("3", "strategy: barrier")
    await world.until(lambda r: r.revision == third and r.has_ended)
    assert await told() == wanted


async def test_orders_by_command(world: World) -> None:
    world.stand("a")
    first = await world.put("1")
    await world.in_force(first)
    second = await world.put("2", SLOW_WAVES)
    await world.until(lambda r: r.is_baking)
    assert f"m@{second} paused" in await world.run("pause", "m")
    shown, table, status = await asyncio.gather(
        world.json("rollouts", "m"), world.run("rollouts"), world.run("status")
    )
    assert [(r["phase"], r["paused"], r["released"]) for r in shown["rollouts"]] == [
        ("waving", True, ["n1"])
    ]
    assert "waving (paused)  1 (baking)" in table
    assert "m: waves rollout waving, wave 1, baking, paused" in status
    assert "held" in status
    assert f"m@{second} goes on" in await world.run("resume", "m")
    promoted = await world.run("promote", "m", "--wait")
    assert f"m@{second}: all waves that were left are released" in promoted
    assert "in force on 4 nodes" in promoted
    await world.in_force(second)
    third = await world.put("3", SLOW_WAVES)
    await world.until(lambda r: r.revision == third and r.is_baking)
    assert f"m@{third} aborted" in await world.run("abort", "m")
    await world.in_force(second)
    status, refused = await asyncio.gather(world.run("status"), world.run("abort", "m", code=1))
    assert "m: the rollout was aborted: aborted by " in status
    assert "nothing to abort" in refused


async def test_apply_waits_for_the_commit_or_the_reason_against_it(
    world: World, tmp_path_factory: pytest.TempPathFactory
) -> None:
    world.stand("a")
    file = tmp_path_factory.mktemp("documents") / "m.yaml"
    file.write_bytes(text("1", "strategy: barrier"))
    assert "in force on 4 nodes" in await world.run("apply", "-f", str(file), "--wait")
    world.nodes[2].fails.add("2")
    file.write_bytes(text("2", "strategy: barrier"))
    said = await world.run("apply", "-f", str(file), "--wait", code=1)
    assert (
        "m: rollout aborted: 1 of 4 nodes can't take it: n3: 2 is FAILED: no such weights" in said
    )
    world.nodes[2].refuses.add("3")
    file.write_bytes(text("3", "strategy: barrier, require_ack: 75"))
    assert "in force on 4 nodes" in await world.run("apply", "-f", str(file), "--wait")
    record = await record_of(world.store)
    assert record is not None
    assert record.refused == (Refusal(node=NodeId("n3"), reason="spec.live: n3 will not have 3"),)


async def test_apply_says_when_nobody_coordinates(
    world: World, tmp_path_factory: pytest.TempPathFactory
) -> None:
    file = tmp_path_factory.mktemp("documents") / "m.yaml"
    file.write_bytes(text("1", "strategy: barrier"))
    said = await world.run("apply", "-f", str(file), "--wait", "--timeout", "1", code=1)
    assert "its rollout was not begun: no coordinator among the nodes" in said
