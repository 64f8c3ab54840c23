"""What etcd says of documents, nodes and statuses, as one value that follows the watches."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass, field
from typing import TypeVar

from paddlewheel.cli.connection import Connection
from registry.keys import Keys, ModelKey, NodeKey, QuarantineKey, RolloutKey, StatusKey
from registry.names import ModelName, NodeId, Revision, Version
from registry.records import BadRecord, Intent, ModelStatus, NodeRecord, Quarantine, Record
from registry.rollouts import RolloutRecord
from registry.spec import ConfigError, ModelDocument, parse_model
from registry.store import Batch, Delete, Event, KeyValue, Put, StoreError


@dataclass(frozen=True, slots=True)
class StoredDocument:
    """A model's document as it stands in etcd, whether or not it parses."""

    model: ModelName
    kv: KeyValue
    parsed: ModelDocument | None
    problem: str | None
    """Why it does not parse."""

    @classmethod
    def of(cls, model: ModelName, kv: KeyValue) -> StoredDocument:
        try:
            return cls(model, kv, parse_model(kv.value, name=model), None)
        except ConfigError as exc:
            return cls(model, kv, None, str(exc))

    @property
    def revision(self) -> Revision:
        return self.kv.mod_revision

    @property
    def text(self) -> str:
        return self.kv.value.decode("utf-8", "replace")

    @property
    def intent(self) -> Intent:
        if self.parsed is None:
            return Intent()
        canary = self.parsed.spec.canary
        return Intent(live=self.parsed.spec.live, canary=canary.version if canary else None)

    @property
    def labels(self) -> dict[str, str]:
        return {} if self.parsed is None else dict(self.parsed.spec.placement.labels)


@dataclass(slots=True)
class Fleet:
    """Records by name; one that cannot be read counts as not there."""

    keys: Keys
    documents: dict[ModelName, StoredDocument] = field(
        default_factory=dict[ModelName, StoredDocument]
    )
    nodes: dict[NodeId, NodeRecord] = field(default_factory=dict[NodeId, NodeRecord])
    statuses: dict[tuple[ModelName, NodeId], ModelStatus] = field(
        default_factory=dict[tuple[ModelName, NodeId], ModelStatus]
    )
    quarantines: dict[tuple[ModelName, Version], Quarantine] = field(
        default_factory=dict[tuple[ModelName, Version], Quarantine]
    )
    rollouts: dict[ModelName, RolloutRecord] = field(default_factory=dict[ModelName, RolloutRecord])

    def take(self, event: Event) -> None:
        """Apply one event."""
        kv = event.kv if isinstance(event, Put) else None
        key = self.keys.parse(event.key if isinstance(event, Delete) else event.kv.key)
        match key:
            case ModelKey(model):
                if kv is None:
                    self.documents.pop(model, None)
                else:
                    self.documents[model] = StoredDocument.of(model, kv)
            case NodeKey(node):
                self.nodes.pop(node, None)
                if kv is not None and (record := _read(NodeRecord, kv)) is not None:
                    self.nodes[node] = record
            case StatusKey(model, node):
                self.statuses.pop((model, node), None)
                if kv is not None and (status := _read(ModelStatus, kv)) is not None:
                    self.statuses[model, node] = status
            case QuarantineKey(model, version):
                self.quarantines.pop((model, version), None)
                if kv is not None and (quarantine := _read(Quarantine, kv)) is not None:
                    self.quarantines[model, version] = quarantine
            case RolloutKey(model):
                self.rollouts.pop(model, None)
                if kv is not None and (rollout := _read(RolloutRecord, kv)) is not None:
                    self.rollouts[model] = rollout
            case _:
                pass

    def models(self) -> list[ModelName]:
        """Every model with a document, or with nodes that still have it."""
        return sorted({*self.documents, *(model for model, _ in self.statuses)})


R = TypeVar("R", bound=Record)


def _read(kind: type[R], kv: KeyValue) -> R | None:
    try:
        return kind.from_json(kv.value)
    except BadRecord:
        return None


def _prefixes(keys: Keys) -> tuple[str, ...]:
    # Documents first: a status read after a document may be ahead of it, never behind.
    return (
        keys.models_prefix, keys.rollouts_prefix, keys.nodes_prefix, keys.status_prefix(),
        keys.quarantines_prefix,
    )  # fmt: skip


async def read_fleet(connection: Connection) -> Fleet:
    """One look at everything."""
    fleet = Fleet(connection.keys)
    for prefix in _prefixes(connection.keys):
        for kv in (await connection.store.list_prefix(prefix)).kvs:
            fleet.take(Put(kv))
    return fleet


async def follow_fleet(connection: Connection) -> AsyncGenerator[Fleet, None]:
    """The fleet now, and again after every change; the same object each time. Never ends.

    Close it (`contextlib.aclosing`). Raises `Unavailable` when etcd cannot be reached at the
    start; later outages are waited out.
    """
    fleet = Fleet(connection.keys)
    queue: asyncio.Queue[Batch | Exception] = asyncio.Queue()
    pumps: list[asyncio.Task[None]] = []
    try:
        for prefix in _prefixes(connection.keys):
            listing = await connection.store.list_prefix(prefix)
            for kv in listing.kvs:
                fleet.take(Put(kv))
            watch = connection.store.watch_prefix(prefix, known=listing)
            pumps.append(asyncio.create_task(_pump(watch, queue)))
        yield fleet
        while True:
            item = await queue.get()
            if isinstance(item, Exception):
                raise item
            for event in item.events:
                fleet.take(event)
            if queue.empty():
                yield fleet
    finally:
        for pump in pumps:
            pump.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)


async def _pump(watch: AsyncIterator[Batch], queue: asyncio.Queue[Batch | Exception]) -> None:
    """Hand on a watch's batches, and its error: nobody awaits this task meanwhile."""
    try:
        async for batch in watch:
            queue.put_nowait(batch)
    except StoreError as exc:
        queue.put_nowait(exc)
