"""Inputs for the first runs of a predictor: deterministic, of every shape that is asked for."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from math import prod

import numpy as np

from loader.errors import NotAdmitted
from loader.recipe import Recipe
from registry.inference import Array, Signature, TensorSpec, numpy_dtype

BATCH = 1
IMAGE_SIDE = 64
LENGTH = 16
_MAX_BYTES = 1 << 30


def warmup_feeds(signature: Signature, recipe: Recipe) -> list[dict[str, Array]]:
    """One feed for every input, for each set of shapes (today the document gives one set).

    The shape of an input is the document's, else the program's; a dim that varies in both is
    `BATCH` on the first axis, `IMAGE_SIDE` on the last two of four (NCHW), `LENGTH` elsewhere.
    Floats are uniform in [0.1, 1), the same on every call; integers and booleans are ones: a token
    that every embedding has, a mask that hides nothing, a length that is not zero.
    Raises `NotAdmitted` (warmup) for shapes that do not fit the program.
    """
    names = {spec.name for spec in signature.inputs}
    for name in recipe.warmup_shapes:
        if name not in names:
            raise NotAdmitted("warmup", f"a shape for {name!r}, the inputs are {sorted(names)}")
    return [{spec.name: _feed(spec, recipe.warmup_shapes) for spec in signature.inputs}]


def warmup_shape(spec: TensorSpec, wanted: tuple[int, ...] | None) -> tuple[int, ...]:
    """The shape to warm up one input with; ``wanted`` is the document's, -1 where it is silent."""
    dims = spec.shape if wanted is None else wanted
    if len(dims) != len(spec.shape):
        raise _misfit(spec, dims)
    if any(
        fixed not in (-1, dim) and dim != -1 for fixed, dim in zip(spec.shape, dims, strict=True)
    ):
        raise _misfit(spec, dims)
    filled = (fixed if dim == -1 else dim for fixed, dim in zip(spec.shape, dims, strict=True))
    return tuple(_default(axis, len(dims)) if dim == -1 else dim for axis, dim in enumerate(filled))


def _feed(spec: TensorSpec, shapes: Mapping[str, tuple[int, ...]]) -> Array:
    shape = warmup_shape(spec, shapes.get(spec.name))
    dtype = numpy_dtype(spec.dtype)
    if prod(shape) * dtype.itemsize > _MAX_BYTES:
        raise NotAdmitted("warmup", f"input {spec.name!r} of {list(shape)} is more than 1 GiB")
    if spec.dtype == "bool" or (dtype.kind in "iu" and spec.dtype != "bfloat16"):
        return np.ones(shape, dtype)
    rng = np.random.default_rng(zlib.crc32(spec.name.encode()))
    values = rng.random(shape, dtype=np.float32) * np.float32(0.9) + np.float32(0.1)
    if spec.dtype == "bfloat16":
        return (values.view(np.uint32) >> 16).astype(np.uint16)
    return values.astype(dtype, copy=False)


def _default(axis: int, rank: int) -> int:
    if axis == 0:
        return BATCH
    return IMAGE_SIDE if rank == 4 and axis >= 2 else LENGTH


def _misfit(spec: TensorSpec, dims: tuple[int, ...]) -> NotAdmitted:
    return NotAdmitted(
        "warmup", f"shape {list(dims)} does not fit input {spec.name!r} of {list(spec.shape)}"
    )
