"""Drills on a real node, over HTTP and from the command line; and where a drill's count goes."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Iterator
from typing import Any

import numpy as np
import pytest
import pytest_asyncio

from loader.drills import DrillBox
from loader.oversight import FaultReport, Oversight
from loader.pool import WorkerPool
from loader.worker import Worker
from registry.inference import ServableFailed, Signature, TensorSpec
from registry.names import Digest, ModelName, ServableId, Version
from tests.etcd import EtcdCluster, etcd_cluster
from tests.eventually import eventually
from tests.fault.rollback_stage import Fleet, ask, fleet_of
from tests.integration.workers import Peer, rows
from tests.node import Node
from tests.served import Models

pytestmark = pytest.mark.asyncio(loop_scope="module")

SPEC = {"rollback": {"bake_s": 3600, "consecutive": 100}}
"""Drilled a lot, and never rolled back."""


@pytest.fixture(scope="module")
def cluster() -> Iterator[EtcdCluster]:
    with etcd_cluster() as cluster:
        yield cluster


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models(tmp_path_factory.mktemp("models"), spec=SPEC)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def fleet(
    cluster: EtcdCluster, models: Models, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Fleet]:
    """``n1`` and ``n2`` obey drills, ``off`` does not."""
    folder = tmp_path_factory.mktemp("nodes")
    async with fleet_of(cluster, folder, "n1", "n2") as fleet:
        off = await Node.start(
            (
                "node", "--etcd", ",".join(cluster.endpoints), "--id", "off",
                "--listen", "127.0.0.1:0", "--device", "cpu", "--cache", str(folder / "off"),
            ),
            folder / "off",
        )  # fmt: skip
        try:
            await fleet.serve(models)
            await fleet.until(
                "off", models.name, lambda status: status.live == "2", within_s=40, what="live"
            )
            yield fleet
        finally:
            await off.end()


@pytest_asyncio.fixture(autouse=True, loop_scope="module")
async def calm(fleet: Fleet) -> AsyncIterator[None]:
    """No drill of one test is left for the next."""
    yield
    for node in fleet.nodes.values():
        for drill in (await node.call("GET", "/admin/drill"))[1]["drills"]:
            await node.call("DELETE", f"/admin/drill/{drill['id']}")


async def drill(fleet: Fleet, *arguments: str, code: int = 0) -> tuple[str, str]:
    """Run ``paddlewheel drill``; its stdout and stderr."""
    command = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "paddlewheel", "drill", *arguments,
        "--etcd", ",".join(fleet.cluster.endpoints),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    out, err = await command.communicate()
    assert command.returncode == code, (out, err)
    return out.decode(), err.decode()


# --- the command --------------------------------------------------------------------------------


async def test_one_node_is_drilled_and_the_client_does_not_see_it(
    fleet: Fleet, models: Models
) -> None:
    await ask(fleet["n1"], models)  # so that it is not probed, which is a run too
    out, _ = await drill(
        fleet, models.name, "--code", "-101", "--count", "2", "--node", "n1", "-o", "json"
    )
    (node,) = json.loads(out)["nodes"]
    assert (node["node"], node["error"]) == ("n1", None)
    assert node["drills"][0] | {"id": ""} == {
        "id": "", "model": models.name, "version": "2", "kind": "code", "code": -101,
        "delay_ms": 0, "share": 1.0, "count": 2, "left": 2, "armed": True,
    }  # fmt: skip
    assert await fleet["n2"].drills_left() == 0
    answers = [await ask(fleet["n1"], models) for _ in range(4)]
    assert (await fleet["n1"].servables(models.name))["2"]["errors"]["-101"] == 2
    assert [answer.version for answer in answers] == ["1", "1", "2", "2"]


async def test_every_node_is_asked_and_one_refusal_is_told(fleet: Fleet, models: Models) -> None:
    out, _ = await drill(fleet, models.name, "--code", "700", "--version", "1", code=1)
    lines = {line.split()[0]: line for line in out.splitlines()[1:]}
    assert lines.keys() == {"n1", "n2", "off"}
    assert "switched off" in lines["off"]
    assert "--enable-drills" in lines["off"]
    for id in ("n1", "n2"):
        assert "code 700" in lines[id]
        assert await fleet[id].drills_left() == 1


async def test_what_is_armed_is_listed_and_called_off(fleet: Fleet, models: Models) -> None:
    await fleet["n1"].drill(models.name, version="1", code=700, count=7, share=0.5)
    out, _ = await drill(fleet, models.name, "--list", "--node", "n1")
    assert "7 of 7" in out
    assert "code 700, of 50%" in out
    out, _ = await drill(fleet, models.name, "--disarm", "--node", "n1")
    assert "off" in out
    assert await fleet["n1"].drills_left() == 0
    _, err = await drill(fleet, models.name, "--list", "--node", "n1")
    assert "nothing is armed" in err


WRONG: dict[str, tuple[tuple[str, ...], int, str]] = {
    "nothing to do": (("mlp",), 2, "--code or --kind or --delay-ms, --list, --disarm"),
    "two things": (("mlp", "--code", "700", "--list"), 2, "want one of"),
    "no such kind": (("mlp", "--kind", "melt"), 2, "melt"),
    "no runs": (("mlp", "--code", "700", "--count", "0"), 2, "--count"),
    "no model": (("no/model", "--code", "700"), 2, "no model can be called"),
    "a model that nobody has": (("other", "--code", "700"), 1, "no node has a model 'other'"),
    "a node that is not there": (("mlp", "--code", "700", "--node", "n9"), 1, "n1, n2, off"),
    "a code of nothing": (("mlp", "--code", "MELTED", "--node", "n1"), 1, "MELTED"),
    "a version of nothing": (("mlp", "--code", "2", "--version", "9", "--node", "n1"), 1, "'9'"),
    "a URL of nothing": (("mlp", "--code", "2", "--node", "http://127.0.0.1:1"), 1, "no answer"),
}


@pytest.mark.parametrize("case", WRONG)
async def test_what_is_wrong_is_said(fleet: Fleet, case: str) -> None:
    arguments, code, why = WRONG[case]
    out, err = await drill(fleet, *arguments, code=code)
    assert why in out + err
    assert "Traceback" not in err


# --- the endpoint -------------------------------------------------------------------------------


async def test_a_node_without_the_flag_refuses(fleet: Fleet, models: Models) -> None:
    (record,) = [
        json.loads(kv.value) for kv in (await fleet.store.list_prefix("/paddlewheel/nodes/off")).kvs
    ]
    one = fleet["n1"]
    body: dict[str, Any] = {"model": models.name, "code": 700}
    held, one.ready = one.ready, {"http": record["http"]}
    try:
        for method, path, document in (
            ("POST", "/admin/drill", body),
            ("GET", "/admin/drill", None),
            ("DELETE", "/admin/drill/drill-1", None),
        ):
            status, problem = await one.call(method, path, document)
            assert status == 403
            assert "--enable-drills" in problem["detail"]
    finally:
        one.ready = held


async def test_what_each_kind_does_to_a_request(fleet: Fleet, models: Models) -> None:
    """One of each on the standby, asked for by name: nothing else may answer, so the pinned
    request is run again on the same version, by a new worker where the old one ended."""
    one = fleet["n1"]
    await ask(one, models, **{"X-Model-Version": "1"})
    for document in (
        {"kind": "code", "code": 2},
        {"kind": "oom"},
        {"kind": "crash", "code": "EXIT:7"},
        {"kind": "slow", "delay_ms": 300},
    ):
        await one.drill(models.name, version="1", **document)
        began_s = asyncio.get_running_loop().time()
        answer = await ask(one, models, **{"X-Model-Version": "1"})
        took_s = asyncio.get_running_loop().time() - began_s
        assert (answer.status, answer.version) == (200, "1"), (document, answer)
        assert (took_s > 0.3) or document["kind"] != "slow"
        assert await one.drills_left() == 0
    errors = (await one.servables(models.name))["1"]["errors"]
    assert errors.items() >= {"2": 1, "-101": 1, "EXIT:7": 1}.items()


# --- the count ----------------------------------------------------------------------------------

ID = ServableId(ModelName("m"), Version("1"), Digest("sha256:1"))
SIGNATURE = Signature((TensorSpec("x", "float32", (-1, 64)),), (TensorSpec("y", "float32", (-1,)),))


async def test_a_drill_is_not_used_up_by_requests_that_leave_unrun() -> None:
    """Those behind a run that ends the worker are handed back; the next ones fail for them."""
    box = DrillBox()
    box.arm({"model": "m", "kind": "crash", "code": "SIGSEGV", "count": 3}, live=ID.version)
    peers, faults = [Peer()], list[FaultReport]()

    def on_fault(report: FaultReport) -> bool:
        faults.append(report)
        return False

    async def make_worker() -> Worker:
        peers.append(Peer())
        return peers[-1].worker

    pool = WorkerPool(
        ID, SIGNATURE, [peers[0].worker], make_worker=make_worker,
        oversight=Oversight(
            on_fault=on_fault,
            has_control=lambda: True,
            drill=lambda: box.order_for(ID.model, ID.version),
        ),
    )  # fmt: skip
    deadline_s = asyncio.get_running_loop().time() + 20
    try:
        for deaths in range(1, 4):
            asked = [
                asyncio.ensure_future(pool.infer({"x": rows(1)}, deadline_s=deadline_s))
                for _ in range(4)
            ]
            message = await peers[-1].next()
            assert message["drill"]["code"] == "SIGSEGV"
            peers[-1].die("SIGSEGV")
            outcomes = await asyncio.gather(*asked, return_exceptions=True)
            assert all(isinstance(outcome, ServableFailed) for outcome in outcomes)
            assert len(faults) == deaths
            await eventually(lambda: pool.is_manned, within_s=10, what="the next worker")
        after = asyncio.ensure_future(pool.infer({"x": rows(1)}, deadline_s=deadline_s))
        message = await peers[-1].next()
        assert "drill" not in message
        peers[-1].answer(message, y=np.zeros(1, np.float32))
        await after
    finally:
        for peer in peers:
            peer.close()
        await pool.close()
