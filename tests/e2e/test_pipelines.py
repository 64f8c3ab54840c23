"""Pipelines on a real node: models and transforms behind one request, swapped under it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
import pytest_asyncio

from paddlewheel.models import make_mlp, reference
from registry.inference import Array
from tests import transforms_package
from tests.e2e.running import RunningNode, document, running_node
from tests.etcd import EtcdCluster, etcd_cluster
from tests.pipelines import document as pipeline
from tests.pipelines import put, until_status

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
