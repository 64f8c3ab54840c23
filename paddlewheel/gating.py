"""What one node does about the newest document of a model, given the fleet's word on it (pure).

`registry.rollouts.standing` is the rule for all; this is what follows from it for a manager that
already works towards something.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto

from registry.names import NodeId, Revision
from registry.rollouts import NONE_BEFORE, Phase, RolloutRecord, Stand, standing
from registry.spec import ModelDocument


class Shadow(Enum):
    """What becomes of what is loaded only to be ready."""

    PREPARE = auto()
    """The document is made ready beside what serves."""
    KEEP = auto()
    DROP = auto()


@dataclass(frozen=True, slots=True)
class Step:
    """What the manager is to be told."""

    aspire: Revision | None
    """The document to have in force; ``None``: whatever is, and no document is looked for."""
    shadow: Shadow
    reason: str | None = None
    """For the status."""
    is_tentative: bool = False
    """The document may still be taken back."""


def next_step(
    document: ModelDocument,
    revision: Revision,
    record: RolloutRecord | None,
    node: NodeId,
    *,
    aspired: Revision | None,
    is_placed_here: bool = True,
) -> Step:
    """What ``node`` does about ``document``, the newest that it accepted.

    aspired: the document that the node works towards now; ``None`` after a start.
    is_placed_here: a document that moves a model to other nodes takes it away only when it is in
    force there.
    """
    stand = standing(document, revision, record, node)
    base = stand.base if stand.base != NONE_BEFORE else None
    match stand.stand:
        case Stand.APPLY:
            is_waving = record is not None and record.phase is Phase.WAVING
            is_ours = record is not None and record.revision == revision
            return Step(revision, Shadow.DROP, is_tentative=is_waving and is_ours)
        case Stand.REVERT:
            return Step(base, Shadow.DROP, stand.reason)
        case Stand.HOLD if base == revision:
            return Step(revision, Shadow.KEEP, stand.reason)
        case Stand.HOLD if record is not None and record.revision > revision:
            # Overtaken: what is loaded for it may be of use to the one that is to come.
            return Step(base, Shadow.KEEP, stand.reason)
        case Stand.HOLD if aspired == revision:
            # In force here already, and its record was lost: nobody takes it back.
            return Step(None, Shadow.KEEP, stand.reason)
        case Stand.HOLD:
            shadow = Shadow.PREPARE if is_placed_here else Shadow.KEEP
            return Step(base, shadow, stand.reason)


def may_be_last_good(revision: Revision, record: RolloutRecord | None) -> bool | None:
    """Whether what a document put into force may become what the whole fleet falls back to.

    ``None``: not yet; while it is in force on some nodes only, the others know nothing of it.
    """
    if record is None or record.revision < revision:
        return True  # it waited for nobody
    if record.revision > revision:
        return record.previous >= revision
    match record.phase:
        case Phase.COMMITTED:
            return True
        case Phase.ABORTED:
            return False
        case Phase.PREPARING | Phase.WAVING:
            return None
