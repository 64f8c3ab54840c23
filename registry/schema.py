"""The JSON Schema of documents, for editors and other people's checkers (pure).

Made from the same classes that parse, so it can't promise something else. It refuses less than
`registry.spec` does: that ``live`` is listed under ``versions``, the key's name, repeated keys,
lines and the size of a text are beyond JSON Schema.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

from pydantic import BaseModel

from registry.gateway_spec import GatewayDocument
from registry.pipeline_spec import PipelineDocument
from registry.spec import ModelDocument

DIALECT = "https://json-schema.org/draft/2020-12/schema"


def model_schema() -> dict[str, Any]:
    """JSON Schema (2020-12) of a model document. The caller's own copy."""
    return _schema_of(ModelDocument, "Paddlewheel model document")


def pipeline_schema() -> dict[str, Any]:
    """JSON Schema (2020-12) of a pipeline document. The caller's own copy."""
    return _schema_of(PipelineDocument, "Paddlewheel pipeline document")


def gateway_schema() -> dict[str, Any]:
    """JSON Schema (2020-12) of the gateway document. The caller's own copy."""
    return _schema_of(GatewayDocument, "Paddlewheel gateway document")


def _schema_of(document: type[BaseModel], title: str) -> dict[str, Any]:
    schema = document.model_json_schema(by_alias=True, mode="validation")
    for part in _objects(schema):
        _tidy(part)
    return {
        "$schema": DIALECT,
        "title": title,
        **{key: value for key, value in schema.items() if key != "title"},
    }


def _objects(value: Any) -> Iterator[dict[str, Any]]:
    """Every schema inside ``value``, itself included."""
    if isinstance(value, dict):
        yield value
        for below in list(value.values()):
            yield from _objects(below)
    elif isinstance(value, list):
        for below in value:
            yield from _objects(below)


def _tidy(part: dict[str, Any]) -> None:
    """Leave out what the library adds for itself, and Markdown that editors show as it is."""
    if isinstance(part.get("title"), str):
        del part["title"]
    if part.get("default", ...) is None:
        del part["default"]
    if isinstance(part.get("description"), str):
        part["description"] = part["description"].replace("``", "")


@dataclass(frozen=True, slots=True)
class SchemaField:
    """One field of a document, for the configuration reference."""

    path: str
    """``spec.versions[].source``"""
    kind: str
    """``text``, ``whole number``, ``list of text`` ..."""
    default: str
    """As it would be written; ``required`` or empty when there is none."""
    description: str


def fields() -> tuple[SchemaField, ...]:
    """Every field that may be written in a model document, in the order of the classes."""
    return _fields()


@cache
def _fields() -> tuple[SchemaField, ...]:
    schema = model_schema()
    return tuple(_walk(schema, schema, ""))


@cache
def pipeline_fields() -> tuple[SchemaField, ...]:
    """Every field that may be written in a pipeline document."""
    schema = pipeline_schema()
    return tuple(_walk(schema, schema, ""))


@cache
def gateway_fields() -> tuple[SchemaField, ...]:
    """Every field that may be written in the gateway document."""
    schema = gateway_schema()
    return tuple(_walk(schema, schema, ""))


def _walk(top: dict[str, Any], part: dict[str, Any], path: str) -> Iterator[SchemaField]:
    required = set(part.get("required", ()))
    for name, written in part.get("properties", {}).items():
        where = f"{path}.{name}" if path else name
        field = _only(top, written)
        default = "required" if name in required else _default(written)
        description = written.get("description") or field.get("description", "")
        yield SchemaField(where, _kind(top, field), default, " ".join(description.split()))
        if field.get("type") == "array":
            yield from _walk(top, _only(top, field.get("items", {})), f"{where}[]")
        else:
            yield from _walk(top, field, where)


def _only(top: dict[str, Any], part: dict[str, Any]) -> dict[str, Any]:
    """The schema meant: references followed, the ``null`` of an optional field left out."""
    if "$ref" in part:
        return _only(top, top["$defs"][part["$ref"].rsplit("/", 1)[-1]])
    choices = [choice for choice in part.get("anyOf", ()) if choice.get("type") != "null"]
    if len(choices) == 1:
        return _only(top, choices[0])
    return part


def _default(written: dict[str, Any]) -> str:
    default = written.get("default")
    if default is None or isinstance(default, dict):
        return ""
    if isinstance(default, list):
        return f"[{', '.join(str(item) for item in default)}]"
    if isinstance(default, float) and default.is_integer():
        return str(int(default))
    return str(default)


_KINDS = {
    "string": "text",
    "integer": "whole number",
    "number": "number",
    "boolean": "true or false",
    "object": "mapping",
}


def _kind(top: dict[str, Any], part: dict[str, Any]) -> str:
    part = _only(top, part)
    if "const" in part:
        return f"`{str(part['const']).lower() if part['const'] is True else part['const']}`"
    if "enum" in part:
        return ", ".join(f"`{choice}`" for choice in part["enum"])
    if "anyOf" in part:
        return " or ".join(_kind(top, choice) for choice in part["anyOf"])
    kind = part.get("type")
    if isinstance(kind, list):
        return ", ".join(_KINDS[name] for name in kind)
    if kind == "array":
        return f"list of {_kind(top, part.get('items', {}))}"
    if kind == "object" and isinstance(part.get("additionalProperties"), dict):
        return f"mapping of name to {_kind(top, part['additionalProperties'])}"
    return _KINDS.get(str(kind), "any") + _range(part)


def _range(part: dict[str, Any]) -> str:
    if "exclusiveMinimum" in part:
        return f", more than {part['exclusiveMinimum']}"
    if "minimum" not in part:
        return ""
    high = part.get("maximum")
    return f", {part['minimum']}..{high}" if high is not None and high <= 1024 else (
        f", {part['minimum']} or more"
    )  # fmt: skip
