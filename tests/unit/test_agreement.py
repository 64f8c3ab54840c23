"""When the answers of two versions agree."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from registry.inference import Signature, TensorSpec
from registry.spec_canary import Compare
from router.agreement import agree
from router.tensors import to_bfloat16

NAN, INF = float("nan"), float("inf")
PLAIN, TOP1, TOP2 = Compare(), Compare(topk=1), Compare(topk=2)
SIGNATURE = Signature((), (TensorSpec("y", "float32", (-1, -1)),))


def same(mine: Any, other: Any, compare: Compare = PLAIN, dtype: str = "float32") -> bool:
    return agree({"y": np.array(mine, dtype)}, {"y": np.array(other, dtype)}, compare, SIGNATURE)


CASES: dict[str, tuple[Any, Any, Compare, str, bool]] = {
    "equal": ([1, 2], [1, 2], PLAIN, "float32", True),
    "within rtol": ([1000.0], [1000.9], PLAIN, "float32", True),
    "beyond rtol": ([1000.0], [1001.2], PLAIN, "float32", False),
    "within atol": ([0.0], [9e-6], PLAIN, "float32", True),
    "beyond atol": ([0.0], [2e-5], PLAIN, "float32", False),
    "half precision": ([1.0], [1.001], Compare(rtol=0.01), "float16", True),
    "NaN in both": ([NAN, 1], [NAN, 1], PLAIN, "float32", True),
    "NaN in one": ([1, 1], [NAN, 1], PLAIN, "float32", False),
    "infinities": ([INF], [INF], PLAIN, "float32", True),
    "infinities apart": ([INF], [-INF], PLAIN, "float32", False),
    "whole numbers": ([1, 2], [1, 2], PLAIN, "int64", True),
    "whole numbers have no tolerance": ([1000000], [1000001], PLAIN, "int64", False),
    "truth": ([True], [False], PLAIN, "bool", False),
    "other rows": ([[1, 2]], [[1, 2], [1, 2]], PLAIN, "float32", False),
    "the same first": ([[0.1, 0.7, 0.2]], [[0.3, 0.4, 0.3]], TOP1, "float32", True),
    "another first": ([[0.1, 0.7, 0.2]], [[0.5, 0.4, 0.1]], TOP1, "float32", False),
    "one row of two": ([[0, 1], [0, 1]], [[0, 1], [1, 0]], TOP1, "float32", False),
    "the first two, in any order": ([[3, 2, 1]], [[2, 3, 1]], TOP2, "float32", True),
    "one of two": ([[3, 2, 1]], [[3, 1, 2]], TOP2, "float32", False),
    "a tie": ([[1.0, 1.00001, 0]], [[1.00001, 1.0, 0]], TOP1, "float32", True),
    "a tie on one side only": ([[1.0, 1.00001, 0]], [[5.0, 1.0, 0]], TOP1, "float32", False),
    "fewer than k": ([[1.0]], [[9.0]], TOP2, "float32", True),
    "top of NaN in one": ([[NAN, 1, 0]], [[2, 1, 0]], TOP1, "float32", False),
    "top beside NaN in both": ([[NAN, 1, 0]], [[NAN, 7, 0]], TOP1, "float32", True),
    "a number by itself": (1.0, 1.0, TOP1, "float32", True),
    "labels under topk": ([3], [4], TOP1, "int64", False),
    "nothing": ([[]], [[]], TOP1, "float32", True),
}  # fmt: skip


@pytest.mark.parametrize(
    ("mine", "other", "compare", "dtype", "wanted"), CASES.values(), ids=CASES.keys()
)
def test_agreement(mine: Any, other: Any, compare: Compare, dtype: str, wanted: bool) -> None:
    assert same(mine, other, compare, dtype) is wanted


def test_bfloat16_is_compared_by_value_not_by_bits() -> None:
    signature = Signature((), (TensorSpec("y", "bfloat16", (-1,)),))
    mine = {"y": to_bfloat16(np.array([1.0, 2.0], np.float32), "y")}
    near = {"y": to_bfloat16(np.array([1.01, 2.0], np.float32), "y")}
    assert agree(mine, near, Compare(rtol=0.02), signature)
    assert not agree(mine, near, Compare(rtol=0.001), signature)


def test_outputs_go_together_by_name_else_by_place() -> None:
    a, b = np.array([1.0]), np.array([2.0])
    assert agree({"p": a, "q": b}, {"q": b, "p": a}, PLAIN, SIGNATURE)
    assert agree({"p": a, "q": b}, {"fetch_0": a, "fetch_1": b}, PLAIN, SIGNATURE)
    assert not agree({"p": a, "q": b}, {"fetch_0": b, "fetch_1": a}, PLAIN, SIGNATURE)
    assert not agree({"p": a}, {"p": a, "q": b}, PLAIN, SIGNATURE)
    assert not agree({"p": a}, {"p": a.astype(np.float32)}, PLAIN, SIGNATURE)


rows = st.lists(
    st.lists(st.sampled_from([0.0, 1.0, 2.0, 5.0, NAN, -INF]), min_size=4, max_size=4),
    min_size=1,
    max_size=4,
)


@given(rows, rows, st.sampled_from([PLAIN, TOP1, TOP2]))
def test_it_never_raises_is_reflexive_and_topk_is_symmetric(
    mine: list[list[float]], other: list[list[float]], compare: Compare
) -> None:
    assert same(mine, mine, compare)
    if compare.topk is not None:
        assert same(mine, other, compare) == same(other, mine, compare)
