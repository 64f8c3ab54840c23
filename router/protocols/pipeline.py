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


def parse_pipeline_predict(
    body: bytes, content_type: str | None, signature: Signature
) -> PredictRequest:
    """Understand ``{"inputs": {...}}``, or a raw body for a pipeline of one BYTES input.

    An image is always raw. So are bytes of no type (``application/octet-stream``) where they can
    be: some clients call JSON so. Raises `BadInput`.
    """
    kind = (content_type or "").partition(";")[0].strip().lower()
    is_media = kind.startswith(("image/", "audio/", "video/"))
    spec = signature.inputs[0]
    takes_raw = (
        len(signature.inputs) == 1
        and spec.dtype == "bytes"
        and all(d in (1, -1) for d in spec.shape)
    )
    if is_media and not takes_raw:
        raise BadInput(
            f"a body of type {kind} is for pipelines whose one input is a BYTES element; send JSON"
        )
    if not is_media and not (takes_raw and kind == "application/octet-stream"):
        return PredictRequest(parse_short(body, None, signature).feeds)
    if not body:
        raise BadInput("the body is empty")
    feed = np.empty(tuple(1 for _ in spec.shape), dtype=np.object_)
    feed.fill(body)
    return PredictRequest({spec.name: feed})
