"""``P/history``: every revision of every document, written once by whichever node sees it first."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from datetime import UTC, datetime

import structlog
from tenacity import AsyncRetrying, retry_if_exception, wait_random_exponential

from registry.cas import create_if_absent
from registry.catalog import Accepted
from registry.errors import PaddlewheelError
from registry.keys import HistoryKey, Keys, ModelKey
from registry.names import ModelName, Revision
from registry.records import BadRecord, HistoryEntry
from registry.spec import ConfigError, parse_model
from registry.store import KeyValue, PermissionDenied, Store, StoreError, StoreRefused

log = structlog.get_logger(__name__)


def is_passing(exc: BaseException) -> bool:
    """Whether the same call may succeed later without anybody doing something about it."""
    return isinstance(exc, StoreError) and not isinstance(exc, PermissionDenied | StoreRefused)


class History:
    """Loop-bound. `record` never blocks and never fails."""

    def __init__(self, store: Store, keys: Keys) -> None:
        self._store = store
        self._keys = keys
        self._unwritten: asyncio.Queue[tuple[ModelName, Revision, HistoryEntry]] = asyncio.Queue()

    def record(self, kvs: Iterable[KeyValue]) -> None:
        """Keep those of ``kvs`` that are documents, whatever is in them."""
        seen_at = datetime.now(UTC)
        for kv in kvs:
            key = self._keys.parse(kv.key)
            if isinstance(key, ModelKey):
                entry = HistoryEntry.of(kv.mod_revision, kv.value, seen_at)
                self._unwritten.put_nowait((key.model, kv.mod_revision, entry))

    async def run(self) -> None:
        """Write until cancelled.

        A document near 1 MiB may be too large for a key once it is text within JSON: it is left
        out and logged, and must not keep the others waiting.
        """
        retrying = AsyncRetrying(
            retry=retry_if_exception(is_passing),
            wait=wait_random_exponential(multiplier=0.2, max=5.0),
        )
        while True:
            model, revision, entry = await self._unwritten.get()
            key, value = self._keys.history(model, revision), entry.to_json()
            try:
                await retrying(create_if_absent, self._store, key, value)
            except PaddlewheelError as exc:
                log.warning("history_not_written", key=key, bytes=len(value), error=str(exc))

    async def at(self, model: ModelName, revision: Revision) -> Accepted | None:
        """The document of that revision, if there is one and it is valid. Raises `StoreError`."""
        kv = await self._store.get(self._keys.history(model, revision))
        return None if kv is None else await asyncio.to_thread(_valid, kv, model)

    async def before(self, model: ModelName, revision: Revision) -> AsyncIterator[Accepted]:
        """The valid documents older than ``revision``, the newest first. Raises `StoreError`."""
        listing = await self._store.list_prefix(self._keys.history_prefix(model))
        for kv in reversed(listing.kvs):
            key = self._keys.parse(kv.key)
            if isinstance(key, HistoryKey) and key.revision < revision:
                found = await asyncio.to_thread(_valid, kv, model)
                if found is not None:
                    yield found


def _valid(kv: KeyValue, model: ModelName) -> Accepted | None:
    """Parsing takes up to 0.3 s: not for the event loop."""
    try:
        entry = HistoryEntry.from_json(kv.value)
        document = parse_model(entry.document, name=model)
    except (BadRecord, ConfigError):
        return None
    return Accepted(entry.revision, document, entry.document)
