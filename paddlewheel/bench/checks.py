"""Judges of inference answers for the load generator: right numbers, and from the right version."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import numpy as np
import orjson

from paddlewheel.bench.load import Headers, Verify
from registry.inference import DTYPES, Array, numpy_dtype

_BINARY_HEADER = "inference-header-content-length"
_OURS: Mapping[str, str] = {theirs: ours for ours, theirs in DTYPES.items()}

Outputs = Mapping[str, Array]


def read_outputs(headers: Headers, body: bytes) -> dict[str, Array]:
    """The output tensors of an Open Inference Protocol answer, JSON or binary.

    Raises ValueError or KeyError when the body is not such an answer.
    """
    head_bytes = int(headers.get(_BINARY_HEADER, len(body)))
    document = cast("dict[str, Any]", orjson.loads(body[:head_bytes]))
    offset = head_bytes
    outputs: dict[str, Array] = {}
    for tensor in cast("list[dict[str, Any]]", document["outputs"]):
        dtype = numpy_dtype(_OURS[tensor["datatype"]])
        size = tensor.get("parameters", {}).get("binary_data_size")
        if size is None:
            array = np.asarray(tensor["data"], dtype=dtype)
        else:
            array = np.frombuffer(body[offset : offset + size], dtype=dtype)
            offset += size
        outputs[tensor["name"]] = array.reshape(tensor["shape"])
    if offset != len(body):
        raise ValueError(f"{len(body) - offset} bytes after the last tensor")
    return outputs


def infer_body(inputs: Outputs, *, binary: bool) -> tuple[dict[str, str], bytes]:
    """Headers and body of an Open Inference Protocol request for these inputs.

    ``binary`` sends the inputs as raw bytes and asks for binary outputs.
    """
    tensors: list[dict[str, Any]] = []
    chunks: list[bytes] = []
    for name, array in inputs.items():
        tensor: dict[str, Any] = {
            "name": name, "shape": list(array.shape), "datatype": DTYPES[array.dtype.name],
        }  # fmt: skip
        if binary:
            chunks.append(array.tobytes())
            tensor["parameters"] = {"binary_data_size": len(chunks[-1])}
        else:
            tensor["data"] = array.ravel().tolist()
        tensors.append(tensor)
    document: dict[str, Any] = {"inputs": tensors}
    if not binary:
        return {"Content-Type": "application/json"}, orjson.dumps(document)
    document["parameters"] = {"binary_data_output": True}
    head = orjson.dumps(document)
    headers = {
        "Content-Type": "application/octet-stream",
        "Inference-Header-Content-Length": str(len(head)),
    }
    return headers, head + b"".join(chunks)


def outputs_of_version(
    expected: Mapping[str, Outputs],
    *,
    rtol: float = 1e-4,
    atol: float = 1e-5,
    allowed: Callable[[str], bool] = lambda version: True,
) -> Verify:
    """A judge that wants, from version v, the outputs that v's weights give for this input.

    expected: for each version, the outputs by name. The versions' outputs must differ by more
        than the tolerance, or a mixed-up version could not be told.
    allowed: whether this version may answer at all (a pinned request, a canary header).
    Says so when the numbers are those of another version than the header names.
    """

    def verify(status: int, headers: Headers, body: bytes) -> str | None:
        if status != 200:
            return f"status {status}: {body[:200].decode('utf-8', 'replace')}"
        version = headers.get("x-model-version", "")
        if version not in expected or not allowed(version):
            return f"answered by version {version!r}"
        got = read_outputs(headers, body)
        if _same(got, expected[version], rtol, atol):
            return None
        for other, outputs in expected.items():
            if other != version and _same(got, outputs, rtol, atol):
                return f"header says version {version}, the numbers are those of {other}"
        return f"wrong numbers from version {version}"

    return verify


def _same(got: Outputs, wanted: Outputs, rtol: float, atol: float) -> bool:
    return got.keys() == wanted.keys() and all(
        got[name].shape == wanted[name].shape
        and np.allclose(got[name], wanted[name], rtol=rtol, atol=atol)
        for name in wanted
    )
