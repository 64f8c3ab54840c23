"""Paddle's `VarType.TensorDesc`: a data type and dims. Both file formats are built from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from loader import protobuf

DTYPE_OF_CODE: Mapping[int, str] = {
    0: "bool", 1: "int16", 2: "int32", 3: "int64", 4: "float16", 5: "float32", 6: "float64",
    20: "uint8", 21: "int8", 22: "bfloat16", 23: "complex64", 24: "complex128",
}  # fmt: skip
"""`VarType.Type` of Paddle's framework.proto. The 8-bit floats (GPU only) are not among them."""

CODE_OF_DTYPE: Mapping[str, int] = {name: code for code, name in DTYPE_OF_CODE.items()}

MAX_RANK = 32
"""numpy's own limit (1.x); Paddle's is 9."""

_MAX_ELEMENTS = 1 << 62


@dataclass(frozen=True, slots=True)
class TensorDesc:
    """``dims`` may hold -1 (variable) in a program, never in a params file."""

    dtype: str
    dims: tuple[int, ...]


def storage_dtype(dtype: str) -> np.dtype[Any]:
    """The little-endian numpy dtype of the raw data; bfloat16 is uint16, its bits."""
    name = "uint16" if dtype == "bfloat16" else dtype
    return np.dtype(name).newbyteorder("<")


def element_count(dims: Sequence[int]) -> int:
    """How many elements; 1 for a scalar.

    Raises `protobuf.WireError` for a negative dim and for a count no memory could hold.
    """
    if any(dim < 0 for dim in dims):
        raise protobuf.WireError(0, f"negative dims {list(dims)}")
    count = prod(dims)
    if count > _MAX_ELEMENTS:
        raise protobuf.WireError(0, f"dims {list(dims)} overflow")
    return count


def parse_tensor_desc(message: protobuf.Buffer) -> TensorDesc:
    """Raises `protobuf.WireError`: not such a message, a type code nobody knows, too many dims."""
    code: int | None = None
    dims: list[int] = []
    for number, value in protobuf.fields(message):
        if number == 1:
            code = protobuf.number(value)
        elif number == 2:
            dims += protobuf.numbers(value)
    if code is None:
        raise protobuf.WireError(0, "no data type")
    dtype = DTYPE_OF_CODE.get(code)
    if dtype is None:
        raise protobuf.WireError(0, f"unknown data type {code}")
    if len(dims) > MAX_RANK:
        raise protobuf.WireError(0, f"{len(dims)} dims, more than {MAX_RANK}")
    return TensorDesc(dtype, tuple(dims))


def encode_tensor_desc(desc: TensorDesc) -> bytes:
    """The message, dims unpacked, byte for byte as Paddle writes it."""
    out = b"\x08" + protobuf.encode_varint(CODE_OF_DTYPE[desc.dtype])
    return out + b"".join(b"\x10" + protobuf.encode_varint(dim) for dim in desc.dims)
