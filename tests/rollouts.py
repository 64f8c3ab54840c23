"""A fleet of played nodes: each watches etcd and writes its status as a real one does."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime

from registry.keys import Keys, ModelKey, RolloutKey
from registry.names import ModelName, NodeId, Revision, Version
from registry.records import BadRecord, ModelStatus, NodeRecord, ServableStatus
from registry.rollouts import (
    NONE_BEFORE,
    Order,
    OrderKind,
    RolloutRecord,
    Stand,
    standing,
)
from registry.spec import ConfigError, ModelDocument, parse_model
from registry.store import Delete, Put, Store

M = ModelName("m")
K = Keys()
AT = datetime(2024, 5, 21, 8, 0, 0, tzinfo=UTC)


def text(version: str = "1", rollout: str = "", *, more: str = "") -> bytes:
    """A document whose live version is ``version``; rollout: in flow style, without its braces."""
    return f"""\
apiVersion: paddlewheel/v1
kind: Model
metadata: {{name: m}}
spec:
  live: "{version}"
  versions: [{{version: "{version}", source: /m/{version}}}]
  rollout: {{{rollout}}}
{more}""".encode()


def document(version: str = "1", rollout: str = "", *, more: str = "") -> ModelDocument:
    return parse_model(text(version, rollout, more=more), name=M)


async def parse_here(raw: bytes, model: ModelName) -> ModelDocument:
    """Not in a thread: virtual time does not wait for threads."""
    return parse_model(raw, name=model)


@dataclass
class PlayedNode:
    """What it does about versions is said before; what it did is in ``applied``."""

    store: Store
    id: NodeId
    labels: dict[str, str] = field(default_factory=dict[str, str])
    refuses: set[str] = field(default_factory=set[str])
    fails: set[str] = field(default_factory=set[str])
    load_s: float = 0.02
    applied: list[Revision] = field(default_factory=list[Revision])
    """Every revision that it had in force, in order."""
    _documents: dict[Revision, ModelDocument] = field(default_factory=dict[Revision, ModelDocument])
    _seen: Revision = NONE_BEFORE
    _newest: Revision = NONE_BEFORE
    """The last one that parses."""
    _errors: str | None = None
    _record: RolloutRecord | None = None
    _prepared: set[Revision] = field(default_factory=set[Revision])
    _failed: set[Revision] = field(default_factory=set[Revision])
    _tasks: list[asyncio.Task[None]] = field(default_factory=list[asyncio.Task[None]])
    _wake: asyncio.Event = field(default_factory=asyncio.Event)

    async def start(self) -> None:
        record = NodeRecord(id=self.id, http="http://x", started_at=AT, labels=self.labels)
        await self.store.put(K.node(self.id), record.to_json())
        parts = (self._watch(K.models_prefix), self._watch(K.rollouts_prefix), self._act())
        self._tasks = [asyncio.create_task(part) for part in parts]

    async def stop(self) -> None:
        """As if killed, and its lease over."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.store.delete(K.node(self.id))
        await self.store.delete(K.status(M, self.id))

    @property
    def in_force(self) -> Revision:
        return self.applied[-1] if self.applied else NONE_BEFORE

    def is_ready_for(self, revision: Revision) -> bool:
        return revision in self._prepared

    @property
    def serves(self) -> Version | None:
        return self._documents[self.in_force].spec.live if self.applied else None

    async def _watch(self, prefix: str) -> None:
        async for batch in self.store.watch_prefix(prefix):
            for event in batch.events:
                self._take(event)
            self._wake.set()

    def _take(self, event: Put | Delete) -> None:
        kv = event.kv if isinstance(event, Put) else None
        key = K.parse(event.key if isinstance(event, Delete) else event.kv.key)
        if isinstance(key, RolloutKey) and key.model == M:
            self._record = None
            with suppress(BadRecord):
                self._record = None if kv is None else RolloutRecord.from_json(kv.value)
        elif isinstance(key, ModelKey) and key.model == M and kv is not None:
            self._seen = kv.mod_revision
            try:
                found = parse_model(kv.value, name=M)
            except ConfigError as exc:
                self._errors = str(exc)
                return  # the one before goes on
            self._documents[kv.mod_revision] = found
            self._newest, self._errors = kv.mod_revision, None
            if found.spec.live in self.refuses:
                self._errors = f"spec.live: {self.id} will not have {found.spec.live}"

    async def _act(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            newest = self._newest
            if newest == NONE_BEFORE:
                continue
            is_mine = self._errors is None or self._seen != newest
            if is_mine and newest not in self._prepared | self._failed:
                await self._report()
                await asyncio.sleep(self.load_s)
                bad = self._documents[newest].spec.live in self.fails
                (self._failed if bad else self._prepared).add(newest)
                self._wake.set()
            if is_mine:
                self._obey(newest)
            await self._report()

    def _obey(self, newest: Revision) -> None:
        stand = standing(self._documents[newest], newest, self._record, self.id)
        wanted = newest if stand.stand is Stand.APPLY else stand.base
        if wanted in self._documents and wanted not in self._failed and wanted != self.in_force:
            self.applied.append(wanted)

    async def _report(self) -> None:
        live = self._documents[self._newest].spec.live
        states = {self._newest in self._prepared: "READY", self._newest in self._failed: "FAILED"}
        servable = ServableStatus(
            model=M, version=live, state=states.get(True, "LOADING"), reason="no such weights"
        )
        status = ModelStatus(
            model=M,
            node=self.id,
            revision=self._seen,
            accepted=self._errors is None,
            error=self._errors,
            applied_revision=self.in_force or None,
            prepared_revision=max(self._prepared, default=None),
            live=self.serves,
            servables=(servable,),
        )
        value = status.to_json()
        kv = await self.store.get(K.status(M, self.id))
        if kv is None or kv.value != value:
            await self.store.put(K.status(M, self.id), value)


@asynccontextmanager
async def played_fleet(store: Store, count: int = 3) -> AsyncGenerator[list[PlayedNode]]:
    """``n1``, ``n2``, ... ready to see documents."""
    nodes = [PlayedNode(store, NodeId(f"n{at}")) for at in range(1, count + 1)]
    for node in nodes:
        await node.start()
    try:
        yield nodes
    finally:
        for node in nodes:
            await node.stop()


async def record_of(store: Store) -> RolloutRecord | None:
    kv = await store.get(K.rollout(M))
    return None if kv is None else RolloutRecord.from_json(kv.value)


async def order(store: Store, kind: OrderKind, revision: Revision) -> None:
    given = Order(order=kind, revision=revision, at=AT, by="tester")
    await store.put(K.order(M), given.to_json())
