"""The short form: inputs by name in, outputs by name out, nothing to declare."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import orjson

from registry.inference import Array, BadInput, Signature
from router.protocols.exchange import Answer, Rendered, parse_json
from router.protocols.plain import feeds_from, only_input, values_from


@dataclass(frozen=True, slots=True)
class ShortRequest:
    """An understood request. See `router.protocols.exchange.Exchange`."""

    feeds: Mapping[str, Array]
    timeout_s: float | None = None

    def render(self, answer: Answer) -> Rendered:
        """Return ``{"model", "version", "outputs": {name: nested lists}}``."""
        document = {
            "model": answer.model,
            "version": answer.version,
            "outputs": values_from(answer.outputs, answer.signature),
        }
        return Rendered(orjson.dumps(document, option=orjson.OPT_SERIALIZE_NUMPY))


def parse_short(body: bytes, _header_length: str | None, signature: Signature) -> ShortRequest:
    """Understand ``{"inputs": {...}}``; for a model with one input also a bare list.

    Raises `BadInput`.
    """
    document = parse_json(body)
    inputs: object = document
    if isinstance(document, dict):
        doc = cast("dict[str, object]", document)
        if "inputs" not in doc:
            raise BadInput("the request: want inputs")
        inputs = doc["inputs"]
    if isinstance(inputs, dict):
        return ShortRequest(feeds_from(cast("dict[str, object]", inputs), signature))
    if not isinstance(inputs, list):
        raise BadInput("inputs: want an object of tensors, or a list for a model with one input")
    return ShortRequest(feeds_from({only_input(signature).name: inputs}, signature))
