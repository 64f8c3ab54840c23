"""What a pipeline's Python steps are made of: a function and what it takes and returns (pure).

A package offers them as entry points of the group ``paddlewheel.transforms``:

    @transform(inputs={"image": ("bytes", [1])}, outputs={"x": ("float32", [1, 3, -1, -1])})
    def prepare(image: Array) -> dict[str, Array]: ...

    [project.entry-points."paddlewheel.transforms"]
    ocr-prepare = "my_package:prepare"
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from registry.inference import Array, Signature, TensorSpec, numpy_dtype

GROUP = "paddlewheel.transforms"
"""The entry points that a pipeline's ``transform`` names."""

DTYPES = (
    "bool", "uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64",
    "float16", "bfloat16", "float32", "float64", "bytes",
)  # fmt: skip
"""numpy's names, ``bfloat16`` (its bits as ``uint16``) and ``bytes`` (an object array of them)."""

Declared = Mapping[str, tuple[str, Sequence[int]]]
"""Name to dtype and shape, -1 for a dimension that may vary."""


@dataclass(frozen=True, slots=True)
class Transform:
    """A function of named arrays and what it declares.

    It is run in a process of its own kind, one call at a time, with each input as a keyword.
    A `ValueError` says that the request is at fault (400); anything else is a fault of the step.
    """

    run: Callable[..., Mapping[str, Array]]
    signature: Signature

    def __call__(self, **inputs: Array) -> Mapping[str, Array]:
        return self.run(**inputs)


def transform(
    *, inputs: Declared, outputs: Declared
) -> Callable[[Callable[..., Mapping[str, Array]]], Transform]:
    """Make a function a `Transform`. Raises `ValueError` for a dtype or shape that there is not."""
    signature = Signature(_specs(inputs), _specs(outputs))

    def declare(run: Callable[..., Mapping[str, Array]]) -> Transform:
        return Transform(run, signature)

    return declare


def _specs(declared: Declared) -> tuple[TensorSpec, ...]:
    if not declared:
        raise ValueError("want at least one tensor")
    for name, (dtype, shape) in declared.items():
        if dtype not in DTYPES:
            raise ValueError(f"{name}: want a dtype of {', '.join(DTYPES)}, got {dtype!r}")
        if any(isinstance(dim, bool) or dim < -1 for dim in shape):
            raise ValueError(f"{name}: want sizes, or -1 where they vary, got {list(shape)}")
    return tuple(TensorSpec(name, dtype, tuple(shape)) for name, (dtype, shape) in declared.items())


def carrier(dtype: str) -> np.dtype[Any]:
    """The numpy dtype that carries ``dtype`` (one of `DTYPES`)."""
    return np.dtype(object) if dtype == "bytes" else numpy_dtype(dtype)


def misfit(array: object, spec: TensorSpec) -> str | None:
    """Why ``array`` is not what ``spec`` declares; ``None`` when it is. Empty dimensions fit."""
    if not isinstance(array, np.ndarray):
        return f"{spec.name!r}: want an array, got {type(array).__name__}"
    if array.dtype != carrier(spec.dtype):
        return f"{spec.name!r}: want {spec.dtype}, got {array.dtype.name}"
    fits = len(array.shape) == len(spec.shape) and all(
        want in (-1, have) for want, have in zip(spec.shape, array.shape, strict=True)
    )
    if not fits:
        return f"{spec.name!r}: want shape {list(spec.shape)}, got {list(array.shape)}"
    return None
