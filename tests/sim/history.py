"""What happened, as it is seen from outside of the programs: the promises are checked on this."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from registry.names import ModelName, NodeId, Revision, Version
from tests.sim.loop import START_S


class Handed(NamedTuple):
    """A node's follower passed on what it made of one revision of a document."""

    at_s: float
    process: str
    what: str
    """accepted, refused or deleted."""
    model: ModelName
    revision: Revision


class Leapt(NamedTuple):
    """A process listed the documents, or bridged a compaction: what lay between is superseded."""

    at_s: float
    process: str
    to: Revision


class Routed(NamedTuple):
    """A node's routing changed for one model."""

    at_s: float
    process: str
    node: NodeId
    model: ModelName
    revision: Revision
    """Of the document in force: ``X-Config-Revision``."""
    live: Version | None
    standby: Version | None
    is_gone: bool
    """The model is not routed at all any more."""


class Barred(NamedTuple):
    """A node learnt which versions of a model are quarantined."""

    at_s: float
    process: str
    model: ModelName
    versions: frozenset[Version]


class Answered(NamedTuple):
    """A client's request by default, and what the gateway gave it."""

    at_s: float
    """When the answer was there."""
    sent_s: float
    gateway: str
    model: ModelName
    node: NodeId | None
    """``None``: 503."""
    revision: Revision
    version: Version | None


class Lived(NamedTuple):
    """A process began or ended."""

    at_s: float
    process: str
    what: str
    """started, killed or stopped."""


class Did(NamedTuple):
    """The user, or the weather."""

    at_s: float
    who: str
    what: str


Entry = Handed | Leapt | Routed | Barred | Answered | Lived | Did


@dataclass
class History:
    entries: list[Entry] = field(default_factory=list[Entry])

    def note(self, entry: Entry) -> None:
        self.entries.append(entry)

    def digest(self) -> str:
        """Equal for equal runs."""
        digest = hashlib.sha256()
        for entry in self.entries:
            digest.update(repr(entry).encode())
        return digest.hexdigest()[:16]

    def lines(self) -> Iterator[str]:
        for entry in self.entries:
            yield line_of(entry)


def line_of(entry: Entry) -> str:
    """One line for people."""
    values = entry._asdict()
    at_s = values.pop("at_s") - START_S
    said = " ".join(
        f"{name}={sorted(value) if isinstance(value, frozenset) else value}"
        for name, value in values.items()
    )
    return f"{at_s:9.3f} {type(entry).__name__.lower():9} {said}"
