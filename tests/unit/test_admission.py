"""Each check refuses what it is there for, and says what and where."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loader.admission import (
    check_digest,
    check_finite,
    check_golden,
    check_outputs_finite,
    check_params,
    load_golden,
    warmup_feeds,
)
from loader.errors import NotAdmitted
from loader.memory import check_memory, required_mb
from loader.model_files import NoSuchModel, choose, file_sha256
from loader.recipe import Recipe
from paddlewheel.models import make_mlp, make_two_output, read_weights
from registry.inference import Array, Signature, TensorSpec
from registry.names import ModelName, Version
from tests import models


def recipe(**changes: Any) -> Recipe:
    return Recipe(ModelName("m"), Version("1"), "/m", **changes)


def refusal(call: Callable[[], object], check: str) -> str:
    with pytest.raises(NotAdmitted) as caught:
        call()
    assert caught.value.check == check
    return caught.value.reason


@pytest.fixture(params=["pir", "legacy"])
def folder(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    return make_mlp(tmp_path / "good", tag=7, format=request.param)


def test_a_good_folder_passes(folder: Path) -> None:
    check_digest(folder, {"inference.pdiparams": file_sha256(folder / "inference.pdiparams")})
    check_finite(folder, check_params(folder))


@pytest.mark.parametrize("real", [models.ocr_rec, models.ocr_cls])
def test_published_models_pass(real: Callable[[], Path]) -> None:
    check_finite(real(), check_params(real()))


# --- digest ------------------------------------------------------------------------------------


def test_digests_may_be_written_in_either_way(folder: Path) -> None:
    digest = file_sha256(folder / "inference.pdiparams")
    check_digest(folder, {"inference.pdiparams": f"sha256:{digest.upper()}"})


@pytest.mark.parametrize("name", ["inference.pdiparams", "other.pdiparams", "../x", "/etc/passwd"])
def test_wrong_digest(folder: Path, name: str) -> None:
    reason = refusal(lambda: check_digest(folder, {name: "0" * 64}), "digest")
    assert name in reason


# --- params ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("damage", "wanted"),
    [
        (models.without_params, "inference.pdiparams is missing, the program wants 4 tensors"),
        (models.cut_last_tensor, "float32 data [128, 10] of 'linear_1.w_0' needs 5120 bytes, 5116"),
        (models.half_last_tensor, "of 'linear_1.w_0' needs 5120 bytes, 2560 left"),
        (models.cut_at_boundary, "1 of 4 tensors are missing, the first is 'linear_1.w_0'"),
        (models.trailing_byte, "1 bytes left over after the last of 4 tensors"),
        (models.other_dtype, "is float64 [128, 10], the program wants 'linear_1.w_0' float32"),
        (models.of_another_architecture, "tensor 0 is float32 [96], the program wants 'linear_0.b"),
        (models.broken_program, "inference."),
    ],
)
def test_params(folder: Path, tmp_path: Path, damage: Any, wanted: str) -> None:
    broken = damage(folder, tmp_path / "broken")
    assert wanted in refusal(lambda: check_params(broken), "params")


def test_a_folder_without_a_program(tmp_path: Path) -> None:
    assert "no program" in refusal(lambda: check_params(tmp_path), "params")
    assert "No such file" in refusal(lambda: check_params(tmp_path / "x"), "params")


@pytest.mark.parametrize(
    ("names", "wanted"),
    [
        ("m.json m.pdiparams", ("m.json", "m.pdiparams")),
        ("m.pdmodel m.pdiparams m.pdiparams.info", ("m.pdmodel", "m.pdiparams")),
        ("m.json m.pdmodel m.pdiparams", ("m.json", "m.pdiparams")),
        ("m.json m.pdiparams config.json tokenizer.json", ("m.json", "m.pdiparams")),
        ("m.pdmodel weights.pdiparams", ("m.pdmodel", "weights.pdiparams")),
        ("m.json", ("m.json", None)),
        (".m.json m.pdmodel m.pdiparams", ("m.pdmodel", "m.pdiparams")),
        ("", "no program"),
        ("m.pdiparams", "no program"),
        ("a.json b.json", "more than one program in the folder: a.json, b.json"),
        ("a.json a.pdiparams b.pdmodel b.pdiparams", "more than one program"),
        ("a.json b.pdiparams c.pdiparams", "more than one params file"),
    ],
)
def test_which_files_are_the_model(names: str, wanted: Any) -> None:
    if isinstance(wanted, str):
        with pytest.raises(NoSuchModel, match=wanted):
            choose(names.split())
    else:
        files = choose(names.split())
        assert (files.program, files.params) == wanted


# --- finite ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("value", "kind"), [(np.nan, "NaN"), (np.inf, "Inf"), (-np.inf, "Inf")])
def test_non_finite_weights(folder: Path, tmp_path: Path, value: float, kind: str) -> None:
    broken = models.non_finite_weight(folder, tmp_path / "broken", value=value)
    program = check_params(broken)
    reason = refusal(lambda: check_finite(broken, program), "finite")
    assert reason == f"weight 'linear_0.w_0' [64, 128] holds 1 {kind}, the first at [32, 0]"


@pytest.mark.parametrize(
    ("array", "wanted"),
    [
        (np.array([1, np.nan, np.inf], np.float16), "1 NaN and 1 Inf, the first at [1]"),
        (np.array([[0, np.inf]], np.float64), "1 Inf, the first at [0, 1]"),
        (np.array([0x3F80, 0x7FC0, 0xFF80], np.uint16), "1 NaN and 1 Inf, the first at [1]"),
        (np.array([1j, complex(0, np.nan)], np.complex64), "1 NaN, the first at [1]"),
        (np.array(np.nan, np.float32), "1 NaN, the first at []"),
        (np.array([0x7F7F, 0xFF7F, 0], np.uint16), None),
        (np.array([-1, 2**31 - 1], np.int32), None),
        (np.zeros((0, 3), np.float32), None),
        (np.array([3.4e38, -3.4e38, 1e-45], np.float32), None),
    ],
)
def test_finite_in_every_floating_type(array: Array, wanted: str | None) -> None:
    if wanted is None:
        check_outputs_finite({"y": array})
    else:
        assert wanted in refusal(lambda: check_outputs_finite({"y": array}), "warmup")


def test_a_nan_far_into_a_large_array_is_found_where_it_is() -> None:
    array = np.zeros((3, 1 << 20), np.float32)
    array[2, 5] = np.nan
    assert "[2, 5]" in refusal(lambda: check_outputs_finite({"y": array}), "warmup")


# --- warm-up -----------------------------------------------------------------------------------


def feeds(*specs: TensorSpec, **shapes: tuple[int, ...]) -> dict[str, Array]:
    (one,) = warmup_feeds(Signature(specs, ()), recipe(warmup_shapes=shapes))
    return one


@pytest.mark.parametrize(
    ("program", "document", "wanted"),
    [
        ((-1, 64), None, (1, 64)),
        ((-1, 3, 48, -1), None, (1, 3, 48, 64)),
        ((-1, -1), None, (1, 16)),
        ((-1, -1, 80), None, (1, 16, 80)),
        ((), None, ()),
        ((-1, 3, 48, -1), (4, 3, 48, 320), (4, 3, 48, 320)),
        ((-1, 3, 48, -1), (-1, -1, -1, 320), (1, 3, 48, 320)),
    ],
)
def test_warmup_shapes(program: Any, document: Any, wanted: Any) -> None:
    shapes = {} if document is None else {"x": document}
    assert feeds(TensorSpec("x", "float32", program), **shapes)["x"].shape == wanted


@pytest.mark.parametrize("shape", [(1, 65), (1, 64, 1), ()])
def test_warmup_shapes_that_do_not_fit(shape: tuple[int, ...]) -> None:
    spec = TensorSpec("x", "float32", (-1, 64))
    assert "does not fit input 'x'" in refusal(lambda: feeds(spec, x=shape), "warmup")


def test_warmup_shapes_of_an_unknown_input_or_beyond_memory() -> None:
    spec = TensorSpec("x", "float32", (-1, 64))
    assert "'z'" in refusal(lambda: feeds(spec, z=(1, 64)), "warmup")
    assert "1 GiB" in refusal(lambda: feeds(spec, x=(1 << 40, 64)), "warmup")


def test_warmup_feeds_are_the_same_every_time_and_safe() -> None:
    dtypes = ("bool", "uint8", "int8", "int16", "int32", "int64", "float16", "bfloat16",
              "float32", "float64")  # fmt: skip
    specs = [TensorSpec(dtype, dtype, (-1, 4)) for dtype in dtypes]
    first, second = feeds(*specs), feeds(*specs)
    check_outputs_finite(first)
    for dtype in dtypes:
        assert first[dtype].dtype == ("uint16" if dtype == "bfloat16" else dtype)
        np.testing.assert_array_equal(first[dtype], second[dtype])
        if "int" in dtype or dtype == "bool":
            assert (first[dtype] == 1).all()


# --- golden ------------------------------------------------------------------------------------


def compare(got: Array, want: Array, *, name: str = "y", **tolerance: float) -> None:
    golden = load_golden_of({f"outputs/{name}": want})
    check_golden(golden, {"y": got}, recipe(**tolerance))


def load_golden_of(arrays: dict[str, Array]) -> Any:
    from tempfile import TemporaryDirectory

    with TemporaryDirectory() as scratch:
        path = Path(scratch) / "g.npz"
        np.savez(path, **arrays)  # type: ignore[arg-type]
        return load_golden(path)


def floats(*values: float, dtype: Any = np.float32) -> Array:
    return np.array(values, dtype)


GOLDEN: dict[str, tuple[Array, Array, str | None]] = {
    "equal": (floats(1, 2), floats(1, 2), None),
    "within tolerance": (floats(1, 100), floats(1.0005, 100.05), None),
    "beyond it": (floats(1, 100), floats(1, 101), "output 'y'[1] is 100, golden 101 (off by 1;"),
    "NaN": (floats(1, np.nan), floats(1, 2), "output 'y'[1] is nan, golden 2"),
    "golden NaN": (floats(1, 2), floats(1, np.nan), "golden nan"),
    "same infinity": (floats(np.inf), floats(np.inf), "'y'[0] is inf, golden inf"),
    "shape": (floats(1, 2), floats(1, 2, 3), "output 'y' is [2], golden [3]"),
    "rank": (floats(1), np.float32(1).reshape(()), "output 'y' is [1], golden []"),
    "half against single": (floats(0.5, dtype=np.float16), floats(0.5), None),
    "bfloat16 bits against single": (np.array([0x3F80], np.uint16), floats(1), None),
    "bfloat16 off": (np.array([0x4000], np.uint16), floats(1), "is 2, golden 1"),
    "integers": (np.array([1, 2]), np.array([1, 3]), "output 'y'[1] is 2, golden 3; 1 of 2"),
    "integers of other width": (np.array([1], np.int32), np.array([1], np.int64), "is int32"),
    "integer for float": (np.array([1]), floats(1), "is int64, golden float32"),
    "booleans": (np.array([True]), np.array([False]), "is True, golden False"),
    "empty": (np.zeros((0, 2), np.float32), np.zeros((0, 2), np.float32), None),
    "scalar": (np.float32(1).reshape(()), np.float32(2).reshape(()), "output 'y' is 1, golden 2"),
}


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("case", GOLDEN)
def test_golden(case: str) -> None:
    got, want, wanted = GOLDEN[case]
    if wanted is None:
        compare(got, want)
    else:
        assert wanted in refusal(lambda: compare(got, want), "golden")


def test_the_worst_element_is_named() -> None:
    got, want = np.zeros((2, 3), np.float32), np.zeros((2, 3), np.float32)
    got[0, 1], got[1, 2] = 0.5, 3
    reason = refusal(lambda: compare(got, want), "golden")
    assert reason.startswith("output 'y'[1, 2] is 3, golden 0")
    assert reason.endswith("2 of 6 elements differ")


def test_golden_tolerances_are_the_documents() -> None:
    compare(floats(100), floats(101), rtol=0.02)
    compare(floats(0), floats(0.4), atol=0.5)
    refusal(lambda: compare(floats(0), floats(0.6), atol=0.5, rtol=0.0), "golden")


def test_golden_outputs_by_position_and_unknown_ones() -> None:
    compare(floats(1), floats(1), name="0")
    refusal(lambda: compare(floats(1), floats(2), name="0"), "golden")
    reason = refusal(lambda: compare(floats(1), floats(1), name="1"), "golden")
    assert reason == "no output '1', the outputs are ['y']"


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        (None, "is missing"),
        (b"", "not a readable npz"),
        (b"PK\x03\x04 not really", "not a readable npz"),
        ({"y": floats(1)}, "want inputs/<name> or outputs/<name>"),
        ({"inputs/x": floats(1)}, "no array outputs/<name>"),
        ({"outputs/": floats(1)}, "want inputs/<name>"),
        ({"inputs/x": np.array([{}], object), "outputs/y": floats(1)}, "not a readable npz"),
    ],
)
def test_broken_golden_files(tmp_path: Path, content: Any, wanted: str) -> None:
    path = tmp_path / "golden.npz"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        np.savez(path, **content)
    assert wanted in refusal(lambda: load_golden(path), "golden")


def test_a_cut_golden_file(tmp_path: Path) -> None:
    path = models.write_golden(tmp_path / "g.npz", {"x": floats(1)}, {"y": floats(1)})
    data = path.read_bytes()
    for size in range(0, len(data), 40):
        path.write_bytes(data[:size])
        refusal(lambda: load_golden(path), "golden")
    path.write_bytes(data.replace(b"\x80?", b"\x81?", 1))  # the checksum of one array is wrong
    refusal(lambda: load_golden(path), "golden")


@pytest.mark.parametrize(
    ("inputs", "wanted"),
    [
        ({"x": np.zeros((2, 32), np.float32), "ids": np.zeros((2, 6), np.int64)}, None),
        ({"x": np.zeros((2, 32), np.float32)}, "no array inputs/ids"),
        ({"x": np.zeros((2, 32)), "ids": np.zeros((2, 6), np.int64)}, "inputs/x is float64, want"),
        ({"x": np.zeros((2, 31), np.float32), "ids": np.zeros((2, 6), np.int64)}, "is [2, 31]"),
        ({"x": np.zeros((2, 32), np.float32), "ids": np.zeros((2, 6), np.int64),
          "z": np.zeros(1)}, "no input 'z'"),
    ],
)  # fmt: skip
def test_golden_inputs_fit_the_program(tmp_path: Path, inputs: Any, wanted: str | None) -> None:
    signature = models.program_of(make_two_output(tmp_path / "m")).signature
    path = models.write_golden(tmp_path / "g.npz", inputs, {"0": floats(1)})
    if wanted is None:
        assert set(load_golden(path, signature).inputs) == {"x", "ids"}
    else:
        assert wanted in refusal(lambda: load_golden(path, signature), "golden")


# --- memory ------------------------------------------------------------------------------------


def test_memory_is_the_documents_or_grows_with_the_files() -> None:
    assert required_mb(recipe(memory_mb=2048), 1) == 2048
    small, large = required_mb(recipe(), 40_000), required_mb(recipe(), 103_000_000)
    assert 100 <= small <= 300
    assert large - small > 200


def test_memory_that_is_not_there() -> None:
    check_memory(1000, 1000)
    reason = refusal(lambda: check_memory(600, 1000, replicas=2), "memory")
    assert reason == "needs 1200 MB (2 replicas of 600 MB), 1000 MB are free"


# --- the models themselves ---------------------------------------------------------------------


def test_a_tag_that_float32_cannot_hold_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="exactly"):
        make_mlp(tmp_path, tag=2**24 + 1)


def test_seeds_decide_the_weights(tmp_path: Path) -> None:
    one, same, other = (make_mlp(tmp_path / str(i), seed=seed) for i, seed in enumerate((1, 1, 2)))
    weights = [read_weights(folder)["linear_0.w_0"] for folder in (one, same, other)]
    assert (weights[0] == weights[1]).all()
    assert not (weights[0] == weights[2]).all()


def test_rounding_to_bfloat16_moves_every_weight_a_little(tmp_path: Path) -> None:
    good = make_mlp(tmp_path / "good")
    rounded = read_weights(models.to_bfloat16(good, tmp_path / "rounded"))
    for name, weight in read_weights(good).items():
        assert not (rounded[name].view(np.uint32) & 0xFFFF).any()
        np.testing.assert_allclose(rounded[name], weight, rtol=2**-8)
