"""Whatever makes the live version fail, nobody outside sees more than another version's answers.

Two nodes serve version 2 with version 1 as the standby, traffic goes to the first. A drill there
makes version 2 fail; the fleet must serve version 1 and say why, and serve version 2 again once it
is released.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from typing import Any

import psutil
import pytest
import pytest_asyncio

from registry.names import ModelName, Version
from tests.etcd import EtcdCluster, etcd_cluster
from tests.eventually import eventually
from tests.fault.rollback_stage import (
    ROLLS_BACK_WITHIN_S,
    Fleet,
    fleet_of,
    servable,
    steady,
)
from tests.served import KEYS, Models

pytestmark = pytest.mark.asyncio(loop_scope="module")

HANG_S = 1.0
NOISE_S = 0.8
"""What a shared machine may add to a latency."""
SPEC = {
    "limits": {"timeout_s": 15, "hang_s": HANG_S, "queue": 4000},
    "rollback": {"bake_s": 3600, "on": {"nan_rate": 0.01}},
}


@dataclass(frozen=True)
class Case:
    drill: dict[str, Any]
    code: int | str
    """Of the quarantine."""
    is_worker_replaced: bool = False


def code(number: int, **fields: Any) -> Case:
    return Case({"kind": "code", "code": number, "count": 3}, number, **fields)


def ended(how: str, kind: str = "crash", code: str | None = None) -> Case:
    return Case({"kind": kind, "code": how, "count": 3}, code or how, is_worker_replaced=True)


CASES = {
    "illegal address": code(700, is_worker_replaced=True),
    "launch failure": code(719, is_worker_replaced=True),
    "host allocation": code(-101),
    "device allocation": code(-102),
    "no such kernel": code(-204),
    "out of memory": Case({"kind": "oom", "count": 3}, -101),
    "segfault": ended("SIGSEGV"),
    "killed": ended("SIGKILL"),
    "stopped": ended("SIGSTOP", kind="hang", code="HANG"),
    "exit": ended("EXIT:1"),
    "NaN": Case({"kind": "nan", "count": 100}, "NAN"),
}


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
    async with fleet_of(cluster, tmp_path_factory.mktemp("nodes"), "n1", "n2") as fleet:
        await fleet.serve(models)
        yield fleet


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
async def test_the_standby_takes_over_unseen(fleet: Fleet, models: Models, case: Case) -> None:
    one, name = fleet["n1"], models.name
    (poisoned,) = (await one.pids(name))["2"]
    async with steady(one, models) as traffic:
        await one.drill(name, version="2", **case.drill)
        await fleet.until_serves(name, "1", nodes=["n1"], within_s=ROLLS_BACK_WITHIN_S)
        await fleet.until_serves(name, "1", nodes=["n2"], within_s=5)
        result = await traffic.stop()
    await check_rolled_back(fleet, models.name, case)
    if case.code != "NAN":
        met = [e["pid"] for e in one.logged("servable_fault", code=str(case.code))][-3:]
        assert met[0] == poisoned
        assert len(set(met)) == (3 if case.is_worker_replaced else 1), "who met the faults"
    assert "standby" in result.by(lambda sample: sample.route)
    # A hung run is given up after hang_s; nothing else waits for a worker to be replaced.
    allowed_s = NOISE_S + (HANG_S if case.code == "HANG" else 0)
    assert result.latency_s(100) < allowed_s, result.summary()
    await eventually(lambda: not psutil.pid_exists(poisoned), within_s=5, what="poisoned one gone")
    await fleet.release(name, "2")
    await fleet.until_serves(name, "2", standby="1")


async def check_rolled_back(fleet: Fleet, model: ModelName, case: Case) -> None:
    """What the fleet says about it."""
    quarantine = await fleet.quarantine(model, "2")
    assert quarantine is not None
    faults = await fleet.store.list_prefix(KEYS.faults_prefix(model, Version("2")))
    assert [kv.key.rpartition("/")[2] for kv in faults.kvs] == ["n1"]
    assert (quarantine.code, quarantine.nodes) == (case.code, ("n1",))
    flips = [fleet[id].at("route_swapped", live="1", before="2") for id in ("n1", "n2")]
    assert (flips[1] - flips[0]).total_seconds() < 1.0
    for id in ("n1", "n2"):
        status = await fleet.status(id, model)
        assert status is not None
        assert (status.intent.live, status.live, status.standby) == ("2", "1", None)
        assert str(case.code) in (status.reason or "")
        assert servable(status, "2").state == "QUARANTINED"
        assert (await fleet[id].call("GET", "/readyz"))[0] == 200
