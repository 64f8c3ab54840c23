"""What one node's status says about one document (pure)."""

from __future__ import annotations

import math
from enum import StrEnum

from paddlewheel.rollout.world import NodeSeen, World
from registry.names import Revision, Version
from registry.records import ModelStatus, Quarantine, ServableStatus
from registry.spec import ModelDocument

SETTLE_S = 0.5
"""How long a failure must stand to be believed: a node says that it has seen a document before it
has acted on it, so what it last said of a failed version may be about the document before."""

UNDER_WAY = frozenset({"NEW", "FETCHING", "LOADING", "WARMING"})
SERVING = frozenset({"READY", "CANARY", "LIVE"})


class Answer(StrEnum):
    """Where one node stands with a document."""

    SILENT = "no word yet"
    REFUSED = "refused"
    FAILED = "failed"
    LOADING = "loading"
    PREPARED = "ready"
    APPLIED = "in force"


READY = frozenset({Answer.PREPARED, Answer.APPLIED})
BAD = frozenset({Answer.REFUSED, Answer.FAILED})


def concerned(world: World) -> tuple[NodeSeen, ...]:
    """The nodes that take the model and stay: registered, not draining, placed."""
    wanted = world.document.spec.placement.labels.items()
    return tuple(
        node for node in world.nodes if not node.is_draining and wanted <= node.labels.items()
    )


def answer(world: World, node: NodeSeen) -> Answer:
    status, revision = node.status, world.revision
    if status is None:
        return Answer.SILENT
    if refusal(revision, status) is not None:
        return Answer.REFUSED
    if node.failing_s >= SETTLE_S and failure(world.document, revision, status) is not None:
        return Answer.FAILED
    if (status.applied_revision or 0) >= revision:
        return Answer.APPLIED
    if (status.prepared_revision or 0) >= revision:
        return Answer.PREPARED
    return Answer.LOADING if status.revision == revision else Answer.SILENT


def has_accepted(world: World, node: NodeSeen) -> bool:
    """Whether the node took the document, whatever became of its versions there."""
    status = node.status
    if status is None:
        return False
    known = max(status.prepared_revision or 0, status.applied_revision or 0)
    return known >= world.revision or (status.revision == world.revision and status.accepted)


def refusal(revision: Revision, status: ModelStatus) -> str | None:
    """Why the node did not accept the document."""
    if status.revision != revision or status.accepted:
        return None
    return status.error or "refused"


def failure(document: ModelDocument, revision: Revision, status: ModelStatus) -> str | None:
    """Why a version of the document cannot serve on the node."""
    if status.revision is None or status.revision < revision:
        return None
    is_prepared = (status.prepared_revision or 0) >= revision
    for version in aspired(document):
        entries = [each for each in status.servables if each.version == version]
        states = {entry.state for entry in entries}
        if states & UNDER_WAY:
            continue
        if "FAILED" in states and not is_prepared:
            return _because(entries, "FAILED")
        if "QUARANTINED" in states and not states & SERVING:
            return _because(entries, "QUARANTINED")
    return None


def _because(entries: list[ServableStatus], state: str) -> str:
    entry = next(each for each in entries if each.state == state)
    return f"{entry.version} is {state}" + (f": {entry.reason}" if entry.reason else "")


def complaint(world: World, node: NodeSeen) -> str:
    """The node's own words for why it is refused or failed."""
    if node.status is None:
        return Answer.SILENT
    return (
        refusal(world.revision, node.status)
        or failure(world.document, world.revision, node.status)
        or answer(world, node)
    )


def aspired(document: ModelDocument) -> tuple[Version, ...]:
    """The versions that the document wants loaded."""
    canary = document.spec.canary
    live = document.spec.live
    return (live,) if canary is None or canary.version == live else (live, canary.version)


def quarantined(world: World) -> str | None:
    """Why a version of the document is out of service in the whole fleet."""
    for version in aspired(world.document):
        held = quarantine_of(world, version)
        if held is not None:
            return f"{version} is quarantined: {held.reason}"
    return None


def quarantine_of(world: World, version: Version) -> Quarantine | None:
    """What takes ``version`` out of service in the whole fleet, if anything does.

    A quarantine that names a digest is about those bytes; other bytes under the same version are
    another servable.
    """
    held = world.quarantines.get(version)
    if held is None or held.digest is None:
        return held
    digests = {
        servable.digest
        for node in world.nodes
        if node.status is not None
        for servable in node.status.servables
        if servable.version == version and servable.state not in UNDER_WAY
    }
    return held if held.digest in digests else None


def enough(count: int, percent: float) -> int:
    """How many of ``count`` nodes ``percent`` of them are: rounded up, one at least."""
    return max(1, math.ceil(count * percent / 100 - 1e-9))
