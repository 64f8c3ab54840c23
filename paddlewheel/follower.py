"""Follows etcd: documents, quarantines and last-good versions, from the watch to the manager.

Every revision of a document is recorded in history (create-if-absent), parsed off the event loop,
and then handed on or refused. What was last accepted is kept on disk (`registry.snapshot`), so
that a node starts from it while etcd is away.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import structlog
from tenacity import AsyncRetrying, retry_if_exception, wait_random_exponential

from loader.manager import Manager
from paddlewheel.admission import DocumentAdmission, local_sizes
from paddlewheel.report import Seen
from registry.cas import create_if_absent
from registry.catalog import (
    Accepted,
    Catalog,
    Change,
    DocumentAccepted,
    DocumentDeleted,
    DocumentRefused,
    LastGoodChanged,
    QuarantineChanged,
    RecordIgnored,
)
from registry.errors import PaddlewheelError
from registry.keys import HistoryKey, Keys, ModelKey
from registry.names import ModelName, Revision, Version
from registry.records import BadRecord, HistoryEntry
from registry.snapshot import load, save
from registry.spec import ConfigError, FieldError, ModelDocument, parse_model
from registry.store import Batch, KeyValue, Listing, PermissionDenied, Put, Store, StoreError

log = structlog.get_logger(__name__)

Fold = Callable[[Catalog], tuple[Catalog, tuple[Change, ...]]]


class Follower:
    """One node's reader of etcd. ``on_seen`` is told after each document, accepted or not."""

    def __init__(
        self,
        *,
        store: Store,
        keys: Keys,
        manager: Manager,
        admission: DocumentAdmission,
        labels: Mapping[str, str],
        snapshot_path: Path,
        on_seen: Callable[[ModelName], None],
    ) -> None:
        self._store = store
        self._keys = keys
        self._manager = manager
        self._admission = admission
        self._labels = labels
        self._snapshot_path = snapshot_path
        self._on_seen = on_seen
        self._catalog = Catalog()
        self._folding = asyncio.Lock()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="documents")
        self._history: asyncio.Queue[tuple[ModelName, Revision, HistoryEntry]] = asyncio.Queue()
        self._unsaved = asyncio.Event()
        self.seen: dict[ModelName, Seen] = {}
        """The last document seen of each model that is placed here."""
        self.knows_configs = False
        """Whether the documents are known: from etcd, or from the snapshot."""
        self.last_event_at: datetime | None = None

    async def restore(self) -> None:
        """Start from what was last accepted here, without etcd."""
        loop = asyncio.get_running_loop()
        snapshot = await loop.run_in_executor(self._thread, load, self._snapshot_path)
        if snapshot is None:
            return
        await self._fold(lambda _: Catalog.restore(snapshot, self._keys, accept=self._accept(loop)))
        self.knows_configs = True
        log.info("snapshot_restored", models=len(self.seen), path=str(self._snapshot_path))

    async def run(self) -> None:
        """Follow until cancelled; only a refusal of our credentials ends it."""
        async with asyncio.TaskGroup() as tasks:
            for prefix in (
                self._keys.quarantines_prefix,
                self._keys.lastgoods_prefix,
                self._keys.models_prefix,
            ):
                tasks.create_task(self._follow(prefix), name=f"follow {prefix}")
            tasks.create_task(self._write_history(), name="history")
            tasks.create_task(self._save_snapshots(), name="snapshots")

    # --- from the store to the catalog --------------------------------------------------------

    async def _follow(self, prefix: str) -> None:
        loop = asyncio.get_running_loop()
        accept = self._accept(loop)
        listing = await self._list(prefix)
        self._record(listing.kvs)
        await self._fold(lambda was: was.relist(listing, self._keys, prefix, accept=accept))
        if prefix == self._keys.models_prefix:
            self.knows_configs = True
        async for batch in self._store.watch_prefix(prefix, known=listing):
            self._record([event.kv for event in batch.events if isinstance(event, Put)])
            await self._fold(_apply(batch, self._keys, accept))

    async def _list(self, prefix: str) -> Listing:
        retrying = AsyncRetrying(
            retry=retry_if_exception(_is_passing),
            wait=wait_random_exponential(multiplier=0.1, max=1.0),
        )
        async for attempt in retrying:
            with attempt:
                return await self._store.list_prefix(prefix)
        raise AssertionError("tenacity ends with a result or an error")

    def _accept(
        self, loop: asyncio.AbstractEventLoop
    ) -> Callable[[ModelDocument], tuple[FieldError, ...]]:
        """What a node asks beyond the document itself; called in the thread that parses.

        Disks are looked at there; the device pool belongs to the loop and is asked on it.
        """

        async def check(
            document: ModelDocument, sizes: Mapping[str, int]
        ) -> tuple[FieldError, ...]:
            return self._admission.check(document, sizes)

        def accept(document: ModelDocument) -> tuple[FieldError, ...]:
            if not self._is_placed_here(document):
                return ()
            sizes = local_sizes(document)
            return asyncio.run_coroutine_threadsafe(check(document, sizes), loop).result()

        return accept

    async def _fold(self, fold: Fold) -> None:
        """Take the catalog one step further, off the loop, and hand the changes on."""
        loop = asyncio.get_running_loop()
        async with self._folding:
            catalog, changes = await loop.run_in_executor(self._thread, fold, self._catalog)
            self._catalog = catalog
            self.last_event_at = datetime.now(UTC)
            self._hand_on(changes)
        if changes:
            self._unsaved.set()
        for change in changes:
            await self._look_back(change)

    # --- from the catalog to the manager ------------------------------------------------------

    def _hand_on(self, changes: Iterable[Change]) -> None:
        for change in changes:
            match change:
                case DocumentAccepted(model, revision, document):
                    self._accepted(model, revision, document)
                case DocumentRefused(model, revision, errors):
                    self.seen[model] = Seen(revision, errors)
                    log.warning(
                        "document_refused", model=model, revision=revision,
                        errors=[f"{error.path}: {error.message}" for error in errors[:3]],
                    )  # fmt: skip
                    self._on_seen(model)
                case DocumentDeleted(model, revision):
                    log.info("document_deleted", model=model, revision=revision)
                    self._leave(model)
                case QuarantineChanged(model, version, quarantine):
                    log.info(
                        "quarantine_changed", model=model, version=version,
                        reason=quarantine and quarantine.reason,
                    )  # fmt: skip
                    self._manager.set_quarantined(
                        model,
                        {v: q for (m, v), q in self._catalog.quarantines.items() if m == model},
                    )
                case LastGoodChanged():
                    pass
                case RecordIgnored(key, reason):
                    log.warning("record_ignored", key=key, reason=reason)

    def _accepted(self, model: ModelName, revision: Revision, document: ModelDocument) -> None:
        if not self._is_placed_here(document):
            log.info("document_placed_elsewhere", model=model, revision=revision)
            self._leave(model)
            return
        self.seen[model] = Seen(revision)
        log.info("document_accepted", model=model, revision=revision)
        self._manager.aspire(document, revision)
        self._on_seen(model)

    def _leave(self, model: ModelName) -> None:
        self.seen.pop(model, None)
        self._manager.forget_model(model)
        self._on_seen(model)

    def _is_placed_here(self, document: ModelDocument) -> bool:
        return document.spec.placement.labels.items() <= self._labels.items()

    # --- what only older documents know -------------------------------------------------------

    async def _look_back(self, change: Change) -> None:
        """Find in history what the present documents don't say. Quiet where etcd is away."""
        try:
            match change:
                case DocumentAccepted(model) | LastGoodChanged(model):
                    await self._find_last_good(model)
                case DocumentRefused(model, revision):
                    await self._find_last_accepted(model, revision)
                case _:
                    pass
        except StoreError as exc:
            log.info("history_not_read", error=str(exc))

    async def _find_last_good(self, model: ModelName) -> None:
        known, last = self._catalog.models.get(model), self._catalog.lastgoods.get(model)
        if last is None or known is None or known.accepted is None:
            return
        document = known.accepted.document
        good = last.other_than(document.spec.live)
        if good is None:
            return
        if not _lists(document, good.version):
            kv = await self._store.get(self._keys.history(model, good.revision))
            accepted = _accepted_from(kv, model) if kv is not None else None
            if accepted is None or not _lists(accepted.document, good.version):
                return
            document = accepted.document
        self._manager.set_fallback(document, good.version, good.revision)

    async def _find_last_accepted(self, model: ModelName, refused: Revision) -> None:
        """A node that starts with a broken document serves the one before it, as the others do."""
        known = self._catalog.models.get(model)
        if known is None or known.accepted is not None:
            return
        listing = await self._store.list_prefix(self._keys.history_prefix(model))
        for kv in reversed(listing.kvs):
            key = self._keys.parse(kv.key)
            if not isinstance(key, HistoryKey) or key.revision >= refused:
                continue
            loop = asyncio.get_running_loop()
            accepted = await loop.run_in_executor(self._thread, _accepted_from, kv, model)
            if accepted is None or self._catalog.models.get(model) is not known:
                continue
            models = {**self._catalog.models, model: replace(known, accepted=accepted)}
            self._catalog = replace(self._catalog, models=models)
            self._unsaved.set()
            log.info("document_from_history", model=model, revision=accepted.revision)
            self._manager.aspire(accepted.document, accepted.revision)
            return

    # --- history, snapshot --------------------------------------------------------------------

    def _record(self, kvs: Iterable[KeyValue]) -> None:
        seen_at = datetime.now(UTC)
        for kv in kvs:
            key = self._keys.parse(kv.key)
            if isinstance(key, ModelKey):
                entry = HistoryEntry.of(kv.mod_revision, kv.value, seen_at)
                self._history.put_nowait((key.model, kv.mod_revision, entry))

    async def _write_history(self) -> None:
        retrying = AsyncRetrying(
            retry=retry_if_exception(_is_passing),
            wait=wait_random_exponential(multiplier=0.2, max=5.0),
        )
        while True:
            model, revision, entry = await self._history.get()
            key, value = self._keys.history(model, revision), entry.to_json()
            try:
                await retrying(create_if_absent, self._store, key, value)
            except PaddlewheelError as exc:
                log.warning("history_not_written", key=key, error=str(exc))

    async def _save_snapshots(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._unsaved.wait()
            self._unsaved.clear()
            snapshot = self._catalog.snapshot(self._keys)
            try:
                await loop.run_in_executor(self._thread, save, self._snapshot_path, snapshot)
            except PaddlewheelError as exc:
                log.warning("snapshot_not_saved", error=str(exc))


def _is_passing(exc: BaseException) -> bool:
    return isinstance(exc, StoreError) and not isinstance(exc, PermissionDenied)


def _apply(
    batch: Batch, keys: Keys, accept: Callable[[ModelDocument], tuple[FieldError, ...]]
) -> Fold:
    return lambda was: was.apply(batch, keys, accept=accept)


def _lists(document: ModelDocument, version: Version) -> bool:
    return any(entry.version == version for entry in document.spec.versions)


def _accepted_from(kv: KeyValue, model: ModelName) -> Accepted | None:
    """The document of a history entry, if it is one that would be accepted today."""
    try:
        entry = HistoryEntry.from_json(kv.value)
        document = parse_model(entry.document, name=model)
    except (BadRecord, ConfigError):
        return None
    return Accepted(entry.revision, document, entry.document)
