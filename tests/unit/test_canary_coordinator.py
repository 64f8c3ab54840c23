"""Canaries and their coordinators: killed at any step, overtaken by edits, many nodes counting."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import timedelta

import pytest

from paddlewheel.rollout.coordinator import Coordinator
from registry.memory_store import MemoryStore
from registry.names import NodeId, Version
from registry.records import ModelStatus, NodeRecord
from registry.rollouts import RolloutRecord
from registry.samples import NodeSamples, RouteSamples, bucket_of
from registry.spec import ModelDocument, parse_model
from tests.eventually import eventually
from tests.rollouts import AT, K, M, parse_here

pytestmark = pytest.mark.looptime

NODES = [NodeId(f"n{at}") for at in range(1, 6)]


def text(
    *, queue: int = 256, steps: str = "{percent: 5, hold_s: 10}, {percent: 50, hold_s: 10}"
) -> bytes:
    return f"""\
# why 2: it reads more
apiVersion: paddlewheel/v1
kind: Model
metadata: {{name: m}}
spec:
  live: "1"
  versions: [{{version: "1", source: /m/1}}, {{version: "2", source: /m/2}}]
  canary: {{version: "2", steps: [{steps}]}}
  limits: {{queue: {queue}}}
""".encode()


class World:
    """Nodes that serve what is asked and count what a step sends them, as fast as time goes."""

    def __init__(self, store: MemoryStore) -> None:
        self.store = store
        self.errors = 0.0
        self.percents: list[float] = []
        self.records = 0
        """How often the record was written."""
        self.writes: list[ModelDocument] = []
        self._counted: dict[object, int] = {}

    async def start(self) -> None:
        for id in NODES:
            record = NodeRecord(id=id, http="http://x", started_at=AT)
            await self.store.put(K.node(id), record.to_json())

    async def follow(self) -> None:
        """As nodes do: a document put is in force at once."""
        async for batch in self.store.watch_prefix(K.models_prefix):
            for event in batch.events:
                document = parse_model(event.kv.value, name=M)  # type: ignore[union-attr]
                self.writes.append(document)
                canary = document.spec.canary
                for id in NODES:
                    status = ModelStatus(
                        model=M,
                        node=id,
                        revision=batch.revision,
                        applied_revision=batch.revision,
                        live=document.spec.live,
                        canary=None if canary is None else canary.version,
                    )
                    await self.store.put(K.status(M, id), status.to_json())

    async def count(self) -> None:
        """100 requests a second on each node."""
        while True:
            await asyncio.sleep(1)
            record = await self.record()
            if record is None or record.canary is None:
                continue
            share, since = record.canary.percent / 100, record.canary.since
            turns = self._counted[since] = self._counted.get(since, 0) + 1
            canary = round(100 * turns * share)
            for id in NODES:
                samples = NodeSamples(
                    model=M,
                    node=id,
                    version=Version("2"),
                    since=since,
                    stable=route(100 * turns - canary),
                    canary=route(canary, round(canary * self.errors)),
                )
                await self.store.put(K.samples(M, id), samples.to_json())

    async def watch(self) -> None:
        async for batch in self.store.watch_prefix(K.rollouts_prefix):
            for event in batch.events:
                self.records += 1
                canary = RolloutRecord.from_json(event.kv.value).canary  # type: ignore[union-attr]
                if canary is not None and self.percents[-1:] != [canary.percent]:
                    self.percents.append(canary.percent)

    async def record(self) -> RolloutRecord | None:
        kv = await self.store.get(K.rollout(M))
        return None if kv is None else RolloutRecord.from_json(kv.value)

    async def until(self, holds: Callable[[RolloutRecord], bool], within_s: float = 90) -> None:
        async def is_so() -> bool:
            record = await self.record()
            return record is not None and holds(record)

        await eventually(is_so, within_s=within_s)


def route(requests: int, errors: int = 0) -> RouteSamples:
    buckets = [0] * 30
    buckets[bucket_of(0.01)] = requests - errors
    return RouteSamples(requests=requests, errors=errors, buckets=tuple(buckets))


@asynccontextmanager
async def playing(*, candidates: int = 1) -> AsyncIterator[tuple[World, list[asyncio.Task[None]]]]:
    """A world and its coordinators' tasks, each with a client of its own."""
    store = MemoryStore()
    world = World(store)
    await world.start()
    loop = asyncio.get_running_loop()
    coordinators = [
        Coordinator(
            store,
            K,
            f"c{at}",
            parse=parse_here,
            rng=random.Random(at),
            now=lambda: AT + timedelta(seconds=loop.time()),
        )
        for at in range(candidates)
    ]
    standing = [asyncio.create_task(each.run()) for each in coordinators]
    played = [asyncio.create_task(part) for part in (world.follow(), world.count(), world.watch())]
    try:
        yield world, standing
    finally:
        for task in (*played, *standing):
            task.cancel()
        await asyncio.gather(*played, *standing, return_exceptions=True)


async def test_it_is_promoted_once_and_its_comments_are_kept() -> None:
    async with playing() as (world, _):
        await world.store.put(K.model(M), text())
        await eventually(lambda: len(world.writes) == 2, within_s=90, what="rewritten")
        assert world.writes[-1].spec.live == "2"
        assert world.writes[-1].spec.canary is None
        kv = await world.store.get(K.model(M))
        assert kv is not None
        assert kv.value.startswith(b"# why 2: it reads more\n")
        await asyncio.sleep(60)
        assert len(world.writes) == 2
        assert world.percents == [5.0, 50.0]


async def test_coordinators_are_killed_all_along() -> None:
    """Each for a few seconds only: less than a step holds, so that its clock starts again."""
    async with playing(candidates=8) as (world, standing):
        await world.store.put(K.model(M), text())
        for task in standing[:-1]:
            await asyncio.sleep(9)
            assert all(one in (5.0, 50.0) for one in world.percents)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        await eventually(lambda: len(world.writes) == 2, within_s=90, what="rewritten")
        assert world.writes[-1].spec.live == "2"
        assert world.percents == [5.0, 50.0], "never back, never over a step"


async def test_a_bad_one_is_taken_back_by_whoever_leads() -> None:
    async with playing(candidates=2) as (world, standing):
        await world.store.put(K.model(M), text())
        await world.until(lambda record: record.canary is not None and record.canary.step == 1)
        standing[0].cancel()
        world.errors = 0.3
        await world.until(
            lambda record: record.canary is not None and record.canary.phase == "failed"
        )
        await asyncio.sleep(120)
        assert world.percents == [5.0, 50.0, 0.0]
        assert len(world.writes) == 1, "the document is the user's"


async def test_an_edit_of_something_else_does_not_start_it_anew() -> None:
    async with playing() as (world, _):
        await world.store.put(K.model(M), text())
        await world.until(lambda record: record.canary is not None and record.canary.step == 1)
        await world.store.put(K.model(M), text(queue=7))
        await eventually(lambda: len(world.writes) == 3, within_s=90, what="rewritten")
        assert world.writes[-1].spec.live == "2"
        assert world.writes[-1].spec.limits.queue == 7
        assert world.percents == [5.0, 50.0]


async def test_an_edit_at_the_moment_of_promotion_wins() -> None:
    """The coordinator has read the document and is about to write: its write finds another one."""
    async with playing() as (world, _):
        get = world.store.get

        async def slow_get(key: str) -> object:
            found = await get(key)
            if key == K.model(M) and len(world.writes) == 1:
                await world.store.put(K.model(M), text(queue=7, steps="{percent: 1, hold_s: 900}"))
            return found

        world.store.get = slow_get  # type: ignore[method-assign, assignment]
        await world.store.put(K.model(M), text())
        await eventually(lambda: len(world.writes) == 2, within_s=90, what="edited")
        await asyncio.sleep(60)
        assert [document.spec.live for document in world.writes] == ["1", "1"]
        record = await world.record()
        assert record is not None
        assert record.canary is not None
        assert (record.canary.percent, record.canary.phase) == (1.0, "stepping")


async def test_samples_add_up_and_are_told_now_and_then() -> None:
    async with playing() as (world, _):
        await world.store.put(K.model(M), text(steps="{percent: 5, hold_s: 1000}"))
        await world.until(
            lambda record: record.canary is not None and record.canary.verdict == "pass"
        )
        record = await world.record()
        assert record is not None
        assert record.canary is not None
        assert "canary 0 of 100 (0.00%), stable 0 of 1900" in (record.canary.detail or "")
        before = world.records
        await asyncio.sleep(60)
        assert 10 <= world.records - before <= 13, "each write goes to every node"
