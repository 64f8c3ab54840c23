"""YAML text to a tree. Iterative, bounded, and strict where YAML's versions disagree.

Built from the parser's events rather than PyYAML's composer: the composer recurses, expands
nothing but bounds nothing, keeps no line for keys and takes the last of two equal keys.

Plain scalars follow YAML 1.2's core schema. Those that YAML 1.1 reads as something else (``yes``,
``1_000``, ``1:30``, ``007``, an unquoted date) are refused with the way to write them, since the
same document is read by other people's tools too. Keys are always text.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import yaml

from registry.document_tree import (
    MAX_DEPTH,
    MAX_NODES,
    ConfigError,
    Entry,
    FieldError,
    Node,
    Scalar,
    ScalarValue,
    mapping,
    sequence,
    shorten,
    text_problem,
)

_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""libyaml where the wheel has it: 1 MiB takes 0.2 s instead of 3 s."""

_INT = re.compile(r"[-+]?(0|[1-9][0-9]*)")
_HEX = re.compile(r"0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|(0|[1-9][0-9]*)(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_INF = re.compile(r"([-+]?)\.(inf|Inf|INF)")
_NAN = re.compile(r"\.(nan|NaN|NAN)")
_NULL = frozenset({"", "~", "null", "Null", "NULL"})
_TRUE = frozenset({"true", "True", "TRUE"})
_FALSE = frozenset({"false", "False", "FALSE"})

_SWITCH = re.compile(r"yes|Yes|YES|no|No|NO|on|On|ON|off|Off|OFF")
_DATE = re.compile(r"[0-9]{4}-[0-9]{1,2}-[0-9]{1,2}([Tt \t].*)?")
_SEXAGESIMAL = re.compile(r"[-+]?[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?")
_UNDERSCORED = re.compile(r"[-+]?[0-9.][0-9_.]*([eE][-+]?[0-9]+)?")
_OCTAL = re.compile(r"[-+]?0[0-9]+(\.[0-9]*)?|0o[0-7]+|0b[01_]+")
_NUMBER_CHARS_MAX = 64

_STR_TAGS = frozenset({"!", "tag:yaml.org,2002:str"})
_COLLECTION_TAGS = frozenset({"!", "tag:yaml.org,2002:map", "tag:yaml.org,2002:seq"})


def parse_yaml(text: str) -> Node:
    """The one document in ``text``.

    Raises `ConfigError` with the line for anything that is not exactly one YAML document within
    the bounds of `registry.document_tree`. Spellings that are readable but wrong are left in the
    tree as ``problem``, so that all of them are reported together.
    """
    try:
        return _build(yaml.parse(text, Loader=_LOADER))
    except yaml.MarkedYAMLError as exc:
        mark = exc.problem_mark or exc.context_mark
        line = None if mark is None else int(mark.line) + 1
        raise _refuse(line, _syntax_message(text, line, exc)) from exc
    except yaml.YAMLError as exc:
        raise _refuse(None, f"not readable as YAML: {shorten(str(exc))}") from exc


@dataclass(slots=True)
class _Open:
    """A collection whose end has not been seen yet."""

    line: int
    anchor: str | None
    is_mapping: bool
    items: list[Node] = field(default_factory=list[Node])
    entries: list[Entry] = field(default_factory=list[Entry])
    key: tuple[str, int, str | None] | None = None

    def add(self, node: Node, line: int) -> None:
        if not self.is_mapping:
            self.items.append(node)
        elif self.key is None:
            if not isinstance(node, Scalar):
                raise _refuse(line, "want text as a field name, got a list or a mapping")
            problem = text_problem(node.raw)
            if node.raw == "<<" and node.problem is not None:
                problem = "merge keys (<<) are not read here: write the fields out"
            self.key = (node.raw, line, problem)
        else:
            key, key_line, problem = self.key
            self.entries.append(Entry(key, key_line, node, problem))
            self.key = None

    def close(self) -> Node:
        if self.is_mapping:
            return mapping(self.line, self.entries)
        return sequence(self.line, self.items)


def _build(events: Iterable[Any]) -> Node:
    anchors: dict[str, Node] = {}
    open_anchors: set[str] = set()
    stack: list[_Open] = []
    root: Node | None = None
    documents = 0
    nodes = 0
    for event in events:
        line = int(event.start_mark.line) + 1
        done: Node
        match event:
            case yaml.DocumentStartEvent():
                documents += 1
                if documents > 1:
                    raise _refuse(line, "want one document, got a second one (after ---)")
                continue
            case yaml.SequenceStartEvent() | yaml.MappingStartEvent():
                if len(stack) >= MAX_DEPTH:
                    raise _refuse(line, f"nested too deeply (more than {MAX_DEPTH} levels)")
                tag: str | None = event.tag
                if tag is not None and tag not in _COLLECTION_TAGS:
                    raise _refuse(line, f"tags such as {shorten(tag)!r} are not read here")
                is_mapping = isinstance(event, yaml.MappingStartEvent)
                stack.append(_Open(line, event.anchor, is_mapping))
                if event.anchor is not None:
                    open_anchors.add(event.anchor)
                continue
            case yaml.SequenceEndEvent() | yaml.MappingEndEvent():
                opened = stack.pop()
                done, line = opened.close(), opened.line
                nodes += 1
                if opened.anchor is not None:
                    anchors[opened.anchor] = done
                    open_anchors.discard(opened.anchor)
            case yaml.AliasEvent():
                name = str(event.anchor)
                if name in open_anchors:
                    raise _refuse(line, f"*{shorten(name)} stands inside itself")
                if name not in anchors:
                    raise _refuse(line, f"no &{shorten(name)} before this *alias")
                done = anchors[name]
                nodes += done.size
                if len(stack) + done.height > MAX_DEPTH:
                    raise _refuse(line, f"nested too deeply (more than {MAX_DEPTH} levels)")
            case yaml.ScalarEvent():
                done = _scalar(event, line)
                nodes += 1
                if event.anchor is not None:
                    anchors[event.anchor] = done
            case _:
                continue
        if nodes > MAX_NODES:
            raise _refuse(line, f"too large: more than {MAX_NODES} values, aliases expanded")
        if stack:
            stack[-1].add(done, line)
        else:
            root = done
    if root is None or (isinstance(root, Scalar) and root.value is None):
        raise _refuse(None, "want a document, got nothing")
    return root


def _scalar(event: Any, line: int) -> Scalar:
    raw: str = event.value
    tag: str | None = event.tag
    if tag is not None and tag not in _STR_TAGS:
        problem = f"tags such as {shorten(tag)!r} are not read here: quote text, write numbers bare"
        return Scalar(line, raw, raw, problem)
    if event.style or tag is not None:  # quoted, block or !!str
        return Scalar(line, raw, raw, text_problem(raw))
    value, odd = resolve(raw)
    return Scalar(line, value, raw, odd)


def resolve(raw: str) -> tuple[ScalarValue, str | None]:
    """What a plain scalar means, and what is wrong with writing it so."""
    if raw in _NULL:
        return None, None
    if raw in _TRUE:
        return True, None
    if raw in _FALSE:
        return False, None
    first = raw[0]
    if first in "0123456789+-.":
        return _number(raw)
    if _SWITCH.fullmatch(raw):
        return raw, f'{raw} is text to some readers and true or false to others: write "{raw}" in '\
            "quotes, or true or false"  # fmt: skip
    if raw in {"<<", "="}:
        return raw, f'{raw} has a meaning of its own in YAML: write "{raw}" in quotes'
    return raw, text_problem(raw)


def _number(raw: str) -> tuple[ScalarValue, str | None]:
    if len(raw) > _NUMBER_CHARS_MAX:
        if _INT.fullmatch(raw) or _FLOAT.fullmatch(raw) or _HEX.fullmatch(raw):
            return (
                raw,
                f"want a number of at most {_NUMBER_CHARS_MAX} characters, or text in quotes",
            )
        return raw, text_problem(raw)
    if _INT.fullmatch(raw):
        return int(raw), None
    if _HEX.fullmatch(raw):
        return int(raw, 16), None
    if _FLOAT.fullmatch(raw):
        return float(raw), None
    if (infinite := _INF.fullmatch(raw)) is not None:
        return float(f"{infinite.group(1)}inf"), None
    if _NAN.fullmatch(raw):
        return float("nan"), None
    if _DATE.fullmatch(raw):
        return raw, f'{raw} without quotes is a date to YAML: write "{raw}"'
    if _SEXAGESIMAL.fullmatch(raw):
        return raw, f'{raw} without quotes is a number in base 60 to some readers: write "{raw}"'
    if _OCTAL.fullmatch(raw):
        return raw, f'{raw} is another number to other readers: write "{raw}" in quotes for text, '\
            "or a decimal number"  # fmt: skip
    if "_" in raw and _UNDERSCORED.fullmatch(raw):
        return raw, f'{raw} is a number to some readers and text to others: write "{raw}" in '\
            f"quotes for text, or {raw.replace('_', '')}"  # fmt: skip
    return raw, text_problem(raw)


def _refuse(line: int | None, message: str) -> ConfigError:
    return ConfigError((FieldError("", line, message),))


def _syntax_message(text: str, line: int | None, exc: yaml.MarkedYAMLError) -> str:
    problem = " ".join(str(exc.problem or exc.context or "syntax error").split())
    message = f"not readable as YAML: {shorten(problem, 160)}"
    lines = text.splitlines()
    if line is not None and 0 < line <= len(lines):
        indent = lines[line - 1][: len(lines[line - 1]) - len(lines[line - 1].lstrip())]
        if "\t" in indent:
            message += " (a tab indents this line: YAML wants spaces)"
    return message
