"""A model's past documents, and which of them a rollback means."""

from __future__ import annotations

from collections.abc import Sequence

from paddlewheel.cli.connection import Connection
from registry.errors import PaddlewheelError
from registry.names import ModelName, Revision
from registry.records import BadRecord, HistoryEntry
from registry.spec import ConfigError, parse_model
from registry.store import KeyValue


class NoSuchRevision(PaddlewheelError):
    """History has no such document, or nothing to go back to."""


async def read_history(connection: Connection, model: ModelName) -> list[HistoryEntry]:
    """Oldest first. Entries that cannot be read are left out."""
    listing = await connection.store.list_prefix(connection.keys.history_prefix(model))
    entries: list[HistoryEntry] = []
    for kv in listing.kvs:
        try:
            entries.append(HistoryEntry.from_json(kv.value))
        except BadRecord:
            continue
    return sorted(entries, key=lambda entry: entry.revision)


def choose_rollback(
    model: ModelName,
    entries: Sequence[HistoryEntry],
    current: KeyValue | None,
    wanted: Revision | None,
) -> HistoryEntry:
    """The entry to go back to: ``wanted``, else the newest before ``current`` that has another
    text and is valid.

    Raises `NoSuchRevision`, and `ConfigError` where ``wanted`` is a document that is not valid:
    writing it would only be refused again.
    """
    if wanted is not None:
        entry = find(model, entries, wanted)
        parse_model(entry.document, name=model)
        return entry
    text = None if current is None else current.value.decode("utf-8", "replace")
    for entry in reversed(entries):
        earlier = current is None or entry.revision < current.mod_revision
        if earlier and entry.document != text and _is_valid(model, entry):
            return entry
    raise NoSuchRevision(
        f"{model}: nothing to go back to; {_known(entries)} (nodes write history as they see "
        "documents)"
    )


def find(model: ModelName, entries: Sequence[HistoryEntry], revision: Revision) -> HistoryEntry:
    """The entry of ``revision``. Raises `NoSuchRevision`, which lists those there are."""
    for entry in entries:
        if entry.revision == revision:
            return entry
    raise NoSuchRevision(f"{model}: no revision {revision} in history; {_known(entries)}")


def _known(entries: Sequence[HistoryEntry]) -> str:
    revisions = [str(entry.revision) for entry in entries[-10:]]
    return f"known: {', '.join(revisions)}" if revisions else "history is empty"


def _is_valid(model: ModelName, entry: HistoryEntry) -> bool:
    try:
        parse_model(entry.document, name=model)
    except ConfigError:
        return False
    return True
