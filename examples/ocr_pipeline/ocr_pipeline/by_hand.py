"""The same three models run by hand, one after the other in one process, with plain Paddle.

What the pipeline is held against. Slow to import: it imports Paddle.

    python -m ocr_pipeline.by_hand MODELS_DIR IMAGE [IMAGE ...]

MODELS_DIR is the folder ``models`` that `ocr_pipeline.prepare` makes. Prints a line of JSON for
each image and version of the recognition model: ``{"image", "rec", "texts": [...]}``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ocr_pipeline import boxes, ctc, images, lines

Array = npt.NDArray[Any]


class Reader:
    """Three predictors on one thread."""

    def __init__(self, *, det: Path, cls: Path, rec: Path) -> None:
        """Each a folder with ``inference.pdmodel`` and ``inference.pdiparams``."""
        self._det, self._cls, self._rec = map(_predictor, (det, cls, rec))

    def use(self, rec: Path) -> None:
        """Take another recognition model from now on."""
        self._rec = _predictor(rec)

    def read(self, encoded: bytes) -> list[str]:
        """The texts in one image, in reading order."""
        pixels = images.decode(encoded)
        probability = _run(self._det, images.detection_input(pixels))
        found = boxes.find_boxes(probability[0, 0], height=pixels.shape[0], width=pixels.shape[1])
        if not len(found):
            return []
        cut, widths = lines.cut(pixels, found)
        directions = _run(self._cls, lines.direction_input(cut, widths))
        turned = lines.turn_upright(cut, widths, directions)
        scores = _run(self._rec, lines.recognition_input(turned, widths))
        return ctc.decode(scores, ctc.alphabet())[0]


def _predictor(folder: Path) -> Any:
    from paddle import inference

    config = inference.Config(
        str(folder / "inference.pdmodel"), str(folder / "inference.pdiparams")
    )
    config.disable_glog_info()
    config.set_cpu_math_library_num_threads(1)
    return inference.create_predictor(config)


def _run(predictor: Any, x: Array) -> Array:
    (name,) = predictor.get_input_names()
    predictor.get_input_handle(name).copy_from_cpu(x)
    predictor.run()
    output = predictor.get_output_handle(predictor.get_output_names()[0])
    return np.asarray(output.copy_to_cpu())


def main(arguments: list[str]) -> None:
    models, *images_given = map(Path, arguments)
    det, cls = models / "ocr-det" / "1", models / "ocr-cls" / "1"
    first, *others = sorted((models / "ocr-rec").iterdir())
    reader = Reader(det=det, cls=cls, rec=first)
    for version in (first, *others):
        if version is not first:
            reader.use(version)
        for path in images_given:
            texts = reader.read(path.read_bytes())
            read = {"image": path.name, "rec": version.name, "texts": texts}
            print(json.dumps(read, ensure_ascii=False), flush=True)


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit("usage: python -m ocr_pipeline.by_hand MODELS_DIR IMAGE [IMAGE ...]")
    main(sys.argv[1:])
