"""Documents that come into force everywhere at once, with nodes and coordinators killed.

No client of the gateway sees the new version and then, in a request sent later, the old one again;
and none sees a failure.
"""

from __future__ import annotations

import asyncio
import math
import os
import random
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import orjson
import pytest

from paddlewheel.bench.samples import Result
from registry.names import Revision
from registry.rollouts import Order, OrderKind, Phase, RolloutRecord
from tests.etcd import EtcdCluster, etcd_cluster
from tests.eventually import eventually
from tests.fault.rollback_stage import ask
from tests.fleet import FleetNode, FleetUnderTest, fleet
from tests.node import SERVES_WITHIN_S, http_get
from tests.served import KEYS, MLP, traffic

ROLLOUTS = int(os.environ.get("BARRIER_N", "3"))
"""``BARRIER_N=50`` makes it the fifty that we promise."""
SEED = int(os.environ.get("BARRIER_SEED", "3"))
RATE_PER_S = 100.0
COMMITTED_WITHIN_S = 60.0
KILL_WITHIN_S = 2.0
"""Of the document's put: the nodes are getting ready, or have just changed."""
STOPPED_S = 0.7
"""Less than its lease, and than two probes without an answer."""
AT_ONCE = 30
WATCHED_S = 0.3
"""How long a version serves before the next document, at least."""
BARRIER = {"strategy": "barrier", "timeout_s": 60}
NO_STANDBY = {"bake_s": 0}
"""Every version is loaded again each time."""

pytestmark = pytest.mark.timeout(240 + 30 * ROLLOUTS)


@pytest.fixture
def cluster() -> Iterator[EtcdCluster]:
    with etcd_cluster() as cluster:
        yield cluster


@pytest.fixture
async def world(cluster: EtcdCluster, tmp_path: Path) -> AsyncIterator[FleetUnderTest]:
    async with fleet(cluster, tmp_path, rollout=BARRIER, rollback=NO_STANDBY) as world:
        yield world


@dataclass(frozen=True)
class Change:
    """One document, on the machine's monotonic clock."""

    live: str
    revision: Revision
    put_s: float


async def test_no_client_sees_the_new_version_and_then_the_old_one(world: FleetUnderTest) -> None:
    rng = random.Random(SEED)
    changes = list[Change]()
    coming_back: asyncio.Task[None] | None = None
    happened = Counter[str]()
    plan = ["node", "late", "coordinator", "nobody"] * math.ceil(ROLLOUTS / 4)
    if len(set(plan)) < ROLLOUTS:
        rng.shuffle(plan)
    async with traffic(world.gateway.http, world.models, rate_per_s=RATE_PER_S) as running:
        for number, what in enumerate(plan[:ROLLOUTS]):
            live = "21"[number % 2]
            if what != "nobody" and coming_back is not None:
                await coming_back  # one at a time: the others serve
                coming_back = None
            revision = await world.models.put(world.store, live)
            victim = None
            changes.append(Change(live, revision, time.monotonic()))
            happened[what] += 1
            match what:
                case "node" | "coordinator":
                    await passes(rng.uniform(0, KILL_WITHIN_S))
                    leads = await coordinator(world)
                    victim = leads if what == "coordinator" and leads else rng.choice(world.nodes)
                    coming_back = asyncio.create_task(kill_and_restart(victim))
                case "late":
                    await one_hears_the_word_late(world, revision, live, rng)
                case _:
                    pass
            await until_committed(world, revision)
            others = [node for node in world.nodes if node is not victim]
            await until_in_force(world, others, revision)
            await passes(WATCHED_S)
        if coming_back is not None:
            await coming_back
        await until_in_force(world, world.nodes, changes[-1].revision)
        result = await running.stop()
    took_s = [first_answer_s(result, changes, at) - c.put_s for at, c in enumerate(changes)]
    older = [olds(result, changes, at) for at in range(len(changes))]
    print(
        f"{len(changes)} rollouts: {dict(happened)}; {len(result)} requests, "
        f"{result.failed} failed, {sum(older)} old after new; "
        f"document to first new answer {min(took_s):.2f} to {max(took_s):.2f} s; "
        f"p50 {result.latency_s(50) * 1e3:.1f} ms, p99 {result.latency_s(99) * 1e3:.1f} ms, "
        f"slowest {result.latency_s(100):.2f} s"
    )
    assert sum(older) == 0, older
    assert all(math.isfinite(each) for each in took_s)


def olds(result: Result, changes: list[Change], at: int) -> int:
    """How many requests sent after the first new answer were answered by the old version."""
    since_s = first_answer_s(result, changes, at)
    return sum(s.version != changes[at].live for s in result.window(since_s, end_s(changes, at)))


def first_answer_s(result: Result, changes: list[Change], at: int) -> float:
    """When the first answer of the new version was whole.

    Versions take turns: before it, every answer is the other one's.
    """
    put_s, live = changes[at].put_s, changes[at].live
    answered = result.window(put_s, end_s(changes, at))
    return min((s.done_s for s in answered if s.version == live), default=math.inf)


def end_s(changes: list[Change], at: int) -> float:
    return changes[at + 1].put_s if at + 1 < len(changes) else math.inf


async def passes(seconds: float) -> None:
    until_s = time.monotonic() + seconds
    await eventually(lambda: time.monotonic() >= until_s, within_s=seconds + 5)


async def coordinator(world: FleetUnderTest) -> FleetNode | None:
    kv = await world.store.get(KEYS.coordinator)
    named = None if kv is None else orjson.loads(kv.value)["id"]
    return next((node for node in world.nodes if node.id == named), None)


async def one_hears_the_word_late(
    world: FleetUnderTest, revision: Revision, live: str, rng: random.Random
) -> None:
    """A node that is ready stands still while the others change, with requests on their way to it,
    and goes on with the old table and the word both to be read."""
    await order(world, revision, OrderKind.PAUSE)

    async def all_ready() -> bool:
        said = (await world.statuses()).values()
        return [status.prepared_revision for status in said] == [revision] * len(world.nodes)

    await eventually(all_ready, within_s=SERVES_WITHIN_S, what="ready everywhere")
    leads = await coordinator(world)
    victim = rng.choice([node for node in world.nodes if node is not leads])
    victim.process.signal(signal.SIGSTOP)
    try:
        await order(world, revision, OrderKind.RESUME)
        await until_committed(world, revision)
        await until_in_force(world, [n for n in world.nodes if n is not victim], revision)
        await passes(WATCHED_S)  # the gateway has passed on an answer of the new one
        # So many at once that it is asked too.
        asked = [asyncio.create_task(ask(world.gateway, world.models)) for _ in range(AT_ONCE)]
        await passes(STOPPED_S - WATCHED_S)
    finally:
        victim.process.signal(signal.SIGCONT)
    answers = await asyncio.gather(*asked)
    assert {(each.status, each.version) for each in answers} == {(200, live)}


async def order(world: FleetUnderTest, revision: Revision, kind: OrderKind) -> None:
    record = Order(order=kind, revision=revision, at=datetime.now(UTC))
    await world.store.put(KEYS.order(MLP), record.to_json())


async def kill_and_restart(node: FleetNode) -> None:
    """kill -9, and the same node again; done once it serves."""
    node.process.kin()
    node.process.signal(signal.SIGKILL)
    await node.process.wait(5)
    await node.process.end()
    await node.start()

    async def serves() -> bool:
        return (await http_get(f"{node.process.http}/v2/models/{MLP}/ready"))[0] == 200

    await eventually(serves, within_s=SERVES_WITHIN_S, what=f"{node.id} serves again")


async def record_of(world: FleetUnderTest) -> RolloutRecord | None:
    kv = await world.store.get(KEYS.rollout(MLP))
    return None if kv is None else RolloutRecord.from_json(kv.value)


async def until_committed(world: FleetUnderTest, revision: Revision) -> None:
    last: list[RolloutRecord | None] = [None]

    async def is_committed() -> bool:
        last[0] = await record_of(world)
        record = last[0]
        assert record is None or record.revision != revision or record.phase is not Phase.ABORTED, (
            record and record.to_dict()
        )
        return record is not None and (record.revision, record.phase) == (
            revision,
            Phase.COMMITTED,
        )

    try:
        await eventually(is_committed, within_s=COMMITTED_WITHIN_S)
    except AssertionError:
        shown = None if last[0] is None else last[0].to_dict()
        raise AssertionError(f"revision {revision} is not committed: {shown}") from None


async def until_in_force(world: FleetUnderTest, nodes: list[FleetNode], revision: Revision) -> None:
    async def everywhere() -> bool:
        applied = await world.applied()
        return all(applied.get(node.id) == revision for node in nodes)

    await eventually(everywhere, within_s=SERVES_WITHIN_S, what=f"{revision} in force")
