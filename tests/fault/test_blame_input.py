"""An input that ends every worker which runs it: it is refused, and nobody else pays for it.

No drill: a real kernel that a real input kills (`tests.fault.poison_model`).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
import pytest_asyncio

from paddlewheel.bench.checks import infer_body, read_outputs
from paddlewheel.bench.load import Headers, Request, Verify, http_request
from registry.inference import Array
from tests.e2e.running import Answer, RunningNode, document, running_node
from tests.e2e.traffic import Traffic, traffic_to
from tests.etcd import EtcdCluster, etcd_cluster
from tests.eventually import eventually
from tests.fault.poison_model import SMALLEST, feeds, make_remainder, remainder

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(120)]

POISON_S = 6
OUTPUT = "fetch_name_0"
RATE_PER_S = 40.0


@pytest.fixture(scope="module")
def etcd() -> Iterator[EtcdCluster]:
    with etcd_cluster() as cluster:
        yield cluster


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    root = tmp_path_factory.mktemp("remainder")
    return {v: make_remainder(root / v, 1000 * int(v)) for v in ("1", "2")}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def node(
    etcd: EtcdCluster, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[RunningNode]:
    async with running_node(etcd, tmp_path_factory.mktemp("node")) as node:
        yield node


def text(model: str, live: str, folders: Mapping[str, Path], **spec: object) -> bytes:
    return document(model, live, folders, limits={"poison_s": POISON_S, "timeout_s": 15}, **spec)


def judged(given: dict[str, Array], *, may_be_refused: bool) -> Verify:
    """The right numbers, by whichever version says that it gave them."""

    def verify(status: int, headers: Headers, body: bytes) -> str | None:
        if may_be_refused and status == 503 and float(headers["retry-after"]) > 0:
            return None
        if status != 200:
            return f"status {status}: {body[:200]!r}"
        tag = 1000 * int(headers["x-model-version"])
        got, wanted = read_outputs(headers, body)[OUTPUT], remainder(given, tag)
        if np.array_equal(got, wanted):
            return None
        return f"version {tag // 1000}: got {got.tolist()}, want {wanted.tolist()}"

    return verify


def good_requests(model: str, kinds: int = 8, *, may_be_refused: bool = False) -> list[Request]:
    requests: list[Request] = []
    for seed in range(kinds):
        given = feeds(seed)
        headers, body = infer_body(given, binary=True)
        data = http_request("POST", f"/v2/models/{model}/infer", body, headers=headers)
        requests.append(Request("binary", data, judged(given, may_be_refused=may_be_refused)))
    return requests


def crashes(node: RunningNode, model: str) -> list[str]:
    """The servables that lost a worker to the trap, in order."""
    faults = node.process.events("servable_fault")
    assert {fault["code"] for fault in faults} <= {"SIGFPE"}
    return [f["servable"] for f in faults if f["servable"].startswith(f"{model}:")]


async def until_whole(node: RunningNode, model: str) -> None:
    """Until every servable has its worker again."""

    async def whole() -> bool:
        status = await node.status(model)
        return all(w["alive"] for s in status["servables"] for w in s["workers"])

    await eventually(whole, within_s=15, what="the workers replaced")


async def check_nothing_blamed(node: RunningNode, model: str, live: str) -> None:
    status = await node.status(model)
    assert (status["live"], status["reason"]) == (live, None)
    assert {s["state"] for s in status["servables"]} <= {"LIVE", "STANDBY"}
    assert not (await node.store.list_prefix(node.keys.quarantines_prefix)).kvs
    assert node.process.events("device_cordoned") == []
    assert (await node.get("/readyz")).status == 200


def check_refused(answer: Answer) -> None:
    assert answer.status == 422, (answer.status, answer.body)
    assert answer.error.startswith("this input ended workers of this model and is refused for ")


async def test_an_input_that_ends_a_worker_of_each_version(
    node: RunningNode, folders: Mapping[str, Path]
) -> None:
    loop = asyncio.get_running_loop()
    await node.apply("m", text("m", "1", folders))
    await node.apply("m", text("m", "2", folders))
    poison = feeds(99, deadly=True)
    async with traffic_to(node, good_requests("m"), rate_per_s=RATE_PER_S) as traffic:
        await traffic.goes_on()
        before_s = loop.time()
        check_refused(await node.infer("m", poison))
        refused_s = loop.time()
        ended = crashes(node, "m")
        assert sorted(servable.partition("@")[0] for servable in ended) == ["m:1", "m:2"]
        # The same input again, however it comes: refused at once, and no worker meets it.
        for binary in (True, False):
            check_refused(await node.infer("m", poison, binary=binary))
        assert crashes(node, "m") == ended
        assert loop.time() - refused_s < 1.0
        # Others that look much like it are not it.
        alike = feeds(99, deadly=True)
        alike["a"][1, 2] = SMALLEST + 1
        answer = await node.infer("m", alike)
        assert np.array_equal(
            answer.outputs()[OUTPUT], remainder(alike, 1000 * int(answer.version))
        )
        await until_whole(node, "m")
        await traffic.goes_on(int(RATE_PER_S))
        await check_nothing_blamed(node, "m", "2")
        # It is not refused for ever: it may have been something else.
        while len(crashes(node, "m")) < 4:
            check_refused(await node.infer("m", poison))
            assert loop.time() - before_s < POISON_S + 10, "refused for longer than said"
            await asyncio.sleep(0.1)
        assert loop.time() - before_s >= POISON_S
        assert len(crashes(node, "m")) == 4
        check_refused(await node.infer("m", poison))
        await until_whole(node, "m")
        await traffic.goes_on()
        await check_nothing_blamed(node, "m", "2")
    _check_all_answered(traffic)
    await node.delete("m")


def _check_all_answered(traffic: Traffic) -> None:
    assert len(traffic.samples) > RATE_PER_S
    assert not traffic.failures


async def test_several_poison_inputs_at_once(
    node: RunningNode, folders: Mapping[str, Path]
) -> None:
    """Two such inputs sent in the same moment, among others: each refused, none of the others."""
    await node.apply("two", text("two", "1", folders))
    await node.apply("two", text("two", "2", folders))
    async with traffic_to(node, good_requests("two"), rate_per_s=RATE_PER_S) as traffic:
        await traffic.goes_on()
        poisons = [feeds(seed, deadly=True) for seed in (201, 202)]

        async def until_refused(given: dict[str, Array]) -> list[int]:
            statuses: list[int] = []
            while 422 not in statuses:
                assert len(statuses) < 8, statuses
                statuses.append((await node.infer("two", given)).status)
            return statuses

        for statuses in await asyncio.gather(*map(until_refused, poisons)):
            assert set(statuses) <= {422, 503}, statuses
        await until_whole(node, "two")
        await traffic.goes_on(int(RATE_PER_S))
        await check_nothing_blamed(node, "two", "2")
        assert len(crashes(node, "two")) <= 6
    _check_all_answered(traffic)
    await node.delete("two")


async def test_without_a_standby(node: RunningNode, folders: Mapping[str, Path]) -> None:
    """The only version: that others are answered in between tells the input from the version.

    Until then, and while the one worker is being replaced, people are asked to come back.
    """
    await node.apply("only", text("only", "1", folders))
    poison = feeds(7, deadly=True)
    requests = good_requests("only", may_be_refused=True)
    async with traffic_to(node, requests, rate_per_s=RATE_PER_S) as traffic:
        await traffic.goes_on(20)
        statuses: list[int] = []
        while 422 not in statuses:
            answer = await node.infer("only", poison)
            statuses.append(answer.status)
            assert answer.status in (422, 503), answer.body
            assert len(statuses) <= 4, statuses
            await until_whole(node, "only")
            await traffic.goes_on(int(RATE_PER_S))
        ended = crashes(node, "only")
        assert 2 <= len(ended) <= 6, ended
        check_refused(await node.infer("only", poison))
        assert crashes(node, "only") == ended
        await check_nothing_blamed(node, "only", "1")
    refused = sum(sample.status == 503 for sample in traffic.samples)
    assert refused < 0.5 * len(traffic.samples)
    await node.delete("only")
