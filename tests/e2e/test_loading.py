"""What becomes of a load on a real node: killed, superseded, swapped by its bytes, dropped."""

from __future__ import annotations

import os
import re
import shutil
import signal
from collections.abc import AsyncIterator, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from paddlewheel.bench.checks import infer_body, outputs_of_version
from paddlewheel.bench.load import Headers, Request, Verify, http_request
from paddlewheel.models import make_mlp, reference
from tests import models
from tests.e2e.expected import check_tag, gone, old_serves_on
from tests.e2e.running import (
    OUTPUT,
    RunningNode,
    Status,
    document,
    is_alive,
    reason_of,
    running_node,
    states_of,
)
from tests.e2e.traffic import Traffic, mlp_requests, rows, traffic_to
from tests.etcd import EtcdCluster, etcd_cluster
from tests.eventually import eventually

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest.fixture(scope="module")
def etcd() -> Iterator[EtcdCluster]:
    with etcd_cluster() as cluster:
        yield cluster


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """Two good versions."""
    root = tmp_path_factory.mktemp("good")
    return {v: make_mlp(root / v, seed=int(v), tag=int(v)) for v in ("1", "2")}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def node(
    etcd: EtcdCluster, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[RunningNode]:
    async with running_node(etcd, tmp_path_factory.mktemp("node")) as node:
        yield node


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def traffic(node: RunningNode, folders: Mapping[str, Path]) -> AsyncIterator[Traffic]:
    """Judged requests to the model ``m`` through all the tests of this module.

    The good versions take turns; an answer of any other version is a failure.
    """
    await node.apply("m", document("m", "1", folders))
    async with traffic_to(node, mlp_requests("m", folders), rate_per_s=80) as traffic:
        yield traffic


# --- the worker that loads -----------------------------------------------------------------------


async def test_a_worker_killed_while_it_loads(
    node: RunningNode, traffic: Traffic, folders: Mapping[str, Path], tmp_path: Path
) -> None:
    third = make_mlp(tmp_path / "3", seed=3, tag=3)
    before, workers = await node.status("m"), node.worker_pids()
    revision = await node.put("m", document("m", "bad", {**folders, "bad": third}))
    os.kill(await node.next_worker(workers), signal.SIGKILL)
    failed = await node.failed("m", revision, "bad")
    assert re.fullmatch(r".*SIGKILL.*", reason_of(failed, "bad"))
    await old_serves_on(node, traffic, before, failed, "bad")
    status = await node.apply("m", document("m", "1", folders))
    assert states_of(status, "bad") == []
    await traffic.goes_on()


async def test_a_killed_load_is_tried_again(node: RunningNode, tmp_path: Path) -> None:
    """Nothing is wrong with the version, so the node tries again by itself."""
    folder = make_mlp(tmp_path / "1", seed=1, tag=1)
    workers = node.worker_pids()
    revision = await node.put("again", document("again", "1", {"1": folder}))
    os.kill(await node.next_worker(workers), signal.SIGKILL)
    await node.failed("again", revision, "1")
    # Never loaded so far: known, but nothing to serve it with, and why.
    answer = await node.infer("again", {"x": rows(1)})
    assert answer.status == 503
    assert int(answer.headers["Retry-After"]) >= 1
    assert "again" in answer.error
    await node.applied("again", revision)
    await check_tag(node, "again", 1.0)
    await gone(node, "again")


async def test_a_newer_document_supersedes_a_load(
    node: RunningNode, traffic: Traffic, folders: Mapping[str, Path], tmp_path: Path
) -> None:
    """The half-loaded worker is ended, even one that hangs; its version is never routed to."""
    third = make_mlp(tmp_path / "3", seed=3, tag=3)
    workers = node.worker_pids()
    await node.put("m", document("m", "3", {**folders, "3": third}))
    half_loaded = await node.next_worker(workers)
    os.kill(half_loaded, signal.SIGSTOP)
    await node.until("m", lambda s: states_of(s, "3") == ["LOADING"], what="3 LOADING")
    pinned = await node.infer("m", {"x": rows(1)}, version="3")
    assert pinned.status == 404
    live = "2" if (await node.status("m"))["live"] == "1" else "1"
    status = await node.apply("m", document("m", live, folders))
    assert status["live"] == live
    assert states_of(status, "3") == []
    await eventually(lambda: not is_alive(half_loaded), within_s=5, what="half-loaded worker gone")
    await traffic.goes_on()


async def test_many_documents_in_a_row_end_at_the_last(
    node: RunningNode, traffic: Traffic, folders: Mapping[str, Path], tmp_path: Path
) -> None:
    before = len(node.worker_pids())
    extra = {str(n): make_mlp(tmp_path / str(n), seed=n, tag=n) for n in range(3, 9)}
    for live in extra:
        await node.put("m", document("m", live, {**folders, **extra}))
    status = await node.apply("m", document("m", "1", folders))
    assert status["live"] == "1"
    await eventually(lambda: len(node.worker_pids()) <= before, within_s=10, what="workers gone")
    await traffic.goes_on()


# --- bytes and identities ------------------------------------------------------------------------


def tags_judge(x: Any, *folders: Path) -> Verify:
    """The answer must be that of one of these folders, whatever version it names."""
    wanted = [outputs_of_version({"1": {OUTPUT: reference(folder, x)}}) for folder in folders]

    def verify(status: int, headers: Headers, body: bytes) -> str | None:
        verdicts = [judge(status, headers, body) for judge in wanted]
        return None if None in verdicts else verdicts[0]

    return verify


async def test_other_bytes_under_the_same_version(node: RunningNode, tmp_path: Path) -> None:
    """A servable is version and digest: new bytes are loaded beside the old ones and swapped."""
    source = make_mlp(tmp_path / "source", seed=20, tag=20)
    old = models.copy(source, tmp_path / "old")
    new = make_mlp(tmp_path / "new", seed=21, tag=21)
    text = document("same", "1", {"1": source})
    first = await node.apply("same", text)
    x = rows(2)
    headers, body = infer_body({"x": x}, binary=True)
    request = Request(
        "binary",
        http_request("POST", "/v2/models/same/infer", body, headers=headers),
        tags_judge(x, old, new),
    )
    async with traffic_to(node, [request]) as traffic:
        await check_tag(node, "same", 20.0)
        # The same document again: nothing to load.
        workers = node.worker_pids()
        await node.apply("same", text)
        assert node.worker_pids() == workers
        # Other bytes at the source do nothing until a document says so.
        for name in ("inference.json", "inference.pdiparams"):
            shutil.copyfile(new / name, source / name)
        await traffic.goes_on()
        await check_tag(node, "same", 20.0)
        second = await node.apply("same", text)
        await check_tag(node, "same", 21.0)
        assert digest_of(first, "LIVE") != digest_of(second, "LIVE")
        # Broken bytes under the same version: the good ones of that version serve on.
        models.params_path(source).write_bytes(b"nothing")
        revision = await node.put("same", text)
        failed = await node.failed("same", revision, "1")
        assert sorted(s for s in states_of(failed, "1") if s != "STANDBY") == ["FAILED", "LIVE"]
        assert failed["applied_revision"] == second["applied_revision"]
        assert digest_of(failed, "LIVE") == digest_of(second, "LIVE")
        assert reason_of(failed, "1").startswith("params: ")
        assert (await node.infer("same", {"x": x}, version="1")).status == 200
        await traffic.goes_on()
        # And by another source, back to the first bytes: they are still loaded.
        third = await node.apply("same", document("same", "1", {"1": old}))
        assert digest_of(third, "LIVE") == digest_of(first, "LIVE")
        await check_tag(node, "same", 20.0)
        await traffic.goes_on()
    await gone(node, "same")


def digest_of(status: Status, state: str) -> str:
    (digest,) = [s["digest"] for s in status["servables"] if s["state"] == state]
    return str(digest)


async def test_deleting_a_document_drains_and_then_404(node: RunningNode, tmp_path: Path) -> None:
    """Every request is answered: by the model, then (while it drains) 503, then 404 for ever."""
    folder = make_mlp(tmp_path / "1", seed=5, tag=5)
    before = node.worker_pids()
    await node.apply("brief", document("brief", "1", {"1": folder}))
    statuses: list[int] = []

    def verify(status: int, headers: Headers, body: bytes) -> str | None:
        statuses.append(status)
        drains = status == 503 and b"deleted" in body and "retry-after" in headers
        return None if status in (200, 404) or drains else f"status {status}: {body[:200]!r}"

    headers, body = infer_body({"x": rows(1)}, binary=True)
    data = http_request("POST", "/v2/models/brief/infer", body, headers=headers)
    async with traffic_to(node, [Request("binary", data, verify)], rate_per_s=150) as traffic:
        await traffic.goes_on()
        await gone(node, "brief")
        await traffic.goes_on()
    order = [(200, 503, 404).index(status) for status in statuses]
    assert order == sorted(order), "refused, and then answered again"
    assert {200, 404} <= set(statuses)
    await eventually(lambda: not node.worker_pids() - before, within_s=10, what="its worker ended")
    assert "brief" not in (await node.get("/admin/routes")).json["models"]
    assert (await node.get("/readyz")).status == 200


# --- starts --------------------------------------------------------------------------------------


async def test_a_node_that_starts_with_broken_documents(etcd: EtcdCluster, tmp_path: Path) -> None:
    """It serves what the others serve, the one before, with what it remembers and without."""
    good = make_mlp(tmp_path / "1", seed=1, tag=1)
    bad = models.cut_last_tensor(good, tmp_path / "2")
    async with running_node(etcd, tmp_path / "node", prefix="/start") as node:
        before = {
            model: await node.apply(model, document(model, "1", {"1": good}))
            for model in ("unreadable", "failing")
        }
        unreadable = await node.put("unreadable", "spec: {live: 1}\n")
        failing = await node.put("failing", document("failing", "2", {"1": good, "2": bad}))
        for cache in ("cache", "nothing-known"):
            await node.refused("unreadable", unreadable)
            await node.failed("failing", failing, "2")
            await node.stop()
            await node.start(cache=cache)
            for model in before:
                status = await node.until(
                    model,
                    lambda s: s["live"] == "1" and s["revision"] in (unreadable, failing),
                    what=f"{model}: the good version after a restart with {cache}",
                )
                await check_tag(node, model, 1.0)
                assert status["applied_revision"] == before[model]["applied_revision"]
                assert status["accepted"] is (model == "failing")
        third = make_mlp(tmp_path / "3", seed=3, tag=3)
        for model in before:
            await node.apply(model, document(model, "3", {"3": third}))
            await check_tag(node, model, 3.0)


async def test_a_node_restarts_though_its_sources_are_gone(
    etcd: EtcdCluster, tmp_path: Path
) -> None:
    """What served here is served again from the cache; a version that never did is not."""
    gone = {v: make_mlp(tmp_path / v, seed=int(v), tag=int(v)) for v in ("1", "2")}
    async with running_node(etcd, tmp_path / "node", prefix="/gone") as node:
        await node.apply("m", document("m", "1", gone))
        await node.stop()
        for folder in gone.values():
            shutil.rmtree(folder)
        await node.start(cache="cache")
        await node.until("m", lambda s: s["live"] == "1", what="served from the cache")
        await check_tag(node, "m", 1.0)
        never_served = await node.put("m", document("m", "2", gone))
        await node.failed("m", never_served, "2")
        # A new version's text over an old folder says that the bytes are new ones.
        renamed = await node.put("m", document("m", "3", {"3": gone["1"]}))
        await node.failed("m", renamed, "3")
        await check_tag(node, "m", 1.0)
