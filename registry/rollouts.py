"""Rollouts: what the coordinator writes, what a user orders, and what a node makes of it (pure).

``P/rollouts/<model>`` has one writer, the coordinator (`paddlewheel.rollout`). Nodes, gateways
and the command line read it; `standing` is the one rule by which a node obeys it.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, Literal

from annotated_types import Ge, Le
from pydantic import AllowInfNan

from registry.names import ModelName, NodeId, Revision, Version
from registry.records import At, Record
from registry.spec import ModelDocument
from registry.spec_rollout import Strategy

NONE_BEFORE = Revision(0)
"""`RolloutRecord.previous` of a model's first document."""


class Phase(StrEnum):
    """Where a rollout is. `COMMITTED` and `ABORTED` are the end for its document."""

    PREPARING = "preparing"
    """Nodes load the new versions beside those in force; nothing has changed for any client."""
    WAVING = "waving"
    """The nodes in `RolloutRecord.released` have the document in force, the others do not yet."""
    COMMITTED = "committed"
    """In force everywhere, or about to be: nothing takes it back but a newer document."""
    ABORTED = "aborted"
    """The document before stays in force, or comes back into force, everywhere."""


ENDED = frozenset({Phase.COMMITTED, Phase.ABORTED})


class Refusal(Record):
    """One node that stands in a rollout's way, in its own words."""

    node: NodeId
    reason: str


class CanaryProgress(Record):
    """How far a canary's steps are. See `paddlewheel.rollout.canary_plan`."""

    version: Version
    plan: str = ""
    """Of which canary (`registry.canary.plan_id`): a document with another one starts anew."""
    step: int = 0
    """Index into ``spec.canary.steps``."""
    percent: Annotated[float, Ge(0), Le(100), AllowInfNan(False)] = 0.0
    """The share of traffic in force now."""
    since: At
    """When this step began."""
    verdict: Literal["pass", "inconclusive", "fail"] | None = None
    detail: str | None = None
    """The numbers behind the verdict, or why it failed."""
    judged_at: At | None = None
    """When that was written."""
    phase: Literal["stepping", "done", "failed"] = "stepping"
    """``done``: through all steps, the document is about to make it live."""


class RolloutRecord(Record):
    """``P/rollouts/<model>``: the coordinator's word about one document."""

    model: ModelName
    revision: Revision
    """Of the document that it is about."""
    previous: Revision = NONE_BEFORE
    """Of the document that was in force before it; 0: there was none."""
    strategy: Strategy = "immediate"
    phase: Phase
    paused: bool = False
    wave: int | None = None
    """The wave released last, from 0; ``None`` before the first. The nodes left over follow as one
    wave more than the document names."""
    is_baking: bool = False
    """Whether every node of this wave serves it, and is being watched since ``since``."""
    released: tuple[NodeId, ...] = ()
    """The nodes of all waves so far, sorted; only grows until the rollout is aborted."""
    reason: str | None = None
    """Why it was aborted."""
    refused: tuple[Refusal, ...] = ()
    """The nodes that caused it, or that a commit leaves behind."""
    since: At
    """When this phase, wave or bake began. For people: nobody reckons with another's clock."""
    canary: CanaryProgress | None = None
    coordinator: str = ""
    """The id of the node whose coordinator wrote this."""

    @property
    def has_ended(self) -> bool:
        return self.phase in ENDED

    @property
    def in_force(self) -> Revision:
        """The revision the whole fleet may fall back on: this one once committed, else previous."""
        return self.revision if self.phase is Phase.COMMITTED else self.previous


class OrderKind(StrEnum):
    PAUSE = "pause"
    RESUME = "resume"
    ABORT = "abort"
    PROMOTE = "promote"


class Order(Record):
    """``P/orders/<model>``: what a user wants of the rollout of one document."""

    order: OrderKind
    revision: Revision
    """Of the document meant; an order for another one is not obeyed."""
    at: At
    by: str = ""
    """Who gave it: user and host, for people."""


class CoordinatorRecord(Record):
    """``P/coordinator``, under the coordinator's own lease. Its create_revision is the fence."""

    id: str
    at: At


def is_gated(document: ModelDocument) -> bool:
    """Whether the document waits for the coordinator's word before it takes effect."""
    return document.spec.rollout.is_gated


# --- a node's rule ------------------------------------------------------------------------------


class Stand(StrEnum):
    APPLY = "apply"
    """Put the document into force as soon as its versions are ready."""
    HOLD = "hold"
    """Make its versions ready, and keep what is in force."""
    REVERT = "revert"
    """Go back to the document at `Standing.base`."""


@dataclass(frozen=True, slots=True)
class Standing:
    """What one node does about the newest document of one model that it accepted."""

    stand: Stand
    base: Revision = NONE_BEFORE
    """The document to have in force meanwhile, for HOLD and REVERT. `NONE_BEFORE`: whatever the
    node has in force, if anything."""
    reason: str | None = None
    """For a status: why this document is not in force."""


APPLY = Standing(Stand.APPLY)


def standing(
    document: ModelDocument, revision: Revision, record: RolloutRecord | None, node: NodeId
) -> Standing:
    """What ``node`` does about ``document``, of which ``revision`` is the newest it accepted.

    record: ``P/rollouts/<model>`` as last seen, ``None`` when there is none.
    """
    if not is_gated(document):
        return APPLY
    if record is None:
        return Standing(Stand.HOLD, NONE_BEFORE, "rollout not started")
    if record.revision < revision:
        return Standing(Stand.HOLD, record.in_force, "rollout not started")
    if record.revision > revision:
        return Standing(Stand.HOLD, record.previous, "rollout: a newer document is on its way")
    match record.phase:
        case Phase.COMMITTED:
            return APPLY
        case Phase.WAVING if node in record.released:
            return APPLY
        case Phase.ABORTED:
            return Standing(Stand.REVERT, record.previous, f"rollout aborted: {record.reason}")
        case Phase.WAVING:
            return Standing(Stand.HOLD, record.previous, "rollout: waiting for this node's wave")
        case Phase.PREPARING:
            waiting = "rollout: waiting for the commit" + (" (paused)" if record.paused else "")
            return Standing(Stand.HOLD, record.previous, waiting)
