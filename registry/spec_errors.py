"""From the checking library's errors to what a user reads: "want X, got Y", path and line."""

from __future__ import annotations

import difflib
from functools import cache
from typing import Any

from pydantic import BaseModel, ValidationError

from registry.document import Document
from registry.document_tree import (
    MAX_ERRORS,
    FieldError,
    Mapping,
    Node,
    Path,
    Scalar,
    Sequence,
    shorten,
    show,
    show_path,
)

_COLLECTIONS = {
    "dict_type": "a mapping",
    "mapping_type": "a mapping",
    "model_type": "a mapping",
    "model_attributes_type": "a mapping",
    "is_instance_of": "a mapping",
    "tuple_type": "a list",
    "list_type": "a list",
    "too_short": "a list of one entry or more",
    "too_long": "a shorter list",
}


def explain(exc: ValidationError, document: Document, root: type[BaseModel]) -> list[FieldError]:
    """One `FieldError` for each error of ``exc``, except where the text itself is at fault.

    Stops just past `MAX_ERRORS`.
    """
    errors: list[FieldError] = []
    for found in exc.errors(include_url=False, include_input=False):
        if len(errors) > MAX_ERRORS:
            break  # nobody reads that many, and looking each up would take its time
        raw_path: tuple[str | int, ...] = found["loc"]
        # The library's mark for a wrong key, unless a field is really called that.
        is_key = raw_path[-1:] == ("[key]",) and document.node(raw_path) is None
        path: Path = raw_path[:-1] if is_key else raw_path
        if path in document.bad_paths or _is_echo(found["type"], document.node(path)):
            continue
        message = _message(found["type"], found.get("ctx", {}), path, is_key, document, root)
        errors.append(FieldError(show_path(path), document.line(path), message))
    return errors


def _is_echo(kind: str, node: Node | None) -> bool:
    """Whether the error only repeats another: a default made from a field that is wrong itself,
    or a list said to be too short because its entries are wrong."""
    if kind == "default_factory_not_called":
        return True
    return kind == "too_short" and isinstance(node, Sequence) and bool(node.items)


def _message(
    kind: str,
    context: dict[str, Any],
    path: Path,
    is_key: bool,
    document: Document,
    root: type[BaseModel],
) -> str:
    if kind == "said":
        return str(context["said"])
    if kind == "missing":
        return "missing: this field is required"
    if kind == "extra_forbidden":
        return "unknown field" + _nearest(path, document, root)
    want = str(context["want"]) if kind == "want" else _COLLECTIONS.get(kind, "another value")
    if is_key:
        return f"want {want} as a field name, got {shorten(str(path[-1]))!r}"
    node = document.node(path)
    return f"want {want}, got {show(node)}{_hint(want, node)}"


def _hint(want: str, node: Node | None) -> str:
    """The usual slip: quotes where none belong, or none where they do."""
    if not isinstance(node, Scalar):
        return ""
    wants_number = any(word in want for word in ("number", "seconds", "megabytes"))
    if isinstance(node.value, str):
        return ": leave the quotes out" if wants_number and _is_number(node.value) else ""
    if node.value is None or wants_number or want == "true or false" or "list" in want:
        return ""
    return "" if "mapping" in want else f': quote it, "{shorten(node.raw)}"'


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _nearest(path: Path, document: Document, root: type[BaseModel]) -> str:
    known = _known_fields(root, path[:-1])
    parent = document.node(path[:-1])
    if isinstance(parent, Mapping):
        written = {entry.key for entry in parent.entries}
        known = tuple(name for name in known if name not in written)
    near = difflib.get_close_matches(str(path[-1])[:64], known, n=1, cutoff=0.6)
    return f": did you mean {near[0]}?" if near else ""


@cache
def _schema(root: type[BaseModel]) -> dict[str, Any]:
    return root.model_json_schema(by_alias=True, mode="validation")


def _known_fields(root: type[BaseModel], path: Path) -> tuple[str, ...]:
    """The fields that may stand at ``path``, found by walking the JSON Schema."""
    top = _schema(root)
    places: list[dict[str, Any]] = _open_up(top, top)
    for part in path:
        below: list[dict[str, Any]] = []
        for place in places:
            if isinstance(part, int):
                below += _open_up(place.get("items", {}), top)
            else:
                below += _open_up(place.get("properties", {}).get(part, {}), top)
        places = below
    return tuple(name for place in places for name in place.get("properties", {}))


def _open_up(schema: dict[str, Any], top: dict[str, Any]) -> list[dict[str, Any]]:
    """The schema with its reference followed and its alternatives side by side."""
    if "$ref" in schema:
        return _open_up(top["$defs"][schema["$ref"].rsplit("/", 1)[-1]], top)
    found = [schema]
    for choice in schema.get("anyOf", ()):
        found += _open_up(choice, top)
    return found


def in_order(errors: list[FieldError]) -> list[FieldError]:
    """Each error once, by line, at most `MAX_ERRORS` of them and a word about the rest."""
    unique = list(dict.fromkeys(errors))
    unique.sort(key=lambda error: error.line or 0)  # stable: the same line keeps its order
    if len(unique) > MAX_ERRORS:
        unique = [*unique[:MAX_ERRORS], FieldError("", None, "and more errors")]
    return unique
