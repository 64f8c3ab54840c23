"""A node with a CPU and a GPU whose driver reports errors while models on the CPU serve.

The driver is a stand-in (`tests.integration.fake_nvml`) inside the node's own process, behind the
real binding; Python loads it at start by way of a ``sitecustomize`` on the node's path.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import orjson
import pytest
import pytest_asyncio

from paddlewheel.models import make_mlp
from registry.names import NodeId
from tests.e2e.running import RunningNode, document, running_node
from tests.e2e.traffic import Traffic, mlp_requests, traffic_to
from tests.etcd import EtcdCluster, etcd_cluster
from tests.eventually import eventually

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(120)]

ROOT = Path(__file__).parent.parent.parent
QUOTA_MB = 1000
RATE_PER_S = 60

DRIVER = """
import pathlib, sys
if "paddlewheel" in sys.orig_argv:
    sys.path.insert(0, {root!r})
    from tests.integration.fake_nvml import FakeDriver, FakeGpu
    gpu = FakeGpu("GPU-a", used=3 << 30, temperature_c=71, ecc=2)
    driver = FakeDriver([gpu, FakeGpu("GPU-b")], events_file=pathlib.Path({events!r}))
    driver.install(pathlib.Path({folder!r}))
"""


@pytest.fixture(scope="module")
def etcd() -> Iterator[EtcdCluster]:
    with etcd_cluster() as cluster:
        yield cluster


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    root = tmp_path_factory.mktemp("mlp")
    return {v: make_mlp(root / v, seed=int(v), tag=int(v)) for v in ("1", "2")}


@pytest.fixture
def xids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A line ``<gpu> <xid>`` in this file is an event of the node's driver."""
    events, folder = tmp_path / "xids", tmp_path / "site"
    folder.mkdir()
    source = DRIVER.format(root=str(ROOT), events=str(events), folder=str(folder))
    (folder / "sitecustomize.py").write_text(source)
    monkeypatch.setenv("PYTHONPATH", str(folder))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return events


@pytest_asyncio.fixture(loop_scope="module")
async def node(etcd: EtcdCluster, xids: Path, tmp_path: Path) -> AsyncIterator[RunningNode]:
    devices = ("--device", "cpu", "--device", f"gpu:0,memoryMB={QUOTA_MB}", "--device", "gpu:1")
    prefix = f"/{tmp_path.name}"
    async with running_node(etcd, tmp_path / "node", *devices, prefix=prefix) as node:
        yield node


def raise_xid(xids: Path, gpu: int, xid: int) -> None:
    with xids.open("a") as file:
        file.write(f"{gpu} {xid}\n")


async def devices_of(node: RunningNode) -> dict[str, dict[str, Any]]:
    kv = await node.store.get(node.keys.node(NodeId(node.id)))
    assert kv is not None
    listed = cast("list[dict[str, Any]]", orjson.loads(kv.value)["devices"])
    return {device["id"]: device for device in listed}


async def until_cordoned(node: RunningNode, device: str) -> dict[str, Any]:
    async def is_cordoned() -> bool:
        return (await devices_of(node))[device]["cordoned"] is not None

    await eventually(is_cordoned, within_s=5, what=f"{device} cordoned in the node's record")
    return cast("dict[str, Any]", (await devices_of(node))[device]["cordoned"])


async def metrics_of(node: RunningNode) -> dict[str, float]:
    text = (await node.get("/metrics")).body.decode()
    lines = [line.rpartition(" ") for line in text.splitlines() if not line.startswith("#")]
    return {name.removeprefix("paddlewheel_"): float(value) for name, _, value in lines}


async def check_the_cpu_is_unaffected(node: RunningNode, traffic: Traffic) -> None:
    """Answers go on, the node is ready, and the CPU takes new loads."""
    await traffic.goes_on(10)
    assert (await devices_of(node))["cpu"]["cordoned"] is None
    assert (await node.get("/readyz")).status == 200
    assert (await node.get("/v2/health/ready")).status == 200


@pytest.mark.parametrize("xid", [79, 94])
async def test_a_device_that_its_driver_gives_up(
    node: RunningNode, xids: Path, folders: Mapping[str, Path], xid: int
) -> None:
    await node.apply("m", document("m", "1", folders))
    before = await metrics_of(node)
    assert before['device_cordoned{device="gpu:0"}'] == 0
    async with traffic_to(node, mlp_requests("m", folders), rate_per_s=RATE_PER_S) as traffic:
        await traffic.goes_on()
        raise_xid(xids, 0, 31)  # a program's own fault: says nothing of the device
        raise_xid(xids, 0, xid)
        cordon = await until_cordoned(node, "gpu:0")
        assert cordon["code"] == f"XID:{xid}"
        assert cordon["reason"].startswith(f"XID {xid}: ")
        assert (await devices_of(node))["gpu:1"]["cordoned"] is None
        await check_the_cpu_is_unaffected(node, traffic)
        told = (await node.get("/readyz?verbose")).json["checks"]
        (check,) = [check for check in told if check["name"] == "device:gpu:0"]
        assert not check["ok"]
        assert cordon["reason"] in check["detail"]
        after = await metrics_of(node)
        assert after['device_cordoned{device="gpu:0"}'] == 1
        assert after['device_cordoned{device="cpu"}'] == 0
        # What the driver says is not lifted by probes that succeed.
        await node.apply("m", document("m", "2", folders))
        for _ in range(8 if xid == 79 else 1):  # seconds
            await traffic.goes_on(RATE_PER_S)
        assert (await until_cordoned(node, "gpu:0")) == cordon
        # A model for that device is told why it does not come up; the others go on.
        placement = {"device": "gpu:0", "memoryMB": 100}
        await node.put("g", document("g", "1", folders, placement=placement))
        status = await node.until(
            "g", lambda s: bool(s["servables"] and s["servables"][0]["reason"]), what="g's reason"
        )
        assert f"gpu:0 is cordoned: XID {xid}" in status["servables"][0]["reason"]
        verbose = await node.get("/readyz?verbose")
        assert verbose.status == 503, "a model of this node cannot serve"
        failed = [check["name"] for check in verbose.json["checks"] if not check["ok"]]
        assert failed == ["model:g", "device:gpu:0"]
        await node.delete("g")
        await eventually(lambda: _is_ready(node), within_s=10, what="ready without that model")
        await check_the_cpu_is_unaffected(node, traffic)
    assert len(node.process.events("device_cordoned")) == 1
    events = await node.store.list_prefix(node.keys.events_prefix)
    told = [kv for kv in events.kvs if f"{node.id}/gpu:0".encode() in kv.value]
    assert len(told) == 1


async def _is_ready(node: RunningNode) -> bool:
    return (await node.get("/readyz")).status == 200


async def test_what_the_driver_measures(node: RunningNode) -> None:
    """Quotas, and memory, temperature and ECC errors of each device, in `/metrics`."""

    async def is_watched() -> bool:
        return 'device_used_bytes{device="gpu:0"}' in await metrics_of(node)

    await eventually(is_watched, within_s=10, what="the driver is asked")
    metrics = await metrics_of(node)
    mb = 2**20
    assert metrics['device_quota_bytes{device="gpu:0"}'] == QUOTA_MB * mb
    assert metrics['device_quota_bytes{device="gpu:1"}'] == int(16384 * 0.9) * mb
    assert metrics['device_used_bytes{device="gpu:0"}'] == 3072 * mb
    assert metrics['device_used_bytes{device="cpu"}'] > 100 * mb
    assert metrics['gpu_temperature_celsius{device="gpu:0"}'] == 71
    assert metrics['gpu_ecc_uncorrected{device="gpu:0"}'] == 2
    assert metrics['device_reserved_bytes{device="gpu:0"}'] == 0
    assert metrics['device_waiting{device="gpu:0"}'] == 0
