"""Open Inference Protocol: what is understood, and what is refused before anything runs."""

from __future__ import annotations

import json
import struct
from typing import Any

import numpy as np
import pytest

from registry.inference import BadInput, Signature, TensorSpec
from registry.names import ModelName, Version
from router.protocols.exchange import Answer
from router.protocols.open_inference import InferRequest, parse_infer


def takes(dtype: str = "float32", shape: tuple[int, ...] = (-1, 2)) -> Signature:
    return Signature((TensorSpec("x", dtype, shape),), (TensorSpec("y", dtype, shape),))


def request(
    data: Any = None, datatype: str = "FP32", shape: Any = None, **more: Any
) -> dict[str, Any]:
    tensor = {"name": "x", "datatype": datatype, "shape": [1, 2] if shape is None else shape}
    if data is not None:
        tensor["data"] = data
    return {"inputs": [tensor | more.pop("tensor", {})], **more}


def binary(document: dict[str, Any], raw: bytes) -> tuple[bytes, str]:
    text = json.dumps(document).encode()
    return text + raw, str(len(text))


GOOD: dict[str, tuple[dict[str, Any], Signature, list[Any]]] = {
    "flat": (request([1, 2.5]), takes(), [[1, 2.5]]),
    "nested": (request([[1, 2.5]]), takes(), [[1, 2.5]]),
    "two rows nested": (request([[1, 2], [3, 4]], shape=[2, 2]), takes(), [[1, 2], [3, 4]]),
    "two rows flat": (request([1, 2, 3, 4], shape=[2, 2]), takes(), [[1, 2], [3, 4]]),
    "a scalar": (request([7], shape=[]), takes(shape=()), 7),  # type: ignore[dict-item]
    "rank 3": (
        request([[[1], [2]], [[3], [4]]], shape=[2, 2, 1]), takes(shape=(-1, 2, 1)),
        [[[1], [2]], [[3], [4]]]),
    "int64 to its edge": (
        request([2**63 - 1, -(2**63)], "INT64"), takes("int64"), [[2**63 - 1, -(2**63)]]),
    "uint64 to its edge": (request([2**64 - 1, 0], "UINT64"), takes("uint64"), [[2**64 - 1, 0]]),
    "booleans": (request([True, False], "BOOL"), takes("bool"), [[True, False]]),
    "text": (request(["a", "字"], "BYTES"), takes("bytes"), [[b"a", "字".encode()]]),
    "unknown members are for others": (
        request([1, 2], parameters={"priority": 1, "mine": "x"}, more=1), takes(), [[1, 2]]),
}  # fmt: skip


@pytest.mark.parametrize("case", GOOD)
def test_understood(case: str) -> None:
    document, signature, wanted = GOOD[case]
    feed = parse_infer(json.dumps(document).encode(), None, signature).feeds["x"]
    assert feed.tolist() == wanted
    assert feed.flags.c_contiguous


BAD: dict[str, tuple[Any, Signature, str]] = {
    "not an object": ([], takes(), "JSON object"),
    "no inputs": ({}, takes(), "inputs: want a list"),
    "inputs that are no list": ({"inputs": {}}, takes(), "inputs: want a list"),
    "an input that is no object": ({"inputs": [1]}, takes(), "list of objects"),
    "no input at all": ({"inputs": []}, takes(), "missing 'x'"),
    "an unknown input": (
        {"inputs": [{"name": "z", "datatype": "FP32", "shape": [1, 2], "data": [1, 2]}]},
        takes(), "unknown input 'z'"),
    "an input without a name": ({"inputs": [{}]}, takes(), "wants a name"),
    "the same input twice": (
        {"inputs": request([1, 2])["inputs"] * 2}, takes(), "given twice"),
    "another datatype": (request([1, 2], "FP64"), takes(), "want datatype FP32, got FP64"),
    "a datatype there is not": (request([1, 2], "FLOAT"), takes(), "datatypes are"),
    "a datatype that is a list": (request([1, 2], []), takes(), "want datatype"),  # type: ignore[arg-type]
    "no shape": ({"inputs": [{"name": "x", "datatype": "FP32", "data": [1]}]}, takes(), "shape"),
    "another rank": (request([1, 2], shape=[2]), takes(), "2 dimensions"),
    "another dim": (request([1, 2, 3], shape=[1, 3]), takes(), "want shape"),
    "a negative dim": (request([1, 2], shape=[-1, 2]), takes(), "at least 1"),
    "a dim of zero": (request([], shape=[0, 2]), takes(), "at least 1"),
    "a dim that is true": (request([1, 2], shape=[True, 2]), takes(), "at least 1"),
    "a dim that is a float": (request([1, 2], shape=[1.0, 2]), takes(), "at least 1"),
    "a shape beyond memory": (request([1, 2], shape=[2**62, 2]), takes(), "beyond any memory"),
    "a huge shape with little data": (request([1, 2], shape=[2**30, 2]), takes(), "wants"),
    "too few values": (request([1]), takes(), "wants 2 values, data has 1"),
    "too many values": (request([1, 2, 3]), takes(), "wants 2 values, data has 3"),
    "nested otherwise": (request([[1], [2]]), takes(), "not nested"),
    "ragged": (request([[1, 2], [3]], shape=[2, 2]), takes(), "not nested"),
    "half nested": (request([[1, 2], 3], shape=[2, 2]), takes(), "not nested"),
    "nested too deep": (request([[[1, 2]]]), takes(), "not nested|a list"),
    "data that is text": (request("ab"), takes(), "want a list"),
    "null for a number": (request([1, None]), takes(), "null"),
    "text for a number": (request([1, "2"]), takes(), "text"),
    "a boolean for a number": (request([1, True]), takes(), "a boolean"),
    "a float for an integer": (request([1, 2.0], "INT32"), takes("int32"), "a float"),
    "a number for a boolean": (request([1, 0], "BOOL"), takes("bool"), "an integer"),
    "a number for text": (request([1, 2], "BYTES"), takes("bytes"), "an integer"),
    "over int8": (request([1, 128], "INT8"), takes("int8"), "outside INT8"),
    "below uint8": (request([1, -1], "UINT8"), takes("uint8"), "outside UINT8"),
    "over int64": (request([1, 2**63], "INT64"), takes("int64"), "outside INT64"),
    "over uint64, which JSON makes a float": (
        request([1, 2**64], "UINT64"), takes("uint64"), "a float"),
    "over float32": (request([1, 1e300]), takes(), "does not fit FP32"),
    "float16 as JSON": (request([1, 2], "FP16"), takes("float16"), "no JSON form"),
    "bfloat16 as JSON": (request([1, 2], "BF16"), takes("bfloat16"), "no JSON form"),
    "no data": (request(), takes(), "no data"),
    "binary without the header": (
        request(tensor={"parameters": {"binary_data_size": 8}}), takes(),
        "Inference-Header-Content-Length"),
    "shared memory": (
        request(tensor={"parameters": {"shared_memory_region": "r"}}), takes(), "shared memory"),
    "parameters that are a list": (
        request([1, 2], tensor={"parameters": []}), takes(), "want an object"),
    "an id that is a number": (request([1, 2], id=5), takes(), "id: want text"),
    "an unknown output": (
        request([1, 2], outputs=[{"name": "z"}]), takes(), "unknown output 'z'"),
    "an output twice": (
        request([1, 2], outputs=[{"name": "y"}, {"name": "y"}]), takes(), "twice"),
    "outputs that are an object": (request([1, 2], outputs={"y": 1}), takes(), "want a list"),
    "an output without a name": (request([1, 2], outputs=[{}]), takes(), "wants a name"),
    "classification": (
        request([1, 2], outputs=[{"name": "y", "parameters": {"classification": 3}}]), takes(),
        "classification"),
    "binary_data that is text": (
        request([1, 2], outputs=[{"name": "y", "parameters": {"binary_data": "yes"}}]), takes(),
        "true or false"),
    "a timeout that is text": (
        request([1, 2], parameters={"timeout": "1s"}), takes(), "microseconds"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_refused(case: str) -> None:
    document, signature, why = BAD[case]
    with pytest.raises(BadInput, match=why):
        parse_infer(json.dumps(document).encode(), None, signature)


@pytest.mark.parametrize("body", [b"", b"{", b"\xff", b"[" * 5000, b'{"inputs": NaN}'])
def test_what_is_not_json_is_refused(body: bytes) -> None:
    with pytest.raises(BadInput, match="not JSON"):
        parse_infer(body, None, takes())


def sized(size: Any, **more: Any) -> dict[str, Any]:
    return request(tensor={"parameters": {"binary_data_size": size}}, **more)


BAD_BINARY: dict[str, tuple[bytes, str, Signature, str]] = {
    "a length that is text": (b"{}", "abc", takes(), "number of bytes"),
    "a negative length": (b"{}", "-1", takes(), "number of bytes"),
    "a length in other digits": (b"{}", "٣", takes(), "number of bytes"),
    "a length without end": (b"{}", "9" * 30, takes(), "number of bytes"),
    "a length over the body": (b"{}", "3", takes(), "the body has 2 bytes"),
    "a length inside the JSON": (json.dumps(sized(8)).encode(), "5", takes(), "not JSON"),
    "a size over the body": (*binary(sized(12), bytes(8)), takes(), "only 8 bytes are left"),
    "a size of another shape": (*binary(sized(4), bytes(4)), takes(), "wants 8 bytes, got 4"),
    "bytes of nobody": (*binary(sized(8), bytes(9)), takes(), "belong to no input"),
    "a negative size": (*binary(sized(-8), bytes(8)), takes(), "number of bytes"),
    "a size that is true": (*binary(sized(True), bytes(1)), takes(), "number of bytes"),
    "a size that is text": (*binary(sized("8"), bytes(8)), takes(), "number of bytes"),
    "data and a size": (
        *binary(request([1, 2], tensor={"parameters": {"binary_data_size": 8}}), bytes(8)),
        takes(), "both"),
    "a huge shape": (
        *binary(sized(8, shape=[2**38, 2]), bytes(8)), takes(), "bytes, got 8"),
    "a boolean of 2": (
        *binary(sized(2, datatype="BOOL"), b"\x01\x02"), takes("bool"), "neither 0 nor 1"),
    "text that lies about its length": (
        *binary(sized(8, datatype="BYTES"), struct.pack("<I", 2**32 - 1) + b"abcd"),
        takes("bytes"), "do not add up"),
    "too few texts": (
        *binary(sized(8, datatype="BYTES", shape=[1, 2]), struct.pack("<I", 4) + b"abcd"),
        takes("bytes"), "do not add up"),
    "a huge count of texts": (
        *binary(sized(4, datatype="BYTES", shape=[2**30, 2]), bytes(4)), takes("bytes"),
        "do not fit"),
    "a raw request for two inputs": (
        bytes(8), "0", Signature((*takes().inputs, TensorSpec("z", "int8", (1,))), ()),
        "models of one input"),
    "a raw request of two unknown dims": (
        bytes(8), "0", takes(shape=(-1, -1, -1)), "at most one variable"),
    "a raw request that does not fill the shape": (bytes(9), "0", takes(), "wants 8 bytes"),
    "an empty raw request": (b"", "0", takes(shape=(-1,)), "do not fill"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_BINARY)
def test_refused_binary(case: str) -> None:
    body, length, signature, why = BAD_BINARY[case]
    with pytest.raises(BadInput, match=why):
        parse_infer(body, length, signature)


def test_binary_is_a_view_of_the_body() -> None:
    body, length = binary(sized(8), np.array([1, 2], "<f4").tobytes())
    feed = parse_infer(body, length, takes()).feeds["x"]
    assert feed.tolist() == [[1, 2]]
    assert not feed.flags.owndata


def test_a_raw_request_is_batch_1_and_all_outputs_are_binary() -> None:
    raw = np.arange(6, dtype="<f4").tobytes()
    understood = parse_infer(raw, "0", takes(shape=(-1, 2, -1)))
    assert understood.feeds["x"].shape == (1, 2, 3)
    assert understood.outputs == (("y", True),)
    text = parse_infer(b"hello", "0", takes("bytes", (-1, 1))).feeds["x"]
    assert text.tolist() == [[b"hello"]]


def test_outputs_are_binary_as_asked_one_by_one_or_all() -> None:
    def outputs(**more: Any) -> tuple[tuple[str, bool], ...]:
        signature = Signature(
            takes().inputs, (TensorSpec("y", "float32", (-1,)), TensorSpec("z", "int8", (-1,)))
        )
        return parse_infer(json.dumps(request([1, 2], **more)).encode(), None, signature).outputs

    all_binary = {"parameters": {"binary_data_output": True}}
    not_y = [{"name": "z"}, {"name": "y", "parameters": {"binary_data": False}}]
    assert outputs() == (("y", False), ("z", False))
    assert outputs(outputs=[]) == (("y", False), ("z", False))
    assert outputs(**all_binary) == (("y", True), ("z", True))
    assert outputs(outputs=[{"name": "z"}]) == (("z", False),)
    assert outputs(outputs=not_y, **all_binary) == (("z", True), ("y", False))


def test_half_floats_go_out_as_binary_only() -> None:
    signature = Signature(takes().inputs, (TensorSpec("y", "bfloat16", (-1,)),))
    with pytest.raises(BadInput, match="no JSON form"):
        parse_infer(json.dumps(request([1, 2])).encode(), None, signature)


def test_the_clients_timeout_is_in_microseconds() -> None:
    body = json.dumps(request([1, 2], parameters={"timeout": 250_000})).encode()
    assert parse_infer(body, None, takes()).timeout_s == 0.25


def answer(array: Any, dtype: str = "float32") -> Answer:
    return Answer(ModelName("m"), Version("1"), takes(dtype), {"y": array})


def test_an_answer_echoes_the_id_and_names_the_version() -> None:
    rendered = InferRequest({}, "abc", (("y", False),)).render(
        answer(np.array([[1, 2]], np.float32))
    )
    assert rendered.header_length is None
    assert json.loads(rendered.body) == {
        "model_name": "m",
        "model_version": "1",
        "id": "abc",
        "outputs": [{"name": "y", "datatype": "FP32", "shape": [1, 2], "data": [1.0, 2.0]}],
    }


def test_nan_and_infinity_are_null_in_json_and_themselves_in_binary() -> None:
    array = np.array([np.nan, np.inf], np.float32)
    text = InferRequest({}, None, (("y", False),)).render(answer(array))
    assert json.loads(text.body)["outputs"][0]["data"] == [None, None]
    raw = InferRequest({}, None, (("y", True),)).render(answer(array))
    assert raw.header_length is not None
    assert raw.body[raw.header_length :] == array.tobytes()


def test_transposed_and_big_endian_outputs_go_out_in_row_major_little_endian() -> None:
    array = np.arange(6, dtype=">f4").reshape(2, 3).T
    raw = InferRequest({}, None, (("y", True),)).render(answer(array))
    assert raw.body[raw.header_length :] == np.ascontiguousarray(array, "<f4").tobytes()
    text = InferRequest({}, None, (("y", False),)).render(answer(array))
    assert json.loads(text.body)["outputs"][0]["data"] == [0, 3, 1, 4, 2, 5]
    assert json.loads(text.body)["outputs"][0]["shape"] == [3, 2]
