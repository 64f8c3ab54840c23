"""Everything to try the pipeline with, as files in a folder.

    python -m ocr_pipeline.prepare DIR

Makes ``models/ocr-det/1``, ``ocr-cls/1``, ``ocr-rec/1`` and ``ocr-rec/2`` (the same weights rounded
to bfloat16) under DIR, a document of each model and the pipeline's own under ``documents``, and
``rec-2.yaml``, which swaps the recognition model.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path

from paddlewheel.demo.models import copy_model, find_published, round_weights

MODELS = ("ocr-det", "ocr-cls", "ocr-rec")
PIPELINE = Path(__file__).parent / "pipeline.yaml"
_DETECTION = "ch_PP-OCRv4_det_infer"


def prepare(folder: Path) -> Mapping[str, Mapping[str, Path]]:
    """Fill ``folder``; returns the folder of each model's versions.

    Raises `paddlewheel.demo.models.NoDemoModels`, `OSError`.
    """
    published = find_published()
    models = folder.resolve() / "models"
    versions = {
        "ocr-det": {
            "1": copy_model(published.recognition.parent / _DETECTION, models / "ocr-det" / "1")
        },
        "ocr-cls": {"1": copy_model(published.direction, models / "ocr-cls" / "1")},
        "ocr-rec": {
            "1": copy_model(published.recognition, models / "ocr-rec" / "1"),
            "2": round_weights(published.recognition, models / "ocr-rec" / "2"),
        },
    }
    documents = folder / "documents"
    documents.mkdir()
    for name, folders in versions.items():
        (documents / f"{name}.json").write_text(document(name, "1", folders))
    (documents / "pipeline.yaml").write_text(PIPELINE.read_text())
    (folder / "rec-2.json").write_text(document("ocr-rec", "2", versions["ocr-rec"]))
    return versions


def document(name: str, live: str, versions: Mapping[str, Path]) -> str:
    """A model document. Its longest run takes longer than most: a page has many lines."""
    spec = {
        "live": live,
        "versions": [{"version": v, "source": str(path)} for v, path in versions.items()],
        "warmup": {"requests": 1, "shapes": {"x": WARMUP[name]}},
        "limits": {"timeout_s": 60, "hang_s": 50, "drain_s": 70},
    }
    head = {"apiVersion": "paddlewheel/v1", "kind": "Model", "metadata": {"name": name}}
    return json.dumps({**head, "spec": spec}, indent=2) + "\n"


WARMUP = {
    "ocr-det": [1, 3, 320, 640],
    "ocr-cls": [1, 3, 48, 192],
    "ocr-rec": [1, 3, 48, 320],
}

if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m ocr_pipeline.prepare DIR")
    prepare(Path(sys.argv[1]))
