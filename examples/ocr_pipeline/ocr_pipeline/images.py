"""Encoded images to pixels, and pixels to the detection model's input.

Source: PaddleOCR ``tools/infer/predict_det.py`` (Apache-2.0): sides are multiples of 32, values are
scaled by ImageNet's mean and deviation, channels stand blue first as OpenCV reads images.
"""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

Array = npt.NDArray[Any]

PIXELS_MAX = 40_000_000
"""More than a camera makes; a small file may claim to be larger than any memory."""
LONG_SIDE_PX = 960
SHORT_SIDE_PX = 320
"""Smaller images are enlarged, so that their letters are of a size that the model knows."""
_MEAN = np.array([0.485, 0.456, 0.406], np.float32)
_DEVIATION = np.array([0.229, 0.224, 0.225], np.float32)


def decode(data: bytes) -> Array:
    """An encoded image as uint8 ``(height, width, 3)``, red first, upright by its own EXIF.

    Raises `ValueError` for what is no image, is broken, or is too large.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.width * image.height > PIXELS_MAX:
                raise ValueError(f"the image has over {PIXELS_MAX} pixels")
            upright = ImageOps.exif_transpose(image)
            return np.asarray(_flat(upright), np.uint8)
    except (UnidentifiedImageError, Image.DecompressionBombError) as exc:
        raise ValueError(f"not an image: {exc}") from exc
    except (OSError, SyntaxError) as exc:
        raise ValueError(f"the image is broken: {exc}") from exc


def _flat(image: Image.Image) -> Image.Image:
    """Without transparency: on white, as paper would show it."""
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        with_alpha = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, with_alpha).convert("RGB")
    return image.convert("RGB")


def detection_input(pixels: Array) -> Array:
    """float32 ``(1, 3, h, w)`` with h and w multiples of 32."""
    height, width = pixels.shape[:2]
    scale = min(1.0, LONG_SIDE_PX / max(height, width))
    if min(height, width) * scale < SHORT_SIDE_PX:
        scale = min(SHORT_SIDE_PX / min(height, width), LONG_SIDE_PX / max(height, width))
    size = tuple(max(32, round(side * scale / 32) * 32) for side in (width, height))
    resized = Image.fromarray(pixels).resize((size[0], size[1]), Image.Resampling.BILINEAR)
    blue_first = np.asarray(resized, np.float32)[:, :, ::-1] / 255
    scaled = (blue_first - _MEAN) / _DEVIATION
    return np.ascontiguousarray(scaled.transpose(2, 0, 1)[np.newaxis], np.float32)
