"""JSON values to feeds and back for the protocols that leave shapes to be seen."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from typing import Any, cast

from registry.inference import Array, BadInput, Signature, TensorSpec
from router.tensors import checked_shape, dtype_of, from_json, infer_shape, json_ready


def feeds_from(values: Mapping[str, object], signature: Signature) -> dict[str, Array]:
    """Return an array for each input from nested lists. Raises `BadInput`."""
    unknown = [name for name in values if signature.input(name) is None]
    missing = [spec.name for spec in signature.inputs if spec.name not in values]
    if unknown or missing:
        known = ", ".join(repr(spec.name) for spec in signature.inputs)
        raise BadInput(
            f"inputs: this model takes {known}"
            + (f"; unknown: {', '.join(name[:128] for name in unknown)}" if unknown else "")
            + (f"; missing: {', '.join(missing)}" if missing else "")
        )
    return {spec.name: _feed(values[spec.name], spec) for spec in signature.inputs}


def only_input(signature: Signature) -> TensorSpec:
    """Return the one input. Raises `BadInput` for a model with several."""
    if len(signature.inputs) != 1:
        known = ", ".join(repr(spec.name) for spec in signature.inputs)
        raise BadInput(f"inputs: want an object with {known}")
    return signature.inputs[0]


def values_from(outputs: Mapping[str, Array], signature: Signature) -> dict[str, Any]:
    """Return outputs in the signature's order as values that orjson writes."""
    values: dict[str, Any] = {}
    for spec in signature.outputs:
        array = outputs[spec.name]
        if array.dtype == object and spec.name.endswith("_bytes"):
            values[spec.name] = _to_b64(array.tolist())
        else:
            values[spec.name] = json_ready(array, dtype_of(array, spec.dtype))
    return values


def _feed(value: object, spec: TensorSpec) -> Array:
    data = _from_b64(value) if spec.dtype == "bytes" else value
    if isinstance(data, str | bytes) and all(dim in (1, -1) for dim in spec.shape):
        for _ in spec.shape:  # one file need not be put into lists
            data = [data]
    shape = checked_shape(infer_shape(data, len(spec.shape)), spec)
    return from_json(data, shape, spec)


def _from_b64(value: object) -> object:
    if isinstance(value, list):
        return [_from_b64(item) for item in cast("list[object]", value)]
    if isinstance(value, dict):
        item = cast("dict[str, object]", value)
        text = item.get("b64")
        if len(item) == 1 and isinstance(text, str):
            try:
                return base64.b64decode(text, validate=True)
            except binascii.Error as exc:
                raise BadInput(f"b64: {exc}") from exc
    return value


def _to_b64(value: Any) -> Any:
    if isinstance(value, list):
        return [_to_b64(item) for item in value]
    return {"b64": base64.b64encode(value).decode()}
