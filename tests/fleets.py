"""Fleets as values: the records that nodes would write, in a line each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import Any

from registry.keys import Keys
from registry.names import Digest, ModelName, NodeId, Revision, Version
from registry.records import ModelStatus, NodeRecord, ServableStatus, WorkerStatus
from registry.store import Batch, Delete, Event, KeyValue, Put
from router.fleet.members import Fleet

KEYS = Keys()
M = ModelName("m")
DIGEST = Digest("sha256:" + "ab" * 32)


def node_record(node: str, **changes: Any) -> NodeRecord:
    given: dict[str, Any] = {
        "id": NodeId(node),
        "http": f"http://{node}:8500",
        "started_at": datetime(2024, 5, 21, tzinfo=UTC),
    }
    return NodeRecord(**(given | changes))


def status(
    node: str,
    live: str | None = "1",
    *,
    model: ModelName = M,
    applied: int = 10,
    states: Mapping[str, str] | None = None,
    alive: bool = True,
    **changes: Any,
) -> ModelStatus:
    """states: version to state; the live version alone unless given."""
    servables = tuple(
        ServableStatus(
            model=model,
            version=Version(version),
            state=state,
            reason="digest differs" if state == "FAILED" else None,
            digest=DIGEST,
            workers=(WorkerStatus(pid=1, alive=alive),),
        )
        for version, state in (states or ({live: "LIVE"} if live else {})).items()
    )
    return ModelStatus(
        model=model,
        node=NodeId(node),
        revision=Revision(applied),
        applied_revision=Revision(applied),
        live=Version(live) if live else None,
        servables=servables,
        **changes,
    )


def put(record: NodeRecord | ModelStatus, revision: int = 1) -> Put:
    if isinstance(record, NodeRecord):
        key = KEYS.node(record.id)
    else:
        key = KEYS.status(record.model, record.node)
    return Put(KeyValue(key, record.to_json(), Revision(revision)))


def node_gone(node: str, revision: int) -> Delete:
    return Delete(KEYS.node(NodeId(node)), Revision(revision))


def status_gone(node: str, revision: int, model: ModelName = M) -> Delete:
    return Delete(KEYS.status(model, NodeId(node)), Revision(revision))


def fold(events: Iterable[Event], start: Fleet | None = None) -> Fleet:
    fleet = start or Fleet()
    for event in events:
        fleet, ignored = fleet.apply(Batch(Revision(1), (event,)), KEYS)
        assert not ignored
    return fleet


def fleet_of(*nodes: str, **changes: Any) -> Fleet:
    """Nodes that all serve version 1 of `M`."""
    return fold(
        event for node in nodes for event in (put(node_record(node, **changes)), put(status(node)))
    )
