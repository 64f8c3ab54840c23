"""The documents that the demo writes, as the text a user would write."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from paddlewheel.demo import ocr
from paddlewheel.demo.traffic import CANARY_HEADER, CLS_MODEL, REC_MODEL

_WIDTH_PX = {REC_MODEL: ocr.REC_WIDTH_PX, CLS_MODEL: ocr.CLS_WIDTH_PX}


def document(
    model: str, live: str, folders: Mapping[str, Path], *, canary: str | None = None
) -> str:
    """A model document as YAML.

    folders: for each version under ``versions``, where its files lie.
    canary: a version for requests that carry the demo's canary header.
    """
    lines = [
        "apiVersion: paddlewheel/v1",
        "kind: Model",
        f"metadata: {{name: {model}}}",
        "spec:",
        f'  live: "{live}"',
        "  versions:",
        *(
            f'    - {{version: "{version}", source: "{folder.as_uri()}"}}'
            for version, folder in folders.items()
        ),
    ]
    if canary is not None:
        name, value = CANARY_HEADER
        lines += [
            "  canary:",
            f'    version: "{canary}"',
            f'    rules: [{{header: {{name: {name}, equals: "{value}"}}}}]',
        ]
    lines += [
        f"  warmup: {{shapes: {{x: [1, 3, {ocr.HEIGHT_PX}, {_WIDTH_PX[model]}]}}}}",
        "  rollback: {bake_s: 600}",
        "",
    ]
    return "\n".join(lines)
