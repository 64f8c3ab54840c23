"""One coordinator's term: it watches, asks the plan what to say next, and writes it, fenced.

Everything known is read anew when a term begins, and every write compares the fence, the record
and the document that it was decided on. So a term may end between any two writes, or be a ghost
of a leader long replaced, and the record is still one that the plan followed step by step.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Awaitable, Callable, Coroutine
from datetime import datetime, timedelta
from typing import Any, TypeVar

import structlog

from paddlewheel.history import is_passing
from paddlewheel.promotion import NothingToPromote, promote_text
from paddlewheel.rollout.canary_plan import promotes
from paddlewheel.rollout.plan import next_record, waits_for_nobody, wake_s, wants_record
from paddlewheel.rollout.telling import Telling, tellings
from paddlewheel.rollout.view import DocumentSeen, View
from paddlewheel.rollout.world import World
from registry.cas import Conflict
from registry.election import Deposed, Leadership, backoff_s
from registry.keys import Keys, ModelKey, SamplesKey
from registry.names import ModelName, Revision
from registry.records import BadRecord, HistoryEntry
from registry.rollouts import RolloutRecord
from registry.spec import ConfigError, ModelDocument
from registry.store import Batch, Event, KeyValue, Listing, ModRevisionIs, Put, Store, StoreError

log = structlog.get_logger(__name__)

Parse = Callable[[bytes, ModelName], Awaitable[ModelDocument]]
"""Raises `ConfigError`."""
T = TypeVar("T")

CLOCK_STEP_S = 0.001
"""uvloop's clock counts milliseconds: what is due within one is due."""
WAKE_MIN_S = 0.01
"""Timers may end a little early."""
JUDGE_AFTER_S = 0.3
"""For the samples of other nodes to come in too."""
GATHER_PER_NODE_S = 0.0002
GATHER_MAX_S = 0.1
CONFLICT_RETRY_S = 0.05
"""For a watch to bring what a write was refused for."""
TOLD_AGAIN = timedelta(minutes=10)
"""Steps this young are told again when a term begins: the writer may have ended before it could."""


class Term:
    """From a won election to its end. Loop-bound, used once."""

    def __init__(
        self,
        store: Store,
        keys: Keys,
        node: str,
        leadership: Leadership,
        *,
        parse: Parse,
        tell: Callable[[Telling], None],
        now: Callable[[], datetime],
        rng: random.Random,
    ) -> None:
        self._store = store
        self._keys = keys
        self._node = node
        self._leadership = leadership
        self._parse = parse
        self._tell = tell
        self._now = now
        self._rng = rng
        loop = asyncio.get_running_loop()
        self._clock_s = loop.time
        self._view = View(keys, loop.time)
        self._existing: set[ModelName] = set()
        """Models with a document key, whether or not it parses."""
        self._unlisted: set[str] | None = None
        """Prefixes of the fleet that are not known yet; ``None``: not asked for."""
        self._told: dict[ModelName, RolloutRecord | None] = {}
        """The records of which the world was told by events, as far as this term knows."""
        self._unpromotable: set[tuple[ModelName, Revision]] = set()
        """Documents that could not be rewritten; said once."""
        self._deserted: set[ModelName] = set()
        """Models that no node took when last looked at: no time counted since."""
        self._failures: dict[ModelName, int] = {}
        self._touched: set[ModelName] = set()
        self._due_s: dict[ModelName, float] = {}
        self._wake = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._ended: asyncio.Future[None] = loop.create_future()

    async def run(self) -> None:
        """Coordinate until something ends it.

        Returns when the store went back in time: the next term reads everything anew. Raises
        `registry.election.Deposed`, and what the store raises for good (`is_passing`).
        """
        try:
            # Records before documents: what a document has been decided on is never older.
            records = await self._list(self._keys.rollouts_prefix)
            self._view.relist(records, self._keys.rollouts_prefix)
            documents = await self._list(self._keys.models_prefix)
            for kv in documents.kvs:
                await self._take_document(kv)
            self._touched |= {*self._existing, *self._view.records}
            self._leave_out_old_news()
            self._start(self._watch(self._keys.rollouts_prefix, records, self._take))
            self._start(self._watch(self._keys.models_prefix, documents, self._take_documents))
            self._start(self._decide())
            await self._ended
        finally:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    def _start(self, part: Coroutine[Any, Any, None]) -> None:
        self._tasks.append(asyncio.create_task(self._until_ended(part)))

    async def _until_ended(self, part: Coroutine[Any, Any, None]) -> None:
        """The term ends with its first part, and as that part did."""
        try:
            await part
        except Exception as exc:  # handed on to `run`, whose caller knows which are weather
            if not self._ended.done():
                self._ended.set_exception(exc)
        else:
            if not self._ended.done():
                self._ended.set_result(None)

    def _leave_out_old_news(self) -> None:
        """What is under way, and what is young, is told (again) at the beginning of a term."""
        for model, (_, record) in self._view.records.items():
            is_old = record is not None and abs(self._now() - record.since) >= TOLD_AGAIN
            if record is not None and record.has_ended and is_old:
                self._told[model] = record

    def _tell_news(self, model: ModelName) -> None:
        """Tell what became of the record: by our writes, also those whose answer was lost."""
        before, now = self._told.get(model), self._view.record(model)
        self._told[model] = now
        if now is not None and now != before:
            for telling in tellings(before, now):
                self._tell(telling)

    # --- what there is ------------------------------------------------------------------------

    async def _list(self, prefix: str) -> Listing:
        return await self._patiently(lambda: self._store.list_prefix(prefix))

    async def _patiently(self, call: Callable[[], Awaitable[T]]) -> T:
        failures = 0
        while True:
            try:
                return await call()
            except StoreError as exc:
                if not is_passing(exc):
                    raise
                failures += 1
                await asyncio.sleep(backoff_s(self._rng, failures))

    async def _watch(
        self, prefix: str, known: Listing, take: Callable[[Batch], Awaitable[None]]
    ) -> None:
        """Hand on every batch. Returns when the store went back in time."""
        revision = known.revision
        async for batch in self._store.watch_prefix(prefix, known=known):
            if batch.revision < revision:
                log.warning("store_rewound", prefix=prefix, was=revision, now=batch.revision)
                return
            revision = batch.revision
            await take(batch)

    async def _take(self, batch: Batch) -> None:
        for event in batch.events:
            models = self._view.take(event)
            key = event.kv.key if isinstance(event, Put) else event.key
            if isinstance(self._keys.parse(key), SamplesKey):
                self._judge_soon(models)
            else:
                self._touch(models)

    def _judge_soon(self, models: set[ModelName]) -> None:
        """Every node writes its samples once a second: the whole fleet's are judged together."""
        at_s = self._clock_s() + JUDGE_AFTER_S
        for model in models:
            if self._due_s.get(model, at_s) >= at_s:
                self._due_s[model] = at_s
                self._wake.set()

    def _touch(self, models: set[ModelName]) -> None:
        if models:
            self._touched |= models
            self._wake.set()

    def _need_fleet(self) -> bool:
        """Whether nodes, statuses and orders are known; asks for them the first time. A fleet
        without gated documents is not watched."""
        if self._unlisted is None:
            keys = self._keys
            prefixes = (
                keys.nodes_prefix, keys.status_prefix(), keys.orders_prefix,
                keys.quarantines_prefix, keys.samples_prefix(),
            )  # fmt: skip
            self._unlisted = set(prefixes)
            for prefix in prefixes:
                self._start(self._follow(prefix, self._unlisted))
        return not self._unlisted

    async def _follow(self, prefix: str, unlisted: set[str]) -> None:
        listing = await self._list(prefix)
        self._view.relist(listing, prefix)
        unlisted.discard(prefix)
        if not unlisted:
            self._touch(set(self._view.documents))
        await self._watch(prefix, listing, self._take)

    # --- documents ----------------------------------------------------------------------------

    async def _take_documents(self, batch: Batch) -> None:
        for event in batch.events:
            await self._take_document_event(event)

    async def _take_document_event(self, event: Event) -> None:
        if isinstance(event, Put):
            await self._take_document(event.kv)
            return
        key = self._keys.parse(event.key)
        if isinstance(key, ModelKey):
            self._existing.discard(key.model)
            self._view.documents.pop(key.model, None)
            self._touch({key.model})

    async def _take_document(self, kv: KeyValue) -> None:
        key = self._keys.parse(kv.key)
        if not isinstance(key, ModelKey):
            return
        model, revision = key.model, kv.mod_revision
        self._existing.add(model)
        document: ModelDocument | None
        try:
            document = await self._parse(kv.value, model)
        except ConfigError:
            # Nobody takes it: the one before goes on, its rollout too.
            document, revision = await self._last_valid(model, kv)
        if document is None:
            self._view.documents.pop(model, None)
            return
        self._view.documents[model] = DocumentSeen(
            kv.mod_revision, kv.create_revision, revision, document
        )
        self._view.document_changed(model)
        self._touch({model})

    async def _last_valid(
        self, model: ModelName, kv: KeyValue
    ) -> tuple[ModelDocument | None, Revision]:
        known, record = self._view.documents.get(model), self._view.record(model)
        if known is not None and known.created == kv.create_revision:
            return known.document, known.revision
        if record is None or record.revision < kv.create_revision:
            return None, kv.mod_revision
        revision = record.revision
        then = await self._patiently(lambda: self._store.get(self._keys.history(model, revision)))
        if then is not None:
            with contextlib.suppress(BadRecord, ConfigError):
                entry = HistoryEntry.from_json(then.value)
                return await self._parse(entry.document.encode(), model), revision
        return None, revision

    # --- what to say --------------------------------------------------------------------------

    async def _decide(self) -> None:
        while True:
            due_s = min(self._due_s.values(), default=None)
            timeout_s = None if due_s is None else max(0.0, due_s - self._clock_s())
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(timeout_s):
                    await self._wake.wait()
            # Many statuses are one look: it takes 10 us a node, on a loop that serves requests.
            await asyncio.sleep(min(GATHER_MAX_S, GATHER_PER_NODE_S * len(self._view.nodes)))
            self._wake.clear()
            now_s = self._clock_s() + CLOCK_STEP_S
            models = self._touched | {m for m, at_s in self._due_s.items() if at_s <= now_s}
            self._touched = set()
            for model in sorted(models):
                self._due_s.pop(model, None)
                try:
                    await self._step(model)
                except (Deposed, StoreError):
                    raise
                except Exception:  # a bug, but one model's: the others go on
                    log.exception("rollout_not_decided", model=model)

    async def _step(self, model: ModelName) -> None:
        """Write what is to be said of one model, as far as that goes without waiting."""
        self._tell_news(model)
        if model not in self._existing:
            await self._forget(model)
            return
        while True:
            seen = self._view.documents.get(model)
            if seen is None or not wants_record(seen.document, self._view.record(model)):
                return
            if not self._need_fleet():
                return  # touched again once it is known
            world = self._view.world(model, now=self._now(), coordinator=self._node)
            if world is None:
                return
            if waits_for_nobody(world):
                self._deserted.add(model)
            elif model in self._deserted:
                self._deserted.discard(model)
                self._view.wait_anew(model)
                continue
            record = next_record(world)
            if record is None:
                await self._promote(model, seen, world)
                again_s = wake_s(world)
                if again_s is not None:
                    self._due_s[model] = self._clock_s() + max(WAKE_MIN_S, again_s)
                return
            if not await self._write(model, seen.mod_revision, record):
                return

    async def _write(self, model: ModelName, document: Revision, record: RolloutRecord) -> bool:
        """document: the mod_revision of the key, which may hold one that does not parse."""
        key = self._keys.rollout(model)
        is_newest = ModRevisionIs(self._keys.model(model), document)
        try:
            done = await self._leadership.put(
                key, record.to_json(), self._view.record_revision(model), is_newest
            )
        except StoreError as exc:
            self._retry(model, exc)
            return False
        self._failures.pop(model, None)
        if isinstance(done, Conflict):
            self._take_back(model, done)
            return False
        self._view.wrote_record(model, done, record)
        log.info(
            "rollout_written", model=model, revision=record.revision, phase=record.phase.value,
            wave=record.wave, paused=record.paused, reason=record.reason,
        )  # fmt: skip
        self._tell_news(model)
        return True

    async def _promote(self, model: ModelName, seen: DocumentSeen, world: World) -> None:
        """Make the canary live where its last step is passed, as ``paddlewheel promote`` does.

        By compare-and-swap on the very document that was decided on: an edit made meanwhile wins.
        """
        record = world.record
        if record is None or not promotes(world, record) or seen.mod_revision != seen.revision:
            return
        if (model, seen.revision) in self._unpromotable:
            return
        key = self._keys.model(model)
        try:
            kv = await self._store.get(key)
            if kv is None or kv.mod_revision != seen.revision:
                return  # the watch brings what it is now
            text = promote_text(kv.value.decode()).text.encode()
            await self._parse(text, model)
            await self._leadership.put(key, text, seen.revision)
        except StoreError as exc:
            self._retry(model, exc)
        except (NothingToPromote, ConfigError) as exc:
            self._unpromotable.add((model, seen.revision))
            log.error("canary_not_promoted", model=model, revision=seen.revision, reason=str(exc))

    async def _forget(self, model: ModelName) -> None:
        """The document is gone: so is its rollout, and what was ordered of it."""
        revision = self._view.record_revision(model)
        if not revision:
            return
        is_gone = ModRevisionIs(self._keys.model(model), Revision(0))
        try:
            done = await self._leadership.delete(
                self._keys.rollout(model), revision, is_gone,
                and_delete=[self._keys.order(model)],
            )  # fmt: skip
        except StoreError as exc:
            self._retry(model, exc)
            return
        if isinstance(done, Conflict):
            self._take_back(model, done)
        else:
            self._view.drop_record(model, done)

    def _take_back(self, model: ModelName, conflict: Conflict) -> None:
        """A write was refused: the record or the document is another one than we thought."""
        if conflict.current is None:
            self._view.drop_record(model, self._view.record_revision(model))
        else:
            self._view.take_record(model, conflict.current)
        self._due_s[model] = self._clock_s() + CONFLICT_RETRY_S

    def _retry(self, model: ModelName, exc: StoreError) -> None:
        if not is_passing(exc):
            raise exc
        failures = self._failures[model] = self._failures.get(model, 0) + 1
        log.info("rollout_not_written", model=model, error=str(exc))
        self._due_s[model] = self._clock_s() + backoff_s(self._rng, failures)
