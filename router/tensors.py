"""Tensors on the wire: datatypes, the checks before anything is allocated, JSON and raw bytes.

The datatypes are those of the Open Inference Protocol. A BYTES tensor is a numpy object array of
``bytes``; a bfloat16 one travels as ``uint16`` bits (`registry.inference`).
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any, cast

import numpy as np

from registry.inference import DTYPES, Array, BadInput, TensorSpec

DATATYPES: Mapping[str, str] = {
    **DTYPES,
    "uint16": "UINT16", "uint32": "UINT32", "uint64": "UINT64", "bytes": "BYTES",
}  # fmt: skip
"""Our dtype names and the protocol's; wider than what Paddle takes, so that errors name both."""

DTYPE_OF: Mapping[str, str] = {datatype: dtype for dtype, datatype in DATATYPES.items()}

_CARRIER: Mapping[str, np.dtype[Any]] = {
    dtype: np.dtype({"bfloat16": "uint16", "bytes": "object"}.get(dtype, dtype)).newbyteorder("<")
    for dtype in DATATYPES
}
_NAMES: Mapping[np.dtype[Any], str] = {
    np.dtype(dtype): dtype for dtype in DATATYPES if dtype not in ("bfloat16", "bytes")
}
"""numpy works a dtype's name out anew each time; this costs a tenth."""

_INT_RANGE: Mapping[str, tuple[int, int]] = {
    dtype: (int(np.iinfo(dtype).min), int(np.iinfo(dtype).max))
    for dtype in ("uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64")
}
_FLOATS = frozenset({"float16", "bfloat16", "float32", "float64"})
_WORDS: Mapping[type, str] = {
    int: "an integer", float: "a float", bool: "a boolean", str: "text", list: "a list",
    dict: "an object", type(None): "null",
}  # fmt: skip
_MAX_RANK = 32
_MAX_ELEMENTS = 2**40
_LENGTH = struct.Struct("<I")


def checked_shape(shape: object, spec: TensorSpec) -> tuple[int, ...]:
    """Return ``shape`` as sizes that fit ``spec``. Raises `BadInput`; allocates nothing.

    A dimension of 0 is refused: kernels differ in what they do with it, and some take the whole
    worker down.
    """
    if not isinstance(shape, list):
        raise BadInput(f"input {spec.name!r}: shape: want a list of integers")
    dims = cast("list[object]", shape)
    want = spec.shape
    if len(dims) != len(want):
        raise BadInput(
            f"input {spec.name!r}: want shape {list(want)} ({len(want)} dimensions), "
            f"got {len(dims)} dimensions"
        )
    for dim, wanted in zip(dims, want, strict=True):
        if type(dim) is not int or dim < 1:
            raise BadInput(
                f"input {spec.name!r}: shape: want integers of at least 1, got {_short(dim)}"
            )
        if wanted not in (-1, dim):
            raise BadInput(
                f"input {spec.name!r}: want shape {list(want)}, "
                f"got [{', '.join(map(_short, dims))}]"
            )
    sizes = tuple(cast("list[int]", dims))
    if len(sizes) > _MAX_RANK or math.prod(sizes) > _MAX_ELEMENTS:
        raise BadInput(f"input {spec.name!r}: shape is beyond any memory")
    return sizes


def from_json(data: object, shape: tuple[int, ...], spec: TensorSpec) -> Array:
    """Return JSON ``data``, flat or nested as ``shape`` says, as an array of ``spec.dtype``.

    Strict: no float for an integer, no number for a boolean, nothing that does not fit the type.
    Raises `BadInput`.
    """
    name = spec.name
    if not isinstance(data, list):
        if not shape:
            data = [data]
        else:
            raise BadInput(f"input {name!r}: data: want a list, got {_word(data)}")
    flat = _flatten(cast("list[Any]", data), shape)
    if flat is None:
        raise BadInput(f"input {name!r}: data is not nested as its shape {list(shape)} says")
    count = math.prod(shape)
    if len(flat) != count:
        raise BadInput(
            f"input {name!r}: shape {list(shape)} wants {count} values, data has {len(flat)}"
        )
    return _from_flat(flat, spec).reshape(shape)


def _flatten(data: list[Any], shape: tuple[int, ...]) -> list[Any] | None:
    """Return the leaves of ``data``: as it is when flat, unnested when nested as ``shape`` says."""
    level = data
    if shape and level and type(level[0]) is list:
        if len(level) != shape[0]:
            return None
        for size in shape[1:]:
            if set(map(type, level)) != {list} or set(map(len, level)) != {size}:
                return None
            level = list(chain.from_iterable(level))
    return level


def infer_shape(data: object, rank: int) -> list[int]:
    """Return the shape that nested lists show, looking at first elements only, to ``rank``."""
    shape: list[int] = []
    level = data
    while len(shape) < rank and isinstance(level, list):
        items = cast("list[object]", level)
        shape.append(len(items))
        level = items[0] if items else None
    return shape


def _from_flat(flat: list[Any], spec: TensorSpec) -> Array:
    dtype, name = spec.dtype, spec.name
    types = set(map(type, flat))
    if dtype in _FLOATS:
        _only(types, {int, float}, spec)
        array = np.array(flat, dtype=np.float64)
        if dtype == "float64":
            return array
        if dtype == "bfloat16":
            return to_bfloat16(array, name)
        with np.errstate(over="ignore"):
            narrow = array.astype(dtype)
        if not np.isfinite(narrow).all():
            raise BadInput(f"input {name!r}: a value does not fit {DATATYPES[dtype]}")
        return narrow
    if dtype == "bool":
        _only(types, {bool}, spec)
        return np.array(flat, dtype=np.bool_)
    if dtype == "bytes":
        _only(types, {str, bytes}, spec)
        out = np.empty(len(flat), dtype=np.object_)
        out[:] = [item.encode() if isinstance(item, str) else item for item in flat]
        return out
    _only(types, {int}, spec)
    low, high = _INT_RANGE[dtype]
    if flat and (min(flat) < low or max(flat) > high):
        raise BadInput(f"input {name!r}: a value is outside {DATATYPES[dtype]} ({low}..{high})")
    return np.array(flat, dtype=dtype)


def _only(types: set[type], allowed: set[type], spec: TensorSpec) -> None:
    wrong = types - allowed
    if wrong:
        words = ", ".join(sorted(_WORDS.get(kind, kind.__name__) for kind in wrong))
        raise BadInput(f"input {spec.name!r}: want {DATATYPES[spec.dtype]} values, got {words}")


def to_bfloat16(array: Array, name: str) -> Array:
    """Round floats to bfloat16 (nearest, ties to even) and return their bits as ``uint16``."""
    with np.errstate(over="ignore"):
        bits = array.astype(np.float32).view(np.uint32)
    rounded = ((bits + (np.uint32(0x7FFF) + ((bits >> 16) & 1))) >> 16).astype(np.uint16)
    if ((rounded & 0x7F80) == 0x7F80).any():
        raise BadInput(f"input {name!r}: a value does not fit BF16")
    return rounded


def from_bfloat16(bits: Array) -> Array:
    """Return the float32 values of bfloat16 ``bits``."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def from_bytes(raw: memoryview, shape: tuple[int, ...], spec: TensorSpec) -> Array:
    """Return little-endian ``raw`` as a read-only array over the same memory. Raises `BadInput`."""
    count = math.prod(shape)
    if spec.dtype == "bytes":
        return _strings_from_bytes(raw, count, spec.name).reshape(shape)
    carrier = _CARRIER[spec.dtype]
    if len(raw) != count * carrier.itemsize:
        raise BadInput(
            f"input {spec.name!r}: shape {list(shape)} of {DATATYPES[spec.dtype]} wants "
            f"{count * carrier.itemsize} bytes, got {len(raw)}"
        )
    if spec.dtype == "bool":
        octets = np.frombuffer(raw, dtype=np.uint8)
        if octets.max(initial=0) > 1:
            raise BadInput(f"input {spec.name!r}: a BOOL byte is neither 0 nor 1")
    return np.frombuffer(raw, dtype=carrier).reshape(shape)


def _strings_from_bytes(raw: memoryview, count: int, name: str) -> Array:
    # Each element takes at least its length's four bytes: a huge count stops here.
    if count * 4 > len(raw):
        raise BadInput(f"input {name!r}: {count} BYTES elements do not fit {len(raw)} bytes")
    items: list[bytes] = []
    offset = 0
    while offset + 4 <= len(raw):
        (size,) = _LENGTH.unpack_from(raw, offset)
        offset += 4
        if size > len(raw) - offset or len(items) == count:
            break
        items.append(bytes(raw[offset : offset + size]))
        offset += size
    if offset != len(raw) or len(items) != count:
        raise BadInput(f"input {name!r}: BYTES lengths do not add up to {count} elements")
    out = np.empty(count, dtype=np.object_)
    out[:] = items
    return out


def raw_bytes(array: Array) -> bytes | memoryview:
    """Return ``array`` as it goes on the wire: row-major, little-endian, no copy where possible."""
    if array.dtype == np.object_:
        return b"".join(
            _LENGTH.pack(len(item)) + item for item in cast("Sequence[bytes]", array.ravel())
        )
    if array.dtype.byteorder == ">":
        array = array.astype(array.dtype.newbyteorder("<"))
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def json_ready(array: Array, dtype: str) -> Any:
    """Return ``array`` as something orjson writes: numbers, booleans or text, nesting kept.

    JSON has no NaN and no infinity; orjson writes them as ``null``. The binary form keeps them.
    """
    if dtype == "bfloat16" and array.dtype == np.uint16:
        array = from_bfloat16(array)
    if array.dtype == np.object_:
        return _texts(array.tolist())
    if array.ndim == 0:
        return array.item()
    if array.dtype.byteorder == ">":
        array = array.astype(array.dtype.newbyteorder("<"))
    return np.ascontiguousarray(array)


def _texts(value: Any) -> Any:
    if isinstance(value, list):
        return [_texts(item) for item in value]
    try:
        return cast("bytes", value).decode()
    except UnicodeDecodeError as exc:
        raise BadInput("an output is not UTF-8 text: ask for it as binary data") from exc


def dtype_of(array: Array, declared: str | None) -> str:
    """Return the dtype name an output goes out under: what it is, or bfloat16 where declared."""
    if array.dtype == np.object_:
        return "bytes"
    if declared == "bfloat16" and array.dtype == np.uint16:
        return declared
    name = _NAMES.get(array.dtype)
    return array.dtype.name if name is None else name


def numpy_itemsize(dtype: str) -> int:
    """Bytes of one element on the wire; not for ``bytes``, whose elements differ."""
    return _CARRIER[dtype].itemsize


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 24 else text[:21] + "..."


def _word(value: object) -> str:
    return _WORDS.get(type(value), type(value).__name__)
