"""Documents edited under traffic: no request fails, and no answer mixes two versions."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Iterator, Mapping
from pathlib import Path

import pytest
import pytest_asyncio

from paddlewheel.models import make_mlp
from tests.e2e.running import OUTPUT, RunningNode, document, is_alive, running_node, states_of
from tests.e2e.traffic import mlp_requests, rows, traffic_to
from tests.etcd import EtcdCluster, etcd_cluster
from tests.eventually import eventually

pytestmark = pytest.mark.asyncio(loop_scope="module")

MODEL = "m"
SWAPS = 10
CANARY = {"X-Canary": "1"}


@pytest.fixture(scope="module")
def etcd() -> Iterator[EtcdCluster]:
    with etcd_cluster() as cluster:
        yield cluster


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """A version for each swap, so that each is a load; and one to begin with."""
    root = tmp_path_factory.mktemp("models")
    return {str(n): make_mlp(root / str(n), seed=n, tag=n) for n in range(SWAPS + 1)}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def node(
    etcd: EtcdCluster, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[RunningNode]:
    async with running_node(etcd, tmp_path_factory.mktemp("node")) as node:
        yield node


async def test_live_swapped_again_and_again(node: RunningNode, folders: Mapping[str, Path]) -> None:
    """Every version takes its turn, and only in its turn."""
    await node.apply(MODEL, document(MODEL, "0", folders))
    async with traffic_to(node, mlp_requests(MODEL, folders), rate_per_s=100) as traffic:
        await traffic.goes_on()
        for live in list(folders)[1:]:
            await node.apply(MODEL, document(MODEL, live, folders, rollback={"bake_s": 0}))
            assert await traffic.goes_on() == {live}
    assert set(traffic.versions()) == set(folders)


async def test_live_swapped_back_and_forth_without_a_load(
    node: RunningNode, folders: Mapping[str, Path]
) -> None:
    """The version before is the warm standby: going back loads nothing."""
    for live in ("1", "2"):
        await node.apply(MODEL, document(MODEL, live, folders))
    workers = node.worker_pids()
    async with traffic_to(node, mlp_requests(MODEL, folders), rate_per_s=100) as traffic:
        for number in range(SWAPS):
            live = "12"[number % 2]
            status = await node.apply(MODEL, document(MODEL, live, folders), within_s=5)
            assert (status["live"], status["standby"]) == (live, "21"[number % 2])
            assert node.worker_pids() <= workers
            assert await traffic.goes_on() == {live}
    assert set(traffic.versions()) == {"1", "2"}


async def test_canary_swapped_again_and_again(
    node: RunningNode, folders: Mapping[str, Path]
) -> None:
    """With and without the header, at the same time; the live version stays what it is."""
    await node.apply(MODEL, document(MODEL, "0", folders))
    rules = [{"header": {"name": "X-Canary", "equals": "1"}}]
    stable = mlp_requests(MODEL, folders, allowed=lambda version: version == "0")
    marked = mlp_requests(MODEL, folders, headers=CANARY)
    async with (
        traffic_to(node, stable, rate_per_s=60) as to_live,
        traffic_to(node, marked, rate_per_s=60) as to_canary,
    ):
        for version in list(folders)[1:]:
            canary = {"version": version, "rules": rules}
            text = document(MODEL, "0", folders, canary=canary, rollback={"bake_s": 0})
            status = await node.apply(MODEL, text)
            assert (status["live"], status["canary"]) == ("0", version)
            assert await to_canary.goes_on() == {version}
            assert await to_live.goes_on() == {"0"}
        # Off: all are stable again.
        status = await node.apply(MODEL, document(MODEL, "0", folders, rollback={"bake_s": 0}))
        assert status["canary"] is None
        assert await to_canary.goes_on() == {"0"}
    assert set(to_live.versions()) == {"0"}
    assert set(to_canary.versions()) == set(folders)


async def test_a_canary_promoted(node: RunningNode, folders: Mapping[str, Path]) -> None:
    """No load: the canary's worker goes on as the live one."""
    canary = {"version": "1", "rules": [{"percent": 50}]}
    await node.apply(MODEL, document(MODEL, "0", folders, canary=canary))
    async with traffic_to(node, mlp_requests(MODEL, folders), rate_per_s=100) as traffic:
        await traffic.goes_on(40)
        assert set(traffic.versions()) == {"0", "1"}
        workers = node.worker_pids()
        status = await node.apply(MODEL, document(MODEL, "1", folders), within_s=5)
        assert (status["live"], status["canary"], status["standby"]) == ("1", None, "0")
        assert node.worker_pids() <= workers
        assert await traffic.goes_on() == {"1"}


async def test_a_request_under_way_is_answered_by_the_version_it_began_with(
    node: RunningNode, folders: Mapping[str, Path]
) -> None:
    """What is swapped out is drained: nobody new, and everybody there gets an answer."""
    limits = {"timeout_s": 60, "hang_s": 50}
    workers = node.worker_pids()
    await node.apply("slow", document("slow", "8", folders, limits=limits))
    (worker,) = node.worker_pids() - workers
    os.kill(worker, signal.SIGSTOP)
    try:
        # One that runs, and some that the worker has not begun.
        under_way = [asyncio.create_task(node.infer("slow", {"x": rows(1)})) for _ in range(5)]
        await eventually(lambda: in_flight(node), within_s=5, what="five requests under way")
        text = document("slow", "9", folders, limits=limits, rollback={"bake_s": 0})
        await node.apply("slow", text)
        await node.until("slow", lambda s: states_of(s, "8") == ["DRAINING"], what="8 DRAINING")
        assert (await node.infer("slow", {"x": rows(1)})).version == "9"
        assert not any(task.done() for task in under_way)
    finally:
        os.kill(worker, signal.SIGCONT)
    answers = await asyncio.gather(*under_way)
    assert [answer.status for answer in answers] == [200] * 5
    for answer in answers:
        assert answer.outputs()[OUTPUT][0, -1] == float(answer.version)
    assert answers[0].version == "8"
    await node.until("slow", lambda s: states_of(s, "8") == [], what="8 unloaded")
    await eventually(lambda: not is_alive(worker), within_s=5, what="its worker ended")
    await node.delete("slow")


async def in_flight(node: RunningNode) -> bool:
    metrics = (await node.get("/metrics")).body.decode()
    return any(
        "in_flight" in line and 'model="slow"' in line and line.endswith((" 5", " 5.0"))
        for line in metrics.splitlines()
    )


async def test_two_models_do_not_mix(node: RunningNode, folders: Mapping[str, Path]) -> None:
    """One is swapped while the other answers as it did."""
    await node.apply("other", document("other", "7", folders))
    only = mlp_requests("other", folders, allowed=lambda version: version == "7")
    async with traffic_to(node, only, rate_per_s=60) as traffic:
        for live in ("3", "4", "5"):
            await node.apply(MODEL, document(MODEL, live, folders))
            assert await traffic.goes_on() == {"7"}
    await node.delete("other")

    async def is_gone() -> bool:
        return not await node.status("other")

    await eventually(is_gone, within_s=10, what="other gone")
