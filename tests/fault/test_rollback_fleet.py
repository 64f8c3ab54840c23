"""What a rollback is in a fleet: by quorum, across restarts, until it is lifted, and no wider."""

from __future__ import annotations

import asyncio
import re
import signal
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from paddlewheel.models import make_mlp
from registry.names import ModelName
from tests.etcd import EtcdCluster, etcd_cluster
from tests.eventually import eventually
from tests.fault.rollback_stage import (
    ROLLS_BACK_WITHIN_S,
    Fleet,
    ask,
    fleet_of,
    servable,
    steady,
)
from tests.served import KEYS, Models

pytestmark = pytest.mark.asyncio(loop_scope="module")

CODE_700 = {"kind": "code", "code": 700, "count": 3}
CODE_101 = {"kind": "code", "code": -101, "count": 3}
"""Does not cost a worker: the fastest."""
LIMITS = {"timeout_s": 15, "hang_s": 5, "queue": 4000}


@pytest.fixture(scope="module")
def cluster() -> Iterator[EtcdCluster]:
    with etcd_cluster() as cluster:
        yield cluster


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def fleet(
    cluster: EtcdCluster, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Fleet]:
    async with fleet_of(cluster, tmp_path_factory.mktemp("nodes"), "n1", "n2") as fleet:
        yield fleet


@pytest.fixture
def models(request: pytest.FixtureRequest, tmp_path: Path) -> Models:
    """Of the test's own name, so that no test sees another's verdicts."""
    name = re.sub("[^a-z0-9]+", "-", request.node.name.removeprefix("test_"))[:60].strip("-")
    return with_rollback(Models(tmp_path, name=ModelName(name)))


@pytest_asyncio.fixture(autouse=True, loop_scope="module")
async def forgotten(fleet: Fleet, models: Models) -> AsyncIterator[None]:
    """What one test leaves loaded is no load on the next."""
    yield
    await fleet.store.delete(KEYS.model(models.name))


def with_rollback(models: Models, **rollback: Any) -> Models:
    models.spec = {"limits": LIMITS, "rollback": {"bake_s": 3600, **rollback}}
    return models


async def serve_baked(fleet: Fleet, models: Models) -> None:
    """Version 2 live with version 1 as standby, and version 1 known as good."""
    await fleet.serve(with_rollback(models, bake_s=0.1), "1", before=None)

    async def is_baked() -> bool:
        return await fleet.store.get(KEYS.lastgood(models.name)) is not None

    await eventually(is_baked, within_s=20, what="version 1 baked")
    await fleet.serve(with_rollback(models), before=None, standby="1")


async def test_a_restart_keeps_the_quarantine(fleet: Fleet, models: Models) -> None:
    """Of the node that saw the faults and of the other, stopped and killed."""
    name = models.name
    await serve_baked(fleet, models)
    async with steady(fleet["n1"], models):
        await fleet["n1"].drill(name, **CODE_700)
        await fleet.until_serves(name, "1", within_s=ROLLS_BACK_WITHIN_S)
    for id, other, number in (("n1", "n2", signal.SIGTERM), ("n2", "n1", signal.SIGKILL)):
        async with steady(fleet[other], models):
            fleet[id].signal(number)
            await fleet[id].wait(20)
            again = await fleet.start(id)
            await serves_only(fleet, again.id, models, "1")
            assert (await again.servables(name))["2"]["state"] == "QUARANTINED"
    assert await fleet.quarantine(name, "2") is not None


async def test_a_restart_before_etcd_knew_keeps_the_quarantine(
    fleet: Fleet, models: Models, cluster: EtcdCluster
) -> None:
    """etcd stands still from before the faults to after the restart: the disk remembers."""
    name, one = models.name, fleet["n1"]
    await serve_baked(fleet, models)
    await asyncio.to_thread(cluster.members[0].freeze)
    try:
        await one.drill(name, **CODE_101)
        async with steady(one, models):
            pass
        assert (await ask(one, models)).version == "1"
        one.signal(signal.SIGKILL)
        await one.wait(10)
        one = await fleet.start("n1")
        await serves_only(fleet, "n1", models, "1")
    finally:
        await asyncio.to_thread(cluster.members[0].thaw)

    async def is_written() -> bool:
        return await fleet.quarantine(name, "2") is not None

    await eventually(is_written, within_s=15, what="the quarantine in etcd")
    await fleet.until_serves(name, "1", within_s=15)


async def serves_only(fleet: Fleet, id: str, models: Models, version: str) -> None:
    """From its first answer on the node answers with ``version``."""
    seen: list[str] = []

    async def answers() -> bool:
        answer = await ask(fleet[id], models)
        seen.append(answer.version if answer.status == 200 else "")
        return bool(seen[-1])

    await eventually(answers, within_s=30, what=f"{id} serves; {fleet[id].tail()}")
    seen += [(await ask(fleet[id], models)).version for _ in range(10)]
    assert set(seen) - {""} == {version}


async def test_release_brings_it_back_everywhere(fleet: Fleet, models: Models) -> None:
    name = models.name
    await fleet.serve(models)
    async with steady(fleet["n1"], models):
        await fleet["n1"].drill(name, **CODE_101)
        await fleet.until_serves(name, "1", within_s=ROLLS_BACK_WITHIN_S)
        command = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "paddlewheel", "release", name, "2",
            "--etcd", ",".join(fleet.cluster.endpoints),
        )  # fmt: skip
        assert await command.wait() == 0
        await fleet.until_serves(name, "2", standby="1")
    assert await fleet.quarantine(name, "2") is None
    assert (await fleet.status("n1", name)).reason is None  # type: ignore[union-attr]
    assert not (await fleet.store.list_prefix(KEYS.faults_prefix(name))).kvs
    # And it counts from nothing: two faults are not three.
    async with steady(fleet["n1"], models):
        await fleet["n1"].drill(name, **(CODE_101 | {"count": 2}))
        await fleet["n1"].until_drilled()
    await fleet.until_serves(name, "2", standby="1", within_s=1)


async def test_a_quorum_of_two_takes_two(fleet: Fleet, models: Models) -> None:
    """The node that fails flips for itself; the fleet only with a second witness."""
    name = models.name
    await fleet.serve(with_rollback(models, quorum=2))
    async with steady(fleet["n1"], models), steady(fleet["n2"], models):
        await fleet["n1"].drill(name, **CODE_101)
        await fleet.until_serves(name, "1", nodes=["n1"], within_s=ROLLS_BACK_WITHIN_S)
        await eventually(
            lambda: bool(fleet["n1"].logged("quarantine_without_quorum", model=name)),
            within_s=5,
            what="one witness is not enough",
        )
        assert await fleet.quarantine(name, "2") is None
        await fleet.until_serves(name, "2", standby="1", nodes=["n2"], within_s=1)
        await fleet["n2"].drill(name, **CODE_101)
        await fleet.until_serves(name, "1", nodes=["n2"], within_s=ROLLS_BACK_WITHIN_S)

    async def is_known() -> bool:
        quarantine = await fleet.quarantine(name, "2")
        return quarantine is not None and quarantine.nodes == ("n1", "n2")

    await eventually(is_known, within_s=5, what="a quarantine with both nodes")


async def test_a_failing_canary_goes_alone(fleet: Fleet, models: Models) -> None:
    name = models.name
    await fleet.store.put(KEYS.model(name), models.document("1"))
    models.spec = {**models.spec, "canary": {"version": "2", "rules": [{"percent": 50}]}}
    revision = await models.put(fleet.store, "1")
    await fleet.until_serves(name, "1", canary="2", revision=revision)
    async with steady(fleet["n1"], models) as traffic:
        await fleet["n1"].drill(name, version="2", **CODE_700)
        await fleet.until_serves(name, "1", within_s=ROLLS_BACK_WITHIN_S)
        result = await traffic.stop()
    assert "canary" in result.by(lambda sample: sample.route)
    for id in fleet.nodes:
        status = await fleet.status(id, name)
        assert status is not None
        assert servable(status, "2").state == "QUARANTINED"
        assert servable(status, "1").state == "LIVE"
        assert "700" in (status.reason or "")


async def test_other_bytes_under_the_version_lift_it(fleet: Fleet, models: Models) -> None:
    name = models.name
    await fleet.serve(models)
    async with steady(fleet["n1"], models):
        await fleet["n1"].drill(name, **CODE_101)
        await fleet.until_serves(name, "1", within_s=ROLLS_BACK_WITHIN_S)
        # The same document again is not enough.
        await models.put(fleet.store, "2", again="1")
        await asyncio.sleep(0.1)
        await fleet.until_serves(name, "1", within_s=1)
    make_mlp(models.source("2"), seed=22, tag=2.0)
    await models.put(fleet.store, "2", fixed="1")
    await fleet.until_serves(name, "2", standby="1")
    assert (await ask(fleet["n1"], models)).version == "2"


async def test_codes_left_out_do_not_count(fleet: Fleet, models: Models) -> None:
    """Nor does the client see them. A worker's end counts whatever the list says."""
    name, one = models.name, fleet["n1"]
    await fleet.serve(with_rollback(models, codes=[700]))
    async with steady(one, models):
        await one.drill(name, **(CODE_101 | {"count": 20}))
        await fleet["n1"].until_drilled()
        await fleet.until_serves(name, "2", standby="1", within_s=1)
        assert (await one.servables(name))["2"]["errors"]["-101"] == 20
        await one.drill(name, kind="crash", code="SIGSEGV", count=3)
        await fleet.until_serves(name, "1", within_s=ROLLS_BACK_WITHIN_S)


async def test_without_a_standby_the_last_good_is_loaded(fleet: Fleet, models: Models) -> None:
    """``bake_s: 0``: 503 with Retry-After while it loads, and then answers."""
    name, one = models.name, fleet["n1"]
    await fleet.serve(with_rollback(models, bake_s=0), standby=None)
    assert (await one.pids(name)).keys() == {"2"}
    async with steady(one, models, may_fail=True) as traffic:
        await one.drill(name, **CODE_101)
        await fleet.until_serves(name, "1", within_s=ROLLS_BACK_WITHIN_S)
        result = await traffic.stop()
    assert set(result.by(lambda sample: str(sample.status))) <= {"200", "503"}
    refused = [sample for sample in result if sample.status == 503]
    assert max(s.due_s for s in refused) - min(s.due_s for s in refused) < ROLLS_BACK_WITHIN_S
    async with steady(one, models):
        pass
    assert (await ask(one, models)).version == "1"


@pytest.mark.parametrize("code", [-101, 700])
async def test_the_first_version_ever_recovers_when_the_fault_ends(
    fleet: Fleet, models: Models, code: int
) -> None:
    """Nothing to roll back to: it says so, refuses for now, and is not given up."""
    name, one = models.name, fleet["n1"]
    await fleet.serve(models, "1", before=None)
    async with steady(one, models, may_fail=True) as traffic:
        await one.drill(name, kind="code", code=code, count=6)
        status = await fleet.until(
            "n1", name, lambda status: status.reason is not None, within_s=10, what="a reason"
        )
        assert str(code) in (status.reason or "")
        assert "nothing to roll back to" in (status.reason or "")
        await fleet["n1"].until_drilled()
        await fleet.until(
            "n1", name, lambda status: status.reason is None, within_s=20, what="well again"
        )
        result = await traffic.stop()
    assert set(result.by(lambda sample: str(sample.status))) == {"200", "503"}
    assert await fleet.quarantine(name, "1") is None
    async with steady(one, models):
        pass
