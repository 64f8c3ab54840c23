"""Open Inference Protocol v2 over HTTP: JSON, and JSON followed by raw tensors.

Sources: open-inference-protocol, specification/protocol/inference_rest.md; Triton,
docs/protocol/extension_binary_data.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import orjson

from registry.inference import Array, BadInput, Signature, TensorSpec
from router.protocols.exchange import Answer, Rendered, parse_json
from router.tensors import (
    DATATYPES,
    DTYPE_OF,
    checked_shape,
    dtype_of,
    from_bytes,
    from_json,
    json_ready,
    numpy_itemsize,
    raw_bytes,
)

_BINARY_ONLY = frozenset({"float16", "bfloat16"})
_NO_PARAMETERS: Mapping[str, Any] = {}


@dataclass(frozen=True, slots=True)
class InferRequest:
    """An understood infer request. See `Exchange`."""

    feeds: Mapping[str, Array]
    id: str | None = None
    outputs: tuple[tuple[str, bool], ...] = ()
    """Name and whether it goes out raw, in the order asked for."""
    timeout_s: float | None = None

    def render(self, answer: Answer) -> Rendered:
        """Return the response: JSON alone, or JSON and the raw tensors in order."""
        listed: list[dict[str, Any]] = []
        raws: list[bytes | memoryview] = []
        for name, is_binary in self.outputs:
            array = answer.outputs[name]
            spec = answer.signature.output(name)
            dtype = dtype_of(array, spec.dtype if spec else None)
            entry: dict[str, Any] = {
                "name": name,
                "datatype": DATATYPES[dtype],
                "shape": array.shape,
            }
            if is_binary:
                raw = raw_bytes(array)
                entry["parameters"] = {"binary_data_size": len(raw)}
                raws.append(raw)
            else:
                entry["data"] = json_ready(array.reshape(-1), dtype)
            listed.append(entry)
        document: dict[str, Any] = {"model_name": answer.model, "model_version": answer.version}
        if self.id is not None:
            document["id"] = self.id
        document["outputs"] = listed
        text = orjson.dumps(document, option=orjson.OPT_SERIALIZE_NUMPY)
        if not raws:
            return Rendered(text)
        return Rendered(b"".join((text, *raws)), header_length=len(text))


def parse_infer(body: bytes, header_length: str | None, signature: Signature) -> InferRequest:
    """Understand one infer request against what the chosen servable accepts.

    header_length: the ``Inference-Header-Content-Length`` header as it came, or ``None``.
    Raises `BadInput`; no tensor is allocated before its size was checked against the body.
    """
    if header_length is None:
        return _parse_document(parse_json(body), None, signature)
    if not (header_length.isascii() and header_length.isdigit() and len(header_length) < 16):
        raise BadInput("Inference-Header-Content-Length: want a number of bytes")
    length = int(header_length)
    if length > len(body):
        raise BadInput(
            f"Inference-Header-Content-Length is {length}, but the body has {len(body)} bytes"
        )
    view = memoryview(body)
    if length == 0:
        return _parse_raw(view, signature)
    return _parse_document(parse_json(view[:length]), view[length:], signature)


def metadata(
    model: str, versions: list[str], signature: Signature, platform: str
) -> dict[str, Any]:
    """Return the model metadata response; -1 stands for a dimension that may vary."""
    return {
        "name": model,
        "versions": versions,
        "platform": platform,
        "inputs": [_tensor_metadata(spec) for spec in signature.inputs],
        "outputs": [_tensor_metadata(spec) for spec in signature.outputs],
    }


def _tensor_metadata(spec: TensorSpec) -> dict[str, Any]:
    return {"name": spec.name, "datatype": DATATYPES[spec.dtype], "shape": list(spec.shape)}


def _parse_document(document: object, raw: memoryview | None, signature: Signature) -> InferRequest:
    if not isinstance(document, dict):
        raise BadInput("the request: want a JSON object")
    doc = cast("dict[str, object]", document)
    request_id = doc.get("id")
    if request_id is not None and not isinstance(request_id, str):
        raise BadInput("id: want text")
    parameters = _parameters(doc, "parameters")
    feeds = _parse_inputs(doc.get("inputs"), raw, signature)
    default_binary = _flag(parameters, "binary_data_output", default=False)
    outputs = _parse_outputs(doc.get("outputs"), signature, default_binary=default_binary)
    return InferRequest(feeds, request_id, outputs, _timeout_s(parameters))


def _parse_inputs(inputs: object, raw: memoryview | None, signature: Signature) -> dict[str, Array]:
    if not isinstance(inputs, list):
        raise BadInput("inputs: want a list of tensors")
    feeds: dict[str, Array] = {}
    offset = 0
    for item in cast("list[object]", inputs):
        if not isinstance(item, dict):
            raise BadInput("inputs: want a list of objects")
        tensor = cast("dict[str, object]", item)
        spec = _input_spec(tensor.get("name"), feeds, signature)
        _check_datatype(tensor.get("datatype"), spec)
        shape = checked_shape(tensor.get("shape"), spec)
        parameters = _parameters(tensor, f"input {spec.name!r}: parameters")
        if "shared_memory_region" in parameters:
            raise BadInput(f"input {spec.name!r}: shared memory is not offered by this server")
        size = parameters.get("binary_data_size")
        if size is None:
            if "data" not in tensor:
                raise BadInput(f"input {spec.name!r}: no data and no binary_data_size")
            if spec.dtype in _BINARY_ONLY:
                raise BadInput(
                    f"input {spec.name!r}: {DATATYPES[spec.dtype]} has no JSON form; "
                    "send it as binary data"
                )
            feeds[spec.name] = from_json(tensor["data"], shape, spec)
            continue
        if "data" in tensor:
            raise BadInput(f"input {spec.name!r}: both data and binary_data_size")
        if type(size) is not int or size < 0:
            raise BadInput(f"input {spec.name!r}: binary_data_size: want a number of bytes")
        if raw is None:
            raise BadInput(
                f"input {spec.name!r}: binary data needs the Inference-Header-Content-Length header"
            )
        if size > len(raw) - offset:
            raise BadInput(
                f"input {spec.name!r}: binary_data_size is {size}, "
                f"but only {len(raw) - offset} bytes are left in the body"
            )
        feeds[spec.name] = from_bytes(raw[offset : offset + size], shape, spec)
        offset += size
    if raw is not None and offset != len(raw):
        raise BadInput(f"{len(raw) - offset} bytes of the body belong to no input")
    if len(feeds) != len(signature.inputs):
        missing = ", ".join(repr(spec.name) for spec in signature.inputs if spec.name not in feeds)
        raise BadInput(f"inputs: missing {missing}")
    return feeds


def _input_spec(name: object, seen: Mapping[str, Array], signature: Signature) -> TensorSpec:
    if not isinstance(name, str):
        raise BadInput("inputs: every tensor wants a name")
    spec = signature.input(name)
    if spec is None:
        known = ", ".join(repr(spec.name) for spec in signature.inputs)
        raise BadInput(f"unknown input {name[:128]!r}; this model takes {known}")
    if name in seen:
        raise BadInput(f"input {name!r} is given twice")
    return spec


def _check_datatype(datatype: object, spec: TensorSpec) -> None:
    want = DATATYPES[spec.dtype]
    if datatype == want:
        return
    if isinstance(datatype, str) and datatype in DTYPE_OF:
        raise BadInput(f"input {spec.name!r}: want datatype {want}, got {datatype}")
    raise BadInput(
        f"input {spec.name!r}: want datatype {want}; datatypes are {', '.join(sorted(DTYPE_OF))}"
    )


def _parse_outputs(
    outputs: object, signature: Signature, *, default_binary: bool
) -> tuple[tuple[str, bool], ...]:
    if outputs is None or outputs == []:
        asked = [(spec, default_binary) for spec in signature.outputs]
    else:
        if not isinstance(outputs, list):
            raise BadInput("outputs: want a list")
        asked = [
            _requested_output(item, signature, default_binary=default_binary)
            for item in cast("list[object]", outputs)
        ]
        if len({spec.name for spec, _ in asked}) != len(asked):
            raise BadInput("outputs: the same output is asked for twice")
    for spec, is_binary in asked:
        if not is_binary and spec.dtype in _BINARY_ONLY:
            raise BadInput(
                f"output {spec.name!r}: {DATATYPES[spec.dtype]} has no JSON form; "
                "ask for it with binary_data or binary_data_output"
            )
    return tuple((spec.name, is_binary) for spec, is_binary in asked)


def _requested_output(
    item: object, signature: Signature, *, default_binary: bool
) -> tuple[TensorSpec, bool]:
    output = cast("dict[str, object]", item) if isinstance(item, dict) else {}
    name = output.get("name")
    if not isinstance(name, str):
        raise BadInput("outputs: every one wants a name")
    spec = signature.output(name)
    if spec is None:
        known = ", ".join(repr(spec.name) for spec in signature.outputs)
        raise BadInput(f"unknown output {name[:128]!r}; this model returns {known}")
    parameters = _parameters(output, f"output {name!r}: parameters")
    if parameters.get("classification"):
        raise BadInput(f"output {name!r}: the classification extension is not offered")
    if "shared_memory_region" in parameters:
        raise BadInput(f"output {name!r}: shared memory is not offered by this server")
    return spec, _flag(parameters, "binary_data", default=default_binary)


def _parse_raw(raw: memoryview, signature: Signature) -> InferRequest:
    """A body that is one tensor and nothing else: batch 1, at most one dimension left to find."""
    if len(signature.inputs) != 1:
        raise BadInput(
            f"a raw request is for models of one input; this one has {len(signature.inputs)}"
        )
    spec = signature.inputs[0]
    shape = list(spec.shape)
    if len(shape) > 1 and shape[0] == -1:
        shape[0] = 1
    if spec.dtype == "bytes":
        if any(dim not in (1, -1) for dim in shape):
            raise BadInput(f"input {spec.name!r}: a raw request carries one BYTES element")
        element = len(raw).to_bytes(4, "little") + bytes(raw)
        feed = from_bytes(memoryview(element), tuple(1 for _ in shape), spec)
    else:
        if shape.count(-1) > 1:
            raise BadInput(
                f"input {spec.name!r}: a raw request wants at most one variable dimension "
                f"besides the batch, the model has {list(spec.shape)}"
            )
        if -1 in shape:
            unit = numpy_itemsize(spec.dtype)
            for dim in shape:
                unit *= dim if dim != -1 else 1
            if unit == 0 or not len(raw) or len(raw) % unit:
                raise BadInput(
                    f"input {spec.name!r}: {len(raw)} bytes do not fill shape {list(spec.shape)}"
                )
            shape[shape.index(-1)] = len(raw) // unit
        feed = from_bytes(raw, checked_shape(shape, spec), spec)
    return InferRequest(
        {spec.name: feed}, outputs=tuple((output.name, True) for output in signature.outputs)
    )


def _parameters(holder: Mapping[str, object], where: str) -> Mapping[str, Any]:
    value = holder.get("parameters")
    if value is None:
        return _NO_PARAMETERS
    if not isinstance(value, dict):
        raise BadInput(f"{where}: want an object")
    return cast("dict[str, Any]", value)


def _flag(parameters: Mapping[str, Any], key: str, *, default: bool) -> bool:
    value = parameters.get(key, default)
    if not isinstance(value, bool):
        raise BadInput(f"{key}: want true or false")
    return value


def _timeout_s(parameters: Mapping[str, Any]) -> float | None:
    """Triton's ``timeout`` parameter, in microseconds; 0 means none."""
    value = parameters.get("timeout")
    if value is None or value == 0:
        return None
    if type(value) is not int or value < 0:
        raise BadInput("parameters: timeout: want microseconds as an integer")
    return value / 1e6
