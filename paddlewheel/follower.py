"""Follows etcd: documents, rollouts, quarantines and last-good versions, from watch to manager.

Every revision of a document is recorded in history (create-if-absent), parsed off the event loop,
and then handed on or refused. One that waits for the fleet (`registry.rollouts`) is only prepared
until the coordinator's record says more. What was last accepted is kept on disk
(`registry.snapshot`), so that a node starts from it while etcd is away.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import structlog
from tenacity import AsyncRetrying, retry_if_exception, wait_random_exponential

from loader.manager import Manager
from paddlewheel.admission import DocumentAdmission, local_sizes
from paddlewheel.history import History, is_passing
from paddlewheel.look_back import LookBack
from paddlewheel.report import Seen, intent_of
from paddlewheel.stance import Stance
from registry.catalog import (
    Accepted,
    Catalog,
    Change,
    DocumentAccepted,
    DocumentDeleted,
    DocumentMissing,
    DocumentRefused,
    LastGoodChanged,
    QuarantineChanged,
    RecordIgnored,
    RolloutChanged,
)
from registry.errors import PaddlewheelError
from registry.keys import Keys
from registry.names import ModelName, NodeId, Revision, Version
from registry.records import Good
from registry.rollouts import RolloutRecord
from registry.snapshot import load, save
from registry.spec import FieldError, ModelDocument
from registry.store import Batch, Listing, Put, Store, StoreError

log = structlog.get_logger(__name__)

REFUSED_RETRY_S = 5.0
SAVE_AFTER_S = 0.25
"""The snapshot's two fsyncs come after what a new document sets off, and once for many of them:
on the thread that parses, each made the next document wait."""

Fold = Callable[[Catalog], tuple[Catalog, tuple[Change, ...]]]


class Follower:
    """One node's reader of etcd.

    ``on_seen`` is told after each document, accepted or not; ``on_standing`` when what the fleet
    says of one changed.
    """

    def __init__(
        self,
        *,
        store: Store,
        keys: Keys,
        node: NodeId,
        manager: Manager,
        admission: DocumentAdmission,
        labels: Mapping[str, str],
        snapshot_path: Path,
        on_seen: Callable[[ModelName], None],
        on_standing: Callable[[ModelName], None] = lambda _model: None,
    ) -> None:
        self._store = store
        self._keys = keys
        self._manager = manager
        self._admission = admission
        self._snapshot_path = snapshot_path
        self._on_seen = on_seen
        self._on_standing = on_standing
        self._catalog = Catalog()
        self._folding = asyncio.Lock()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="documents")
        self._history = History(store, keys)
        self._look_back = LookBack(
            (self._find_last_good, self._find_last_accepted, self._find_base)
        )
        self._stance = Stance(manager=manager, node=node, labels=labels, ask=self._look_back.ask)
        self._unsaved = asyncio.Event()
        self.seen: dict[ModelName, Seen] = {}
        """The last document seen of each model that is placed here."""
        self._refused: dict[ModelName, bytes] = {}
        """Texts of the documents last seen and refused."""
        self.configs_known = asyncio.Event()
        """Whether the documents are known: from etcd, or from the snapshot."""
        self.last_event_at: datetime | None = None

    def rollout(self, model: ModelName) -> RolloutRecord | None:
        """The coordinator's record of a model, as last seen."""
        return self._catalog.rollouts.get(model)

    async def restore(self) -> None:
        """Start from what was last accepted here, without etcd."""
        loop = asyncio.get_running_loop()
        snapshot = await loop.run_in_executor(self._thread, load, self._snapshot_path)
        if snapshot is None:
            return
        if snapshot.prefix != self._keys.prefix:
            log.warning("snapshot_ignored", reason=f"made under the prefix {snapshot.prefix!r}")
            return
        await self._fold(lambda _: Catalog.restore(snapshot, self._keys, accept=self._accept(loop)))
        self.configs_known.set()
        log.info("snapshot_restored", models=len(self.seen), path=str(self._snapshot_path))

    async def run(self) -> None:
        """Follow until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            for prefix in (
                self._keys.quarantines_prefix,
                self._keys.lastgoods_prefix,
                self._keys.rollouts_prefix,
                self._keys.models_prefix,
            ):
                tasks.create_task(self._follow(prefix), name=f"follow {prefix}")
            tasks.create_task(self._history.run(), name="history")
            tasks.create_task(self._look_back.run(), name="look back")
            tasks.create_task(self._save_snapshots(), name="snapshots")
            tasks.create_task(self._take_what_fits(), name="room")

    # --- from the store to the catalog --------------------------------------------------------

    async def _follow(self, prefix: str) -> None:
        """A store that turns us away is waited for: what serves goes on (a password may be in the
        middle of its rotation), and the log says why nothing new is heard."""
        while True:
            try:
                await self._follow_listing(prefix)
            except StoreError as exc:
                log.error("store_refuses", prefix=prefix, error=str(exc))
                await asyncio.sleep(REFUSED_RETRY_S)

    async def _follow_listing(self, prefix: str) -> None:
        """List, then watch. Returns when the store went back in time (restored from a backup):
        only a listing says what is true then."""
        loop = asyncio.get_running_loop()
        accept = self._accept(loop)
        listing = await self._list(prefix)
        self._history.record(listing.kvs)
        await self._fold(lambda was: was.relist(listing, self._keys, prefix, accept=accept))
        if prefix == self._keys.models_prefix:
            self.configs_known.set()
        elif prefix == self._keys.rollouts_prefix and not self._stance.rollouts_known:
            self._stance.rollouts_known = True
            for model in self._catalog.models:
                self._stand(model)
        revision = listing.revision
        async for batch in self._store.watch_prefix(prefix, known=listing):
            is_other = batch.store_id not in ("", listing.store_id)
            if batch.revision < revision or is_other:
                log.warning("store_rewound", prefix=prefix, was=revision, now=batch.revision)
                return
            revision = batch.revision
            self._history.record([event.kv for event in batch.events if isinstance(event, Put)])
            await self._fold(_apply(batch, self._keys, accept))

    async def _list(self, prefix: str) -> Listing:
        retrying = AsyncRetrying(
            retry=retry_if_exception(is_passing),
            wait=wait_random_exponential(multiplier=0.1, max=1.0),
        )
        async for attempt in retrying:
            with attempt:
                return await self._store.list_prefix(prefix)
        raise AssertionError("tenacity ends with a result or an error")

    def _accept(
        self, loop: asyncio.AbstractEventLoop, *, is_newest: bool = True
    ) -> Callable[[ModelDocument], tuple[FieldError, ...]]:
        """What a node asks beyond the document itself; called in the thread that parses.

        Disks are looked at there; the device pool belongs to the loop and is asked on it.
        is_newest: not a document of history, while a newer one stays refused.
        """

        async def check(
            document: ModelDocument, sizes: Mapping[str, int]
        ) -> tuple[FieldError, ...]:
            return self._admission.check(document, sizes, is_newest=is_newest)

        def accept(document: ModelDocument) -> tuple[FieldError, ...]:
            if not self._stance.is_placed_here(document):
                return ()
            try:
                sizes = local_sizes(document)
                return asyncio.run_coroutine_threadsafe(check(document, sizes), loop).result()
            except Exception as exc:  # a bug, met by one document: it must not stop them all
                log.exception("document_not_judged", model=document.name)
                return (FieldError("", None, f"this node can't judge it: {exc!r}"),)

        return accept

    async def _take_what_fits(self) -> None:
        """Accept, without a new revision, what was refused for want of memory that is free now."""
        accept = self._accept(asyncio.get_running_loop())
        while True:
            await self._admission.room.wait()
            self._admission.room.clear()
            while (model := self._admission.now_fitting()) is not None:
                changes = await self._fold(_reconsider(model, self._refused.get(model), accept))
                if not changes and self._admission.now_fitting() == model:
                    self._admission.withdraw(model)  # superseded by one that is refused otherwise

    async def _fold(self, fold: Fold) -> tuple[Change, ...]:
        """Take the catalog one step further, off the loop, and hand the changes on."""
        loop = asyncio.get_running_loop()
        async with self._folding:
            catalog, changes = await loop.run_in_executor(self._thread, fold, self._catalog)
            self._catalog = catalog
            self.last_event_at = datetime.now(UTC)
            for change in changes:
                try:
                    self._hand_on(change)
                except Exception:  # a bug, but one model's: the others go on
                    log.exception("change_not_handed_on", change=type(change).__name__)
        if changes:
            self._unsaved.set()
        return changes

    # --- from the catalog to the manager ------------------------------------------------------

    def _hand_on(self, change: Change) -> None:
        match change:
            case DocumentAccepted(model, revision, document):
                self._accepted(model, revision, document)
                self._fall_back(model)
            case DocumentRefused(model, revision, errors, text):
                self.seen[model] = Seen(revision, errors)
                self._refused[model] = text
                log.warning(
                    "document_refused", model=model, revision=revision,
                    errors=[f"{error.path}: {error.message}" for error in errors[:3]],
                )  # fmt: skip
                self._on_seen(model)
                if self._catalog.models[model].accepted is None:
                    self._look_back.ask(model)
            case DocumentMissing(model, revision):
                # An etcd that lost its data takes no model away.
                log.warning("document_missing_and_kept", model=model, revision=revision)
            case DocumentDeleted(model, revision):
                log.info("document_deleted", model=model, revision=revision)
                self._leave(model)
            case QuarantineChanged(model, version, quarantine):
                log.info(
                    "quarantine_changed", model=model, version=version,
                    reason=quarantine and quarantine.reason,
                )  # fmt: skip
                self._manager.set_quarantined(
                    model, {v: q for (m, v), q in self._catalog.quarantines.items() if m == model}
                )
            case LastGoodChanged(model):
                self._fall_back(model)
            case RolloutChanged(model, rollout):
                log.info(
                    "rollout_changed", model=model, revision=rollout and rollout.revision,
                    phase=rollout and rollout.phase,
                )  # fmt: skip
                self._stance.look_again(model)
                self._stand(model)
                self._on_standing(model)
            case RecordIgnored(key, reason):
                log.warning("record_ignored", key=key, reason=reason)

    def _accepted(self, model: ModelName, revision: Revision, document: ModelDocument) -> None:
        self._refused.pop(model, None)
        self._stance.look_again(model)
        self._stance.remember(document, revision)
        if self._stance.is_placed_here(document):
            log.info("document_accepted", model=model, revision=revision)
        else:
            log.info("document_placed_elsewhere", model=model, revision=revision)
        self.seen[model] = Seen(revision, intent=intent_of(document))
        self._stand(model)
        self._on_seen(model)

    def _newest(self, model: ModelName) -> Accepted | None:
        known = self._catalog.models.get(model)
        return None if known is None else known.accepted

    def _stand(self, model: ModelName) -> None:
        """Do what the fleet's word on the newest accepted document means here."""
        if (newest := self._newest(model)) is None:
            return
        step = self._stance.take(newest, self._catalog.rollouts.get(model))
        if step is None:
            self._leave(model)
        elif (seen := self.seen.get(model)) is not None:
            self.seen[model] = replace(seen, reason=step.reason)

    def _leave(self, model: ModelName) -> None:
        self.seen.pop(model, None)
        self._refused.pop(model, None)
        self._stance.forget(model)
        self._manager.forget_model(model)
        self._admission.forget(model)
        self._on_seen(model)

    # --- what only older documents know -------------------------------------------------------

    def _fall_back(self, model: ModelName) -> None:
        """Tell the manager the last good version, where the document in force still lists it."""
        known, good = self._catalog.models.get(model), self._good(model)
        if good is None or known is None or known.accepted is None:
            return
        document = known.accepted.document
        if _lists(document, good.version):
            self._manager.set_fallback(document, good.version, good.revision)
        else:
            self._look_back.ask(model)

    def _good(self, model: ModelName) -> Good | None:
        """The last good version that is another one than the live version to be in force."""
        known, last = self._catalog.models.get(model), self._catalog.lastgoods.get(model)
        if last is None or known is None or known.accepted is None:
            return None
        view = self._manager.view(model)
        document = (view.aspired if view is not None else None) or known.accepted.document
        good = last.other_than(document.spec.live)
        if good is None or good.revision < known.accepted.created:
            return None  # or from before the model was deleted
        return good if self._stance.is_placed_here(document) else None

    async def _find_last_good(self, model: ModelName) -> None:
        good = self._good(model)
        if good is None:
            return
        then = await self._history.at(model, good.revision)
        if then is not None and _lists(then.document, good.version) and self._good(model) == good:
            self._manager.set_fallback(then.document, good.version, good.revision)

    async def _find_last_accepted(self, model: ModelName) -> None:
        """A node that starts with a broken document serves the one before it, as the others do."""
        loop = asyncio.get_running_loop()
        accept = self._accept(loop, is_newest=False)
        known = self._catalog.models.get(model)
        kv = await self._store.get(self._keys.model(model))
        if known is None or known.accepted is not None or kv is None:
            return
        async for then in self._history.before(model, known.revision):
            if then.revision < kv.create_revision:
                return  # from before the model was deleted
            if not self._stance.is_placed_here(then.document):
                return  # the others serve it
            if await loop.run_in_executor(self._thread, accept, then.document):
                continue  # this node would have refused it
            async with self._folding:
                if self._catalog.models.get(model) is not known:
                    return
                models = {**self._catalog.models, model: replace(known, accepted=then)}
                self._catalog = replace(self._catalog, models=models)
                log.info("document_from_history", model=model, revision=then.revision)
                self._stance.remember(then.document, then.revision)
                self._stand(model)
                self._fall_back(model)
            self._unsaved.set()
            return

    async def _find_base(self, model: ModelName) -> None:
        """The document to have in force while the newest one waits, or was aborted."""
        newest, record = self._newest(model), self._catalog.rollouts.get(model)
        base = None if newest is None else self._stance.lacks(newest, record)
        if base is None:
            return
        loop = asyncio.get_running_loop()
        then = await self._history.at(model, base)
        accept = self._accept(loop, is_newest=False)
        if then is not None:
            refused = await loop.run_in_executor(self._thread, accept, then.document)
            if refused or not self._stance.is_placed_here(then.document):
                then = None  # not for this node
        async with self._folding:
            if then is not None:
                log.info("document_from_history", model=model, revision=then.revision)
                self._stance.remember(then.document, then.revision)
            else:
                log.warning("document_not_in_history", model=model, revision=base)
                self._stance.give_up(model, base)
            self._stand(model)

    # --- the snapshot -------------------------------------------------------------------------

    async def _save_snapshots(self) -> None:
        """Until cancelled; then once more, what was still to be saved."""
        try:
            while True:
                await self._unsaved.wait()
                await asyncio.sleep(SAVE_AFTER_S)
                self._unsaved.clear()
                await asyncio.to_thread(self._save_snapshot)
        finally:
            if self._unsaved.is_set():
                self._save_snapshot()

    def _save_snapshot(self) -> None:
        try:
            save(self._snapshot_path, self._catalog.snapshot(self._keys))
        except PaddlewheelError as exc:
            log.warning("snapshot_not_saved", error=str(exc))


def _apply(
    batch: Batch, keys: Keys, accept: Callable[[ModelDocument], tuple[FieldError, ...]]
) -> Fold:
    return lambda was: was.apply(batch, keys, accept=accept)


def _reconsider(
    model: ModelName,
    text: bytes | None,
    accept: Callable[[ModelDocument], tuple[FieldError, ...]],
) -> Fold:
    return lambda was: (was, ()) if text is None else was.reconsider(model, text, accept=accept)


def _lists(document: ModelDocument, version: Version) -> bool:
    return any(entry.version == version for entry in document.spec.versions)
