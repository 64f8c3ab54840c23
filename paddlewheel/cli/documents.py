"""Documents from files: found, split, validated, all errors at once. Knows no etcd.

A YAML file may hold several documents between ``---`` lines, as kubectl's do; each is stored under
its own key with its own text, comments and all, byte for byte as it stands in the file.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

from paddlewheel.cli.kinds import MODEL, Kind, kind_of
from registry.document_tree import ConfigError
from registry.errors import PaddlewheelError
from registry.keys import Keys
from registry.names import ModelName

SUFFIXES = (".yaml", ".yml", ".json")
STDIN = "-"


@dataclass(frozen=True, slots=True)
class Text:
    """One document's text, and where it came from."""

    file: str
    first_line: int
    """The line of the file on which the text starts, counted from 1."""
    text: str


@dataclass(frozen=True, slots=True)
class Candidate:
    """A document that parses and validates, on its way to etcd."""

    model: ModelName
    """Its name, whatever kind it is: models and pipelines share one space of names."""
    source: Text
    kind: Kind = MODEL

    def key(self, keys: Keys) -> str:
        """Where it stands in etcd."""
        return self.kind.key(keys, self.model)

    @property
    def where(self) -> str:
        return f"{self.source.file}:{self.source.first_line}"


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing wrong with a file."""

    file: str
    line: int | None
    path: str
    """In the document, ``spec.live``; empty for the file as a whole."""
    message: str

    def __str__(self) -> str:
        place = self.file if self.line is None else f"{self.file}:{self.line}"
        return ": ".join(part for part in (place, self.path, self.message) if part)


@dataclass(frozen=True, slots=True)
class Read:
    """What a set of files holds: either half may be empty, or both have something."""

    documents: tuple[Candidate, ...]
    problems: tuple[Problem, ...]


class Refused(PaddlewheelError):
    """Some documents are refused; nothing was written."""


def read(path: str) -> Read:
    """Read a file, every document file below a folder, or stdin (``-``)."""
    if path == STDIN:
        return parse_files([("<stdin>", sys.stdin.buffer.read())])
    return parse_files(_load(find_files(Path(path))))


def find_files(path: Path) -> list[Path]:
    """The document files at or below ``path``, sorted.

    Hidden files and folders are passed over, and so is what belongs to a model that lies there too.
    Raises `OSError` where the folder cannot be listed.
    """
    if not path.is_dir():
        return [path]
    return sorted(_below(path))


def _below(folder: Path) -> Iterator[Path]:
    for entry in folder.iterdir():
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            yield from _below(entry)
        elif entry.suffix in SUFFIXES and not _is_of_a_model(entry):
            yield entry


def _is_of_a_model(file: Path) -> bool:
    """Whether it is a program (``inference.json``) or its description (``inference.yml``, as
    PaddleOCR exports it) rather than a document: it goes by the name of a params file beside it.
    """
    if not file.with_suffix(".pdiparams").is_file():
        return False
    try:
        return b"apiVersion" not in file.read_bytes()
    except OSError:
        return False  # whoever reads it says why it cannot be read


def _load(files: Iterable[Path]) -> Iterator[tuple[str, bytes | OSError]]:
    for file in files:
        try:
            yield str(file), file.read_bytes()
        except OSError as exc:
            yield str(file), exc


def parse_files(files: Iterable[tuple[str, bytes | OSError]]) -> Read:
    """Validate the contents of files. Two documents of one name are a problem of the second."""
    documents: dict[ModelName, Candidate] = {}
    problems: list[Problem] = []
    for file, content in files:
        found = parse_file(file, content)
        problems += found.problems
        for document in found.documents:
            first = documents.setdefault(document.model, document)
            if first is not document:
                source = document.source
                message = f"{document.model!r} is also in {first.where}"
                problems.append(Problem(file, source.first_line, "metadata.name", message))
    return Read(tuple(documents.values()), tuple(problems))


def parse_file(file: str, content: bytes | OSError) -> Read:
    """Validate one file's documents. An empty file is a problem, not nothing."""
    if isinstance(content, OSError):
        return Read((), (Problem(file, None, "", content.strerror or str(content)),))
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as exc:
        line = content.count(b"\n", 0, exc.start) + 1
        return Read((), (Problem(file, line, "", f"not UTF-8: byte 0x{content[exc.start]:02x}"),))
    documents: list[Candidate] = []
    problems: list[Problem] = []
    parts = list(split(file, text))
    if not parts:
        problems.append(Problem(file, None, "", "no document in it"))
    for part in parts:
        kind = kind_of(part.text)
        try:
            name = kind.parse(part.text)
        except ConfigError as exc:
            for error in exc.errors:
                at = None if error.line is None else error.line + part.first_line - 1
                problems.append(Problem(file, at, error.path, error.message))
        else:
            documents.append(Candidate(name, part, kind))
    return Read(tuple(documents), tuple(problems))


def split(file: str, text: str) -> Iterator[Text]:
    """The documents of a YAML stream, as they stand; JSON, or what does not parse, is one.

    Only a stream of two documents and more is cut, at its ``---`` lines, which go. Comments
    between a ``---`` and the document stay with it.
    """
    starts = _document_starts(text)
    if len(starts) < 2:
        if text.strip():
            yield Text(file, 1, text)
        return
    for start, end in zip(starts, [*starts[1:], len(text)], strict=True):
        if text.startswith("---", start):
            newline = text.find("\n", start)
            # What stands on the line of the --- itself belongs to the document: --- {a: b}
            if newline >= 0 and not text[start + 3 : newline].split("#")[0].strip():
                start = newline + 1
        if _has_content(text[start:end]):
            yield Text(file, text.count("\n", 0, start) + 1, text[start:end])


def _has_content(text: str) -> bool:
    bare = (line.strip() for line in text.split("\n"))
    return any(line and not line.startswith("#") and line != "..." for line in bare)


def _document_starts(text: str) -> list[int]:
    """Where documents start, by YAML's own tokens: a ``---`` in a block scalar is not one."""
    if text.lstrip()[:1] in ("{", "["):
        return []
    starts: list[int] = []
    try:
        for token in yaml.scan(text, Loader=yaml.SafeLoader):
            if isinstance(token, yaml.DocumentStartToken):
                starts.append(token.start_mark.index)
            elif not starts and not isinstance(
                token, yaml.StreamStartToken | yaml.StreamEndToken | yaml.DirectiveToken
            ):
                starts.append(0)  # the first one needs no ---
    except yaml.YAMLError:
        return []  # the parser says what is wrong, with its line
    return starts
