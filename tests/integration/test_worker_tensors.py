"""Tensors through shared memory into a predictor and back: every dtype, size and rank."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest
import pytest_asyncio

from loader.errors import LoadFailed
from loader.zygote import Zygote
from registry.inference import Array, numpy_dtype
from tests.integration.workers import recipe_of

pytestmark = pytest.mark.asyncio(loop_scope="module")

SHAPES = {"scalar": [()], "vector": [(1,), (0,), (777,), (150_000,)], "square": [(1, 1), (0, 3),
          (3, 0), (33, 31), (1000, 1000), (5, 7)]}  # fmt: skip
DTYPES = ["bool", "uint8", "int8", "int32", "int64", "float16", "bfloat16", "float32", "float64"]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def zygote() -> AsyncIterator[Zygote]:
    zygote = Zygote()
    await zygote.start()
    yield zygote
    await zygote.close()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dtypes")
    script = Path(__file__).with_name("export_dtypes.py")
    subprocess.run([sys.executable, str(script), str(folder)], check=True, capture_output=True)
    return folder


def values(dtype: str, shape: tuple[int, ...], seed: int) -> Array:
    rng = np.random.default_rng(seed)
    if dtype == "bool":
        return np.asarray(rng.random(shape) < 0.5)
    if dtype == "bfloat16":
        return np.asarray(bits(np.asarray(rng.standard_normal(shape, dtype=np.float32))))
    return np.asarray(np.asarray(rng.random(shape) * 100).astype(dtype))


def bits(array: Array) -> Array:
    return (array.view(np.uint32) >> 16).astype(np.uint16)


def as_float32(dtype: str, array: Array) -> Array:
    if dtype == "bfloat16":
        return (array.astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float32)


@pytest.mark.parametrize("rank", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
async def test_every_dtype_and_size_arrives_unchanged(
    zygote: Zygote, models: Path, dtype: str, rank: str
):
    folder = models / f"{dtype}-{rank}"
    worker = await zygote.spawn()
    recipe = recipe_of(folder, options={"onednn": False})  # oneDNN takes no empty tensors
    await worker.check(folder, recipe)
    loaded = await worker.load(folder, recipe)
    assert loaded.signature.inputs[0].dtype == dtype
    await worker.serve()
    for shape in SHAPES[rank] * 2:  # sizes go up and down again
        sent = [values(dtype, shape, seed) for seed in (1, 2)]
        for x in sent:
            assert x.dtype == numpy_dtype(dtype)
            flat, halved = (await worker.run({"x": x}, timeout_s=20)).outputs.values()
            assert np.array_equal(flat, x.reshape(-1))
            assert np.array_equal(halved, as_float32(dtype, x) * np.float32(0.5))
    await worker.close()


async def test_a_dtype_that_paddle_cannot_be_fed_is_a_failed_load(zygote: Zygote, models: Path):
    folder = models / "int16-square"
    worker = await zygote.spawn()
    with pytest.raises(LoadFailed, match="int16"):
        await worker.load(folder, recipe_of(folder))
    await worker.close()
