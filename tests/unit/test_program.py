"""Programs of both formats are read without Paddle; what is no program is refused by name."""

from __future__ import annotations

import contextlib
import gzip
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loader.program import Program, ProgramError, read_program
from paddlewheel.models import make_mlp, make_resnet50, make_two_output
from paddlewheel.models.pir import ProgramWriter
from registry.inference import Signature, TensorSpec
from tests import models


def legacy_template() -> bytes:
    template = resources.files("paddlewheel.models").joinpath("mlp.pdmodel.gz")
    return gzip.decompress(template.read_bytes())


@pytest.mark.parametrize(
    ("format", "output"), [("pir", "fetch_name_0"), ("legacy", "linear_1.tmp_1")]
)
def test_both_formats_say_the_same_of_one_net(tmp_path: Path, format: Any, output: str) -> None:
    program = models.program_of(make_mlp(tmp_path, format=format))
    assert program.format == format
    assert program.signature == Signature(
        (TensorSpec("x", "float32", (-1, 64)),), (TensorSpec(output, "float32", (-1, 10)),)
    )
    assert [(one.name, one.dtype, one.dims) for one in program.persistables] == [
        ("linear_0.b_0", "float32", (128,)), ("linear_0.w_0", "float32", (64, 128)),
        ("linear_1.b_0", "float32", (10,)), ("linear_1.w_0", "float32", (128, 10)),
    ]  # fmt: skip


def test_several_inputs_and_outputs_keep_the_programs_order(tmp_path: Path) -> None:
    signature = models.program_of(make_two_output(tmp_path)).signature
    assert [(one.name, one.dtype, one.shape) for one in signature.inputs] == [
        ("x", "float32", (-1, 32)), ("ids", "int64", (-1, 6))
    ]  # fmt: skip
    assert [(one.name, one.dtype, one.shape) for one in signature.outputs] == [
        ("fetch_name_0", "float32", (-1, 8)), ("fetch_name_1", "float32", (-1, 24)),
        ("fetch_name_2", "int64", (-1,)),
    ]  # fmt: skip


def test_more_than_ten_parameters_sort_by_bytes_as_paddle_sorts_them(tmp_path: Path) -> None:
    folder = make_mlp(tmp_path, hidden=8, layers=12)
    names = [one.name for one in models.program_of(folder).persistables]
    assert names == sorted(names)
    assert names.index("linear_10.b_0") < names.index("linear_2.b_0")


def test_resnet50_wants_267_tensors(tmp_path: Path) -> None:
    program = models.program_of(make_resnet50(tmp_path))
    assert len(program.persistables) == 267
    assert program.signature.inputs[0].shape == (-1, 3, 224, 224)


@pytest.mark.parametrize(
    ("folder", "tensors", "inputs", "outputs"),
    [
        (models.ocr_rec, 234, (-1, 3, 48, -1), (-1, -1, 6625)),
        (models.ocr_cls, 213, (-1, 3, -1, -1), (-1, 2)),
    ],
)
def test_published_ocr_programs(
    folder: Callable[[], Path], tensors: int, inputs: tuple[int, ...], outputs: tuple[int, ...]
) -> None:
    program = models.program_of(folder())
    assert (program.format, len(program.persistables)) == ("legacy", tensors)
    assert program.signature.inputs == (TensorSpec("x", "float32", inputs),)
    assert [one.shape for one in program.signature.outputs] == [outputs]


def test_outputs_are_ordered_by_their_column_not_by_their_place(tmp_path: Path) -> None:
    program = edited(tmp_path, lambda ops: ops.reverse())
    names = [one.name for one in program.signature.outputs]
    assert names == ["fetch_name_0", "fetch_name_1", "fetch_name_2"]


def edited(tmp_path: Path, change: Callable[[list[Any]], object]) -> Program:
    path = make_two_output(tmp_path) / "inference.json"
    document = orjson.loads(path.read_bytes())
    change(document["program"]["regions"][0]["blocks"][0]["ops"])
    path.write_bytes(orjson.dumps(document))
    return read_program(path)


BROKEN: dict[str, tuple[Callable[[list[Any]], object], str]] = {
    "no fetch": (
        lambda ops: ops.__setitem__(slice(None), [op for op in ops if op["#"] != "1.fetch"]),
        "returns nothing"),
    "a parameter twice": (lambda ops: ops.append(ops[0]), "two parameters of this name"),
    "an input twice": (lambda ops: ops.append(ops[3]), "inputs: a name is there twice"),
    "an output twice": (lambda ops: ops.append(ops[-1]), "outputs: a name is there twice"),
    "an op that is text": (lambda ops: ops.insert(0, "p"), "ops[0]: want an object, got str"),
    "no kind": (lambda ops: ops[2].pop("#"), "ops[2]: no '#'"),
    "parameter without a name": (lambda ops: ops[0].update(A=[]), "ops[0].A[-1]: want text"),
    "parameter of variable size": (
        lambda ops: ops[0]["O"]["TT"]["D"].__setitem__(1, [-1]), "has dims [-1]"),
    "unknown element type": (
        lambda ops: ops[0]["O"]["TT"]["D"][0].update({"#": "0.t_f8e5m2"}),
        "unknown element type '0.t_f8e5m2'"),
    "a tensor array": (
        lambda ops: ops[-1]["O"][0]["TT"].update({"#": "0.t_vec"}), "want a dense tensor"),
    "a dim of text": (
        lambda ops: ops[0]["O"]["TT"]["D"].__setitem__(1, ["8"]), "want a whole number, got str"),
    "a dim below -1": (
        lambda ops: ops[0]["O"]["TT"]["D"].__setitem__(1, [-7]), "a dim of -7"),
    "complex output": (
        lambda ops: ops[-1]["O"][0]["TT"]["D"][0].update({"#": "0.t_c64"}),
        "complex64, which no request can carry"),
    "fetch without a column": (lambda ops: ops[-1]["A"].pop(), "no attribute 'col'"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_pir_program_is_refused_with_its_place(tmp_path: Path, case: str) -> None:
    change, reason = BROKEN[case]
    with pytest.raises(ProgramError) as caught:
        edited(tmp_path, change)
    assert reason in str(caught.value)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "no block"),
        (b"{", "not JSON"),
        (b"{}", "no 'base_code'"),
        (b'{"base_code":{"magic":"x"}}', "want 'pir'"),
        (b'{"base_code":{"magic":"pir"},"program":{"regions":[]}}', "is empty"),
        (b"[" * 100_000, "not a program"),
        (b'{"a":' * 100_000, "not JSON"),
        (b"\x0a\x05ab", "wants 5 bytes, 2 left"),
        (b"\x0b", "wire type 3"),
        (b"hello world, this is text", "not a program"),
        (b"\x0a\x00", "returns nothing"),
    ],
)
def test_what_is_no_program_is_refused(tmp_path: Path, data: bytes, reason: str) -> None:
    path = tmp_path / "m.pdmodel"
    path.write_bytes(data)
    with pytest.raises(ProgramError) as caught:
        read_program(path)
    assert reason in str(caught.value)


@settings(max_examples=300, deadline=None)
@given(data=st.data(), format=st.sampled_from(["legacy", "pir"]))
def test_a_damaged_program_is_read_or_refused_and_nothing_else(
    data: st.DataObject, format: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("fuzz")
    if format == "legacy":
        damaged = bytearray(legacy_template())
    else:
        writer = ProgramWriter()
        weight = writer.parameter("w", [4, 4])
        writer.fetch(writer.matmul(writer.data("x", [-1, 4]), weight))
        writer.save(folder / "m")
        damaged = bytearray((folder / "m").read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(damaged) - 1))
        damaged[at] = data.draw(st.integers(0, 255))
    (folder / "m").write_bytes(damaged[: data.draw(st.integers(0, len(damaged)))])
    with contextlib.suppress(ProgramError):
        read_program(folder / "m")
