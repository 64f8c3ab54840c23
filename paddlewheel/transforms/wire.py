"""What goes between a node and its transform processes: a JSON head, then raw tensors (pure).

Not pickle: what a transform answers is data, whatever libraries it loads.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import orjson

from registry.errors import PaddlewheelError
from registry.inference import Array, InferenceError, Signature, TensorSpec
from registry.transforms import DTYPES, carrier
from router.tensors import from_bytes, raw_bytes

LENGTHS = struct.Struct("<IQ")
"""Bytes of the head and of all tensors together."""
HEAD_BYTES_MAX = 1 << 24
BODY_BYTES_MAX = 1 << 32


class BadFrame(PaddlewheelError):
    """Bytes that are no message of ours."""


def pack(
    head: Mapping[str, Any], tensors: Mapping[str, Array], specs: Sequence[TensorSpec]
) -> list[bytes | memoryview]:
    """A message as buffers to be sent in order; the tensors' are not copied.

    specs: say which dtype each tensor is of, its arrays being carriers (`registry.transforms`).
    """
    listed: list[dict[str, Any]] = []
    raws: list[bytes | memoryview] = []
    for spec in specs:
        array = tensors[spec.name]
        raw = raw_bytes(array) if array.size else b""
        raws.append(raw)
        listed.append(
            {"name": spec.name, "dtype": spec.dtype, "shape": array.shape, "bytes": len(raw)}
        )
    text = orjson.dumps({**head, "tensors": listed})
    return [LENGTHS.pack(len(text), sum(map(len, raws))), text, *raws]


def lengths(prefix: bytes) -> tuple[int, int]:
    """How many bytes of head and of body follow. Raises `BadFrame`."""
    head, body = LENGTHS.unpack(prefix)
    if head > HEAD_BYTES_MAX or body > BODY_BYTES_MAX:
        raise BadFrame(f"a message of {head} and {body} bytes")
    return head, body


def unpack(text: bytes, body: memoryview) -> tuple[dict[str, Any], dict[str, Array]]:
    """The head and the tensors, over the memory of ``body``. Raises `BadFrame`."""
    try:
        head: dict[str, Any] = orjson.loads(text)
        tensors: dict[str, Array] = {}
        for entry in head["tensors"]:
            name, dtype, size = str(entry["name"]), entry["dtype"], entry["bytes"]
            shape = tuple(int(dim) for dim in entry["shape"])
            if dtype not in DTYPES or any(dim < 0 for dim in shape) or not 0 <= size <= len(body):
                raise BadFrame(f"tensor {name!r}: {dtype} {shape} of {size} bytes")
            if not math.prod(shape):
                tensors[name] = np.zeros(shape, carrier(dtype))
            else:
                spec = TensorSpec(name, dtype, shape)
                tensors[name] = from_bytes(body[:size], shape, spec)
            body = body[size:]
    except (orjson.JSONDecodeError, KeyError, TypeError, ValueError, InferenceError) as exc:
        raise BadFrame(f"not a message of ours: {exc!r}") from exc
    return head, tensors


def signature_document(signature: Signature) -> dict[str, Any]:
    return {
        part: [[spec.name, spec.dtype, list(spec.shape)] for spec in specs]
        for part, specs in (("inputs", signature.inputs), ("outputs", signature.outputs))
    }


def signature_of(document: Mapping[str, Any]) -> Signature:
    """Raises `BadFrame`."""
    try:
        inputs, outputs = (
            tuple(
                TensorSpec(str(name), str(dtype), tuple(int(dim) for dim in shape))
                for name, dtype, shape in document[part]
            )
            for part in ("inputs", "outputs")
        )
    except (KeyError, TypeError, ValueError) as exc:
        raise BadFrame(f"not a signature: {exc!r}") from exc
    return Signature(inputs, outputs)
