"""A node that allows one folder, has little memory and little patience: what it refuses."""

from __future__ import annotations

import os
import re
import shutil
import signal
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from paddlewheel.models import make_mlp
from tests.e2e.expected import golden_for, gone, old_serves_on
from tests.e2e.running import (
    RunningNode,
    document,
    is_alive,
    reason_of,
    running_node,
)
from tests.e2e.traffic import Traffic, mlp_requests, traffic_to
from tests.etcd import EtcdCluster, etcd_cluster
from tests.eventually import eventually

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest.fixture(scope="module")
def etcd() -> Iterator[EtcdCluster]:
    with etcd_cluster() as cluster:
        yield cluster


@dataclass(frozen=True, slots=True)
class Small:
    """A node that allows one folder, has little memory, and little patience."""

    node: RunningNode
    allowed: Path
    traffic: Traffic
    folders: Mapping[str, Path]


QUOTA_MB = 700
LOAD_TIMEOUT_S = 3


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def small(
    etcd: EtcdCluster, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Small]:
    root = tmp_path_factory.mktemp("small")
    allowed = root / "models"
    folders = {v: make_mlp(allowed / v, seed=int(v), tag=int(v)) for v in ("1", "2", "3")}
    flags = ("--allow-source", str(allowed), "--device", f"cpu,memoryMB={QUOTA_MB}")
    async with running_node(
        etcd, root / "node", *flags, "--load-timeout", str(LOAD_TIMEOUT_S), prefix="/small"
    ) as node:
        await node.apply("m", small_document("1", folders))
        async with traffic_to(node, mlp_requests("m", folders)) as traffic:
            yield Small(node, allowed, traffic, folders)


def small_document(live: str, folders: Mapping[str, Any], **spec: Any) -> bytes:
    return document("m", live, folders, **{"placement": {"memoryMB": 100}, **spec})


async def _refused(small: Small, text: bytes, path: str, message: str) -> None:
    """Not accepted, with this error; what was in force stays so, and a good one is applied."""
    before = await small.node.status("m")
    status = await small.node.refused("m", await small.node.put("m", text))
    assert re.fullmatch(message, status["errors"][0]["message"])
    assert status["errors"][0]["path"] == path
    line = status["errors"][0]["line"]
    assert path.rpartition(".")[2] in text.decode().splitlines()[line - 1]
    assert status["error"] == f"line {line}: {path}: {status['errors'][0]['message']}"
    assert status["applied_revision"] == before["applied_revision"]
    assert status["live"] == before["live"]
    assert {s["state"] for s in status["servables"]} <= {"LIVE", "STANDBY"}
    await small.traffic.goes_on()
    live = "2" if before["live"] == "1" else "1"
    assert (await small.node.apply("m", small_document(live, small.folders)))["accepted"] is True
    await small.traffic.goes_on()


async def test_a_source_outside_the_allowed_ones(small: Small, tmp_path: Path) -> None:
    outside = make_mlp(tmp_path / "3", seed=3, tag=3)
    beside = small.allowed.with_name("models-too")
    shutil.copytree(small.folders["1"], beside)
    for source in (
        str(outside),
        outside.as_uri(),
        str(beside),
        f"{small.allowed}/../models-too",
        f"{small.allowed}/1/../../models-too",
        "s3://bucket/models",
    ):
        text = small_document("1", {**small.folders, "3": {"source": source}})
        await _refused(
            small, text, "spec.versions[2].source",
            rf"'{re.escape(source)}' is under none of the allowed sources \(.*\)",
        )  # fmt: skip
    golden = golden_for(small.folders["1"], tmp_path / "3")
    await _refused(
        small, small_document("1", small.folders, **golden), "spec.warmup.golden",
        r"'.*\.npz' is under none of the allowed sources \(.*\)",
    )  # fmt: skip


async def test_a_link_out_of_the_allowed_sources(small: Small, tmp_path: Path) -> None:
    outside = make_mlp(tmp_path / "3", seed=3, tag=3)
    links = small.allowed / "links"
    links.mkdir()
    for name in ("inference.json", "inference.pdiparams"):
        (links / name).symlink_to(outside / name)
    folder = small.allowed / "link"
    folder.symlink_to(outside)
    inside = small.allowed / "inside"
    inside.symlink_to(small.folders["2"])
    for source in (links, folder):
        before = await small.node.status("m")
        revision = await small.node.put("m", small_document("bad", {"bad": source}))
        failed = await small.node.failed("m", revision, "bad")
        assert "outside the allowed prefixes" in reason_of(failed, "bad")
        await old_serves_on(small.node, small.traffic, before, failed, "bad")
    status = await small.node.apply("m", small_document("2", {"2": inside}))
    assert status["live"] == "2"
    await small.traffic.goes_on()


async def test_more_memory_than_the_quota(small: Small) -> None:
    """Refused before anything is allocated, with the numbers."""
    for placement, needed_mb in (
        ({"memoryMB": 5000}, 5000),
        ({"memoryMB": QUOTA_MB - 99}, QUOTA_MB - 99),
        ({"memoryMB": 100, "replicas": 7}, 700),
    ):
        text = small_document("3", small.folders, placement=placement)
        await _refused(
            small, text, "spec.placement.memoryMB",
            rf"needs {needed_mb} MB beside the 100 MB of what serves now; of the {QUOTA_MB} MB of "
            rf"cpu, 0 MB are other models', {QUOTA_MB - 100} MB are free",
        )  # fmt: skip
    await _refused(
        small, small_document("3", small.folders, placement={"device": "gpu:3"}),
        "spec.placement.device", r"this node has no device 'gpu:3', it has cpu",
    )  # fmt: skip


async def test_what_fits_once_the_standby_has_gone(small: Small) -> None:
    """Live and the next one fit, the standby with them does not: the standby yields."""
    await small.node.apply("m", small_document("1", small.folders))
    await small.node.apply("m", small_document("2", small.folders))
    text = small_document("3", small.folders, placement={"memoryMB": QUOTA_MB - 150})
    status = await small.node.apply("m", text)
    assert status["live"] == "3"
    (live,) = [s for s in status["servables"] if s["state"] == "LIVE"]
    assert live["memory_mb"] == QUOTA_MB - 150
    await small.traffic.goes_on()
    # And back: nothing is left of what it took.
    await small.node.apply("m", small_document("2", small.folders, rollback={"bake_s": 0}))
    await small.node.until("m", lambda s: len(s["servables"]) == 1, what="only the live one left")

    async def reserves_100_mb() -> bool:
        (device,) = (await small.node.registration())["devices"]
        return (device["memory_mb"], device["reserved_mb"]) == (QUOTA_MB, 100)

    await eventually(reserves_100_mb, within_s=10, what="the memory of what was unloaded is free")


async def test_a_load_that_hangs(small: Small) -> None:
    """Stopped in the middle of it; another model is loaded meanwhile."""
    fourth = make_mlp(small.allowed / "4", seed=4, tag=4)
    before, workers = await small.node.status("m"), small.node.worker_pids()
    revision = await small.node.put("m", small_document("bad", {**small.folders, "bad": fourth}))
    hung = await small.node.next_worker(workers)
    os.kill(hung, signal.SIGSTOP)
    other = document("other", "1", {"1": fourth}, placement={"memoryMB": 50})
    await small.node.apply("other", other, within_s=2.5)
    assert (await small.node.status("m"))["applied_revision"] == before["applied_revision"]
    assert is_alive(hung)
    failed = await small.node.failed("m", revision, "bad")
    assert reason_of(failed, "bad") == f"not ready within the load deadline of {LOAD_TIMEOUT_S} s"
    await eventually(lambda: not is_alive(hung), within_s=5, what="the hung worker ended")
    await old_serves_on(small.node, small.traffic, before, failed, "bad")
    await gone(small.node, "other")
    live = "2" if before["live"] == "1" else "1"
    await small.node.apply("m", small_document(live, small.folders))
    await small.traffic.goes_on()
