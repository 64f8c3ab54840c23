"""What a node keeps on disk for a start without etcd, as a value (pure)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from registry.names import ModelName, Revision, Version
from registry.records import LastGood, Quarantine
from registry.rollouts import RolloutRecord


@dataclass(frozen=True, slots=True)
class SavedDocument:
    """The last accepted document of one model, as it was written."""

    revision: Revision
    text: str


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What a node has to know to serve again."""

    documents: Mapping[ModelName, SavedDocument] = field(
        default_factory=dict[ModelName, SavedDocument]
    )
    lastgoods: Mapping[ModelName, LastGood] = field(default_factory=dict[ModelName, LastGood])
    quarantines: Mapping[tuple[ModelName, Version], Quarantine] = field(
        default_factory=dict[tuple[ModelName, Version], Quarantine]
    )
    rollouts: Mapping[ModelName, RolloutRecord] = field(
        default_factory=dict[ModelName, RolloutRecord]
    )
    prefix: str = ""
    """Of the keys it was made from. Another prefix is another fleet: not for this node."""
