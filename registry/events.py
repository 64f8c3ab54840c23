"""What happened, as CloudEvents 1.0 under ``P/events/<ULID>``: the values, and reading them back.

`registry.event_writer` puts them there.

Source: CloudEvents 1.0 core specification and its JSON event format.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Any

import orjson
from ulid import ULID

from registry.errors import PaddlewheelError
from registry.keys import Keys
from registry.names import NodeId
from registry.records import rfc3339_ms
from registry.store import Put, Store

SEEN_MAX = 10_000
"""So many events are remembered to leave out what comes twice."""


class EventType(StrEnum):
    """``type`` of an event. Consumers match on it, so a value is never renamed."""

    CONFIG_APPLIED = "io.paddlewheel.config.applied"
    CONFIG_REJECTED = "io.paddlewheel.config.rejected"
    SERVABLE_READY = "io.paddlewheel.servable.ready"
    SERVABLE_FAILED = "io.paddlewheel.servable.failed"
    SERVABLE_UNLOADED = "io.paddlewheel.servable.unloaded"
    ROUTE_SWAPPED = "io.paddlewheel.route.swapped"
    ROLLOUT_STARTED = "io.paddlewheel.rollout.started"
    ROLLOUT_WAVE = "io.paddlewheel.rollout.wave"
    ROLLOUT_PAUSED = "io.paddlewheel.rollout.paused"
    ROLLOUT_RESUMED = "io.paddlewheel.rollout.resumed"
    ROLLOUT_COMMITTED = "io.paddlewheel.rollout.committed"
    ROLLOUT_ABORTED = "io.paddlewheel.rollout.aborted"
    CANARY_STEP = "io.paddlewheel.canary.step"
    CANARY_PASSED = "io.paddlewheel.canary.passed"
    CANARY_FAILED = "io.paddlewheel.canary.failed"
    ROLLBACK = "io.paddlewheel.rollback"
    QUARANTINE = "io.paddlewheel.quarantine"
    RELEASE = "io.paddlewheel.release"
    DEVICE_CORDONED = "io.paddlewheel.device.cordoned"
    DEVICE_UNCORDONED = "io.paddlewheel.device.uncordoned"
    INPUT_REFUSED = "io.paddlewheel.input.refused"
    WORKER_DIED = "io.paddlewheel.worker.died"
    NODE_JOINED = "io.paddlewheel.node.joined"
    NODE_LEFT = "io.paddlewheel.node.left"
    EVENTS_DROPPED = "io.paddlewheel.events.dropped"


class BadEvent(PaddlewheelError):
    """Bytes that are not a CloudEvent in JSON."""


@dataclass(frozen=True, slots=True)
class CloudEvent:
    """One event. ``source`` and ``id`` together name it: seen twice, it happened once."""

    id: str
    source: str
    type: str
    """An `EventType`, or what a newer version of this software calls one."""
    time: datetime
    subject: str = ""
    """``model/version``, ``model``, ``node`` or ``node/device``: what it is about."""
    data: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def to_json(self) -> bytes:
        attributes: dict[str, Any] = {
            "specversion": "1.0", "id": self.id, "source": self.source, "type": self.type,
            "time": rfc3339_ms(self.time), "datacontenttype": "application/json",
        }  # fmt: skip
        if self.subject:
            attributes["subject"] = self.subject
        attributes["data"] = dict(self.data)
        return orjson.dumps(attributes)

    @classmethod
    def from_json(cls, raw: bytes) -> CloudEvent:
        """Raises `BadEvent`. Attributes that this version does not know are left out."""
        try:
            found = orjson.loads(raw)
            if found["specversion"] != "1.0":
                raise BadEvent(f"specversion: want 1.0, got {found['specversion']!r}")
            at = datetime.fromisoformat(found["time"])
            data = found.get("data")
            texts = {name: found[name] for name in ("id", "source", "type")}
            if not all(isinstance(text, str) and text for text in texts.values()):
                raise BadEvent("id, source and type: want text")
            if at.tzinfo is None:
                raise BadEvent("time: want an offset")
            return cls(
                **texts, time=at, subject=str(found.get("subject") or ""),
                data=data if isinstance(data, dict) else {},
            )  # fmt: skip
        except (ValueError, KeyError, TypeError) as exc:
            raise BadEvent(f"not a CloudEvent: {exc!r}") from exc

    @property
    def name(self) -> tuple[str, str]:
        return self.source, self.id


def node_source(node: NodeId) -> str:
    """``source`` of what one node says of itself."""
    return f"/paddlewheel/nodes/{node}"


FLEET_SOURCE = "/paddlewheel/fleet"
"""``source`` of a fact of the whole fleet: nodes that all see it write one event, not one each."""


def stable_id(*facts: object) -> str:
    """An id made of what identifies the fact (type, subject, revision ...): again, the same id."""
    return hashlib.sha256("\x1f".join(str(fact) for fact in facts).encode()).hexdigest()[:32]


def event_key(event: CloudEvent, at_ms: int) -> str:
    """The ULID of an event: its time, then bits of its name, so a retry writes the same key."""
    bits = hashlib.sha256("\x1f".join(event.name).encode()).digest()[:10]
    return str(ULID.from_bytes(at_ms.to_bytes(6, "big") + bits))


async def read_events(
    store: Store, keys: Keys, *, follow: bool = False
) -> AsyncIterator[CloudEvent]:
    """Events by time, each once; with ``follow`` those to come as well, for ever.

    An event written twice (by two nodes that saw one fact) is yielded once, of the last `SEEN_MAX`.
    What is not an event is left out. Raises `registry.store.StoreError`.
    """
    seen: OrderedDict[tuple[str, str], None] = OrderedDict()
    listing = await store.list_prefix(keys.events_prefix)
    for kv in listing.kvs:
        event = _unseen(kv.value, seen)
        if event is not None:
            yield event
    if not follow:
        return
    async for batch in store.watch_prefix(keys.events_prefix, known=listing):
        for change in batch.events:
            event = _unseen(change.kv.value, seen) if isinstance(change, Put) else None
            if event is not None:
                yield event


def _unseen(raw: bytes, seen: OrderedDict[tuple[str, str], None]) -> CloudEvent | None:
    try:
        event = CloudEvent.from_json(raw)
    except BadEvent:
        return None
    if event.name in seen:
        return None
    seen[event.name] = None
    if len(seen) > SEEN_MAX:
        seen.popitem(last=False)
    return event
