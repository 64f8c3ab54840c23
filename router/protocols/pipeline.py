"""The short form for pipelines: tensors by name, or one raw body such as an image."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson

from registry.inference import Array, BadInput, Signature
from router.protocols.exchange import Answer, Rendered
from router.protocols.plain import values_from
from router.protocols.short import parse_short

_RAW = ("application/octet-stream",)


@dataclass(frozen=True, slots=True)
class PredictRequest:
    """An understood request. See `router.protocols.exchange.Exchange`."""

    feeds: Mapping[str, Array]
    timeout_s: float | None = None

    def render(self, answer: Answer) -> Rendered:
        """As of `ShortRequest`; the endpoint adds ``versions``."""
        return Rendered(render_predict(answer, {}))


def render_predict(answer: Answer, versions: Mapping[str, str]) -> bytes:
    """Return ``{"model", "version", "versions": {step: version}, "outputs": {name: lists}}``.

    ``model`` is the pipeline, ``version`` the revision of its document.
    """
    document: dict[str, Any] = {
        "model": answer.model,
        "version": answer.version,
        "versions": dict(versions),
        "outputs": values_from(answer.outputs, answer.signature),
    }
    return orjson.dumps(document, option=orjson.OPT_SERIALIZE_NUMPY)


def is_raw(content_type: str | None) -> bool:
    """Whether the body is the one input itself: an image, or bytes of no type."""
    kind = (content_type or "").partition(";")[0].strip().lower()
    return kind.startswith(("image/", "audio/", "video/")) or kind in _RAW


def parse_pipeline_predict(
    body: bytes, content_type: str | None, signature: Signature
) -> PredictRequest:
    """Understand ``{"inputs": {...}}``, or a raw body for a pipeline of one BYTES input.

    Raises `BadInput`.
    """
    if not is_raw(content_type):
        return PredictRequest(parse_short(body, None, signature).feeds)
    spec = signature.inputs[0]
    if len(signature.inputs) != 1 or spec.dtype != "bytes" or any(d > 1 for d in spec.shape):
        raise BadInput(
            f"a body of type {content_type} is for pipelines whose one input is a BYTES element; "
            "send JSON"
        )
    if not body:
        raise BadInput("the body is empty")
    feed = np.empty(tuple(1 for _ in spec.shape), dtype=np.object_)
    feed.fill(body)
    return PredictRequest({spec.name: feed})
