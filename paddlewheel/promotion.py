"""Promote in the text itself: live becomes the canary's version, the canary block goes.

Comments, order and quoting are the user's, so the text is edited at the positions the YAML parser
reports, never dumped anew; JSON is edited the same way, being YAML in flow style. The edit is
believed only after reading it back gives exactly the document wanted; where it does not (anchors
into the canary block, say), the document is dumped anew and the result says so.
"""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass
from typing import Any

import yaml

from registry.errors import PaddlewheelError


class NothingToPromote(PaddlewheelError):
    """The document has no canary (or is not a document with one)."""


@dataclass(frozen=True, slots=True)
class Promoted:
    text: str
    version: str
    """The version that becomes live."""
    was_live: str | None
    redumped: bool
    """The text could not be edited in place: comments and layout are lost."""


def promote_text(text: str) -> Promoted:
    """The document with ``spec.live`` set to ``spec.canary.version`` and ``spec.canary`` removed.

    Raises `NothingToPromote`.
    """
    try:
        document: object = yaml.safe_load(text)
    except yaml.YAMLError as exc:
        raise NothingToPromote(f"the document does not parse: {exc}") from exc
    spec = document.get("spec") if isinstance(document, dict) else None
    canary = spec.get("canary") if isinstance(spec, dict) else None
    version = canary.get("version") if isinstance(canary, dict) else None
    if not isinstance(spec, dict) or not isinstance(version, str):
        raise NothingToPromote("the document has no canary")
    wanted: dict[str, Any] = copy.deepcopy(document)  # type: ignore[arg-type]
    wanted["spec"]["live"] = version
    del wanted["spec"]["canary"]
    was_live = spec.get("live")
    edited = _edit(text)
    redumped = edited is None or _load(edited) != wanted
    if edited is None or redumped:
        edited = yaml.safe_dump(wanted, sort_keys=False, allow_unicode=True)
    return Promoted(edited, version, was_live if isinstance(was_live, str) else None, redumped)


def _load(text: str) -> object:
    try:
        loaded: object = yaml.safe_load(text)
    except yaml.YAMLError:
        return None
    return loaded


def _edit(text: str) -> str | None:
    """The text edited in place, or ``None`` where its shape is not one this knows."""
    spec = _pair(yaml.compose(text, Loader=yaml.SafeLoader), "spec")
    if spec is None:
        return None
    live, canary = _pair(spec[1], "live"), _pair(spec[1], "canary")
    version = None if canary is None else _pair(canary[1], "version")
    if live is None or canary is None or version is None:
        return None
    new_live = _slice(text, version[1])
    old_live = live[1]
    if new_live.startswith(("&", "*", "|", ">")) or _slice(text, old_live).startswith("&"):
        return None
    cut = _cut(text, spec[1], canary)
    if cut is None:
        return None
    edits = [(cut[0], cut[1], ""), (old_live.start_mark.index, old_live.end_mark.index, new_live)]
    for start, end, replacement in sorted(edits, reverse=True):
        text = text[:start] + replacement + text[end:]
    return text


_Pair = tuple[yaml.Node, yaml.Node]


def _pair(node: yaml.Node | None, key: str) -> _Pair | None:
    if not isinstance(node, yaml.MappingNode):
        return None
    for name, value in node.value:
        if isinstance(name, yaml.ScalarNode) and name.value == key:
            return name, value
    return None


def _slice(text: str, node: yaml.Node) -> str:
    return text[node.start_mark.index : node.end_mark.index]


def _cut(text: str, mapping: yaml.Node, pair: _Pair) -> tuple[int, int] | None:
    """From where to where a pair of ``mapping`` stands, separators included."""
    if isinstance(mapping, yaml.CollectionNode) and mapping.flow_style:
        return _cut_flow(text, mapping, pair)
    key, value = pair
    start = text.rfind("\n", 0, key.start_mark.index) + 1
    if text[start : key.start_mark.index].strip():
        return None  # something else stands before it on its line
    end = _end_of_block(text, key.start_mark.column, value)
    return start, end


def _end_of_block(text: str, column: int, value: yaml.Node) -> int:
    """The end of the lines that are the value's own.

    A block's end mark is where the next token starts, past comments that belong to what follows;
    those are the ones not indented deeper than the key.
    """
    end = len(text[: _content_end(value)].rstrip())  # a block scalar ends after its line breaks
    line_end = text.find("\n", end)
    end = len(text) if line_end < 0 else line_end + 1
    position = end
    for line in text[end:].splitlines(keepends=True):
        bare = line.strip()
        indent = len(line) - len(line.lstrip(" "))
        if bare.startswith("#") and indent > column:
            end = position + len(line)
        elif bare:
            break
        position += len(line)
    return end


def _content_end(node: yaml.Node) -> int:
    """Where the last scalar or flow collection of ``node`` ends."""
    if isinstance(node, yaml.CollectionNode) and not node.flow_style and node.value:
        last = node.value[-1]
        return _content_end(last[1] if isinstance(last, tuple) else last)
    return int(node.end_mark.index)


def _cut_flow(text: str, mapping: yaml.CollectionNode, pair: _Pair) -> tuple[int, int]:
    """In ``{a: 1, canary: {...}, b: 2}`` one comma goes with the pair."""
    key, value = pair
    start, end = int(key.start_mark.index), int(value.end_mark.index)
    pairs: list[Any] = list(mapping.value)
    position = next(i for i, (name, _) in enumerate(pairs) if name is key)
    if position > 0:
        # From the end of the pair before: its comma and the white space after it go.
        return int(pairs[position - 1][1].end_mark.index), end
    comma = re.compile(r"\s*,\s*").match(text, end)
    return start, comma.end() if comma else end
