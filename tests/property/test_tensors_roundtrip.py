"""Any tensor survives the wire, in both forms; any garbage is `BadInput` and nothing else."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from registry.inference import Array, BadInput, Signature, TensorSpec
from registry.names import ModelName, Version
from router.protocols.exchange import Answer
from router.protocols.open_inference import InferRequest, parse_infer
from router.protocols.short import parse_short
from router.protocols.tf_serving import parse_predict
from router.tensors import DATATYPES, from_bfloat16, to_bfloat16

NUMBERS = ("bool", "uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64",
           "float16", "float32", "float64")  # fmt: skip
FINITE: dict[str, Any] = {"allow_nan": False, "allow_infinity": False}
shapes = hnp.array_shapes(min_dims=0, max_dims=4, max_side=5)


@st.composite
def arrays(draw: st.DrawFn, *, finite: bool) -> tuple[str, Array]:
    dtype = draw(st.sampled_from([*NUMBERS, "bfloat16", "bytes"]))
    shape = draw(shapes)
    if dtype == "bytes":
        items = draw(st.lists(st.text(max_size=9), min_size=1, max_size=12))
        array = np.empty(len(items), dtype=object)
        array[:] = [item.encode() for item in items]
        return dtype, array
    carrier = "uint16" if dtype == "bfloat16" else dtype
    elements: dict[str, Any] = {}
    if finite and dtype.startswith("float"):
        elements = FINITE
    return dtype, draw(hnp.arrays(carrier, shape, elements=elements or None))


def signature(dtype: str, array: Array) -> Signature:
    spec = TensorSpec("x", dtype, (-1,) * array.ndim)
    return Signature((spec,), (TensorSpec("x", dtype, spec.shape),))


def as_request(body: bytes, header_length: int | None) -> tuple[bytes, str | None]:
    """A response's tensors as the next request's: the same objects in the same order."""
    length = len(body) if header_length is None else header_length
    document = json.loads(body[:length])
    text = json.dumps(
        {"inputs": document["outputs"], "parameters": {"binary_data_output": True}}
    ).encode()
    return text + body[length:], None if header_length is None else str(len(text))


@given(arrays(finite=False))
@settings(max_examples=200)
def test_binary_keeps_every_bit(drawn: tuple[str, Array]) -> None:
    dtype, array = drawn
    known = signature(dtype, array)
    sent = InferRequest({}, None, (("x", True),)).render(
        Answer(ModelName("m"), Version("1"), known, {"x": array})
    )
    got = parse_infer(*as_request(sent.body, sent.header_length), known).feeds["x"]
    assert got.shape == array.shape
    assert got.dtype == array.dtype
    if dtype == "bytes":
        assert got.tolist() == array.tolist()
    else:
        assert got.tobytes() == array.tobytes()


@given(arrays(finite=True))
@settings(max_examples=200)
def test_json_keeps_every_value(drawn: tuple[str, Array]) -> None:
    dtype, array = drawn
    if dtype in ("float16", "bfloat16"):
        return
    known = signature(dtype, array)
    sent = InferRequest({}, None, (("x", False),)).render(
        Answer(ModelName("m"), Version("1"), known, {"x": array})
    )
    got = parse_infer(*as_request(sent.body, sent.header_length), known).feeds["x"]
    assert got.shape == array.shape
    assert got.dtype == array.dtype
    assert got.tolist() == array.tolist()


@given(
    hnp.arrays(
        np.float32, shapes.filter(len), elements={"allow_nan": False, "allow_infinity": False}
    )
)
def test_the_plain_forms_keep_every_value(array: Array) -> None:
    known = signature("float32", array)
    outputs = {"x": array}
    answer = Answer(ModelName("m"), Version("1"), known, outputs)
    first = parse_short(json.dumps({"inputs": {"x": array.tolist()}}).encode(), None, known)
    assert np.array_equal(first.feeds["x"], array)
    shown = json.loads(first.render(answer).body)["outputs"]
    again = parse_predict(json.dumps({"inputs": shown}).encode(), None, known)
    assert np.array_equal(again.feeds["x"], array)
    columns = json.loads(again.render(answer).body)["outputs"]
    rows = parse_predict(json.dumps({"instances": columns}).encode(), None, known)
    assert np.array_equal(rows.feeds["x"], array)
    assert json.loads(rows.render(answer).body)["predictions"] == columns


@given(hnp.arrays(np.uint16, 20))
def test_bfloat16_bits_survive_being_floats(bits: Array) -> None:
    finite = bits[(bits & 0x7F80) != 0x7F80]
    assert np.array_equal(to_bfloat16(from_bfloat16(finite), "x"), finite)


garbage = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=12,
)  # fmt: skip
tensor = st.fixed_dictionaries(
    {"name": st.just("x") | garbage, "shape": st.just([1, 2]) | st.lists(garbage, max_size=3),
     "datatype": st.sampled_from([*DATATYPES.values()]) | garbage},
    optional={"data": garbage | st.lists(st.integers() | st.floats(), max_size=3),
              "parameters": garbage | st.fixed_dictionaries({"binary_data_size": garbage})},
)  # fmt: skip
request = st.fixed_dictionaries(
    {"inputs": st.lists(tensor, max_size=2) | garbage},
    optional={"outputs": garbage, "id": garbage, "parameters": garbage},
)


@given(
    request,
    st.binary(max_size=24),
    st.booleans(),
    st.sampled_from(["float32", "int8", "bool", "bytes", "bfloat16"]),
)
@settings(max_examples=400)
def test_garbage_is_bad_input_and_nothing_else(
    document: dict[str, Any], raw: bytes, is_binary: bool, dtype: str
) -> None:
    known = Signature((TensorSpec("x", dtype, (-1, 2)),), (TensorSpec("y", dtype, (-1, 2)),))
    text = json.dumps(document).encode()
    for parse in (parse_infer, parse_predict, parse_short):
        length = str(len(text)) if is_binary else None
        with contextlib.suppress(BadInput):
            parse(text + raw if is_binary else text, length, known)
