"""Pipelines on a real node: models and transforms behind one request, swapped under it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
import pytest_asyncio
from click.testing import CliRunner

from paddlewheel.cli.root import root
from paddlewheel.models import make_mlp, reference
from registry.inference import Array
from registry.names import ModelName
from tests import transforms_package
from tests.e2e.running import RunningNode, document, running_node, states_of
from tests.etcd import EtcdCluster, etcd_cluster
from tests.eventually import eventually
from tests.pipelines import document as pipeline
from tests.pipelines import put, status_of, until_status

pytestmark = pytest.mark.asyncio(loop_scope="module")

Folders = Mapping[str, Mapping[str, Path]]
CHAIN = (
    {"name": "a", "model": "first", "inputs": {"x": "request.x"}},
    {"name": "b", "model": "second", "inputs": {"x": "a.0"}},
)


@pytest.fixture(scope="module")
def etcd() -> Iterator[EtcdCluster]:
    with etcd_cluster() as cluster:
        yield cluster


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """``first`` returns 64 columns, which ``second`` takes; the last one says which version."""
    root = tmp_path_factory.mktemp("models")
    return {
        name: {
            v: make_mlp(root / name / v, seed=int(v) + at, tag=int(v), classes=classes)
            for v in ("1", "2")
        }
        for at, (name, classes) in enumerate((("first", 64), ("second", 10)))
    }


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def node(
    etcd: EtcdCluster, folders: Folders, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[RunningNode]:
    installed = transforms_package.write_package(tmp_path_factory.mktemp("site"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(installed))
        async with running_node(etcd, tmp_path_factory.mktemp("node")) as node:
            for name, versions in folders.items():
                await node.apply(name, document(name, "1", versions))
            yield node


def rows(count: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal((count, 64), dtype=np.float32)


def by_hand(folders: Folders, x: Array, first: str = "1", second: str = "1") -> Array:
    between = reference(folders["first"][first], x)
    return reference(folders["second"][second], between)


async def test_two_models_in_a_row(node: RunningNode, folders: Folders) -> None:
    revision = await put(node.store, "chain", pipeline("chain", CHAIN))
    await until_status(node.store, "chain", accepted=True, ready=True, applied_revision=revision)
    x = rows(3)

    answer = await node.post("/v1/pipelines/chain/predict", {"inputs": {"x": x.tolist()}})

    assert answer.status == 200, answer.body
    assert answer.headers["X-Pipeline-Versions"] == "a=1,b=1"
    assert answer.headers["X-Config-Revision"] == str(revision)
    np.testing.assert_allclose(answer.json["outputs"]["y"], by_hand(folders, x), rtol=1e-4)

    answer = await node.infer("chain", {"x": x})
    np.testing.assert_allclose(answer.outputs()["y"], by_hand(folders, x), rtol=1e-4)


SLOW, SLEEPS_S = 6, 3.0
TEXTS = (
    {"name": "decode", "transform": "decode", "inputs": {"raw": "request.rows"}},
    *(
        {**step, "inputs": {"x": source}}
        for step, source in zip(CHAIN, ("decode.x", "a.0"), strict=True)
    ),
    {"name": "tag", "transform": "tag", "inputs": {"y": "b.0"}},
)


async def test_transforms_before_and_behind(node: RunningNode) -> None:
    text = pipeline(
        "texts", TEXTS, inputs=[{"name": "rows"}], outputs={"texts": "tag.texts", "y": "b.0"}
    )
    await put(node.store, "texts", text)
    await until_status(node.store, "texts", ready=True)
    answer = await node.request(
        "POST", "/v1/pipelines/texts/predict", rows(2).tobytes(), {"Content-Type": "image/raw"}
    )
    assert answer.status == 200, answer.body
    assert answer.json["outputs"]["texts"] == ["tag 1", "tag 1"]
    refused = await node.request(
        "POST", "/v1/pipelines/texts/predict", b"short", {"Content-Type": "image/raw"}
    )
    assert refused.status == 400
    assert "step 'decode' (transform decode): want rows of 256 bytes" in refused.error


async def test_a_refused_document_changes_nothing(node: RunningNode) -> None:
    good = await put(node.store, "chain", pipeline("chain", CHAIN))
    await until_status(node.store, "chain", applied_revision=good, ready=True)
    refused = {
        "circle": (
            [CHAIN[0], {**CHAIN[1], "inputs": {"x": "b.0"}}],
            ("spec.steps[1].inputs.x", "wait for each other"),
        ),
        "not installed": (
            [*CHAIN, {"name": "t", "transform": "nowhere", "inputs": {"y": "b.0"}}],
            ("spec.steps[2].transform", "installed: decode, double, keep-positive, naughty, tag"),
        ),
        "broken when imported": (
            [*CHAIN, {"name": "t", "transform": "broken-import", "inputs": {"y": "b.0"}}],
            ("spec.steps[2].transform", "SystemExit"),
        ),
        "a transform without such an input": (
            [*CHAIN, {"name": "t", "transform": "tag", "inputs": {"z": "b.0"}}],
            ("spec.steps", "'t' takes 'y', which nothing gives it"),
        ),
    }
    for case, (steps, (path, message)) in refused.items():
        bad = await put(node.store, "chain", pipeline("chain", steps))
        status = await until_status(node.store, "chain", revision=bad)
        assert not status.accepted, case
        meant = [each for each in status.errors if each.path == path and message in each.message]
        assert meant, status.errors
        assert meant[0].line == 1
        assert (status.applied_revision, status.ready) == (good, True)
        answer = await node.post("/v1/pipelines/chain/predict", {"inputs": {"x": rows(1).tolist()}})
        assert answer.headers["X-Config-Revision"] == str(good)
        shown = (await node.get("/v1/pipelines/chain")).json
        assert (shown["accepted"], shown["ready"]) == (False, True)


async def test_a_name_that_a_model_has_is_refused_until_it_is_free(
    node: RunningNode, folders: Folders
) -> None:
    await node.apply("taken", document("taken", "1", folders["first"]))
    await put(node.store, "taken", pipeline("taken", CHAIN))
    status = await until_status(node.store, "taken", accepted=False)
    assert "a model has this name" in str(status.error)
    await node.delete("taken")
    await until_status(node.store, "taken", accepted=True, ready=True)
    await node.store.delete(node.keys.pipeline(ModelName("taken")))
    await eventually(lambda: _is_unknown(node, "taken"), within_s=10)
    assert await status_of(node.store, "taken") is None


async def _is_unknown(node: RunningNode, name: str) -> bool:
    paths = (f"/v1/pipelines/{name}", f"/v2/models/{name}")
    return {(await node.get(path)).status for path in paths} == {404}


async def test_what_a_request_began_with_stays_until_it_ends(
    node: RunningNode, folders: Folders
) -> None:
    """Version 1 is drained, with no bake, while a step before it still runs."""
    slow = {"name": "slow", "transform": "naughty", "inputs": {"x": "request.x"}}
    steps = [slow, {**CHAIN[0], "inputs": {"x": "slow.x"}}, CHAIN[1]]
    await put(node.store, "slow", pipeline("slow", steps))
    await until_status(node.store, "slow", ready=True)
    spec = {"rollback": {"bake_s": 0}}
    both = document("first", "1", folders["first"], canary={"version": "2"}, **spec)
    await node.apply("first", both)
    x = rows(1)
    x[0, :2] = SLOW, SLEEPS_S

    asked = asyncio.create_task(
        node.post("/v1/pipelines/slow/predict", {"inputs": {"x": x.tolist()}})
    )
    await asyncio.sleep(0.1)
    await node.apply("first", document("first", "2", folders["first"], **spec))
    now = await node.post("/v1/pipelines/chain/predict", {"inputs": {"x": rows(1).tolist()}})
    assert now.headers["X-Pipeline-Versions"] == "a=2,b=1"
    await node.until("first", lambda s: states_of(s, "1") == ["DRAINING"], what="1 drains")
    assert not asked.done()
    answer = await asked
    assert answer.status == 200, answer.body
    assert answer.headers["X-Pipeline-Versions"] == "a=1,b=1"
    np.testing.assert_allclose(answer.json["outputs"]["y"], by_hand(folders, x), rtol=1e-4)
    await node.until("first", lambda s: not states_of(s, "1"), what="1 is unloaded")


async def test_readiness_follows_the_models(node: RunningNode, folders: Folders) -> None:
    steps = [CHAIN[0], {**CHAIN[1], "model": "late"}]
    await put(node.store, "later", pipeline("later", steps))
    status = await until_status(node.store, "later", accepted=True, ready=False)
    assert "unknown model 'late'" in str(status.reason)
    assert (await node.get("/v2/models/later/ready")).status == 503
    assert (await node.get("/readyz")).status == 200, "a pipeline makes no node unready"
    await node.apply("late", document("late", "1", folders["second"]))
    await until_status(node.store, "later", ready=True, reason=None)
    await node.delete("late")
    await until_status(node.store, "later", ready=False)


async def test_by_command(node: RunningNode, tmp_path: Path) -> None:
    async def command(*arguments: str) -> tuple[int, str]:
        flags = ["--etcd", ",".join(node.etcd.endpoints)]
        done = await asyncio.to_thread(CliRunner().invoke, root, [*arguments, *flags])
        return done.exit_code, done.output

    good, bad = tmp_path / "good.json", tmp_path / "bad.json"
    good.write_bytes(pipeline("told", CHAIN))
    nowhere = {"name": "t", "transform": "nowhere", "inputs": {"y": "b.0"}}
    bad.write_bytes(pipeline("told", [*CHAIN, nowhere]))
    code, said = await command("apply", "-f", str(good), "--wait")
    assert (code, "told created" in said) == (0, True), said
    assert (await command("get", "told"))[1] == good.read_text()
    code, said = await command("diff", "-f", str(bad))
    assert "nowhere" in said
    code, said = await command("apply", "-f", str(bad), "--wait")
    assert (code, "no transform 'nowhere' is installed" in said) == (1, True), said
    code, said = await command("pipelines", "told", "-o", "json")
    (told,) = json.loads(said)["pipelines"]
    assert (told["nodes"][0]["accepted"], told["converged"]) == (False, False)
    assert "refused" in (await command("pipelines"))[1]
    named_like_a_model = tmp_path / "model.json"
    named_like_a_model.write_bytes(pipeline("first", CHAIN))
    code, said = await command("apply", "-f", str(named_like_a_model))
    assert (code, "is taken" in said) == (1, True), said
