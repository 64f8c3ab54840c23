"""JSON text to a tree with lines; the standard decoder keeps none and takes the last of two keys.

Not read as YAML, although JSON is nearly a part of it: PyYAML refuses tabs between tokens and
splits surrogate pairs.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_right

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
    text_problem,
)

_SPACE = re.compile(r"[ \t\n\r]*")
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(\.[0-9]+)?([eE][-+]?[0-9]+)?")
_WORDS: dict[str, ScalarValue] = {
    "true": True, "false": False, "null": None,
    "NaN": float("nan"), "Infinity": float("inf"), "-Infinity": float("-inf"),
}  # fmt: skip
"""The last three are no JSON but written by many: named as numbers, so that fields refuse them."""

_NUMBER_CHARS_MAX = 64
_DECODER = json.JSONDecoder()


class NotJson(Exception):
    """The text is no JSON. ``line`` is where that shows."""

    def __init__(self, line: int, message: str) -> None:
        super().__init__(message)
        self.line = line
        self.message = message


def parse_json(text: str) -> Node:
    """The value in ``text``.

    Raises `NotJson` for a syntax error (the text may be YAML then) and `ConfigError` for JSON
    out of the bounds of `registry.document_tree`.
    """
    reader = _Reader(text)
    node = reader.value(0)
    reader.skip()
    if reader.at != len(text):
        raise reader.wrong("want the end of the document, got more text")
    return node


class _Reader:
    """Recursive, and so bounded by `MAX_DEPTH`."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0
        self._nodes = 0
        self._line_starts = [0, *(found.end() for found in re.finditer("\n", text))]

    def line(self) -> int:
        return bisect_right(self._line_starts, self.at)

    def wrong(self, message: str) -> NotJson:
        return NotJson(self.line(), f"not readable as JSON: {message}")

    def skip(self) -> None:
        found = _SPACE.match(self.text, self.at)
        if found is not None:
            self.at = found.end()

    def peek(self) -> str:
        self.skip()
        return self.text[self.at : self.at + 1]

    def value(self, depth: int) -> Node:
        char = self.peek()
        self._nodes += 1
        if self._nodes > MAX_NODES:
            raise self._refuse(f"too large: more than {MAX_NODES} values")
        if char in {"{", "["}:
            if depth >= MAX_DEPTH:
                raise self._refuse(f"nested too deeply (more than {MAX_DEPTH} levels)")
            return self._object(depth) if char == "{" else self._array(depth)
        line = self.line()
        if char == '"':
            found = self._string()
            return Scalar(line, found, found, text_problem(found))
        number = _NUMBER.match(self.text, self.at)
        if number is not None:
            self.at = number.end()
            return _number(line, number)
        for word, meaning in _WORDS.items():
            if self.text.startswith(word, self.at):
                self.at += len(word)
                return Scalar(line, meaning, word)
        raise self.wrong("want a value" + (f", got {char!r}" if char else ", got the end"))

    def _object(self, depth: int) -> Node:
        line = self.line()
        self.at += 1
        entries: list[Entry] = []
        if self.peek() == "}":
            self.at += 1
            return mapping(line, entries)
        while True:
            if self.peek() != '"':
                raise self.wrong("want a field name in double quotes")
            key_line = self.line()
            key = self._string()
            if self.peek() != ":":
                raise self.wrong("want ':' after a field name")
            self.at += 1
            entries.append(Entry(key, key_line, self.value(depth + 1), text_problem(key)))
            if self._end_of_collection("}"):
                return mapping(line, entries)

    def _array(self, depth: int) -> Node:
        line = self.line()
        self.at += 1
        items: list[Node] = []
        if self.peek() == "]":
            self.at += 1
            return sequence(line, items)
        while True:
            items.append(self.value(depth + 1))
            if self._end_of_collection("]"):
                return sequence(line, items)

    def _end_of_collection(self, closing: str) -> bool:
        char = self.peek()
        if char not in {",", closing} or not char:
            raise self.wrong(f"want ',' or '{closing}'" + (f", got {char!r}" if char else ""))
        self.at += 1
        return char == closing

    def _string(self) -> str:
        try:
            found, end = _DECODER.raw_decode(self.text, self.at)
        except json.JSONDecodeError as exc:
            self.at = min(exc.pos, len(self.text))
            raise self.wrong(exc.msg[:1].lower() + exc.msg[1:]) from exc
        self.at = end
        return str(found)

    def _refuse(self, message: str) -> ConfigError:
        return ConfigError((FieldError("", self.line(), message),))


def _number(line: int, number: re.Match[str]) -> Scalar:
    raw = number.group()
    if len(raw) > _NUMBER_CHARS_MAX:
        problem = f"want a number of at most {_NUMBER_CHARS_MAX} characters"
        return Scalar(line, raw, raw, problem)
    is_whole = number.group(1) is None and number.group(2) is None
    return Scalar(line, int(raw) if is_whole else float(raw), raw)
