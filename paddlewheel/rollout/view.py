"""What the coordinator knows, folded from its watches: worlds are read off it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from typing import TypeVar

import structlog

from paddlewheel.rollout.reading import failure
from paddlewheel.rollout.world import NodeSeen, World
from registry.keys import (
    Keys,
    NodeKey,
    OrderKey,
    QuarantineKey,
    RolloutKey,
    SamplesKey,
    StatusKey,
)
from registry.names import ModelName, NodeId, Revision, Version
from registry.records import BadRecord, ModelStatus, NodeRecord, Quarantine, Record
from registry.rollouts import Order, RolloutRecord
from registry.spec import ModelDocument
from registry.store import Delete, Event, KeyValue, Listing, Put

log = structlog.get_logger(__name__)

R = TypeVar("R", bound=Record)


@dataclass(slots=True)
class DocumentSeen:
    """One model's document key, and the newest of its documents that parses."""

    mod_revision: Revision
    created: Revision
    revision: Revision
    document: ModelDocument


@dataclass(slots=True)
class Since:
    """When something that is still so was first seen, by the coordinator's own clock."""

    what: object
    at_s: float


@dataclass(slots=True)
class View:
    """Mutable; belongs to one coordinator's loop. Every change names the models it is about."""

    keys: Keys
    clock_s: Callable[[], float]
    documents: dict[ModelName, DocumentSeen] = field(default_factory=dict[ModelName, DocumentSeen])
    """Put in by the coordinator, which parses."""
    records: dict[ModelName, tuple[Revision, RolloutRecord | None]] = field(
        default_factory=dict[ModelName, tuple[Revision, RolloutRecord | None]]
    )
    """With the key's mod_revision; ``None`` for one that can't be read."""
    _gone: dict[ModelName, Revision] = field(default_factory=dict[ModelName, Revision])
    """Records deleted, and when: what was written before comes late."""
    nodes: dict[NodeId, NodeRecord] = field(default_factory=dict[NodeId, NodeRecord])
    statuses: dict[ModelName, dict[NodeId, ModelStatus]] = field(
        default_factory=dict[ModelName, dict[NodeId, ModelStatus]]
    )
    orders: dict[ModelName, Order] = field(default_factory=dict[ModelName, Order])
    quarantines: dict[ModelName, dict[Version, Quarantine]] = field(
        default_factory=dict[ModelName, dict[Version, Quarantine]]
    )
    samples: dict[ModelName, dict[NodeId, bytes]] = field(
        default_factory=dict[ModelName, dict[NodeId, bytes]]
    )
    _failing: dict[tuple[ModelName, NodeId], Since] = field(
        default_factory=dict[tuple[ModelName, NodeId], Since]
    )
    _waiting: dict[ModelName, Since] = field(default_factory=dict[ModelName, Since])
    _canary: dict[ModelName, Since] = field(default_factory=dict[ModelName, Since])

    # --- what the watches say -----------------------------------------------------------------

    def relist(self, listing: Listing, prefix: str) -> set[ModelName]:
        """Make ``listing`` the truth under ``prefix``. Not for documents."""
        listed = {kv.key for kv in listing.kvs}
        touched: set[ModelName] = set()
        for key in list(self._held()):
            if key.startswith(prefix) and key not in listed:
                touched |= self.take(Delete(key, listing.revision))
        for kv in listing.kvs:
            touched |= self.take(Put(kv))
        return touched

    def _held(self) -> Iterator[str]:
        keys = self.keys
        yield from (keys.rollout(model) for model in self.records)
        yield from (keys.node(node) for node in self.nodes)
        yield from (keys.order(model) for model in self.orders)
        for model, statuses in self.statuses.items():
            yield from (keys.status(model, node) for node in statuses)
        for model, quarantines in self.quarantines.items():
            yield from (keys.quarantine(model, version) for version in quarantines)
        for model, samples in self.samples.items():
            yield from (keys.samples(model, node) for node in samples)

    def take(self, event: Event) -> set[ModelName]:
        """Fold one event in; returns the models for which it may matter."""
        kv = event.kv if isinstance(event, Put) else None
        match self.keys.parse(event.key if isinstance(event, Delete) else event.kv.key):
            case RolloutKey(model):
                if kv is not None:
                    self.take_record(model, kv)
                elif isinstance(event, Delete):
                    self.drop_record(model, event.mod_revision)
                return {model}
            case NodeKey(node):
                _put(self.nodes, node, kv, NodeRecord)
                return set(self.documents)
            case StatusKey(model, node):
                _put(self.statuses.setdefault(model, {}), node, kv, ModelStatus)
                self._note_failure(model, node)
                return {model}
            case OrderKey(model):
                _put(self.orders, model, kv, Order)
                return {model}
            case QuarantineKey(model, version):
                _put(self.quarantines.setdefault(model, {}), version, kv, Quarantine)
                return {model}
            case SamplesKey(model, node):
                samples = self.samples.setdefault(model, {})
                samples.pop(node, None)
                if kv is not None:
                    samples[node] = kv.value
                return {model}
            case _:
                return set()

    def take_record(self, model: ModelName, kv: KeyValue) -> None:
        """A record as it stands, from a watch or read back; an older one than known is ignored."""
        known = self.records.get(model, (self._gone.get(model, Revision(0)), None))[0]
        if kv.mod_revision >= known:
            self.records[model] = kv.mod_revision, _read(RolloutRecord, kv)
            self._note_waiting(model)

    def wrote_record(self, model: ModelName, revision: Revision, record: RolloutRecord) -> None:
        if revision >= self.record_revision(model):
            self.records[model] = revision, record
            self._note_waiting(model)

    def drop_record(self, model: ModelName, revision: Revision) -> None:
        if revision >= self.record_revision(model):
            self.records.pop(model, None)
            self._gone[model] = revision
            self._note_waiting(model)

    def record_revision(self, model: ModelName) -> Revision:
        """The record's mod_revision; 0 without one."""
        known = self.records.get(model)
        return Revision(0) if known is None else known[0]

    def record(self, model: ModelName) -> RolloutRecord | None:
        known = self.records.get(model)
        return None if known is None else known[1]

    # --- since when ---------------------------------------------------------------------------

    def document_changed(self, model: ModelName) -> None:
        """The failures shown so far were of another document."""
        for node in self.statuses.get(model, {}):
            self._note_failure(model, node)

    def _note_failure(self, model: ModelName, node: NodeId) -> None:
        status = self.statuses.get(model, {}).get(node)
        seen = self.documents.get(model)
        reason = (
            None if status is None or seen is None
            else failure(seen.document, seen.revision, status)
        )  # fmt: skip
        if reason is None or seen is None:
            self._failing.pop((model, node), None)
            return
        what = (seen.revision, reason)
        known = self._failing.get((model, node))
        if known is None or known.what != what:
            self._failing[model, node] = Since(what, self.clock_s())

    def wait_anew(self, model: ModelName) -> None:
        """Nobody was waited for until now."""
        known = self._waiting.get(model)
        if known is not None:
            known.at_s = self.clock_s()

    def _note_waiting(self, model: ModelName) -> None:
        record = self.record(model)
        if record is None:
            self._waiting.pop(model, None)
            self._canary.pop(model, None)
            return
        # The time of day alone might be the same twice.
        what = (
            record.revision, record.phase, record.wave, record.is_baking, record.paused,
            record.since,
        )  # fmt: skip
        canary = record.canary
        self._mark(self._waiting, model, what)
        self._mark(
            self._canary, model,
            None if canary is None else (canary.version, canary.step, canary.phase, canary.since),
        )  # fmt: skip

    def _mark(self, marks: dict[ModelName, Since], model: ModelName, what: object) -> None:
        known = marks.get(model)
        if known is None or known.what != what:
            marks[model] = Since(what, self.clock_s())

    # --- what the plan looks at ---------------------------------------------------------------

    def world(self, model: ModelName, *, now: datetime, coordinator: str) -> World | None:
        """``None`` without a document."""
        seen = self.documents.get(model)
        if seen is None:
            return None
        now_s = self.clock_s()
        statuses = self.statuses.get(model, {})
        return World(
            model=model,
            document=seen.document,
            revision=seen.revision,
            created=seen.created,
            now=now,
            coordinator=coordinator,
            record=self.record(model),
            order=self.orders.get(model),
            nodes=tuple(
                NodeSeen(
                    id=node,
                    labels=record.labels,
                    is_draining=record.draining,
                    status=statuses.get(node),
                    failing_s=_elapsed_s(self._failing.get((model, node)), now_s),
                )
                for node, record in sorted(self.nodes.items())
            ),
            quarantines=self.quarantines.get(model, {}),
            waited_s=_elapsed_s(self._waiting.get(model), now_s),
            canary_waited_s=_elapsed_s(self._canary.get(model), now_s),
            samples=self.samples.get(model, {}),
        )


K = TypeVar("K")


def _put(known: dict[K, R], name: K, kv: KeyValue | None, kind: type[R]) -> None:
    """One that can't be read is as good as none."""
    known.pop(name, None)
    record = None if kv is None else _read(kind, kv)
    if record is not None:
        known[name] = record


def _read(kind: type[R], kv: KeyValue) -> R | None:
    try:
        return kind.from_json(kv.value)
    except BadRecord as exc:
        log.warning("record_ignored", key=kv.key, reason=str(exc))
        return None


def _elapsed_s(since: Since | None, now_s: float) -> float:
    return 0.0 if since is None else now_s - since.at_s
