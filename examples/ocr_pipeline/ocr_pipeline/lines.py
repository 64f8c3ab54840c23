"""Lines of text cut out of an image, and the inputs of the models that look at one line.

Source: PaddleOCR ``tools/infer/utility.py`` (``get_rotate_crop_image``), ``predict_cls.py`` and
``predict_rec.py`` (Apache-2.0): height 48, values scaled to -1..1, zeros on the right.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

Array = npt.NDArray[Any]

HEIGHT_PX = 48
WIDTH_MAX_PX = 1600
RECOGNITION_WIDTH_PX = 320
"""At least."""
DIRECTION_WIDTH_PX = 192
TURNED_SURE = 0.9
"""How sure the direction model has to be before a line is turned."""
_UPRIGHT_RATIO = 1.5
"""A box so much higher than wide holds a line that runs up or down."""


def cut(pixels: Array, boxes: Array) -> tuple[Array, Array]:
    """All lines, straightened and 48 pixels high.

    pixels: uint8 ``(height, width, 3)``; boxes: ``(n, 4, 2)``. Returns uint8 ``(n, 48, w, 3)``,
    zero on the right of shorter lines, and their widths, int64 ``(n,)``.
    """
    image = Image.fromarray(pixels)
    lines = [_cut_one(image, box.astype(np.float64)) for box in boxes]
    widths = np.array([line.shape[1] for line in lines], np.int64)
    padded = np.zeros((len(lines), HEIGHT_PX, int(widths.max(initial=1)), 3), np.uint8)
    for row, line in zip(padded, lines, strict=True):
        row[:, : line.shape[1]] = line
    return padded, widths


def _cut_one(image: Image.Image, box: Array) -> Array:
    width = max(1, round(max(_length(box[0], box[1]), _length(box[3], box[2]))))
    height = max(1, round(max(_length(box[0], box[3]), _length(box[1], box[2]))))
    along, down = (box[1] - box[0]) / width, (box[3] - box[0]) / height
    where = (along[0], down[0], box[0][0], along[1], down[1], box[0][1])
    line = image.transform((width, height), Image.Transform.AFFINE, where, Image.Resampling.BICUBIC)
    if height / width >= _UPRIGHT_RATIO:
        line = line.transpose(Image.Transpose.ROTATE_90)
    wide = min(WIDTH_MAX_PX, max(1, math.ceil(HEIGHT_PX * line.width / line.height)))
    return np.asarray(line.resize((wide, HEIGHT_PX), Image.Resampling.BILINEAR))


def _length(one: Array, other: Array) -> float:
    return float(np.linalg.norm(one - other))


def direction_input(lines: Array, widths: Array) -> Array:
    """float32 ``(n, 3, 48, 192)``: longer lines are squeezed."""
    tensor = np.zeros((len(lines), 3, HEIGHT_PX, DIRECTION_WIDTH_PX), np.float32)
    for to, line, width in zip(tensor, lines, widths.tolist(), strict=True):
        shown = line[:, :width]
        if width > DIRECTION_WIDTH_PX:
            squeezed = Image.fromarray(shown).resize(
                (DIRECTION_WIDTH_PX, HEIGHT_PX), Image.Resampling.BILINEAR
            )
            shown = np.asarray(squeezed)
        to[:, :, : shown.shape[1]] = _scaled(shown)
    return tensor


def turn_upright(lines: Array, widths: Array, directions: Array) -> Array:
    """The lines, with those turned that the direction model is sure stand on their head.

    directions: ``(n, 2)``, the scores of 0 and 180 degrees.
    """
    turned = lines.copy()
    for line, width, scores in zip(turned, widths.tolist(), directions, strict=True):
        if scores[1] > TURNED_SURE:
            line[:, :width] = line[::-1, :width][:, ::-1].copy()
    return turned


def recognition_input(lines: Array, widths: Array) -> Array:
    """float32 ``(n, 3, 48, w)``, w at least 320 and a multiple of 64.

    The first run of each shape costs a multiple of the next ones: fewer shapes, fewer of those.
    """
    wide = max(RECOGNITION_WIDTH_PX, -(-lines.shape[2] // 64) * 64 if len(lines) else 0)
    tensor = np.zeros((len(lines), 3, HEIGHT_PX, wide), np.float32)
    for to, line, width in zip(tensor, lines, widths.tolist(), strict=True):
        to[:, :, :width] = _scaled(line[:, :width])
    return tensor


def _scaled(line: Array) -> Array:
    """uint8 ``(h, w, 3)`` to float32 ``(3, h, w)`` in -1..1, blue first."""
    return (line[:, :, ::-1].astype(np.float32) / 255 - 0.5).transpose(2, 0, 1) / 0.5
