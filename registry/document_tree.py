"""A document as a tree that remembers its lines, and the errors that point into it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from registry.errors import PaddlewheelError

Path = tuple[str | int, ...]
"""Where a value stands: field names and list indices from the document's root."""

ScalarValue = str | int | float | bool | None

MAX_BYTES = 1 << 20
"""A document's size limit (SPEC section 3); etcd itself refuses 1.5 MiB."""

MAX_DEPTH = 32
"""Nesting allowed, aliases followed. The deepest field of a model document is at 7."""

MAX_NODES = 20_000
"""Values allowed, aliases expanded: what an alias bomb multiplies is counted, not built."""

MAX_ERRORS = 50
"""Errors reported of one document; they travel in a status key, which has to stay small."""

_SHOWN = 60
"""Characters of a value or a name that an error quotes at most."""

_PLAIN_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


@dataclass(frozen=True, slots=True)
class FieldError:
    """One thing wrong with a document."""

    path: str
    """``spec.canary.rules[0].percent``; empty for the document as a whole."""
    line: int | None
    """1-based; ``None`` where there is no text to point at."""
    message: str

    def __str__(self) -> str:
        where = self.path or "document"
        at = "" if self.line is None else f" (line {self.line})"
        return f"{where}{at}: {self.message}"


class ConfigError(PaddlewheelError):
    """A document that is refused, with everything that is wrong with it.

    ``str()`` is one line for a status or a log; `errors` has them all, in the text's order.
    """

    def __init__(self, errors: Iterable[FieldError]) -> None:
        self.errors = tuple(errors)
        super().__init__(self.errors)

    def __str__(self) -> str:
        if not self.errors:
            return "refused"
        rest = len(self.errors) - 1
        return str(self.errors[0]) + (f"; and {rest} more" if rest else "")


@dataclass(frozen=True, slots=True)
class Scalar:
    line: int
    value: ScalarValue
    raw: str
    """As written, without quotes: an unquoted ``1.10`` is the number 1.1, but shown as 1.10."""
    problem: str | None = None
    """What is wrong with the spelling itself, whatever the field wants."""

    @property
    def size(self) -> int:
        return 1

    @property
    def height(self) -> int:
        return 1


@dataclass(frozen=True, slots=True)
class Sequence:
    line: int
    items: tuple[Node, ...]
    size: int
    """Values in this subtree, this one included, aliases expanded."""
    height: int
    """Levels in this subtree, this one included, aliases expanded."""


@dataclass(frozen=True, slots=True)
class Entry:
    key: str
    line: int
    """Of the key."""
    node: Node
    problem: str | None = None


@dataclass(frozen=True, slots=True)
class Mapping:
    line: int
    entries: tuple[Entry, ...]
    """In the text's order, repeated keys included."""
    size: int
    height: int


Node = Scalar | Sequence | Mapping


def sequence(line: int, items: Iterable[Node]) -> Sequence:
    found = tuple(items)
    return Sequence(
        line,
        found,
        1 + sum(item.size for item in found),
        1 + max((item.height for item in found), default=0),
    )


def mapping(line: int, entries: Iterable[Entry]) -> Mapping:
    found = tuple(entries)
    return Mapping(
        line,
        found,
        1 + sum(entry.node.size for entry in found),
        1 + max((entry.node.height for entry in found), default=0),
    )


def text_problem(text: str) -> str | None:
    """What makes ``text`` unfit to be stored, sent or shown; ``None`` when nothing does."""
    for char in text:
        if char < " " and char not in "\t\n\r":
            return f"want text without control characters, got one (U+{ord(char):04X})"
        if "\ud800" <= char <= "\udfff":
            return f"want text, got half a surrogate pair (U+{ord(char):04X})"
    return None


def shorten(text: str, limit: int = _SHOWN) -> str:
    return text if len(text) <= limit else text[: limit - 3] + "..."


def printable(text: str) -> str:
    """On one line and in any encoding of a terminal's choice: control characters as escapes."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def show(node: Node | None) -> str:
    """The value as an error message quotes it."""
    match node:
        case None:
            return "nothing"
        case Mapping():
            return "a mapping"
        case Sequence():
            return "a list"
        case Scalar(value=None):
            return "nothing"
        case Scalar(value=bool()) | Scalar(value=int()) | Scalar(value=float()):
            return shorten(node.raw)
        case Scalar():
            return repr(shorten(node.raw))


def show_path(path: Path) -> str:
    """``("spec", "versions", 0, "sha256", "a.pdiparams")`` as a reader would write it."""
    shown = ""
    for part in path:
        if isinstance(part, int):
            shown += f"[{part}]"
        elif _PLAIN_NAME.fullmatch(part) and len(part) <= _SHOWN:
            shown += f".{part}" if shown else part
        else:
            shown += f'["{printable(shorten(part))}"]'
    return shown
