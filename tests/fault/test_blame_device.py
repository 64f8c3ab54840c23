"""One fault on every version of a model: the device under them is to blame, and nothing else.

A real node with drills enabled, seen from outside: its record and its keys in etcd, `/readyz`,
`/metrics`, answers.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import orjson
import pytest
import pytest_asyncio

from paddlewheel.models import make_mlp
from registry.names import NodeId
from tests.e2e.running import Answer, RunningNode, document, running_node
from tests.e2e.traffic import rows
from tests.etcd import EtcdCluster, etcd_cluster
from tests.eventually import eventually

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(180)]

DRILLS = 5
"""On each version: enough for the verdict, and soon used up by the probes that follow."""


@pytest.fixture(scope="module")
def etcd() -> Iterator[EtcdCluster]:
    with etcd_cluster() as cluster:
        yield cluster


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    root = tmp_path_factory.mktemp("mlp")
    return {v: make_mlp(root / v, seed=int(v), tag=int(v)) for v in ("1", "2")}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def node(
    etcd: EtcdCluster, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[RunningNode]:
    async with running_node(etcd, tmp_path_factory.mktemp("node"), "--enable-drills") as node:
        yield node


async def drill(node: RunningNode, model: str, version: str, code: str, count: int) -> None:
    armed = await node.post(
        "/admin/drill", {"model": model, "version": version, "code": code, "count": count}
    )
    assert armed.status == 200, armed.body


async def cordon_of(node: RunningNode) -> dict[str, Any] | None:
    """As the node's record in etcd has it."""
    kv = await node.store.get(node.keys.node(NodeId(node.id)))
    assert kv is not None
    (device,) = orjson.loads(kv.value)["devices"]
    assert device["id"] == "cpu"
    return cast("dict[str, Any] | None", device["cordoned"])


async def quarantines(node: RunningNode) -> list[str]:
    listing = await node.store.list_prefix(node.keys.quarantines_prefix)
    return [kv.key for kv in listing.kvs]


async def two_versions(node: RunningNode, model: str, folders: Mapping[str, Path]) -> None:
    """Version 2 live, 1 the warm standby."""
    await node.apply(model, document(model, "1", folders))
    await node.apply(model, document(model, "2", folders))
    status = await node.status(model)
    assert (status["live"], status["standby"]) == ("2", "1")


async def ask(node: RunningNode, model: str, seed: int) -> Answer:
    return await node.infer(model, {"x": rows(2, seed=seed)})


@pytest.mark.parametrize("code", ["700", "SIGSEGV"])
async def test_the_same_code_on_both_versions(
    node: RunningNode, folders: Mapping[str, Path], code: str
) -> None:
    model = f"dev-{code.lower()}"
    await two_versions(node, model, folders)
    for version in ("2", "1"):
        await drill(node, model, version, code, DRILLS)
    answers: list[Answer] = []
    while await cordon_of(node) is None:
        assert len(answers) < 50, [(a.status, a.body) for a in answers]
        answers.append(await ask(node, model, seed=len(answers)))
    cordon = await cordon_of(node)
    assert cordon is not None
    assert str(cordon["code"]) == code
    assert "device cpu is at fault" in cordon["reason"]
    # What could not be answered said that coming back helps. Two processes that die of the first
    # input look like a poison input at first (422), until other inputs fare the same.
    statuses = [answer.status for answer in answers]
    assert 503 in statuses, "nobody met the fault"
    assert set(statuses) <= {200, 503} | ({422} if code == "SIGSEGV" else set())
    assert statuses.count(422) <= 2, statuses
    for answer in answers:
        assert answer.status != 503 or float(answer.headers["Retry-After"]) > 0
    # Others are to stay away, and the reason names the device.
    ready = await node.get("/readyz?verbose")
    assert ready.status == 503
    failed = {check["name"]: check["detail"] for check in ready.json["checks"] if not check["ok"]}
    assert f"model:{model}" in failed
    assert "cordoned" in failed[f"model:{model}"]
    assert cordon["reason"] in failed["device:cpu"]
    assert (await node.get("/livez")).status == 200
    # Neither version is: not here, not in the fleet.
    assert await quarantines(node) == []
    status = await node.status(model)
    assert (status["live"], status["standby"]) == ("2", "1")
    # The faults end, and nobody has to do anything.
    await eventually(lambda: _is_well(node), within_s=45, what="the cordon lifted")
    await eventually(lambda: _has_no_cordon(node), within_s=5, what="and from the record")
    status = await node.status(model)
    assert (status["live"], status["standby"]) == ("2", "1")
    assert status["reason"] is None
    assert await quarantines(node) == []
    # No input is held against anybody either.
    for seed in range(len(answers)):
        answer = await ask(node, model, seed)
        assert (answer.status, answer.version) == (200, "2"), answer.body
    await node.delete(model)


async def _has_no_cordon(node: RunningNode) -> bool:
    return await cordon_of(node) is None


async def _is_well(node: RunningNode) -> bool:
    return (await node.get("/readyz")).status == 200


async def test_a_fault_of_one_version_beside_it_is_that_versions(
    node: RunningNode, folders: Mapping[str, Path]
) -> None:
    """The same drill on the live version alone: quarantined, and the device is left alone."""
    await two_versions(node, "one", folders)
    await drill(node, "one", "2", "700", 3)
    # Between two faults the poisoned worker is replaced, and the standby answers alone.
    async with asyncio.timeout(20):
        seed = 0
        while not await _has_quarantine(node, "one/2"):
            answer = await ask(node, "one", seed := seed + 1)
            assert (answer.status, answer.version) == (200, "1"), answer.body
    assert await cordon_of(node) is None
    await node.delete("one")


async def _has_quarantine(node: RunningNode, ending: str) -> bool:
    return any(key.endswith(ending) for key in await quarantines(node))
