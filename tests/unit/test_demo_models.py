"""The demo's models: rounded weights are bfloat16 values, cut ones are refused."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from loader.params import ParamsError, ParamsFile
from loader.program import read_program
from paddlewheel.demo import models, ocr
from registry.inference import Array


@given(
    hnp.arrays(np.float32, 20, elements=st.floats(-(2.0**120), 2.0**120, width=32, allow_nan=False))
)
def test_rounding_is_that_of_bfloat16(values: Array) -> None:
    rounded = models.to_bfloat16(values)
    assert rounded.dtype == np.float32
    assert np.array_equal(rounded, values.astype(ml_dtypes.bfloat16).astype(np.float32))


@pytest.mark.parametrize(("tie", "even"), [(1 + 1 / 256, 1.0), (1 + 3 / 256, 1 + 4 / 256)])
def test_a_value_halfway_between_two_goes_to_the_even_one(tie: float, even: float) -> None:
    assert models.to_bfloat16(np.array([tie], np.float32))[0] == even


def test_what_is_not_float32_stays() -> None:
    counts = np.arange(5, dtype=np.int64)
    assert models.to_bfloat16(counts) is counts


def weights(folder: Path) -> ParamsFile:
    names = [each.name for each in read_program(folder / models.PROGRAM).persistables]
    return ParamsFile.open(folder / models.PARAMS, names)


def test_rounded_weights_keep_program_and_signature(tmp_path: Path) -> None:
    published = models.find_published().recognition
    rounded = models.round_weights(published, tmp_path / "2")
    assert (rounded / models.PROGRAM).read_bytes() == (published / models.PROGRAM).read_bytes()
    before, after = weights(published), weights(rounded)
    assert list(before) == list(after)
    assert any(not np.array_equal(before[name], after[name]) for name in before)
    for name, tensor in before.items():
        assert np.array_equal(after[name], models.to_bfloat16(tensor))
        assert np.allclose(after[name], tensor, rtol=2**-8)


def test_cut_weights_are_what_the_reader_refuses(tmp_path: Path) -> None:
    cut = models.cut_weights(models.find_published().recognition, tmp_path / "3")
    with pytest.raises(ParamsError, match="cut short"):
        weights(cut)


def test_the_alphabet_has_one_character_for_each_class() -> None:
    published = models.find_published()
    (scores,) = read_program(published.recognition / models.PROGRAM).signature.outputs
    assert len(ocr.read_alphabet(published.alphabet)) == scores.shape[-1]
