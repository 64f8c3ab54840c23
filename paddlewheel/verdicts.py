"""What this node found out for the fleet: faults, quarantines by quorum, last-good versions.

Written off the hot path and retried until etcd has it. A quarantine of our own that etcd does not
have yet is also kept on disk, so that a restart in between does not bring a failing version back.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import threading
from collections.abc import Coroutine
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from pathlib import Path

import orjson
import structlog

from loader.faults import Fault
from loader.manager import Manager
from registry.cas import Conflict, replace_if
from registry.keys import FaultKey, Keys
from registry.names import ModelName, NodeId, Revision, ServableId, Version
from registry.records import BadRecord, FaultRecord, LastGood, Quarantine
from registry.store import Delete, Event, KeyValue, Store, StoreError

log = structlog.get_logger(__name__)

SAVE_AFTER_S = 0.02
"""The request that led to a quarantine is run on the standby first: starting a thread and handing
it the interpreter cost it up to 30 ms."""

RETRY_FIRST_S = 0.05
RETRY_MAX_S = 5.0


@dataclass(frozen=True, slots=True)
class _Own:
    """A quarantine of this node's, on its way to the fleet."""

    model: ModelName
    version: Version
    quarantine: Quarantine
    record: FaultRecord
    is_told: bool = False
    """Our fault key was written: once it is gone, somebody released the version."""


class Verdicts:
    """Loop-bound. `quarantined` and `baked` never block and never fail."""

    def __init__(
        self, *, store: Store, keys: Keys, node: NodeId, manager: Manager, path: Path
    ) -> None:
        self._store = store
        self._keys = keys
        self._node = node
        self._manager = manager
        self._path = path
        self._own: dict[tuple[ModelName, Version], _Own] = {}
        """Those that a quarantine key does not say yet."""
        self._good: dict[ModelName, LastGood] = {}
        self._wake = asyncio.Event()
        self._unsaved = asyncio.Event()
        self._file_lock = threading.Lock()

    def restore(self) -> None:
        """Take up what was not written before the restart."""
        try:
            rows = orjson.loads(self._path.read_bytes())
            for row in rows:
                own = _Own(
                    ModelName(row["model"]),
                    Version(row["version"]),
                    Quarantine.model_validate(row["quarantine"]),
                    FaultRecord.model_validate(row["record"]),
                    bool(row.get("told", False)),
                )
                self._own[own.model, own.version] = own
                self._manager.keep_quarantined(own.model, own.version, own.quarantine)
        except FileNotFoundError:
            return
        except (OSError, ValueError, KeyError, TypeError, AttributeError, BadRecord) as exc:
            log.warning("own_quarantines_ignored", path=str(self._path), reason=str(exc))
        self._wake.set()

    def quarantined(
        self, model: ModelName, servable: ServableId, quarantine: Quarantine, fault: Fault
    ) -> None:
        """This node took a version out."""
        version = servable.version
        seen = self._manager.desk.seen(model, servable).get(fault.code)
        ago_s = 0.0 if seen is None else seen.last_s - seen.first_s
        record = FaultRecord(
            code=fault.code,
            fault_class=str(fault.fault_class),
            count=1 if seen is None else seen.count,
            first_at=quarantine.at - timedelta(seconds=ago_s),
            last_at=quarantine.at,
            message=fault.message,
        )
        self._own[model, version] = _Own(model, version, quarantine, record)
        self._save()
        self._wake.set()

    def baked(
        self, model: ModelName, servable: ServableId, revision: Revision, at: datetime
    ) -> None:
        """A live version served through its whole bake."""
        self._good[model] = LastGood(
            version=servable.version, revision=revision, at=at, digest=servable.digest
        )
        self._wake.set()

    async def run(self) -> None:
        """Write until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._keep_on_disk(), name="save quarantines")
            tasks.create_task(self._write(), name="write verdicts")
            tasks.create_task(self._follow_releases(), name="follow releases")

    async def _write(self) -> None:
        failures = 0
        while True:
            await self._wake.wait()
            self._wake.clear()
            failed = False
            # Each by itself: one that etcd refuses must not keep the others from being written.
            for key, own in list(self._own.items()):
                if self._own.get(key) is own:
                    failed = not await self._done(self._publish(own)) or failed
            for model, good in list(self._good.items()):
                failed = not await self._done(self._put_last_good(model, good)) or failed
            failures = failures + 1 if failed else 0
            if failed:
                pause_s = min(RETRY_MAX_S, RETRY_FIRST_S * 2 ** min(failures, 10))
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(random.uniform(0.5, 1.0) * pause_s):
                        await self._wake.wait()
                self._wake.set()

    async def _done(self, writing: Coroutine[None, None, None]) -> bool:
        """Whether it was written; ``False``: to be tried again."""
        try:
            await writing
        except StoreError as exc:
            log.info("verdict_not_written", error=str(exc))
            return False
        return True

    async def _publish(self, own: _Own) -> None:
        """Our own fault key; then, with enough of them for this version, the quarantine key."""
        key = self._keys.fault(own.model, own.version, self._node)
        value = own.record.to_json()
        held = await self._store.get(key)
        if held is None and own.is_told:
            self._released(own.model, own.version)  # while we were away
            return
        if held is None or held.value != value:
            await self._store.put(key, value)
        if not own.is_told:
            own = self._keep(own, replace(own, is_told=True))
        listing = await self._store.list_prefix(self._keys.faults_prefix(own.model, own.version))
        nodes = tuple(sorted(self._nodes_of(listing.kvs)))
        if len(nodes) < self._quorum(own.model):
            log.info("quarantine_without_quorum", model=own.model, version=own.version, nodes=nodes)
            return
        await self._put_quarantine(own, own.quarantine.model_copy(update={"nodes": nodes}))
        self._keep(own, None)

    async def _put_quarantine(self, own: _Own, quarantine: Quarantine) -> None:
        """Create the key, unless one stands there that covers these bytes: the first one counts."""
        key = self._keys.quarantine(own.model, own.version)
        while True:
            held = await self._store.get(key)
            if held is not None:
                with contextlib.suppress(BadRecord):
                    if Quarantine.from_json(held.value).digest in (None, quarantine.digest):
                        return
            revision = Revision(0) if held is None else held.mod_revision
            done = await replace_if(self._store, key, quarantine.to_json(), revision)
            if not isinstance(done, Conflict):
                return

    def _keep(self, was: _Own, now: _Own | None) -> _Own:
        """Replace or drop ``was``, unless a newer one took its place meanwhile."""
        if self._own.get((was.model, was.version)) is was:
            if now is None:
                del self._own[was.model, was.version]
            else:
                self._own[was.model, was.version] = now
            self._save()
        return now or was

    def _released(self, model: ModelName, version: Version) -> None:
        if self._own.pop((model, version), None) is not None:
            self._save()
        self._manager.release(model, version)

    def _nodes_of(self, kvs: tuple[KeyValue, ...]) -> set[NodeId]:
        keys = (self._keys.parse(kv.key) for kv in kvs)
        return {key.node for key in keys if isinstance(key, FaultKey)}

    def _quorum(self, model: ModelName) -> int:
        view = self._manager.view(model)
        document = None if view is None else view.document or view.aspired
        return 1 if document is None else document.spec.rollback.quorum

    async def _put_last_good(self, model: ModelName, good: LastGood) -> None:
        """By compare-and-swap; the revision only grows."""
        key = self._keys.lastgood(model)
        while True:
            held = await self._store.get(key)
            value: LastGood | None = good
            if held is not None:
                with contextlib.suppress(BadRecord):
                    before = LastGood.from_json(held.value)
                    value = good.after(before) if before.revision < good.revision else None
            if value is None:
                break
            revision = Revision(0) if held is None else held.mod_revision
            done = await replace_if(self._store, key, value.to_json(), revision)
            if not isinstance(done, Conflict):
                break
        if self._good.get(model) == good:
            del self._good[model]

    async def _follow_releases(self) -> None:
        """Our fault key deleted by somebody else lifts a quarantine that never got its quorum.

        Another node's fault may complete the quorum: then we write the key, whoever is first.
        """
        while True:
            try:
                async for batch in self._store.watch_prefix(self._keys.faults_prefix()):
                    for event in batch.events:
                        self._fault_changed(event)
            except StoreError as exc:  # turned away: what serves goes on
                log.error("store_refuses", prefix=self._keys.faults_prefix(), error=str(exc))
                await asyncio.sleep(RETRY_MAX_S)

    def _fault_changed(self, event: Event) -> None:
        key = self._keys.parse(event.key if isinstance(event, Delete) else event.kv.key)
        if not isinstance(key, FaultKey):
            return
        if isinstance(event, Delete) and key.node == self._node:
            self._released(key.model, key.version)
        elif key.node != self._node and (key.model, key.version) in self._own:
            self._wake.set()

    # --- on disk --------------------------------------------------------------------------------

    def _save(self) -> None:
        """Soon, and beside the event loop: an fsync takes as long as the disk likes."""
        self._unsaved.set()

    async def _keep_on_disk(self) -> None:
        try:
            while True:
                await self._unsaved.wait()
                await asyncio.sleep(SAVE_AFTER_S)
                self._unsaved.clear()
                await asyncio.to_thread(self._write_file, self._rows())
        finally:
            if self._unsaved.is_set():
                self._write_file(self._rows())

    def _rows(self) -> list[dict[str, object]]:
        return [
            {
                "model": own.model, "version": own.version,
                "quarantine": own.quarantine.to_dict(), "record": own.record.to_dict(),
                "told": own.is_told,
            }
            for own in self._own.values()
        ]  # fmt: skip

    def _write_file(self, rows: list[dict[str, object]]) -> None:
        try:
            with self._file_lock:  # a write that was cancelled may still be under way
                if not rows:
                    self._path.unlink(missing_ok=True)
                    return
                self._path.parent.mkdir(parents=True, exist_ok=True)
                new = self._path.with_suffix(".new")
                with new.open("wb") as file:
                    file.write(orjson.dumps(rows))
                    file.flush()
                    os.fsync(file.fileno())
                new.replace(self._path)
        except OSError as exc:
            log.warning("own_quarantines_not_saved", path=str(self._path), reason=str(exc))
