"""Every form of a Paddle model through a real node: both program formats, dtypes, dims, batches,
and PP-OCRv4 reading rendered text."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import orjson
import pytest
import pytest_asyncio

from loader.params import write_params
from paddlewheel.demo import ocr
from paddlewheel.demo.models import find_published
from paddlewheel.models import make_mlp, make_two_output, reference, reference_two_output
from paddlewheel.models.pir import ProgramWriter
from registry.inference import DTYPES, Array
from tests import models
from tests.e2e.running import OUTPUT, RunningNode, document, reason_of, running_node
from tests.e2e.traffic import rows
from tests.etcd import EtcdCluster, etcd_cluster

pytestmark = pytest.mark.asyncio(loop_scope="module")

ROOT = Path(__file__).parents[2]
OCR = {"warmup": {"requests": 1, "shapes": {"x": [1, 3, 48, 320]}}}
CLS = {"warmup": {"requests": 1, "shapes": {"x": [1, 3, 48, 192]}}}


@pytest.fixture(scope="module")
def etcd() -> Iterator[EtcdCluster]:
    with etcd_cluster() as cluster:
        yield cluster


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def node(
    etcd: EtcdCluster, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[RunningNode]:
    async with running_node(etcd, tmp_path_factory.mktemp("node")) as node:
        yield node


@pytest.mark.parametrize("binary", [True, False])
async def test_pir_and_legacy_answer_the_same(
    node: RunningNode, tmp_path: Path, binary: bool
) -> None:
    """The same weights under a .json and under a .pdmodel, one swapped for the other."""
    model = f"both-{binary}".lower()
    pir = make_mlp(tmp_path / "pir", seed=1, tag=1)
    legacy = make_mlp(tmp_path / "legacy", seed=1, tag=1, format="legacy")
    x = rows(5)
    for version, folder in (("1", pir), ("2", legacy)):
        status = await node.apply(model, document(model, version, {version: folder}))
        answer = await node.infer(model, {"x": x}, binary=binary)
        (y,) = answer.outputs().values()
        np.testing.assert_allclose(y, reference(folder, x), rtol=1e-4, atol=1e-5)
        assert answer.version == version
        (live,) = [s for s in status["servables"] if s["state"] == "LIVE"]
        assert live["digest"].startswith("sha256:")
        assert {"fetch", "check", "load", "warm"} <= live["phases_ms"].keys()
    await node.delete(model)


@pytest.mark.parametrize("batch", [1, 2, 7, 64, 1000])
async def test_batches(node: RunningNode, tmp_path: Path, batch: int) -> None:
    folder = make_two_output(tmp_path / "1", seed=1, tag=1)
    await node.apply("batch", document("batch", "1", {"1": folder}))
    x, ids = rows(batch, 32, seed=batch), np.arange(batch * 6).reshape(batch, 6) % 50
    for binary in (True, False):
        answer = await node.infer("batch", {"x": x, "ids": ids}, binary=binary)
        wanted = reference_two_output(folder, x, ids)
        for got, want in zip(answer.outputs().values(), wanted, strict=True):
            assert got.shape == want.shape
            np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


async def test_dims_that_are_fixed_and_dims_that_are_not(node: RunningNode, tmp_path: Path) -> None:
    folder = tmp_path / "1"
    folder.mkdir()
    program = ProgramWriter()
    weight = program.parameter("linear_0.w_0", [8, 4])
    program.fetch(program.matmul(program.data("x", [2, -1, 8]), weight))
    program.save(folder / "inference.json")
    write_params(folder / "inference.pdiparams", {"linear_0.w_0": rows(8, 4)})
    spec = {"warmup": {"shapes": {"x": [2, 3, 8]}}}
    await node.apply("dims", document("dims", "1", {"1": folder}, **spec))
    shown = (await node.get("/v2/models/dims")).json
    assert [each["shape"] for each in shown["inputs"]] == [[2, -1, 8]]
    assert [each["shape"] for each in shown["outputs"]] == [[2, -1, 4]]
    for length in (1, 5, 200):
        x = np.stack([rows(length, 8, seed=1), rows(length, 8, seed=2)])
        answer = await node.infer("dims", {"x": x})
        np.testing.assert_allclose(answer.outputs()[OUTPUT], x @ rows(8, 4), rtol=1e-4, atol=1e-5)
    for wrong in (np.zeros((3, 5, 8), np.float32), np.zeros((2, 5, 9), np.float32)):
        answer = await node.infer("dims", {"x": wrong})
        assert answer.status == 400
        assert "want shape [2,-1,8]" in answer.error.replace(", ", ",")


# --- dtypes --------------------------------------------------------------------------------------

VALUES: Mapping[str, Array] = {
    "bool": np.array([[True, False, True], [False, True, False]]),
    "uint8": np.array([[0, 1, 255], [7, 8, 9]], np.uint8),
    "int8": np.array([[-128, 0, 127], [1, 2, 3]], np.int8),
    "int32": np.array([[-(2**31), 0, 2**31 - 1], [1, 2, 3]], np.int32),
    "int64": np.array([[-(2**63), 2**53 + 1, 2**63 - 1], [1, 2, 3]], np.int64),
    "float16": np.array([[0.5, -2.0, 65504.0], [0.0, 1.0, -1.5]], np.float16),
    "bfloat16": np.array([[0.5, -2.0, 3.0], [0.0, 1.0, -1.5]], ml_dtypes.bfloat16),
    "float32": np.array([[0.1, -2.0, 3e38], [0.0, 1.0, -1.5]], np.float32),
    "float64": np.array([[0.1, -2.0, 1e30], [0.0, 1.0, -1.5]], np.float64),
}
"""Edges of each type; the int64 between them is one that no float64 holds."""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model for each dtype, exported by Paddle itself."""
    folder = tmp_path_factory.mktemp("dtypes")
    process = await asyncio.create_subprocess_exec(
        sys.executable, str(ROOT / "tests/integration/export_dtypes.py"), str(folder),
        stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE, cwd=ROOT,
    )  # fmt: skip
    _, said = await process.communicate()
    assert process.returncode == 0, said.decode()[-2000:]
    return folder


@pytest.mark.parametrize("dtype", VALUES)
async def test_dtypes(node: RunningNode, exported: Path, dtype: str) -> None:
    """In and out unchanged, binary and (where the protocol has it) as JSON."""
    model = f"dtype-{dtype}"
    await node.apply(model, document(model, "1", {"1": exported / f"{dtype}-square"}))
    shown = (await node.get(f"/v2/models/{model}")).json
    assert shown["inputs"] == [{"name": "x", "datatype": DTYPES[dtype], "shape": [-1, -1]}]
    x = VALUES[dtype]
    for binary in (True, False) if dtype not in ("float16", "bfloat16") else (True,):
        given = x.view(np.uint16) if dtype == "bfloat16" else x
        answer = await infer_as(node, model, given, DTYPES[dtype], binary=binary)
        same, halved = answer.values()
        assert same.tobytes() == given.tobytes(), (same, given)
        np.testing.assert_allclose(
            halved.reshape(x.shape), np.asarray(x, np.float32) * np.float32(0.5), rtol=1e-6
        )
    await node.delete(model)


async def test_a_dtype_that_no_predictor_takes(node: RunningNode, exported: Path) -> None:
    """Paddle exports it, and its predictors refuse it: known before the first request."""
    text = document("dtype-int16", "1", {"1": exported / "int16-square"})
    failed = await node.failed("dtype-int16", await node.put("dtype-int16", text), "1")
    assert reason_of(failed, "1") == "input 'x': Paddle takes no int16 input"
    await node.delete("dtype-int16")


async def infer_as(
    node: RunningNode, model: str, x: Array, datatype: str, *, binary: bool
) -> dict[str, Array]:
    """As `RunningNode.infer`, for datatypes that numpy has no name for too."""
    tensor: dict[str, Any] = {"name": "x", "shape": list(x.shape), "datatype": datatype}
    path = f"/v2/models/{model}/infer"
    if not binary:
        answer = await node.post(path, {"inputs": [tensor | {"data": x.ravel().tolist()}]})
        return answer.outputs()
    tensor["parameters"] = {"binary_data_size": x.nbytes}
    head = orjson.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}})
    headers = {
        "Content-Type": "application/octet-stream",
        "Inference-Header-Content-Length": str(len(head)),
    }
    return (await node.request("POST", path, head + x.tobytes(), headers)).outputs()


# --- PP-OCRv4 ------------------------------------------------------------------------------------


async def test_recognition_reads_rendered_text(node: RunningNode) -> None:
    """Real weights, real images, lines of different lengths in one model."""
    alphabet = ocr.read_alphabet(find_published().alphabet)
    await node.apply("rec", document("rec", "1", {"1": models.ocr_rec()}, **OCR), within_s=60)
    for text in ("Paddlewheel", "0123456789", "a much longer line of text"):
        image = ocr.rec_input(ocr.render(text))
        answer = await node.infer("rec", {"x": image})
        (scores,) = answer.outputs().values()
        read = ocr.decode_text(scores, alphabet).strip()
        assert read.replace(" ", "") == text.replace(" ", "")
    # A batch of two lines is read as well as each alone.
    images = [ocr.rec_input(ocr.render(text)) for text in ("12:30:45", "rollback")]
    batch = await node.infer("rec", {"x": np.concatenate(images)})
    (scores,) = batch.outputs().values()
    read_both = [ocr.decode_text(scores[at : at + 1], alphabet).strip() for at in (0, 1)]
    assert read_both == ["12:30:45", "rollback"]
    await node.delete("rec")


async def test_direction_tells_upside_down(node: RunningNode) -> None:
    folder = models.ocr_cls()
    await node.apply("cls", document("cls", "1", {"1": folder}, **CLS), within_s=60)
    for text in ("Paddlewheel", "PADDLE 3.3"):
        for turned, direction in ((False, "0"), (True, "180")):
            image = ocr.cls_input(ocr.render(text, turned=turned))
            for binary in (True, False):
                answer = await node.infer("cls", {"x": image}, binary=binary)
                (scores,) = answer.outputs().values()
                assert ocr.decode_direction(scores) == direction
    await node.delete("cls")
