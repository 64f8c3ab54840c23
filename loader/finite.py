"""NaN and Inf in arrays of any floating type, found without copying the array."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from registry.inference import Array

_CHUNK_ELEMENTS = 1 << 20


@dataclass(frozen=True, slots=True)
class NonFinite:
    """What is wrong with one array."""

    first: tuple[int, ...]
    nan_count: int
    inf_count: int

    def __str__(self) -> str:
        kinds = [
            f"{count} {kind}"
            for count, kind in ((self.nan_count, "NaN"), (self.inf_count, "Inf"))
            if count
        ]
        return f"{' and '.join(kinds)}, the first at {list(self.first)}"


def find_non_finite(array: Array) -> NonFinite | None:
    """``None`` when every element is finite, or the array is not of a floating type.

    uint16 means bfloat16, as everywhere here. Takes memory for a million elements at a time.
    """
    if array.dtype != np.uint16 and array.dtype.kind not in "fc":
        return None
    flat = array.reshape(-1)
    first = -1
    nan_count = inf_count = 0
    for start in range(0, flat.size, _CHUNK_ELEMENTS):
        chunk = flat[start : start + _CHUNK_ELEMENTS]
        finite = _is_finite(chunk)
        if finite.all():
            continue
        if first < 0:
            first = start + int(np.argmin(finite))
        bad = chunk[~finite]
        nans = int(_is_nan(bad).sum())
        nan_count += nans
        inf_count += bad.size - nans
    if first < 0:
        return None
    where = np.unravel_index(first, array.shape) if array.shape else ()
    return NonFinite(tuple(int(axis) for axis in where), nan_count, inf_count)


def as_floats(array: Array) -> Array | None:
    """The array in float64 (complex128) for comparing, or ``None`` when it is not floating."""
    if array.dtype == np.uint16:
        return (array.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    if array.dtype.kind == "f":
        return array.astype(np.float64)
    return array.astype(np.complex128) if array.dtype.kind == "c" else None


def _is_finite(chunk: Array) -> Array:
    if chunk.dtype == np.uint16:  # not all exponent bits set
        finite: Array = (chunk & 0x7F80) != 0x7F80
    else:
        finite = np.isfinite(chunk)
    return finite


def _is_nan(bad: Array) -> Array:
    nan: Array = (bad & 0x7F) != 0 if bad.dtype == np.uint16 else np.isnan(bad)
    return nan
