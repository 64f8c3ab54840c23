"""Text images for PP-OCR, and texts from its outputs, as PP-OCR's own tools do both.

Source: PaddleOCR ``tools/infer/predict_rec.py`` and ``predict_cls.py`` (Apache-2.0): height 48,
values scaled to -1..1, channels first, zero padding on the right; greedy CTC with the blank at 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from registry.inference import Array

Float32 = npt.NDArray[np.float32]

HEIGHT_PX = 48
REC_WIDTH_PX = 320
CLS_WIDTH_PX = 192
CLS_LABELS = ("0", "180")
"""What the direction model's two outputs stand for: degrees by which the text is turned."""


def render(text: str, *, size_px: int = 40, turned: bool = False) -> Image.Image:
    """Black text on white in Pillow's built-in font, upside down when ``turned``."""
    font = ImageFont.load_default(size=size_px)
    left, top, right, bottom = font.getbbox(text)
    margin = size_px // 4
    size = (math.ceil(right - left) + 2 * margin, math.ceil(bottom - top) + 2 * margin)
    image = Image.new("RGB", size, "white")
    ImageDraw.Draw(image).text((margin - left, margin - top), text, font=font, fill="black")
    return image.transpose(Image.Transpose.ROTATE_180) if turned else image


def _to_tensor(image: Image.Image, width_px: int) -> Float32:
    """One image as float32 ``(1, 3, 48, width_px)``, blue first as OpenCV reads images."""
    resized_px = min(math.ceil(HEIGHT_PX * image.width / image.height), width_px)
    resized = image.resize((resized_px, HEIGHT_PX), Image.Resampling.BILINEAR)
    pixels = np.asarray(resized, dtype=np.float32)[:, :, ::-1].transpose(2, 0, 1)
    tensor = np.zeros((1, 3, HEIGHT_PX, width_px), dtype=np.float32)
    tensor[0, :, :, :resized_px] = (pixels / 255 - 0.5) / 0.5
    return tensor


def rec_input(image: Image.Image) -> Float32:
    """The recognition model's input: float32 ``(1, 3, 48, w)``, w at least 320."""
    width_px = max(REC_WIDTH_PX, int(HEIGHT_PX * image.width / image.height))
    return _to_tensor(image, width_px)


def cls_input(image: Image.Image) -> Float32:
    """The direction model's input: float32 ``(1, 3, 48, 192)``."""
    return _to_tensor(image, CLS_WIDTH_PX)


def read_alphabet(path: Path) -> tuple[str, ...]:
    """The character of each of the recognition model's classes.

    Class 0 is the CTC blank, then come the lines of the file, then a space.
    """
    lines = path.read_text(encoding="utf-8").split("\n")
    return ("", *(line.strip("\r") for line in lines if line), " ")


def decode_text(scores: Array, alphabet: Sequence[str]) -> str:
    """Greedy CTC: the best class of each step, repeats merged, blanks dropped.

    scores: ``(1, steps, classes)``, the recognition model's output.
    """
    if scores.ndim != 3 or scores.shape[0] != 1 or scores.shape[2] != len(alphabet):
        raise ValueError(f"want scores (1, steps, {len(alphabet)}), got {scores.shape}")
    best = scores[0].argmax(axis=1)
    kept = np.concatenate(([True], best[1:] != best[:-1])) & (best != 0)
    return "".join(alphabet[int(index)] for index in best[kept])


def decode_direction(scores: Array) -> str:
    """``"0"`` or ``"180"``. scores: ``(1, 2)``, the direction model's output."""
    if scores.shape != (1, len(CLS_LABELS)):
        raise ValueError(f"want scores (1, {len(CLS_LABELS)}), got {scores.shape}")
    return CLS_LABELS[int(scores[0].argmax())]
