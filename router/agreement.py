"""Whether two versions' answers to one request agree (pure)."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from registry.inference import Array, Signature
from registry.spec_canary import Compare


def agree(
    stable: Mapping[str, Array], canary: Mapping[str, Array], compare: Compare, signature: Signature
) -> bool:
    """Whether ``canary`` says what ``stable`` says, output by output.

    Outputs go together by name, or by place where the names differ and the number does not. Whole
    numbers and truth values have to be equal; floats by ``compare``. With ``topk`` the same places
    have to hold the highest values of the last axis, except where a place that only one of them
    chose is as high as the lowest chosen one, within the tolerances.

    signature: the stable version's; says which outputs are bfloat16 (they come as bits).
    """
    if len(stable) != len(canary):
        return False
    by_name = stable.keys() == canary.keys()
    theirs = [canary[name] for name in stable] if by_name else list(canary.values())
    return all(
        _agree(mine, other, compare, _is_bfloat16(signature, name))
        for (name, mine), other in zip(stable.items(), theirs, strict=True)
    )


def _agree(mine: Array, other: Array, compare: Compare, is_bfloat16: bool) -> bool:
    if mine.shape != other.shape or mine.dtype != other.dtype:
        return False
    if is_bfloat16:
        mine, other = _widened(mine), _widened(other)
    if mine.dtype.kind not in "fc":
        return bool(np.array_equal(mine, other))
    if mine.dtype == np.float16:
        mine, other = mine.astype(np.float32), other.astype(np.float32)
    if compare.topk is None or not mine.ndim or mine.dtype.kind == "c":
        with np.errstate(invalid="ignore", over="ignore"):
            close = np.isclose(other, mine, rtol=compare.rtol, atol=compare.atol, equal_nan=True)
        return bool(close.all())
    return _same_top(mine, other, compare.topk, compare)


def _same_top(mine: Array, other: Array, k: int, compare: Compare) -> bool:
    hollow = np.isnan(mine)
    if not np.array_equal(hollow, np.isnan(other)):
        return False
    width = mine.shape[-1]
    if k >= width or not mine.size:
        return True
    if hollow.any():
        mine, other = np.where(hollow, -np.inf, mine), np.where(hollow, -np.inf, other)
    mine_top, other_top = _top(mine, k), _top(other, k)
    return _holds(mine, mine_top, other_top, compare) and _holds(
        other, other_top, mine_top, compare
    )


def _top(values: Array, k: int) -> Array:
    """The places of the ``k`` highest values of each row, in any order."""
    return np.argpartition(values, values.shape[-1] - k, axis=-1)[..., -k:]


def _holds(values: Array, own: Array, chosen: Array, compare: Compare) -> bool:
    """Whether the places that the other side chose are as high here as the lowest own one."""
    lowest = np.take_along_axis(values, own, axis=-1).min(axis=-1, keepdims=True)
    with np.errstate(invalid="ignore"):
        slack = compare.atol + compare.rtol * np.abs(lowest)
        floor = np.where(np.isfinite(lowest), lowest - slack, lowest)
    return bool((np.take_along_axis(values, chosen, axis=-1) >= floor).all())


def _is_bfloat16(signature: Signature, name: str) -> bool:
    spec = signature.output(name)
    return spec is not None and spec.dtype == "bfloat16"


def _widened(bits: Array) -> Array:
    return (bits.astype(np.uint32) << 16).view(np.float32)
