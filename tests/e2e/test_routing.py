"""Who gets which version on a real node, what `explain` says of it, and what limits do."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import pytest_asyncio

from paddlewheel.models import make_mlp
from router.rules import user_bucket
from tests import models
from tests.e2e.running import (
    OUTPUT,
    Answer,
    RunningNode,
    document,
    reason_of,
    running_node,
    states_of,
)
from tests.e2e.traffic import rows
from tests.etcd import EtcdCluster, etcd_cluster
from tests.eventually import eventually

pytestmark = pytest.mark.asyncio(loop_scope="module")

MODEL = "m"
X = {"x": rows(1)}


@pytest.fixture(scope="module")
def etcd() -> Iterator[EtcdCluster]:
    with etcd_cluster() as cluster:
        yield cluster


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """1 to 4 are good, the params of ``cut`` are cut."""
    root = tmp_path_factory.mktemp("models")
    good = {v: make_mlp(root / v, seed=int(v), tag=int(v)) for v in ("1", "2", "3", "4")}
    return good | {"cut": models.cut_last_tensor(good["1"], root / "cut")}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def node(
    etcd: EtcdCluster, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[RunningNode]:
    async with running_node(etcd, tmp_path_factory.mktemp("node")) as node:
        yield node


async def roll_out(
    node: RunningNode, folders: Mapping[str, Path], rules: Sequence[Mapping[str, Any]]
) -> int:
    """Version 1 live, version 2 canary by ``rules``; the revision in force."""
    canary = {"version": "2", "rules": rules}
    status = await node.apply(MODEL, document(MODEL, "1", folders, canary=canary))
    assert (status["live"], status["canary"]) == ("1", "2")
    return int(status["applied_revision"])


async def ask(node: RunningNode, **headers: str) -> Answer:
    """One request; header names with underscores. The weights must be the named version's."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    answer = await node.infer(MODEL, X, headers=named)
    assert answer.status == 200, answer.body
    assert answer.outputs()[OUTPUT][0, -1] == float(answer.version)
    return answer


async def explained(node: RunningNode, version: str | None = None, **headers: str) -> Any:
    query = f"model={MODEL}" + (f"&version={version}" if version else "")
    for name, value in headers.items():
        query += f"&header={quote(name.replace('_', '-') + ':' + value)}"
    return (await node.get(f"/admin/explain?{query}")).json


async def test_rules_headers_and_explain_agree(
    node: RunningNode, folders: Mapping[str, Path]
) -> None:
    revision = await roll_out(
        node,
        folders,
        [
            {"percent": 0},
            {"region": {"header": "X-Region", "in": ["cn-sh"]}},
            {"user": {"header": "X-User-Id", "percent": 30}},
            {"header": {"name": "X-Canary", "equals": "1"}},
            {"header": {"name": "X-Tester", "prefix": "qa-"}},
            {"header": {"name": "X-Debug", "present": True}},
        ],
    )
    inside = next(f"u{n}" for n in range(100) if user_bucket(MODEL, f"u{n}") < 3000)
    outside = next(f"u{n}" for n in range(100) if user_bucket(MODEL, f"u{n}") >= 3000)
    cases: list[tuple[dict[str, str], str, str | None, int | None]] = [
        ({}, "1", None, None),
        ({"X_Canary": "1"}, "2", "header", 3),
        ({"X_Canary": "0"}, "1", None, None),
        ({"x_canary": "1"}, "2", "header", 3),
        ({"X_Tester": "qa-7"}, "2", "header", 4),
        ({"X_Tester": "dev-qa-"}, "1", None, None),
        ({"X_Debug": ""}, "2", "header", 5),
        ({"X_User_Id": inside}, "2", "user", 2),
        ({"X_User_Id": outside}, "1", None, None),
        ({"X_Region": "cn-sh"}, "2", "region", 1),
        ({"X_Region": "cn-bj"}, "1", None, None),
        # The kinds in their order, whatever the order written.
        ({"X_Region": "cn-sh", "X_User_Id": inside, "X_Canary": "1"}, "2", "header", 3),
        ({"X_Region": "cn-sh", "X_User_Id": inside}, "2", "user", 2),
        ({"X_Region": "cn-sh", "X_User_Id": outside}, "2", "region", 1),
    ]
    for headers, version, kind, index in cases:
        answer = await ask(node, **headers)
        route = "stable" if kind is None else "canary"
        assert answer.version == version, headers
        assert answer.headers["X-Model-Name"] == MODEL
        assert answer.headers["X-Config-Revision"] == str(revision)
        assert answer.headers["X-Request-Id"]
        shown, _, rule = answer.headers["X-Model-Route"].partition("; rule=")
        assert (shown, rule.split(" ")[0] or None) == (route, kind), headers
        said = await explained(node, **headers)
        assert (said["model"], said["version"], said["route"]) == (MODEL, version, route)
        assert said["config_revision"] == revision
        if kind is None:
            assert said["rule"] is None
        else:
            assert (said["rule"]["kind"], said["rule"]["index"]) == (kind, index)
        if "X_User_Id" in headers and kind != "header":
            assert said["bucket"] == user_bucket(MODEL, headers["X_User_Id"])


async def test_users_stay_where_they_are_as_the_percent_grows(
    node: RunningNode, folders: Mapping[str, Path]
) -> None:
    users = [f"user-{n}" for n in range(60)]
    before: set[str] = set()
    for percent in (0, 20, 20, 50, 100):
        await roll_out(node, folders, [{"user": {"header": "X-User-Id", "percent": percent}}])
        answers = await asyncio.gather(*(ask(node, X_User_Id=user) for user in users))
        inside = {u for u, a in zip(users, answers, strict=True) if a.version == "2"}
        assert inside == {u for u in users if user_bucket(MODEL, u) < percent * 100}
        assert before <= inside
        before = inside
    # Without an id there is nothing to be sticky by.
    assert (await ask(node)).version == "1"


async def test_a_percent_by_chance(node: RunningNode, folders: Mapping[str, Path]) -> None:
    await roll_out(
        node, folders,
        [{"percent": 30}, {"region": {"header": "X-Region", "in": ["eu"], "percent": 50}}],
    )  # fmt: skip

    async def canaries(**headers: str) -> int:
        answers = await asyncio.gather(*(ask(node, **headers) for _ in range(400)))
        return sum(answer.version == "2" for answer in answers)

    # Within 6 sigma: 30 % of all, and 30 % of the half that the region's rule leaves.
    assert 65 <= await canaries() <= 175
    assert 200 <= await canaries(X_Region="eu") <= 320
    assert (await explained(node))["canary_percent"] == 30
    assert (await explained(node, X_Region="eu"))["canary_percent"] == 65
    await roll_out(node, folders, [{"percent": 100}])
    assert {(await ask(node)).version for _ in range(10)} == {"2"}
    await roll_out(node, folders, [{"percent": 0}])
    assert {(await ask(node)).version for _ in range(10)} == {"1"}


async def test_pins_and_labels(node: RunningNode, folders: Mapping[str, Path]) -> None:
    """By path, by header, by label; never by chance, and never overruled by a rule."""
    await node.apply(MODEL, document(MODEL, "3", folders))
    revision = await roll_out(node, folders, [{"percent": 100}])
    await node.until(MODEL, lambda s: s["standby"] == "3", what="3 as the standby")
    assert (await ask(node)).version == "2"
    for version in ("1", "2", "3"):
        by_path = await node.infer(MODEL, X, version=version)
        by_header = await ask(node, X_Model_Version=version)
        for answer in (by_path, by_header):
            assert (answer.status, answer.version) == (200, version)
            assert answer.headers["X-Model-Route"] == "pinned"
            assert answer.headers["X-Config-Revision"] == str(revision)
        assert (await explained(node, version))["route"] == "pinned"
        assert (await explained(node, X_Model_Version=version))["version"] == version
    # The path counts more than the header.
    answer = await node.infer(MODEL, X, version="1", headers={"X-Model-Version": "2"})
    assert answer.version == "1"
    for label, version in (("stable", "1"), ("canary", "2")):
        given = {"instances": X["x"].tolist()}
        answer = await node.post(f"/v1/models/{MODEL}/labels/{label}:predict", given)
        assert (answer.status, answer.version) == (200, version)
    routes = (await node.get("/admin/routes")).json
    assert routes["revision"] == revision
    shown = routes["models"][MODEL]
    assert (shown["live"], shown["standby"]) == ("1", "3")
    assert shown["canary"]["version"] == "2"
    assert shown["canary"]["rules"] == [{"percent": 100}]


async def test_a_version_that_is_not_served_here(
    node: RunningNode, folders: Mapping[str, Path]
) -> None:
    """404 that lists what is, and for a failed one says why."""
    await node.apply(MODEL, document(MODEL, "1", folders))
    revision = await node.put(MODEL, document(MODEL, "cut", folders))
    failed = await node.failed(MODEL, revision, "cut")
    for answer in (
        await node.infer(MODEL, X, version="9"),
        await node.infer(MODEL, X, headers={"X-Model-Version": "9"}),
        await node.get(f"/admin/explain?model={MODEL}&version=9"),
    ):
        assert answer.status == 404
        assert "version '9'" in answer.error
        loaded = answer.error.rpartition("loaded versions: ")[2].split(", ")
        assert "1" in loaded
        assert "cut" not in loaded
    for answer in (
        await node.infer(MODEL, X, version="cut"),
        await node.infer(MODEL, X, headers={"X-Model-Version": "cut"}),
    ):
        assert answer.status == 404
        assert f"FAILED: {reason_of(failed, 'cut')}" in answer.error
    problem = await node.get(f"/admin/explain?model={MODEL}&version=9")
    assert problem.headers["Content-Type"] == "application/problem+json"
    assert (problem.json["status"], problem.json["title"]) == (404, "Not Found")
    assert (await node.infer("nobody", X)).status == 404
    await node.apply(MODEL, document(MODEL, "1", folders))


async def test_a_broken_canary_leaves_the_whole_document_aside(
    node: RunningNode, folders: Mapping[str, Path]
) -> None:
    """Live and canary are applied together or not at all; rules too."""
    before = await roll_out(node, folders, [{"header": {"name": "X-Canary", "equals": "1"}}])
    canary = {"version": "cut", "rules": [{"percent": 100}]}
    revision = await node.put(MODEL, document(MODEL, "4", folders, canary=canary))
    status = await node.failed(MODEL, revision, "cut")
    await node.until(MODEL, lambda s: states_of(s, "4") == ["READY"], what="4 READY")
    assert status["applied_revision"] == before
    assert (await ask(node)).version == "1"
    assert (await ask(node, X_Canary="1")).version == "2"
    # READY without traffic: the shadow predictor, to be pinned only.
    assert (await node.infer(MODEL, X, version="4")).headers["X-Model-Route"] == "pinned"
    await node.apply(MODEL, document(MODEL, "1", folders))


async def test_a_model_that_never_loaded(node: RunningNode, folders: Mapping[str, Path]) -> None:
    text = document("never", "cut", folders)
    failed = await node.failed("never", await node.put("never", text), "cut")
    assert (failed["live"], failed["applied_revision"], failed["accepted"]) == (None, None, True)
    assert failed["reason"] == f"cut failed: {reason_of(failed, 'cut')}"
    answer = await node.infer("never", X)
    assert answer.status == 503
    assert int(answer.headers["Retry-After"]) >= 1
    assert "cut short" in answer.error
    ready = await node.get("/readyz?verbose")
    assert ready.status == 503
    assert (await node.get("/livez")).status == 200
    # Repaired, it serves; and the node is ready.
    await node.apply("never", document("never", "1", folders))
    assert (await node.infer("never", X)).status == 200
    assert (await node.get("/readyz")).status == 200
    await node.delete("never")


async def test_queue_and_deadline(node: RunningNode, folders: Mapping[str, Path]) -> None:
    """The worker stands still: so many wait, the next is refused, and none waits for ever."""
    limits = {"timeout_s": 1.5, "hang_s": 60, "queue": 3}
    workers = node.worker_pids()
    await node.apply("slow", document("slow", "1", {"1": folders["1"]}, limits=limits))
    (worker,) = node.worker_pids() - workers
    os.kill(worker, signal.SIGSTOP)
    loop = asyncio.get_running_loop()
    started_s = loop.time()
    try:
        answers = await asyncio.gather(*(node.infer("slow", X) for _ in range(12)))
    finally:
        os.kill(worker, signal.SIGCONT)
    took_s = loop.time() - started_s
    statuses = sorted(answer.status for answer in answers)
    refused = [answer for answer in answers if answer.status == 503]
    late = [answer for answer in answers if answer.status == 504]
    assert len(refused) + len(late) == 12, statuses
    # Three in the queue, and what the worker had been given: at most two.
    assert 4 <= len(late) <= 5, statuses
    assert all(int(answer.headers["Retry-After"]) >= 1 for answer in refused)
    assert all("queue is full" in answer.error for answer in refused)
    assert all("deadline" in answer.error for answer in late)
    assert 1.4 < took_s < 4
    await eventually_answers(node)
    # A shorter deadline of the request's own.
    given = {
        "inputs": [{"name": "x", "shape": [1, 64], "datatype": "FP32", "data": [0.0] * 64}],
        "parameters": {"timeout": 200_000},
    }
    os.kill(worker, signal.SIGSTOP)
    started_s = loop.time()
    try:
        answer = await node.post("/v2/models/slow/infer", given)
    finally:
        os.kill(worker, signal.SIGCONT)
    assert answer.status == 504
    assert 0.15 < loop.time() - started_s < 1.4
    await eventually_answers(node)
    assert worker in node.worker_pids()
    await node.delete("slow")


async def eventually_answers(node: RunningNode) -> None:
    async def answers() -> bool:
        return (await node.infer("slow", X)).status == 200

    await eventually(answers, within_s=5, what="slow answers again")


async def test_a_body_that_is_too_large(node: RunningNode, folders: Mapping[str, Path]) -> None:
    await node.apply(
        "small", document("small", "1", {"1": folders["1"]}, limits={"max_body_mb": 1})
    )
    fits = {"x": rows(3500)}
    assert (await node.infer("small", fits)).status == 200
    for binary in (True, False):
        answer = await node.infer("small", {"x": rows(4000)}, binary=binary)
        assert answer.status == 413
        assert answer.error
    # Limits are the document's: a new one, and it is taken.
    await node.apply(
        "small", document("small", "1", {"1": folders["1"]}, limits={"max_body_mb": 8})
    )
    assert (await node.infer("small", {"x": rows(4000)})).status == 200
    await node.delete("small")
