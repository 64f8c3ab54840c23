"""The pipeline's Python steps, as the entry points in ``pyproject.toml`` name them."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ocr_pipeline import boxes, ctc, images, lines
from registry.transforms import transform

Array = npt.NDArray[Any]


@transform(
    inputs={"image": ("bytes", [1])},
    outputs={"pixels": ("uint8", [-1, -1, 3]), "x": ("float32", [1, 3, -1, -1])},
)
def prepare(image: Array) -> dict[str, Array]:
    """An encoded image to its pixels and the detection model's input."""
    pixels = images.decode(image[0])
    return {"pixels": pixels, "x": images.detection_input(pixels)}


@transform(
    inputs={"pixels": ("uint8", [-1, -1, 3]), "probability": ("float32", [-1, -1, -1, -1])},
    outputs={
        "boxes": ("float32", [-1, 4, 2]),
        "lines": ("uint8", [-1, 48, -1, 3]),
        "widths": ("int64", [-1]),
        "x": ("float32", [-1, 3, 48, 192]),
    },
)
def crops(pixels: Array, probability: Array) -> dict[str, Array]:
    """The detected lines of text: where they are, cut out, and as the direction model's input."""
    height, width = pixels.shape[:2]
    found = boxes.find_boxes(probability[0, 0], height=height, width=width)
    cut, widths = lines.cut(pixels, found)
    return {
        "boxes": found,
        "lines": cut,
        "widths": widths,
        "x": lines.direction_input(cut, widths),
    }


@transform(
    inputs={
        "lines": ("uint8", [-1, 48, -1, 3]),
        "widths": ("int64", [-1]),
        "directions": ("float32", [-1, 2]),
    },
    outputs={"x": ("float32", [-1, 3, 48, -1])},
)
def upright(lines: Array, widths: Array, directions: Array) -> dict[str, Array]:
    """Lines on their head are turned; all become the recognition model's input."""
    turned = _lines.turn_upright(lines, widths, directions)
    return {"x": _lines.recognition_input(turned, widths)}


@transform(
    inputs={"scores": ("float32", [-1, -1, -1])},
    outputs={"texts": ("bytes", [-1]), "confidences": ("float32", [-1])},
)
def texts(scores: Array) -> dict[str, Array]:
    """The recognition model's scores as texts, UTF-8."""
    read, sure = ctc.decode(scores, ctc.alphabet())
    encoded = np.empty(len(read), object)
    encoded[:] = [text.encode() for text in read]
    return {"texts": encoded, "confidences": sure}


_lines = lines
"""The module: a transform's input is called so too."""
