"""What the node says of itself: a manager's view as the JSON records of SPEC section 7 (pure)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from loader.model import ModelView
from loader.plan import is_pending
from loader.servable import Servable
from registry.document_tree import FieldError
from registry.names import ModelName, NodeId, Revision
from registry.records import (
    ErrorRecord,
    Intent,
    ModelStatus,
    ServableStatus,
    WorkerStatus,
)
from registry.spec import ModelDocument

ERRORS_MAX = 20
"""Errors of a refused document that go into the status; the first is in ``error`` too."""


@dataclass(frozen=True, slots=True)
class Seen:
    """The last document seen of a model, and what was made of it."""

    revision: Revision
    errors: tuple[FieldError, ...] = ()
    intent: Intent | None = None
    """What it asks for, where it was accepted; else the last accepted one speaks."""
    reason: str | None = None
    """Why the fleet has not put it into force."""

    @property
    def accepted(self) -> bool:
        return not self.errors


def servable_status(servable: Servable) -> ServableStatus:
    """One servable as it is."""
    workers: Sequence[WorkerStatus] = ()
    if servable.pool is not None:
        workers = [
            WorkerStatus(pid=worker.pid, alive=worker.alive, restarts=worker.restarts)
            for worker in servable.pool.workers()
        ]
    return ServableStatus(
        model=servable.id.model,
        version=servable.id.version,
        state=str(servable.state),
        reason=servable.reason,
        digest=None if is_pending(servable.id) else servable.id.digest,
        device=servable.recipe.device,
        memory_mb=servable.memory_mb or None,
        workers=tuple(workers),
        loaded_at=servable.loaded_at,
        phases_ms=dict(servable.phases_ms),
        errors=dict(servable.errors),
    )


def model_status(
    model: ModelName, node: NodeId, seen: Seen | None, view: ModelView | None
) -> ModelStatus:
    """What this node makes of a model's document."""
    errors = seen.errors if seen is not None else ()
    in_force = view.in_force if view is not None else None
    reasons = (seen.reason if seen is not None else None, view.reason if view is not None else None)
    return ModelStatus(
        model=model,
        node=node,
        revision=seen.revision if seen is not None else None,
        accepted=not errors,
        applied_revision=(in_force.revision or None) if in_force is not None else None,
        prepared_revision=view.ready_revision if view is not None else None,
        error=one_line(errors[0]) if errors else None,
        errors=tuple(ErrorRecord.of(error) for error in errors[:ERRORS_MAX]),
        live=in_force.live.version if in_force and in_force.live else None,
        canary=in_force.canary.version if in_force and in_force.canary else None,
        standby=in_force.standby.version if in_force and in_force.standby else None,
        intent=(seen.intent if seen is not None else None) or _intent_of(view),
        reason="; ".join(reason for reason in reasons if reason) or None,
        servables=tuple(servable_status(s) for s in view.servables) if view is not None else (),
    )


def intent_of(document: ModelDocument | None) -> Intent:
    """What ``document`` asks for."""
    if document is None:
        return Intent()
    canary = document.spec.canary
    return Intent(live=document.spec.live, canary=canary.version if canary else None)


def _intent_of(view: ModelView | None) -> Intent:
    return Intent() if view is None else intent_of(view.prepared or view.aspired)


def one_line(error: FieldError) -> str:
    where = f"line {error.line}: " if error.line is not None else ""
    path = f"{error.path}: " if error.path else ""
    return " ".join(f"{where}{path}{error.message}".split())
