"""One model on this node: what is wanted of it and what is there. The manager's own record."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from loader.lifecycle import State
from loader.plan import Order
from loader.policy import Aspiration, InForce
from loader.repository import Fetched
from loader.servable import Servable
from registry.inference import Predictor
from registry.names import Digest, ModelName, Revision, ServableId, Version
from registry.records import Quarantine
from registry.spec import ModelDocument


@dataclass(frozen=True, slots=True)
class Prepared:
    """A document to be made ready beside what serves."""

    document: ModelDocument
    aspiration: Aspiration

    def is_for(self, document: ModelDocument, revision: Revision) -> bool:
        return self.aspiration.revision == revision and self.document == document


@dataclass(slots=True, eq=False)
class Model:
    """Written by the manager only."""

    name: ModelName
    aspired: ModelDocument | None = None
    """The last document accepted; ``None`` once it is deleted."""
    aspired_revision: Revision | None = None
    is_deleted: bool = False
    """Its document was taken away: what there was to fall back to is of no more use."""
    aspiration: Aspiration | None = None
    prepared: Prepared | None = None
    """What is loaded only to be ready when the fleet says so."""
    awaits_base: bool = False
    """The document to have in force while one is prepared is being looked up."""
    is_tentative: bool = False
    """The fleet may still take the aspired document back."""
    keeps: bool = False
    """No document is to be in force, but none was deleted: what serves goes on."""
    former: dict[Revision, tuple[ModelDocument, Aspiration]] = field(
        default_factory=dict[Revision, tuple[ModelDocument, Aspiration]]
    )
    """What was aspired to before, the oldest first."""
    document: ModelDocument | None = None
    """The document in force."""
    in_force: InForce = field(default_factory=InForce)
    servables: dict[ServableId, Servable] = field(default_factory=dict[ServableId, Servable])
    orders: dict[ServableId, Order] = field(default_factory=dict[ServableId, Order])
    fetched: dict[ServableId, Fetched] = field(default_factory=dict[ServableId, Fetched])
    quarantined: Mapping[Version, Quarantine] = field(default_factory=dict[Version, Quarantine])
    """Versions that the fleet took out."""
    own_quarantines: dict[Version, Quarantine] = field(default_factory=dict[Version, Quarantine])
    """Versions that this node took out, whether the fleet knows or agrees yet or not."""
    suspected: frozenset[ServableId] = frozenset()
    """Enough faults to be left alone while who is to blame is not settled."""
    fallback: ServableId | None = None
    """The last good version, where it is not the aspired one."""
    fallback_revision: Revision = Revision(0)
    fallback_document: ModelDocument | None = None
    served: dict[tuple[Version, str], Digest] = field(
        default_factory=dict[tuple[Version, str], Digest]
    )
    """What a version from a source was when it last was in force here, before a restart too."""
    fetch_ms: dict[ServableId, float] = field(default_factory=dict[ServableId, float])
    retry_at_s: dict[ServableId, float] = field(default_factory=dict[ServableId, float])
    attempts: dict[ServableId, int] = field(default_factory=dict[ServableId, int])
    baked: tuple[ServableId, Revision] | None = None
    """What was last reported as proven."""
    trouble: str | None = None
    """Why requests fail while there is nothing to roll back to."""
    trouble_answered: int = 0
    """`answered` when that began: any more ends it."""
    answered_before: int = 0
    """Answers of servables that are gone."""
    swap_s: float = 0.0
    swaps: int = 0
    rollbacks: Counter[str] = field(default_factory=Counter[str])
    """By the code that led to each."""
    reloads: Counter[str] = field(default_factory=Counter[str])

    def quarantine_of(self, id: ServableId) -> Quarantine | None:
        """Why ``id`` must not serve. Other bytes under the same version are another servable."""
        for known in (self.own_quarantines, self.quarantined):
            quarantine = known.get(id.version)
            if quarantine is not None and quarantine.digest in (None, id.digest):
                return quarantine
        return None

    def usable_fallback(self, other_than: ServableId) -> ServableId | None:
        """The last good version, where it is another one and nothing is known against it."""
        fallback = self.fallback
        if fallback is None or fallback.version == other_than.version:
            return None
        if fallback.version in self.own_quarantines or fallback.version in self.quarantined:
            return None
        servable = self.servables.get(fallback)
        if servable is not None and servable.state in (State.FAILED, State.QUARANTINED):
            return None
        return fallback

    def control_of(self, id: ServableId) -> ServableId | None:
        """The version on which requests that failed on ``id`` are run again, if one is loaded."""
        in_force = self.in_force
        for other in (in_force.standby, in_force.live) if id == in_force.live else (in_force.live,):
            if other is not None and other != id and self._is_loaded(other):
                return other
        return None

    def _is_loaded(self, id: ServableId) -> bool:
        servable = self.servables.get(id)
        return servable is not None and servable.is_loaded

    @property
    def answered(self) -> int:
        """Requests that any version of this model answered well, ever."""
        pools = (servable.pool for servable in self.servables.values())
        return self.answered_before + sum(pool.answered for pool in pools if pool is not None)

    def document_of(self, id: ServableId) -> ModelDocument | None:
        """The document by which ``id`` is loaded."""
        aspired = frozenset() if self.aspiration is None else self.aspiration.ids()
        if self.prepared is not None and id in self.prepared.aspiration.ids() - aspired:
            return self.prepared.document
        return self.aspired or self.document

    @property
    def is_over(self) -> bool:
        """Nothing is wanted of it and nothing is left."""
        is_wanted = self.aspiration or self.prepared or self.awaits_base or self.fallback
        return not is_wanted and not self.servables

    @property
    def ready_revision(self) -> Revision | None:
        """Of the newest document all of whose servables are loaded, in force or not."""
        prepared = None if self.prepared is None else self.prepared.aspiration
        for aspiration in (prepared, self.aspiration):
            if aspiration is not None and all(map(self._is_loaded, aspiration.ids())):
                return aspiration.revision
        in_force, aspired = self.in_force, self.aspiration
        if aspired is not None and aspired.revision == in_force.revision:
            return None  # it was, and something of it was taken out
        return in_force.revision or None if in_force.live is not None else None

    @property
    def _is_required(self) -> bool:
        """A first document that waits for the fleet is no reason to be unready; one that keeps
        another waiting which was in force is."""
        is_held = self.prepared is not None and self.fallback is not None
        return self.aspired is not None or self.awaits_base or is_held

    def view(self) -> ModelView:
        return ModelView(
            name=self.name,
            document=self.document,
            aspired=self.aspired,
            aspired_revision=self.aspired_revision,
            aspiration=self.aspiration,
            prepared=None if self.prepared is None else self.prepared.document,
            is_required=self._is_required,
            ready_revision=self.ready_revision,
            in_force=self.in_force,
            servables=tuple(self.servables.values()),
            reason=self._difference(),
            swap_s=self.swap_s,
            swaps=self.swaps,
            rollbacks=self.rollbacks,
            reloads=self.reloads,
        )

    def _difference(self) -> str | None:
        """Why what is in force is not what the document asks for, or fails; ``None``: all well."""
        if self.aspiration is None and self.prepared is None:
            if self.awaits_base:
                return "the document to go back to is being looked up"
            if self.keeps:
                return None
            return "deleted" if self.servables else None
        aspired = [] if self.aspiration is None else [self.aspiration]
        prepared = [] if self.prepared is None else [self.prepared.aspiration]
        wanted = [id for each in (*aspired, *prepared) for id in (each.live, each.canary)]
        for id in wanted:
            servable = self.servables.get(id) if id is not None else None
            if id is None or servable is None or servable.is_loaded:
                continue
            match servable.state:
                case State.FAILED:
                    return f"{id.version} failed: {servable.reason}"
                case State.QUARANTINED:
                    return f"quarantined: {id.version}: {servable.reason}"
                case State.DRAINING:
                    return f"{id.version} is draining before it is loaded again"
                case _:
                    return f"{id.version} is {servable.state}"
        if self.trouble is not None:
            return self.trouble
        if self.aspiration is not None and self.in_force.revision != self.aspiration.revision:
            return "not applied yet"
        return None


@dataclass(frozen=True, slots=True)
class ModelView:
    """One model as it is: what routing is built from and what the status tells."""

    name: ModelName
    document: ModelDocument | None
    """The document in force; ``None`` before the first one is."""
    aspired: ModelDocument | None
    aspired_revision: Revision | None
    aspiration: Aspiration | None
    prepared: ModelDocument | None
    """The document that is only made ready; ``None``: there is none."""
    is_required: bool
    """Whether the node is unready while it can't serve this model."""
    ready_revision: Revision | None
    """Of the newest document all of whose servables are loaded, in force or not."""
    in_force: InForce
    servables: tuple[Servable, ...]
    reason: str | None
    """Why what is in force is not what the document asks for; ``None`` when it is."""
    swap_s: float
    """How long the last swap of routing took."""
    swaps: int
    rollbacks: Mapping[str, int]
    """By the code that led to each."""
    reloads: Mapping[str, int]
    """``ready`` and ``failed``: servables made ready, or not."""

    def predictors(self) -> Mapping[ServableId, Predictor]:
        return {s.id: s.pool for s in self.servables if s.is_loaded and s.pool is not None}

    @property
    def can_serve(self) -> bool:
        """Whether a request by default would find a worker."""
        return any(
            servable.pool is not None and servable.pool.can_serve
            for servable in self.servables
            if servable.id in (self.in_force.live, self.in_force.standby)
        )
