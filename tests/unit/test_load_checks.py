"""The judges of answers: right numbers, from the version that the header names."""

from __future__ import annotations

import numpy as np
import orjson
import pytest

from paddlewheel.bench.checks import infer_body, outputs_of_version, read_outputs
from paddlewheel.bench.load import Verify

ONE = {"y": np.array([[1.0, 2.0]], dtype=np.float32)}
TWO = {"y": np.array([[1.5, 2.5]], dtype=np.float32)}


def binary_answer(values: bytes) -> tuple[dict[str, str], bytes]:
    head = orjson.dumps(
        {
            "outputs": [
                {"name": "y", "shape": [1, 2], "datatype": "FP32",
                 "parameters": {"binary_data_size": len(values)}},
            ]
        }
    )  # fmt: skip
    return {"inference-header-content-length": str(len(head))}, head + values


def json_answer(values: list[float]) -> bytes:
    tensor = {"name": "y", "shape": [1, 2], "datatype": "FP32", "data": values}
    return orjson.dumps({"outputs": [tensor]})


@pytest.fixture
def verify() -> Verify:
    return outputs_of_version({"1": ONE, "2": TWO})


def test_json_and_binary_say_the_same() -> None:
    headers, body = binary_answer(ONE["y"].tobytes())
    assert np.array_equal(read_outputs(headers, body)["y"], ONE["y"])
    assert np.array_equal(read_outputs({}, json_answer([1.0, 2.0]))["y"], ONE["y"])


def test_bytes_after_the_last_tensor_are_refused() -> None:
    headers, body = binary_answer(ONE["y"].tobytes())
    with pytest.raises(ValueError, match="4 bytes after"):
        read_outputs(headers, body + b"more")


@pytest.mark.parametrize(
    ("version", "values", "wanted"),
    [
        ("1", [1.0, 2.0], None),
        ("2", [1.5, 2.5], None),
        ("2", [1.0, 2.0], "header says version 2, the numbers are those of 1"),
        ("1", [9.0, 9.0], "wrong numbers from version 1"),
        ("3", [1.0, 2.0], "answered by version '3'"),
    ],
)
def test_verdicts(verify: Verify, version: str, values: list[float], wanted: str | None) -> None:
    assert verify(200, {"x-model-version": version}, json_answer(values)) == wanted


def test_a_status_is_told_with_what_the_body_says(verify: Verify) -> None:
    assert verify(503, {}, b'{"error":"queue is full"}') == 'status 503: {"error":"queue is full"}'


@pytest.mark.parametrize("binary", [True, False])
def test_request_bodies_carry_the_array(binary: bool) -> None:
    headers, body = infer_body(ONE, binary=binary)
    length = int(headers.get("Inference-Header-Content-Length", len(body)))
    (tensor,) = orjson.loads(body[:length])["inputs"]
    assert tensor["shape"] == [1, 2]
    assert tensor["datatype"] == "FP32"
    if binary:
        assert body[length:] == ONE["y"].tobytes()
    else:
        assert tensor["data"] == [1.0, 2.0]
