"""Text to a tree with line numbers: YAML or JSON, whichever it is (pure)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from registry.document_json import NotJson, parse_json
from registry.document_tree import (
    MAX_BYTES,
    ConfigError,
    FieldError,
    Mapping,
    Node,
    Path,
    Scalar,
    Sequence,
    show_path,
)
from registry.document_yaml import parse_yaml

__all__ = ["ConfigError", "Document", "FieldError", "read"]

_UNREADABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f\ufffe\uffff]")
_NOT_JSON = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f]")
_JSON_START = re.compile(r'\s*\{\s*["}]')


@dataclass(frozen=True, slots=True)
class Document:
    """A document that could be read, whether or not its values make sense."""

    root: Node
    value: Any
    """The same as plain values: str, int, float, bool, None, tuple and dict."""
    errors: tuple[FieldError, ...]
    """Repeated keys and spellings that readers of YAML disagree about."""
    bad_paths: frozenset[Path]
    """Where `errors` stand: what a schema says about those values is noise."""

    def node(self, path: Path) -> Node | None:
        """The value at ``path``; ``None`` when the document has none there."""
        return self._walk(path)[0]

    def line(self, path: Path) -> int:
        """Where ``path`` is written; for a field that is missing, where its parent is."""
        return self._walk(path)[1]

    def line_of(self, shown: str) -> int | None:
        """Where the path that is shown as ``spec.versions[0].source`` is written."""
        if not shown:
            return None
        return next((line for path, line in _lines(self.root) if show_path(path) == shown), None)

    def _walk(self, path: Path) -> tuple[Node | None, int]:
        node: Node | None = self.root
        line = self.root.line
        for part in path:
            match node, part:
                case Mapping(), str():
                    entry = next((found for found in node.entries if found.key == part), None)
                    if entry is None:
                        return None, line
                    node, line = entry.node, entry.line
                case Sequence(), int() if 0 <= part < len(node.items):
                    node = node.items[part]
                    line = node.line
                case _:
                    return None, line
        return node, line


def _lines(node: Node, path: Path = ()) -> Iterator[tuple[Path, int]]:
    """Every path in the tree with its line. Recursive: depth is bounded."""
    match node:
        case Mapping():
            for entry in node.entries:
                yield (*path, entry.key), entry.line
                yield from _lines(entry.node, (*path, entry.key))
        case Sequence():
            for at, item in enumerate(node.items):
                yield (*path, at), item.line
                yield from _lines(item, (*path, at))
        case Scalar():
            pass


def read(text: bytes | str) -> Document:
    """Read one document of YAML or JSON.

    Raises `ConfigError` (path empty, line where known) when there is no tree to speak of: too
    large, not UTF-8, NUL bytes, a syntax error, several documents, nested or multiplied beyond
    the bounds. Everything else is left in `Document.errors`.
    """
    decoded = _decode(text)
    root = _parse(decoded)
    collector = _Collector()
    value = collector.plain(root, ())
    return Document(root, value, tuple(collector.errors), frozenset(collector.paths))


def _decode(text: bytes | str) -> str:
    try:
        raw = text.encode("utf-8") if isinstance(text, str) else text
        if len(raw) > MAX_BYTES:
            raise _refuse(None, f"want at most {MAX_BYTES} bytes (1 MiB), got {len(raw)}")
        decoded = raw.decode("utf-8")
    except UnicodeDecodeError as exc:
        line = exc.object.count(b"\n", 0, exc.start) + 1
        raise _refuse(line, f"want UTF-8, got the byte 0x{exc.object[exc.start]:02x}") from exc
    except UnicodeEncodeError as exc:
        line = exc.object.count("\n", 0, exc.start) + 1
        raise _refuse(line, "want UTF-8, got half a surrogate pair") from exc
    decoded = decoded.removeprefix("\ufeff")
    # JSON allows more in its strings than YAML does anywhere, and its writers leave it there.
    found = (_NOT_JSON if _looks_like_json(decoded) else _UNREADABLE).search(decoded)
    if found is not None:
        line = decoded.count("\n", 0, found.start()) + 1
        raise _refuse(line, f"want text, got the control character U+{ord(found.group()):04X}")
    return decoded


def _looks_like_json(text: str) -> bool:
    return text.lstrip()[:1] in {"{", "["}


def _parse(text: str) -> Node:
    if not _looks_like_json(text):
        return parse_yaml(text)
    try:
        return parse_json(text)
    except NotJson as exc:
        # YAML's flow style starts the same way; whoever quotes the first key writes JSON.
        try:
            return parse_yaml(text)
        except ConfigError:
            if _JSON_START.match(text):
                raise _refuse(exc.line, exc.message) from exc
            raise


class _Collector:
    """Plain values out of a tree, with what is wrong on the way. Recursive: depth is bounded."""

    def __init__(self) -> None:
        self.errors: list[FieldError] = []
        self.paths: set[Path] = set()

    def plain(self, node: Node, path: Path) -> Any:
        match node:
            case Scalar():
                if node.problem is not None:
                    self._add(path, node.line, node.problem)
                return node.value
            case Sequence():
                return tuple(self.plain(item, (*path, at)) for at, item in enumerate(node.items))
            case Mapping():
                return self._mapping(node, path)

    def _mapping(self, node: Mapping, path: Path) -> dict[str, Any]:
        found: dict[str, Any] = {}
        lines: dict[str, int] = {}
        for entry in node.entries:
            where = (*path, entry.key)
            if entry.key in lines:
                message = f"written twice (first on line {lines[entry.key]})"
                self._add(where, entry.line, message)
                continue
            if entry.problem is not None:
                self._add(where, entry.line, entry.problem)
            lines[entry.key] = entry.line
            found[entry.key] = self.plain(entry.node, where)
        return found

    def _add(self, path: Path, line: int, message: str) -> None:
        self.errors.append(FieldError(show_path(path), line, message))
        self.paths.add(path)


def _refuse(line: int | None, message: str) -> ConfigError:
    return ConfigError((FieldError("", line, message),))
