"""What this node found out for the fleet: faults, quarantines by quorum, last-good versions.

Written off the hot path and retried until etcd has it. A quarantine of our own that etcd does not
have yet is also kept on disk, so that a restart in between does not bring a failing version back.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

import orjson
import structlog
from tenacity import AsyncRetrying, retry_if_exception_type, wait_random_exponential

from loader.faults import Fault
from loader.manager import Manager
from registry.cas import Conflict, create_if_absent, replace_if
from registry.keys import FaultKey, Keys
from registry.names import ModelName, NodeId, Revision, ServableId, Version
from registry.records import BadRecord, FaultRecord, LastGood, Quarantine
from registry.store import Delete, KeyValue, Store, StoreError

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class _Own:
    """A quarantine of this node's, on its way to the fleet."""

    model: ModelName
    version: Version
    quarantine: Quarantine
    record: FaultRecord


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
                )
                self._own[own.model, own.version] = own
                self._manager.keep_quarantined(own.model, own.version, own.quarantine)
        except FileNotFoundError:
            return
        except (OSError, ValueError, KeyError, TypeError, BadRecord) as exc:
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
            tasks.create_task(self._write(), name="write verdicts")
            tasks.create_task(self._follow_releases(), name="follow releases")

    async def _write(self) -> None:
        retrying = AsyncRetrying(
            retry=retry_if_exception_type(StoreError),
            wait=wait_random_exponential(multiplier=0.05, max=2.0),
        )
        while True:
            await self._wake.wait()
            self._wake.clear()
            for own in list(self._own.values()):
                async for attempt in retrying:
                    with attempt:
                        await self._publish(own)
            for model, good in list(self._good.items()):
                async for attempt in retrying:
                    with attempt:
                        await self._put_last_good(model, good)
                if self._good.get(model) == good:
                    del self._good[model]

    async def _publish(self, own: _Own) -> None:
        """Our own fault key; then, with enough of them for this version, the quarantine key."""
        key = self._keys.fault(own.model, own.version, self._node)
        value = own.record.to_json()
        held = await self._store.get(key)
        if held is None or held.value != value:
            await self._store.put(key, value)
        listing = await self._store.list_prefix(self._keys.faults_prefix(own.model, own.version))
        nodes = tuple(sorted(self._nodes_of(listing.kvs)))
        if len(nodes) < self._quorum(own.model):
            log.info("quarantine_without_quorum", model=own.model, version=own.version, nodes=nodes)
            return
        quarantine = own.quarantine.model_copy(update={"nodes": nodes})
        quarantine_key = self._keys.quarantine(own.model, own.version)
        await create_if_absent(self._store, quarantine_key, quarantine.to_json())
        self._own.pop((own.model, own.version), None)
        self._save()

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
            if held is None:
                if await create_if_absent(self._store, key, good.to_json()):
                    return
                continue
            value = good
            with contextlib.suppress(BadRecord):
                before = LastGood.from_json(held.value)
                if before.revision >= good.revision:
                    return
                value = good.after(before)
            done = await replace_if(self._store, key, value.to_json(), held.mod_revision)
            if not isinstance(done, Conflict):
                return

    async def _follow_releases(self) -> None:
        """Our fault key deleted by somebody else lifts a quarantine that never got its quorum.

        Another node's fault may complete the quorum: then we write the key, whoever is first.
        """
        async for batch in self._store.watch_prefix(self._keys.faults_prefix()):
            for event in batch.events:
                key = self._keys.parse(event.key if isinstance(event, Delete) else event.kv.key)
                if not isinstance(key, FaultKey):
                    continue
                if isinstance(event, Delete) and key.node == self._node:
                    self._own.pop((key.model, key.version), None)
                    self._save()
                    self._manager.release(key.model, key.version)
                elif key.node != self._node and (key.model, key.version) in self._own:
                    self._wake.set()

    def _save(self) -> None:
        """A few rows at most, so written in place of the event loop's turn."""
        rows = [
            {
                "model": own.model, "version": own.version,
                "quarantine": own.quarantine.to_dict(), "record": own.record.to_dict(),
            }
            for own in self._own.values()
        ]  # fmt: skip
        try:
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
