"""From documents to etcd: what would change, then compare-and-swap, one document at a time."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from paddlewheel.cli.connection import Connection
from paddlewheel.cli.difference import unified
from paddlewheel.cli.documents import Candidate
from registry.cas import Conflict, put_if
from registry.errors import PaddlewheelError
from registry.names import ModelName, Revision
from registry.store import KeyValue

ChangeKind = Literal["created", "changed", "unchanged"]


class NameTaken(PaddlewheelError):
    """A document of another kind has this name; both would answer under it."""


class Overtaken(PaddlewheelError):
    """Somebody else wrote the document after we had looked at it; ours was not written."""


@dataclass(frozen=True, slots=True)
class Change:
    """One document to be, against what etcd has."""

    model: ModelName
    key: str
    old: KeyValue | None
    new: bytes
    source: str
    """Where the new text comes from, for the difference's heading."""
    document_kind: str = "Model"

    @property
    def kind(self) -> ChangeKind:
        if self.old is None:
            return "created"
        return "unchanged" if self.old.value == self.new else "changed"

    def difference(self) -> list[str]:
        """The lines of a unified difference; none when nothing changes."""
        old = None if self.old is None else self.old.value.decode("utf-8", "replace")
        revision = 0 if self.old is None else self.old.mod_revision
        return unified(
            old,
            self.new.decode("utf-8", "replace"),
            old_name=f"{self.model}@{revision}",
            new_name=self.source,
        )


async def plan(connection: Connection, documents: Iterable[Candidate]) -> list[Change]:
    """Compare each document with what etcd has now. Raises `NameTaken`."""
    changes: list[Change] = []
    for document in documents:
        key = document.key(connection.keys)
        old = await connection.store.get(key)
        rival_key = document.kind.rival_key
        if rival_key is not None and old is None:
            rival = await connection.store.get(rival_key(connection.keys, document.model))
            if rival is not None:
                raise NameTaken(
                    f"{document.where}: metadata.name: {document.model!r} is taken: there is "
                    f"a document {rival.key}"
                )
        new = document.source.text.encode()
        changes.append(Change(document.model, key, old, new, document.where, document.kind.name))
    return changes


async def write(connection: Connection, change: Change) -> Revision:
    """Write one change, unless it changes nothing. Returns the document's revision.

    Raises `Overtaken`; `Unavailable` or `Ambiguous` when etcd stayed away.
    """
    if change.old is not None and change.kind == "unchanged":
        return change.old.mod_revision
    seen = Revision(0) if change.old is None else change.old.mod_revision
    done = await put_if(connection.store, change.key, change.new, seen)
    if not isinstance(done, Conflict):
        return done
    if done.current is None:
        raise Overtaken(f"{change.model}: deleted meanwhile (it was at revision {seen})")
    if done.current.value == change.new:
        return done.current.mod_revision  # the same text by another hand
    raise Overtaken(
        f"{change.model}: changed meanwhile: revision {done.current.mod_revision}, not "
        f"{seen or 'new'} any more; look at the difference and try again"
    )
