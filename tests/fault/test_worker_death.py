"""Workers that end, however they end, and workers that hang, of a node seen from outside.

One version, so that nothing but another replica or a new worker can answer in the dead one's place.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import pytest
import pytest_asyncio

from paddlewheel.models import make_mlp
from tests.e2e.running import Answer, RunningNode, document, is_alive, running_node
from tests.e2e.traffic import mlp_requests, rows, traffic_to
from tests.etcd import EtcdCluster, etcd_cluster
from tests.eventually import eventually

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(120)]

HANG_S = 1.0
PROBED_WITHIN_S = 10.0 + 2.0 + HANG_S
"""An idle servable is probed each 10 s, looked at each 2 s (`loader.prober`)."""


@pytest.fixture(scope="module")
def etcd() -> Iterator[EtcdCluster]:
    with etcd_cluster() as cluster:
        yield cluster


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    root = tmp_path_factory.mktemp("mlp")
    return {"1": make_mlp(root / "1", seed=1, tag=1)}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def node(
    etcd: EtcdCluster, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[RunningNode]:
    async with running_node(etcd, tmp_path_factory.mktemp("node"), "--enable-drills") as node:
        yield node


@pytest_asyncio.fixture(autouse=True, loop_scope="module")
async def alone(node: RunningNode) -> AsyncIterator[None]:
    """Each test's models go with it, and their workers too."""
    yield
    await node.store.delete_prefix(node.keys.models_prefix)
    await eventually(lambda: not node.worker_pids(), within_s=10, what="every worker ended")


def text(model: str, folders: Mapping[str, Path], replicas: int) -> bytes:
    return document(
        model, "1", folders, placement={"replicas": replicas, "memoryMB": 50},
        limits={"hang_s": HANG_S, "timeout_s": 20},
    )  # fmt: skip


async def workers_of(node: RunningNode, model: str) -> list[dict[str, Any]]:
    status = await node.status(model)
    return [worker for servable in status["servables"] for worker in servable["workers"]]


async def drill(node: RunningNode, model: str, **what: Any) -> None:
    armed = await node.post("/admin/drill", {"model": model, **what})
    assert armed.status == 200, armed.body


async def until_replaced(node: RunningNode, model: str, pids: set[int], within_s: float) -> None:
    """Until all replicas are there, none of them one of ``pids``, and the status says so."""

    async def replaced() -> bool:
        workers = await workers_of(node, model)
        return all(w["alive"] and w["pid"] not in pids for w in workers)

    await eventually(replaced, within_s=within_s, what=f"{pids} replaced")
    await eventually(
        lambda: not any(map(is_alive, pids)), within_s=2, what="nothing left of the old one"
    )
    workers = await workers_of(node, model)
    assert {w["pid"] for w in workers} <= node.worker_pids()
    assert sum(w["restarts"] for w in workers) >= len(pids)


ENDS = {
    "SIGSEGV": signal.SIGSEGV,
    "SIGABRT": signal.SIGABRT,
    "the OOM killer's SIGKILL": signal.SIGKILL,
    "SIGSTOP": signal.SIGSTOP,
}


async def test_one_of_two_replicas_ends(node: RunningNode, folders: Mapping[str, Path]) -> None:
    """Every kind of end, one after the other, and nobody outside can tell."""
    await node.apply("m", text("m", folders, replicas=2))
    async with traffic_to(node, mlp_requests("m", folders), rate_per_s=60) as traffic:
        for number in ENDS.values():
            await traffic.goes_on(20)
            pid = (await workers_of(node, "m"))[0]["pid"]
            os.kill(pid, number)
            await until_replaced(node, "m", {pid}, within_s=15)
        for kind, code in (("crash", "EXIT:3"), ("hang", "HANG")):
            before = await errors_of(node)
            await drill(node, "m", kind=kind, code=code, count=1)
            await eventually(lambda: has_another(node, before, code), within_s=10, what=code)  # noqa: B023
            await until_replaced(node, "m", set(), within_s=15)
        await traffic.goes_on(20)
    codes = {"SIGSEGV": 1, "SIGABRT": 1, "SIGKILL": 1, "HANG": 2, "EXIT:3": 1}
    assert await errors_of(node) == codes
    assert (await node.status("m"))["live"] == "1"
    # Nothing waits longer for a hung worker than `hang_s` and a run elsewhere.
    slowest_s = max(sample.latency_s for sample in traffic.samples)
    assert HANG_S * 0.9 < slowest_s < HANG_S + 2.0
    assert not (await node.store.list_prefix(node.keys.quarantines_prefix)).kvs


async def errors_of(node: RunningNode) -> dict[str, int]:
    (servable,) = (await node.status("m"))["servables"]
    return cast("dict[str, int]", servable["errors"])


async def has_another(node: RunningNode, before: Mapping[str, int], code: str) -> bool:
    return (await errors_of(node)).get(code, 0) > before.get(code, 0)


async def test_the_only_worker_ends(node: RunningNode, folders: Mapping[str, Path]) -> None:
    """Its requests wait for the next one: later answers, but answers."""
    await node.apply("m", text("m", folders, replicas=1))
    async with traffic_to(node, mlp_requests("m", folders), rate_per_s=60) as traffic:
        for number in (signal.SIGKILL, signal.SIGSTOP):
            await traffic.goes_on(20)
            (worker,) = await workers_of(node, "m")
            os.kill(worker["pid"], number)
            await until_replaced(node, "m", {worker["pid"]}, within_s=15)
        await traffic.goes_on(20)
    assert (await node.status("m"))["reason"] is None


async def test_a_crash_loop_opens_the_breaker_and_closes_it_again(
    node: RunningNode, folders: Mapping[str, Path]
) -> None:
    """While no worker lasts, people are sent away at once instead of waiting for nothing."""
    loop = asyncio.get_running_loop()
    await node.apply("loop", text("loop", folders, replicas=1))
    await node.apply("other", text("other", folders, replicas=1))
    async with traffic_to(node, mlp_requests("other", folders)) as others:
        await drill(node, "loop", kind="crash", code="SIGSEGV", count=6)
        answers: list[tuple[float, Answer]] = []
        was_unready = False
        while not (answers and answers[-1][1].status == 200):
            assert len(answers) < 400, [answer.status for _, answer in answers]
            sent_s = loop.time()
            answer = await node.infer("loop", {"x": rows(1, seed=len(answers))})
            answers.append((loop.time() - sent_s, answer))
            assert answer.status in (200, 503), answer.body
            if is_sent_away(answer):
                ready = await node.get("/readyz?verbose")
                failed = [c["name"] for c in ready.json["checks"] if not c["ok"]]
                was_unready |= failed == ["model:loop"] and ready.status == 503
                await asyncio.sleep(0.02)
        sent_away = [(took_s, answer) for took_s, answer in answers if is_sent_away(answer)]
        assert len(sent_away) > 5, [answer.body for _, answer in answers]
        assert was_unready, "ready all along, though no request was answered"
        for took_s, answer in sent_away:
            assert took_s < 0.5, "waited for nothing"
            assert 0 < float(answer.headers["Retry-After"]) <= 31
        assert (await node.get("/readyz")).status == 200
        await others.goes_on()
    assert await workers_of(node, "loop")
    assert len([f for f in faults(node, "loop") if f["code"] == "SIGSEGV"]) == 6


def is_sent_away(answer: Answer) -> bool:
    return answer.status == 503 and "keep failing" in answer.error


def faults(node: RunningNode, model: str) -> list[dict[str, Any]]:
    return [
        fault
        for fault in node.process.events("servable_fault")
        if fault["servable"].startswith(f"{model}:")
    ]


@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGKILL])
async def test_a_worker_that_fails_while_nobody_asks(
    node: RunningNode, folders: Mapping[str, Path], number: signal.Signals
) -> None:
    """A second replica, and all of them: found by inferences of the node's own, and replaced."""
    for model in ("m", "n"):
        await node.apply(model, text(model, folders, replicas=2))
    first, second = await workers_of(node, "m")
    ended = {"m": {second["pid"]}, "n": {worker["pid"] for worker in await workers_of(node, "n")}}
    for pids in ended.values():
        for pid in pids:
            os.kill(pid, number)
    for model, pids in ended.items():
        await until_replaced(node, model, pids, within_s=PROBED_WITHIN_S + 5)
    assert first["pid"] in {worker["pid"] for worker in await workers_of(node, "m")}
    assert (await node.infer("n", {"x": rows(1)})).status == 200
    assert (await node.get("/readyz")).status == 200
