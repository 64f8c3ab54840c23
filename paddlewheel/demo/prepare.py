"""The demo's models, documents and a request as files, to try things by hand."""

from __future__ import annotations

from pathlib import Path

from paddlewheel.bench.checks import infer_body
from paddlewheel.demo import ocr
from paddlewheel.demo.documents import document
from paddlewheel.demo.models import copy_model, cut_weights, find_published, round_weights
from paddlewheel.demo.traffic import CLS_MODEL


def prepare(folder: Path) -> None:
    """Fill ``folder``, which must not exist or be empty. Raises `NoDemoModels`, `OSError`.

    Three versions of the direction model (3 is cut short), a document that has each one live, and
    ``request.json`` with a text that is upside down.
    """
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    published = find_published().direction
    versions = {
        "1": copy_model(published, folder / CLS_MODEL / "1"),
        "2": round_weights(published, folder / CLS_MODEL / "2"),
        "3": cut_weights(published, folder / CLS_MODEL / "3"),
    }
    for live in versions:
        text = document(CLS_MODEL, live, {k: v for k, v in versions.items() if k in {"1", live}})
        (folder / f"live-{live}.yaml").write_text(text)
    image = ocr.render("Paddlewheel", turned=True)
    _, body = infer_body({"x": ocr.cls_input(image)}, binary=False)
    (folder / "request.json").write_bytes(body)
