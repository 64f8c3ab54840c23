"""The rules of strict and loose, one line a case."""

from __future__ import annotations

import pytest

from loader.compatibility import breach
from registry.errors import Bug
from registry.inference import Signature, TensorSpec


def signature(text: str) -> Signature:
    """``"x f32 -1,3 -> y f32 -1,2; z i64 -1"``"""
    left, _, right = text.partition("->")
    return Signature(_specs(left), _specs(right))


def _specs(text: str) -> tuple[TensorSpec, ...]:
    names = {"f32": "float32", "f16": "float16", "i64": "int64"}
    found: list[TensorSpec] = []
    for one in filter(None, map(str.strip, text.split(";"))):
        name, dtype, *dims = one.split()
        shape = tuple(int(dim) for dim in dims[0].split(",")) if dims else ()
        found.append(TensorSpec(name, names[dtype], shape))
    return tuple(found)


OLD = "x f32 -1,3; n i64 -1 -> y f32 -1,2; z i64 -1"
# what changed: new signature, strict's reason, loose's reason
CASES: dict[str, tuple[str, str | None, str | None]] = {
    "nothing": (OLD, None, None),
    "order only": ("n i64 -1; x f32 -1,3 -> z i64 -1; y f32 -1,2", None, None),
    "an input is gone": (
        "x f32 -1,3 -> y f32 -1,2; z i64 -1", "input 'n' is gone", "input 'n' is gone"),
    "an input is new": (
        "x f32 -1,3; n i64 -1; m i64 -1 -> y f32 -1,2; z i64 -1",
        "input 'm' is new", "input 'm' is new"),
    "an output is gone": (
        "x f32 -1,3; n i64 -1 -> y f32 -1,2", "output 'z' is gone", "output 'z' is gone"),
    "an output is new": (
        "x f32 -1,3; n i64 -1 -> y f32 -1,2; z i64 -1; w f32 -1", "output 'w' is new", None),
    "an input's dtype": (
        "x f16 -1,3; n i64 -1 -> y f32 -1,2; z i64 -1",
        "input 'x' was float32, is float16", "input 'x' was float32, is float16"),
    "an output's dtype": (
        "x f32 -1,3; n i64 -1 -> y f16 -1,2; z i64 -1",
        "output 'y' was float32, is float16", "output 'y' was float32, is float16"),
    "an input's rank": (
        "x f32 -1,3,1; n i64 -1 -> y f32 -1,2; z i64 -1",
        "input 'x' had rank 2, has 3", "input 'x' had rank 2, has 3"),
    "an input takes more": (
        "x f32 -1,-1; n i64 -1 -> y f32 -1,2; z i64 -1",
        "input 'x' was [-1, 3], is [-1, -1]", None),
    "an input takes less": (
        "x f32 8,3; n i64 -1 -> y f32 -1,2; z i64 -1",
        "input 'x' was [-1, 3], is [8, 3]", "input 'x' took [-1, 3], takes only [8, 3]"),
    "an input takes others": (
        "x f32 -1,4; n i64 -1 -> y f32 -1,2; z i64 -1",
        "input 'x' was [-1, 3], is [-1, 4]", "input 'x' took [-1, 3], takes only [-1, 4]"),
    "an output says more": (
        "x f32 -1,3; n i64 -1 -> y f32 8,2; z i64 -1",
        "output 'y' was [-1, 2], is [8, 2]", None),
    "an output says less": (
        "x f32 -1,3; n i64 -1 -> y f32 -1,-1; z i64 -1",
        "output 'y' was [-1, 2], is [-1, -1]", "output 'y' was [-1, 2], is [-1, -1]"),
    "an output's dims": (
        "x f32 -1,3; n i64 -1 -> y f32 -1,5; z i64 -1",
        "output 'y' was [-1, 2], is [-1, 5]", "output 'y' was [-1, 2], is [-1, 5]"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_breach(case: str) -> None:
    new, strict, loose = CASES[case]
    for mode, wanted in (("strict", strict), ("loose", loose), ("none", None)):
        reason = breach(signature(OLD), signature(new), mode)
        if wanted is None:
            assert reason is None, mode
        else:
            assert reason is not None, mode
            assert reason.startswith(wanted), mode


def test_an_unknown_mode_is_a_bug() -> None:
    with pytest.raises(Bug):
        breach(signature(OLD), signature(OLD), "lax")
