"""PP-OCRv4's models as subjects: as published, and with weights changed a little."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path

import numpy as np

from loader.params import ParamsFile, write_params
from loader.program import read_program
from paddlewheel.bench.reference import run_alone
from paddlewheel.bench.subjects import VERSIONS, Subject
from paddlewheel.demo.models import PARAMS, PROGRAM, copy_model, find_published, round_weights
from registry.inference import Array

SHAPES = {"ocr-cls": (1, 3, 48, 192), "ocr-rec": (1, 3, 48, 320)}
_SCALES = {"3": 1.01, "4": 0.99}


async def ocr_subject(model: str, folder: Path) -> Subject:
    """``ocr-cls`` (direction of a line) or ``ocr-rec`` (its text).

    Version 1 is the model as published, 2 has its weights rounded to bfloat16, in 3 and 4 they are
    scaled by a hundredth. What each must answer is computed by Paddle in a process of its own.
    Raises `NoDemoModels`, `NoReference`, `TooAlike`.
    """
    published = find_published()
    source = published.direction if model == "ocr-cls" else published.recognition
    folders = await asyncio.to_thread(_make_versions, source, folder)
    inputs = {"x": blocks(SHAPES[model])}
    expected = await run_alone(folders, inputs, folder)
    # As JSON a direction's input is half a megabyte, a recognition's scores are three.
    json_every = 4 if model == "ocr-cls" else 8
    return Subject(folders, inputs, expected, rtol=1e-4, atol=2e-5, json_every=json_every)


def blocks(shape: tuple[int, int, int, int]) -> Array:
    """Squares of 8 by 8 pixels of random colours, -1 to 1.

    Neither model is sure what it sees, so that a small change of weights moves its scores.
    """
    batch, channels, height, width = shape
    coarse = np.random.default_rng(12).random((batch, channels, height // 8, width // 8))
    fine = coarse.repeat(8, axis=2).repeat(8, axis=3)
    return (fine * 2 - 1).astype(np.float32)


def _make_versions(source: Path, folder: Path) -> dict[str, Path]:
    made = {
        "1": copy_model(source, folder / "1"),
        "2": round_weights(source, folder / "2"),
        **{version: _scaled(source, folder / version, by) for version, by in _SCALES.items()},
    }
    assert tuple(made) == VERSIONS
    return made


def _scaled(source: Path, to: Path, by: float) -> Path:
    """The same program with the matrices and kernels of its weights multiplied by ``by``."""
    to.mkdir(parents=True)
    shutil.copyfile(source / PROGRAM, to / PROGRAM)
    names = [tensor.name for tensor in read_program(source / PROGRAM).persistables]
    weights = ParamsFile.open(source / PARAMS, names)
    write_params(
        to / PARAMS,
        {
            name: array * np.float32(by) if array.ndim > 1 and array.dtype == np.float32 else array
            for name, array in weights.items()
        },
    )
    return to
