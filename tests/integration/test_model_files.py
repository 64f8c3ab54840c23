"""What we say of model files, held against Paddle itself in a process of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loader.admission import (
    check_finite,
    check_golden,
    check_outputs_finite,
    check_params,
    load_golden,
    warmup_feeds,
)
from loader.errors import NotAdmitted
from loader.params import write_params
from loader.recipe import Recipe
from paddlewheel.models import (
    make_large,
    make_mlp,
    make_resnet50,
    make_two_output,
    reference,
    reference_two_output,
)
from registry.inference import Array
from registry.names import ModelName, Version
from tests import models

RECIPE = Recipe(ModelName("m"), Version("1"), "/m")
RNG = np.random.default_rng(5)


def admitted(folder: Path, scratch: Path, golden: Path | None = None) -> dict[str, Array]:
    """Every check but digest, signature and memory, with a real predictor in the middle."""
    program = check_params(folder)
    check_finite(folder, program)
    (feeds,) = warmup_feeds(program.signature, RECIPE)
    names, outputs = models.run_paddle(folder, feeds, scratch)
    assert names == [spec.name for spec in program.signature.inputs]
    assert list(outputs) == [spec.name for spec in program.signature.outputs]
    check_outputs_finite(outputs)
    if golden is not None:
        data = load_golden(golden, program.signature)
        check_golden(data, models.run_paddle(folder, data.inputs, scratch)[1], RECIPE)
    return outputs


def fits(array: Array, shape: tuple[int, ...]) -> bool:
    return array.ndim == len(shape) and all(
        want in (-1, dim) for want, dim in zip(shape, array.shape, strict=True)
    )


@pytest.mark.parametrize("onednn", [False, True])
@pytest.mark.parametrize("format", ["pir", "legacy"])
def test_an_mlp_made_without_paddle_runs_on_paddle(
    tmp_path: Path, format: Any, onednn: bool
) -> None:
    folder = make_mlp(tmp_path / "m", seed=3, tag=2405, format=format)
    x = RNG.standard_normal((5, 64), dtype=np.float32)
    names, outputs = models.run_paddle(folder, {"x": x}, tmp_path, onednn=onednn)
    (y,) = outputs.values()
    assert names == ["x"]
    np.testing.assert_allclose(y, reference(folder, x), rtol=1e-4, atol=1e-5)
    assert (y[:, -1] == 2405).all()


def test_two_inputs_and_three_outputs_made_without_paddle(tmp_path: Path) -> None:
    folder = make_two_output(tmp_path / "m", seed=3, tag=2)
    x = RNG.standard_normal((4, 32), dtype=np.float32)
    ids = RNG.integers(0, 50, (4, 6))
    names, outputs = models.run_paddle(folder, {"x": x, "ids": ids}, tmp_path)
    assert names == ["x", "ids"]
    for got, want in zip(outputs.values(), reference_two_output(folder, x, ids), strict=True):
        assert got.dtype == want.dtype
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
    signature = models.program_of(folder).signature
    for spec in signature.outputs:
        assert outputs[spec.name].dtype == spec.dtype
        assert fits(outputs[spec.name], spec.shape)


def test_large_models_made_without_paddle(tmp_path: Path) -> None:
    folder = make_large(tmp_path / "deep", mb=100, tag=3)
    assert 100e6 < models.params_path(folder).stat().st_size < 110e6
    x = RNG.random((2, 512), dtype=np.float32)
    _, outputs = models.run_paddle(folder, {"x": x}, tmp_path)
    np.testing.assert_allclose(outputs["fetch_name_0"], reference(folder, x), rtol=1e-3, atol=1e-3)
    resnet = make_resnet50(tmp_path / "resnet", tag=4)
    assert 100e6 < models.params_path(resnet).stat().st_size < 110e6
    x = RNG.random((1, 3, 224, 224), dtype=np.float32)
    _, outputs = models.run_paddle(resnet, {"x": x}, tmp_path)
    check_outputs_finite(outputs)
    assert outputs["fetch_name_0"][0, -1] == 4
    assert outputs["fetch_name_0"].std() > 0.01


@pytest.mark.parametrize("real", [models.ocr_rec, models.ocr_cls])
def test_published_models_and_their_bfloat16_versions_are_admitted(
    real: Callable[[], Path], tmp_path: Path
) -> None:
    published = admitted(real(), tmp_path)
    rounded = admitted(models.to_bfloat16(real(), tmp_path / "rounded"), tmp_path)
    for name, before in published.items():
        assert not np.array_equal(before, rounded[name])
        np.testing.assert_allclose(rounded[name], before, atol=0.1)


@pytest.mark.parametrize("real", [models.ocr_rec, models.ocr_cls])
def test_published_params_are_written_back_byte_for_byte(
    real: Callable[[], Path], tmp_path: Path
) -> None:
    write_params(tmp_path / "again", models.weights_of(real()))
    assert (tmp_path / "again").read_bytes() == models.params_path(real()).read_bytes()


@pytest.mark.parametrize("case", models.SILENT)
def test_what_paddle_loads_without_a_word_is_refused(tmp_path: Path, case: str) -> None:
    """Paddle's silence is part of the test: the day it speaks up we want to know."""
    good = make_mlp(tmp_path / "good", tag=3)
    x = RNG.standard_normal((4, 64), dtype=np.float32)
    golden = models.write_golden(tmp_path / "g.npz", {"x": x}, {"0": reference(good, x)})
    assert admitted(good, tmp_path, golden)
    damage, check = models.SILENT[case]
    broken = damage(good, tmp_path / "broken")
    models.run_paddle(broken, {"x": x}, tmp_path)
    with pytest.raises(NotAdmitted) as caught:
        admitted(broken, tmp_path, golden)
    assert caught.value.check == check


def test_swapped_tensors_are_silent_and_refused(tmp_path: Path) -> None:
    good = make_mlp(tmp_path / "good", hidden=64, layers=3)
    x = RNG.standard_normal((4, 64), dtype=np.float32)
    golden = models.write_golden(tmp_path / "g.npz", {"x": x}, {"0": reference(good, x)})
    broken = models.swapped_tensors(good, tmp_path / "broken")
    assert admitted(broken, tmp_path)
    with pytest.raises(NotAdmitted, match=r"golden: output '0'\["):
        admitted(broken, tmp_path, golden)


@pytest.mark.parametrize("case", models.LOUD)
def test_what_paddle_refuses_is_refused_before_paddle_sees_it(tmp_path: Path, case: str) -> None:
    good = make_mlp(tmp_path / "good")
    damage, check = models.LOUD[case]
    broken = damage(good, tmp_path / "broken")
    with pytest.raises(NotAdmitted) as caught:
        check_params(broken)
    assert caught.value.check == check
    with pytest.raises(models.PaddleRefused):
        models.run_paddle(broken, {"x": np.zeros((1, 64), np.float32)}, tmp_path)


_EXPORT = """
import os, sys
import paddle
from paddle.nn.initializer import Constant
paddle.enable_static()
main, start = paddle.static.Program(), paddle.static.Program()
with paddle.static.program_guard(main, start):
    b = paddle.static.data("b", [-1], "bool")
    x = paddle.static.data("x", [-1, 2], "float32")
    k = paddle.static.data("k", [3], "int32")
    outputs = [paddle.cast(k, "float32").sum(), paddle.logical_not(b)]
    for dtype in "uint8 int8 int16 int32 int64 float16 bfloat16 float32 float64".split():
        weight = paddle.create_parameter([2], dtype, name="w_" + dtype,
                                         default_initializer=Constant(3))
        outputs.append(weight.cast("float32") + x)
        if dtype != "int16":  # the predictor can't hand out such a tensor (3.3.1)
            outputs.append(x.cast(dtype))
    executor = paddle.static.Executor(paddle.CPUPlace())
    executor.run(start)
    paddle.static.save_inference_model(sys.argv[1] + "/inference", [x, k, b], outputs, executor,
                                       program=main)
"""


def test_a_program_exported_by_paddle_with_every_dtype(tmp_path: Path) -> None:
    import subprocess
    import sys

    folder = tmp_path / "m"
    folder.mkdir()
    subprocess.run(
        [sys.executable, "-c", _EXPORT, str(folder)], check=True, timeout=100, capture_output=True
    )
    program = check_params(folder)
    assert {one.name: one.dtype for one in program.persistables} == {
        f"w_{dtype}": dtype
        for dtype in ("uint8", "int8", "int16", "int32", "int64", "float16", "bfloat16",
                      "float32", "float64")
    }  # fmt: skip
    weights = models.weights_of(folder)
    assert [int(weights[name][0]) for name in weights if name != "w_bfloat16"] == [3] * 8
    assert weights["w_bfloat16"][0] == 0x4040
    write_params(tmp_path / "again", weights)
    assert (tmp_path / "again").read_bytes() == models.params_path(folder).read_bytes()

    (feeds,) = warmup_feeds(program.signature, RECIPE)
    names, outputs = models.run_paddle(folder, feeds, tmp_path)
    assert names == [spec.name for spec in program.signature.inputs]
    assert_outputs(outputs, program.signature.outputs)


def assert_outputs(outputs: Mapping[str, Array], specs: Any) -> None:
    assert list(outputs) == [spec.name for spec in specs]
    for spec in specs:
        assert fits(outputs[spec.name], spec.shape)
        if spec.dtype != "bfloat16":  # Paddle hands those out as float32 or as bits
            assert outputs[spec.name].dtype == spec.dtype
