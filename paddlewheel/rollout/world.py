"""All that a decision about one model's rollout looks at, as one value (pure)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime

from registry.names import ModelName, NodeId, Revision, Version
from registry.records import ModelStatus, Quarantine
from registry.rollouts import Order, RolloutRecord
from registry.spec import ModelDocument


@dataclass(frozen=True, slots=True)
class NodeSeen:
    """One registered node, and what it says of the model."""

    id: NodeId
    labels: Mapping[str, str] = field(default_factory=dict[str, str])
    is_draining: bool = False
    status: ModelStatus | None = None
    failing_s: float = 0.0
    """For how long its status has shown the failure that it shows now, if it shows one."""


@dataclass(frozen=True, slots=True)
class World:
    """One model, as the coordinator sees it. Times are durations by the coordinator's own clock.

    Nothing here compares two clocks: a coordinator that takes over waits anew, rather than believe
    the time of day that another machine wrote down.
    """

    model: ModelName
    document: ModelDocument
    """The newest that parses."""
    revision: Revision
    """Its revision."""
    created: Revision
    """Of the model's first document since it was last deleted."""
    now: datetime
    """Wall time, only to be written down."""
    coordinator: str = ""
    """Our id, to be written down."""
    record: RolloutRecord | None = None
    order: Order | None = None
    nodes: tuple[NodeSeen, ...] = ()
    """Every registered node, sorted by id; draining and elsewhere placed ones too."""
    quarantines: Mapping[Version, Quarantine] = field(default_factory=dict[Version, Quarantine])
    waited_s: float = 0.0
    """Since this coordinator first saw the record's present ``since``."""
    canary_waited_s: float = 0.0
    """The same for the ``since`` of the record's canary."""
    samples: Mapping[NodeId, bytes] = field(default_factory=dict[NodeId, bytes])
    """``P/samples/<model>/<node>``, as written."""
