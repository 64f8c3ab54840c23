"""TensorFlow Serving's REST predict, row and column form, and its status and metadata.

Source: tensorflow.org/tfx/serving/api_rest.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import orjson

from registry.inference import Array, BadInput, Signature, TensorSpec
from router.protocols.exchange import Answer, Rendered, parse_json
from router.protocols.plain import feeds_from, only_input, values_from

_DTYPES: Mapping[str, str] = {
    "bool": "DT_BOOL", "uint8": "DT_UINT8", "int8": "DT_INT8", "int16": "DT_INT16",
    "int32": "DT_INT32", "int64": "DT_INT64", "float16": "DT_HALF", "bfloat16": "DT_BFLOAT16",
    "float32": "DT_FLOAT", "float64": "DT_DOUBLE", "uint16": "DT_UINT16",
    "uint32": "DT_UINT32", "uint64": "DT_UINT64", "bytes": "DT_STRING",
}  # fmt: skip
_SIGNATURE_NAMES = ("", "serving_default")


@dataclass(frozen=True, slots=True)
class Predict:
    """An understood predict request. See `router.protocols.exchange.Exchange`."""

    feeds: Mapping[str, Array]
    rows: int | None
    """How many instances the row form had; ``None`` for the column form."""
    timeout_s: float | None = None

    def render(self, answer: Answer) -> Rendered:
        """Return ``predictions`` for rows, ``outputs`` for columns; one output loses its name."""
        values = values_from(answer.outputs, answer.signature)
        body: Any = values
        if self.rows is not None:
            for name, value in values.items():
                if _length(value) != self.rows:
                    raise BadInput(
                        f"output {name!r} has no row for each of the {self.rows} instances; "
                        "use the column form, inputs"
                    )
            if len(values) > 1:
                body = [
                    {name: value[row] for name, value in values.items()} for row in range(self.rows)
                ]
        if len(values) == 1:
            (body,) = values.values()
        key = "outputs" if self.rows is None else "predictions"
        return Rendered(orjson.dumps({key: body}, option=orjson.OPT_SERIALIZE_NUMPY))


def parse_predict(body: bytes, _header_length: str | None, signature: Signature) -> Predict:
    """Understand one ``:predict`` body. Raises `BadInput`."""
    document = parse_json(body)
    if not isinstance(document, dict):
        raise BadInput("the request: want a JSON object with instances or inputs")
    doc = cast("dict[str, object]", document)
    name = doc.get("signature_name", "")
    if name not in _SIGNATURE_NAMES:
        raise BadInput("signature_name: the only one is serving_default")
    if ("instances" in doc) == ("inputs" in doc):
        raise BadInput("want exactly one of instances (rows) and inputs (columns)")
    if "inputs" in doc:
        return Predict(feeds_from(_columns(doc["inputs"], signature), signature), None)
    instances = doc["instances"]
    if not isinstance(instances, list) or not instances:
        raise BadInput("instances: want a list of at least one")
    rows = cast("list[object]", instances)
    return Predict(feeds_from(_from_rows(rows, signature), signature), len(rows))


def _columns(inputs: object, signature: Signature) -> dict[str, object]:
    if isinstance(inputs, dict) and not _is_b64(cast("dict[str, object]", inputs)):
        return cast("dict[str, object]", inputs)
    return {only_input(signature).name: inputs}


def _from_rows(rows: list[object], signature: Signature) -> dict[str, object]:
    first = rows[0]
    if not isinstance(first, dict) or _is_b64(cast("dict[str, object]", first)):
        return {only_input(signature).name: rows}
    names = cast("dict[str, object]", first).keys()
    columns: dict[str, list[object]] = {name: [] for name in names}
    for row in rows:
        if not isinstance(row, dict) or cast("dict[str, object]", row).keys() != names:
            raise BadInput("instances: want the same inputs in every one")
        for name, value in cast("dict[str, object]", row).items():
            columns[name].append(value)
    return dict(columns)


def _is_b64(item: Mapping[str, object]) -> bool:
    return len(item) == 1 and "b64" in item


def _length(value: Any) -> int | None:
    shape = getattr(value, "shape", None)
    if shape is not None:
        return int(shape[0]) if shape else None
    return len(value) if isinstance(value, list) else None


def metadata(model: str, version: str, signature: Signature) -> dict[str, Any]:
    """Return ``GET /v1/models/{m}/metadata``."""
    definition = {
        "inputs": {spec.name: _tensor_info(spec) for spec in signature.inputs},
        "outputs": {spec.name: _tensor_info(spec) for spec in signature.outputs},
        "method_name": "tensorflow/serving/predict",
    }
    return {
        "model_spec": {"name": model, "signature_name": "", "version": version},
        "metadata": {"signature_def": {"signature_def": {"serving_default": definition}}},
    }


def _tensor_info(spec: TensorSpec) -> dict[str, Any]:
    return {
        "dtype": _DTYPES[spec.dtype],
        "tensor_shape": {
            "dim": [{"size": str(dim), "name": ""} for dim in spec.shape],
            "unknown_rank": False,
        },
        "name": spec.name,
    }
