"""The fleet as a value, folded from `P/nodes` and `P/status` (pure).

A key that goes away does not take the node with it: the value remembers who was there and that
the lease is gone, and `router.fleet.selection` decides what that means. Nodes that lost their
lease because etcd did go on serving.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from registry.keys import Keys, NodeKey, PipelineStatusKey, StatusKey
from registry.names import Digest, ModelName, NodeId, Revision, ServableId, Version
from registry.pipeline_records import PipelineStatus
from registry.records import BadRecord, ModelStatus, NodeRecord
from registry.store import Batch, Delete, Put

SERVING_STATES = frozenset({"READY", "CANARY", "LIVE", "STANDBY"})
"""States in which a servable answers requests, with or without being routed to by default."""
OUT_STATES = frozenset({"FAILED", "QUARANTINED"})


@dataclass(frozen=True, slots=True)
class Member:
    """One node as it registered itself."""

    record: NodeRecord
    gone_at: Revision | None = None
    """When its key went away; ``None`` while it is registered."""

    @property
    def is_registered(self) -> bool:
        return self.gone_at is None


@dataclass(frozen=True, slots=True)
class Report:
    """What one node last said of one model, as far as a request is concerned."""

    status: ModelStatus
    live: Version | None
    """``None`` too where that version has no worker alive."""
    canary: Version | None
    standby: Version | None
    loaded: Mapping[Version, ServableId]
    """Every version that can be pinned there."""
    unavailable: Mapping[Version, str]
    gone_at: Revision | None = None
    """When the key went away; ``None`` while it stands."""
    timeout_s: float = 10.0
    """Of a pipeline, whose document the gateway does not follow, and so is the next one."""
    max_body_mb: int = 64

    @classmethod
    def of(cls, status: ModelStatus) -> Report:
        loaded: dict[Version, ServableId] = {}
        unavailable: dict[Version, str] = {}
        for servable in status.servables:
            if servable.state in SERVING_STATES:
                if any(worker.alive for worker in servable.workers):
                    digest = servable.digest or Digest("")
                    loaded[servable.version] = ServableId(status.model, servable.version, digest)
            elif servable.state in OUT_STATES:
                unavailable[servable.version] = f"{servable.state}: {servable.reason}"
        return cls(
            status=status,
            live=status.live if status.live in loaded else None,
            canary=status.canary if status.canary in loaded else None,
            standby=status.standby if status.standby in loaded else None,
            loaded=loaded,
            unavailable={v: why for v, why in unavailable.items() if v not in loaded},
        )

    @classmethod
    def of_pipeline(cls, status: PipelineStatus) -> Report:
        """A pipeline's one version is the revision of its document in force."""
        name = as_model(status.pipeline)
        version = Version(str(status.applied_revision or 0))
        return cls(
            status=ModelStatus(
                model=name,
                node=status.node,
                revision=status.revision,
                accepted=status.accepted,
                applied_revision=status.applied_revision,
                reason=status.reason,
            ),
            live=version if status.ready else None,
            canary=None,
            standby=None,
            loaded={version: ServableId(name, version, Digest(""))} if status.ready else {},
            unavailable={},
            timeout_s=status.timeout_s,
            max_body_mb=status.max_body_mb,
        )

    @property
    def serves_default(self) -> bool:
        """Whether a request that no rule takes is answered there."""
        return self.live is not None or self.standby is not None


PIPELINE_PREFIX = "pipeline/"


def as_model(pipeline: str) -> ModelName:
    """What a pipeline is to all that chooses nodes: a model, kept apart from others by a slash."""
    return ModelName(f"{PIPELINE_PREFIX}{pipeline}")


@dataclass(frozen=True, slots=True)
class Ignored:
    """A record that could not be read, for the log; what was known before stays."""

    key: str
    reason: str


@dataclass(frozen=True, slots=True)
class Fleet:
    """Who is there and what each serves, as far as etcd said."""

    members: Mapping[NodeId, Member] = field(default_factory=dict[NodeId, Member])
    reports: Mapping[ModelName, Mapping[NodeId, Report]] = field(
        default_factory=dict[ModelName, Mapping[NodeId, Report]]
    )

    def apply(self, batch: Batch, keys: Keys) -> tuple[Fleet, tuple[Ignored, ...]]:
        """The next fleet. Keys that are neither nodes nor status pass unseen.

        What no event touched is the same object as before.
        """
        members: dict[NodeId, Member] | None = None
        reports: dict[ModelName, dict[NodeId, Report]] = {}
        ignored: list[Ignored] = []

        def of(model: ModelName) -> dict[NodeId, Report]:
            if model not in reports:
                reports[model] = dict(self.reports.get(model, {}))
            return reports[model]

        def nodes() -> dict[NodeId, Member]:
            nonlocal members
            if members is None:
                members = dict(self.members)
            return members

        for event in batch.events:
            match event:
                case Put(kv):
                    try:
                        match keys.parse(kv.key):
                            case NodeKey(node):
                                nodes()[node] = Member(NodeRecord.from_json(kv.value))
                            case StatusKey(model, node):
                                status = ModelStatus.from_json(kv.value)
                                of(model)[node] = Report.of(status)
                            case PipelineStatusKey(name, node):
                                said = PipelineStatus.from_json(kv.value)
                                of(as_model(name))[node] = Report.of_pipeline(said)
                            case _:
                                pass
                    except BadRecord as exc:
                        ignored.append(Ignored(kv.key, str(exc)))
                case Delete(key, revision):
                    match keys.parse(key):
                        case NodeKey(node) if node in nodes():
                            nodes()[node] = replace(nodes()[node], gone_at=revision)
                        case StatusKey(model, node) if node in of(model):
                            of(model)[node] = replace(of(model)[node], gone_at=revision)
                        case PipelineStatusKey(name, node) if node in of(model := as_model(name)):
                            of(model)[node] = replace(of(model)[node], gone_at=revision)
                        case _:
                            pass
        merged = {**self.reports, **reports}
        next_fleet = Fleet(
            self.members if members is None else members,
            {model: by_node for model, by_node in merged.items() if by_node},
        )
        return next_fleet, tuple(ignored)

    def without_node(self, node: NodeId) -> Fleet:
        """Forget a node and all it said."""
        return Fleet(
            {id: member for id, member in self.members.items() if id != node},
            {
                model: left
                for model, by_node in self.reports.items()
                if (left := {id: report for id, report in by_node.items() if id != node})
            },
        )

    def without_model(self, model: ModelName) -> Fleet:
        """Forget what was said of a model: its document was deleted."""
        return replace(self, reports={m: by for m, by in self.reports.items() if m != model})

    def is_lost(self, report: Report, member: Member) -> bool:
        """Whether the report fell with its node's lease, rather than being taken back.

        The keys of a lease go in one revision, but nodes and status are watched apart, so either
        may be seen first.
        """
        if member.gone_at is None:
            return False
        return report.gone_at is None or report.gone_at == member.gone_at
