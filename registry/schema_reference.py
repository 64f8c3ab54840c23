"""The table of docs/configuration.md, made from the schema (pure).

``python -m registry.schema_reference [pipeline|gateway]`` prints it; a test keeps the pages
equal to it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from registry.schema import SchemaField, fields, gateway_fields, pipeline_fields


def reference() -> str:
    """One Markdown table a section of the model document, in the order of the classes."""
    return _reference(fields())


def pipeline_reference() -> str:
    """The same for the pipeline document."""
    return _reference(pipeline_fields())


def gateway_reference() -> str:
    """The same for the gateway document."""
    return _reference(gateway_fields())


def _reference(listed: Sequence[SchemaField]) -> str:
    lines: list[str] = []
    section = None
    for field in listed:
        parts = field.path.split(".")
        here = ".".join(parts[:2]) if parts[0] == "spec" and len(parts) > 1 else parts[0]
        here = here.removesuffix("[]")
        is_leaf_of_spec = here == field.path and field.kind not in {"mapping", "list of mapping"}
        if here in {"apiVersion", "kind"}:
            here = "The head"
        elif is_leaf_of_spec and parts[0] == "spec":
            here = "spec"
        if field.kind == "mapping" and field.path in {"metadata", "spec"}:
            continue
        if here != section:
            section = here
            title = here if here == "The head" else f"`{here}`"
            lines += ["", f"### {title}", "", "| field | value | default | |", "|---|---|---|---|"]
        default = field.default or "-"
        shown = default if default in {"required", "-"} else f"`{default}`"
        lines.append(f"| `{field.path}` | {field.kind} | {shown} | {field.description} |")
    return "\n".join(lines).strip() + "\n"


if __name__ == "__main__":
    pages = {"pipeline": pipeline_reference, "gateway": gateway_reference}
    print(pages.get("".join(sys.argv[1:]), reference)(), end="")
