"""Several models on one quota: what is refused, what waits, in which order, and never too much.

A real node with `--device cpu,memoryMB=N`. What it holds is read from outside: its record in etcd,
`/metrics`, `/admin/servables`, and the process table, where each worker stands for the memory that
its document says.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import aiohttp
import orjson
import psutil
import pytest
import pytest_asyncio

from paddlewheel.models import make_mlp
from registry.names import ModelName, NodeId, Revision
from registry.store import PutOp
from tests.e2e.running import RunningNode, Status, document, running_node, states_of
from tests.e2e.traffic import mlp_requests, traffic_to
from tests.etcd import EtcdCluster, etcd_cluster
from tests.eventually import eventually

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(150)]

QUOTA_MB = 850


@pytest.fixture(scope="module")
def etcd() -> Iterator[EtcdCluster]:
    with etcd_cluster() as cluster:
        yield cluster


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    root = tmp_path_factory.mktemp("mlp")
    return {v: make_mlp(root / v, seed=int(v), tag=int(v)) for v in ("1", "2", "3")}


def text(
    model: str,
    live: str,
    folders: Mapping[str, Path],
    *,
    priority: str = "normal",
    memory_mb: int = 200,
    bake_s: float = 0,
) -> bytes:
    placement = {"memoryMB": memory_mb, "priority": priority}
    return document(
        model, live, folders, placement=placement, rollback={"bake_s": bake_s},
        limits={"drain_s": 5},
    )  # fmt: skip


@dataclass
class Watch:
    """What the node said that it holds, at every look."""

    node: RunningNode
    looks: int = 0
    seen_mb: set[float] = field(default_factory=set[float])
    workers: set[int] = field(default_factory=set[int])
    waiting: set[float] = field(default_factory=set[float])

    async def look(self) -> None:
        kv = await self.node.store.get(self.node.keys.node(NodeId(self.node.id)))
        if kv is None:
            return  # it is not up yet
        self.workers.add(sum(map(holds_a_model, self.node.worker_pids())))
        (device,) = orjson.loads(kv.value)["devices"]
        assert device["memory_mb"] == QUOTA_MB
        self.seen_mb.add(device["reserved_mb"])
        metrics = (await self.node.get("/metrics")).body.decode()
        self.seen_mb.add(gauge(metrics, "device_reserved_bytes") / 2**20)
        self.waiting.add(gauge(metrics, "device_waiting"))
        assert gauge(metrics, "device_quota_bytes") / 2**20 == QUOTA_MB
        listed = (await self.node.get("/admin/servables")).json["servables"]
        self.seen_mb.add(sum(one["memory_mb"] or 0 for one in listed))
        self.looks += 1

    async def run(self) -> None:
        while True:
            with contextlib.suppress(aiohttp.ClientError, ValueError):
                await self.look()
            await asyncio.sleep(0.01)


def holds_a_model(pid: int) -> bool:
    """By its private memory: a worker just forked has 2 MB, one with the smallest model 16."""
    with contextlib.suppress(psutil.Error):
        return bool(psutil.Process(pid).memory_full_info().uss > 10 * 2**20)
    return False


def gauge(metrics: str, name: str) -> float:
    """Of the CPU."""
    found = re.search(rf'^\w*{name}{{device="cpu"}} (\S+)$', metrics, re.MULTILINE)
    assert found is not None, f"{name} is not in /metrics"
    return float(found[1])


@asynccontextmanager
async def watched(node: RunningNode, each_mb: int) -> AsyncGenerator[Watch]:
    """Look all the time until the end of the block; then nothing may ever have been too much.

    each_mb: the least that any worker stands for.
    """
    watch = Watch(node)
    task = asyncio.create_task(watch.run())
    try:
        yield watch
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
    assert watch.looks > 5
    assert max(watch.seen_mb) <= QUOTA_MB, sorted(watch.seen_mb)
    assert max(watch.workers) <= QUOTA_MB // each_mb, watch.workers


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def node(
    etcd: EtcdCluster, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[RunningNode]:
    device = f"cpu,memoryMB={QUOTA_MB}"
    async with running_node(etcd, tmp_path_factory.mktemp("node"), "--device", device) as node:
        yield node


@pytest_asyncio.fixture(autouse=True, loop_scope="module")
async def emptied(node: RunningNode) -> AsyncIterator[None]:
    """Nothing is left on the node, and nothing is still reserved, after each test."""
    yield
    await node.store.delete_prefix(node.keys.models_prefix)

    async def is_empty() -> bool:
        return gauge((await node.get("/metrics")).body.decode(), "device_reserved_bytes") == 0

    await eventually(is_empty, within_s=10, what="all memory given back")


# --- refusals ---------------------------------------------------------------------------------


async def test_a_fourth_model_is_refused_and_taken_when_there_is_room(
    node: RunningNode, folders: Mapping[str, Path]
) -> None:
    """With the numbers; and by itself, at the same revision, once another model has gone."""
    async with watched(node, 250):
        names = ("a", "b", "c", "d")
        # All at once, before any of them is loaded.
        documents = {name: text(name, "1", folders, memory_mb=250) for name in names}
        revision = await put_all(node, documents)
        for name in names[:3]:
            await node.applied(name, revision)
        refused = await node.refused("d", revision)
        assert refused["errors"][0]["path"] == "spec.placement.memoryMB"
        assert refused["errors"][0]["message"] == (
            "needs 250 MB beside the 0 MB of what serves now; of the 850 MB of cpu, "
            "750 MB are other models', 100 MB are free"
        )
        assert refused["applied_revision"] is None
        assert (await node.get("/v2/models/d/ready")).status != 200
        assert (await node.get("/readyz")).status == 200, "nobody is worse off for it"
        # A node that starts with all four documents serves the same three.
        await node.stop()
        await node.start()
        for name in names[:3]:
            await node.applied(name, revision)
        await node.refused("d", revision)
        # Too large for ever, and in nobody's way.
        huge = await node.put("huge", text("huge", "1", folders, memory_mb=5000))
        assert "needs 5000 MB" in (await node.refused("huge", huge))["error"]
        await node.delete("b")
        status = await node.applied("d", revision)
        assert status["accepted"] is True
        assert status["errors"] == []
        assert status["live"] == "1"
        await node.refused("huge", huge)
        async with traffic_to(node, mlp_requests("d", folders)) as traffic:
            await traffic.goes_on()


async def put_all(node: RunningNode, documents: Mapping[str, bytes]) -> Revision:
    """In one transaction, so at one revision."""
    puts = [PutOp(node.keys.model(ModelName(name)), data) for name, data in documents.items()]
    return (await node.store.txn([], puts)).revision


async def test_freed_memory_goes_to_the_highest_priority(
    node: RunningNode, folders: Mapping[str, Path]
) -> None:
    """Of the refused documents, too: by priority, then by arrival."""
    async with watched(node, 400):
        for name in ("a", "b"):
            await node.apply(name, text(name, "1", folders, memory_mb=400))
        later: dict[str, Revision] = {}
        for name, priority in (("low", "low"), ("first", "normal"), ("second", "normal")):
            later[name] = await node.put(
                name, text(name, "1", folders, priority=priority, memory_mb=400)
            )
            await node.refused(name, later[name])
        await node.delete("a")
        await node.applied("first", later["first"])
        await node.delete("b")
        await node.applied("second", later["second"])
        assert (await node.status("low"))["accepted"] is False
        await node.delete("second")
        await node.applied("low", later["low"])


async def test_a_refused_document_does_not_bring_a_former_life_back(
    node: RunningNode, folders: Mapping[str, Path]
) -> None:
    """History goes back to before a deletion; what a deleted model was is over."""
    await node.apply("again", text("again", "1", folders))
    await node.delete("again")
    await eventually(lambda: is_unknown(node, "again"), within_s=10, what="gone")
    async with watched(node, 200):
        await node.apply("other", text("other", "1", folders, memory_mb=600))
        revision = await node.put("again", text("again", "1", folders, memory_mb=300))
        await node.refused("again", revision)
        await node.apply("other", text("other", "2", folders, memory_mb=200))
        assert not node.process.events("document_from_history")
        await node.applied("again", revision)


async def is_unknown(node: RunningNode, model: str) -> bool:
    return (await node.get(f"/v2/models/{model}")).status == 404


# --- waiting ----------------------------------------------------------------------------------


async def test_loads_wait_in_line_by_priority_then_arrival(
    node: RunningNode, folders: Mapping[str, Path]
) -> None:
    """Five models serve, and there is room for one more load at a time."""
    names = {"holder": "normal", "low": "low", "early": "normal", "late": "normal", "high": "high"}
    async with watched(node, 140) as watch:
        for name, priority in names.items():
            await node.apply(name, text(name, "1", folders, priority=priority, memory_mb=140))
        # Its load is stopped in the middle, and so the memory for it stays taken.
        before = node.worker_pids()
        revisions = {
            "holder": await node.put("holder", text("holder", "2", folders, memory_mb=140))
        }
        held = await node.next_worker(before)
        os.kill(held, signal.SIGSTOP)
        for name in ("low", "early", "late", "high"):
            wanted = text(name, "2", folders, priority=names[name], memory_mb=140)
            revisions[name] = await node.put(name, wanted)
            status = await node.until(
                name, lambda s: reason_of_waiting(s) is not None, what=f"{name} waits"
            )
            assert status["accepted"] is True
            assert status["live"] == "1"
            assert re.fullmatch(
                r"waiting for memory: cpu: 140 MB wanted, 10 MB free "
                r"\(840 of 850 MB reserved(, \d waiting)?\)",
                str(reason_of_waiting(status)),
            )
        await eventually(lambda: 4.0 in watch.waiting, within_s=5, what="/metrics shows the line")
        assert (await node.get("/readyz")).status == 200
        os.kill(held, signal.SIGCONT)
        for name, revision in revisions.items():
            await node.applied(name, revision)
        ready = [
            model
            for event in node.process.events("servable_ready")
            for model, _, rest in [event["servable"].partition(":")]
            if model in names and rest.startswith("2@")
        ]
        assert ready == ["holder", "high", "early", "late", "low"]
        metrics = (await node.get("/metrics")).body.decode()
        assert gauge(metrics, "device_waiting") == 0


def reason_of_waiting(status: Status) -> str | None:
    for servable in status["servables"]:
        if servable["version"] == "2" and servable["state"] in ("FETCHING", "LOADING"):
            return cast("str | None", servable["reason"])
    return None


async def test_a_standby_of_a_lower_priority_yields(
    node: RunningNode, folders: Mapping[str, Path]
) -> None:
    """An equal's does not: the document is refused as long as the bake lasts."""
    async with watched(node, 250):
        for live in ("1", "2"):
            await node.apply("a", text("a", live, folders, bake_s=600, memory_mb=250))
        assert states_of(await node.status("a"), "1") == ["STANDBY"]
        equal = await node.put("equal", text("equal", "1", folders, memory_mb=500))
        await node.refused("equal", equal)
        assert states_of(await node.status("a"), "1") == ["STANDBY"]
        high = text("high", "1", folders, memory_mb=500, priority="high")
        await node.apply("high", high)
        assert [s["version"] for s in (await node.status("a"))["servables"]] == ["2"]
        assert (await node.status("a"))["live"] == "2"


async def test_the_end_of_a_bake_makes_room(node: RunningNode, folders: Mapping[str, Path]) -> None:
    async with watched(node, 250):
        for live in ("1", "2"):
            await node.apply("a", text("a", live, folders, bake_s=3, memory_mb=250))
        revision = await node.put("b", text("b", "1", folders, memory_mb=500))
        await node.refused("b", revision)
        await node.applied("b", revision, within_s=10)


# --- never too much ---------------------------------------------------------------------------


async def test_never_overrun_while_documents_change(
    node: RunningNode, folders: Mapping[str, Path]
) -> None:
    """Three models, room for one load beside them, sixty documents; all answer all along."""
    priorities = {"a": "high", "b": "normal", "c": "low"}
    async with watched(node, 200) as watch:
        last: dict[str, tuple[str, Revision]] = {}
        for name, priority in priorities.items():
            await node.apply(name, text(name, "1", folders, priority=priority))
        requests = [request for name in priorities for request in mlp_requests(name, folders)]
        async with traffic_to(node, requests, rate_per_s=60) as traffic:
            for n in range(60):
                name = "abc"[n % 3]
                live = str(1 + (n // 3 + n) % 3)
                bake_s = (0, 0, 1)[n // 3 % 3]
                body = text(name, live, folders, priority=priorities[name], bake_s=bake_s)
                last[name] = (live, await node.put(name, body))
                await asyncio.sleep((0.02, 0.05, 0.1)[n % 3])
            for name, (live, revision) in last.items():
                status = await node.applied(name, revision, within_s=20)
                assert status["live"] == live
            await traffic.goes_on()
        assert max(watch.seen_mb) > 600, "nothing was ever loaded beside what serves"
        assert watch.looks > 50
