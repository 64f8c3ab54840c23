"""What a node's status says about a document: does it have it in force, and if not, why not?

A decision over values: nothing here reads etcd or a clock.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from paddlewheel.cli.canary_view import CanaryView, canary_view
from paddlewheel.cli.fleet_view import Fleet
from registry.names import ModelName, NodeId, Revision, Version
from registry.records import Intent, ModelStatus, NodeRecord, ServableStatus
from registry.rollouts import RolloutRecord, is_gated


class Standing(StrEnum):
    """Where one node is with one revision of one document."""

    CONVERGED = "converged"
    """In force, and what serves is what the document means."""
    UNSEEN = "unseen"
    """The node has not said a word about it yet."""
    LOADING = "loading"
    HELD = "held"
    """Ready, and not in force before the fleet's rollout says so."""
    ABORTED = "aborted"
    """Not in force, or not any more, since the fleet's rollout was aborted."""
    REFUSED = "refused"
    """Does not parse, does not validate or is not allowed there: the one before stays in force."""
    FAILED = "failed"
    """Accepted, but a version it asks for could not be made ready."""
    DEVIATES = "deviates"
    """In force, but something else serves: a version is quarantined, say."""


BAD = frozenset({Standing.ABORTED, Standing.REFUSED, Standing.FAILED, Standing.DEVIATES})
"""Standings that waiting does not mend."""

_LOST = frozenset({"FAILED", "QUARANTINED"})
_COMING = frozenset({"NEW", "FETCHING", "LOADING", "WARMING", "READY"})


@dataclass(frozen=True, slots=True)
class Verdict:
    standing: Standing
    detail: str = ""
    """One line; for `BAD` ones the node's own reason."""

    def __str__(self) -> str:
        return f"{self.standing}: {self.detail}" if self.detail else str(self.standing)


def judge(status: ModelStatus | None, revision: Revision, intent: Intent) -> Verdict:
    """What ``status`` says about the document ``revision``, which means ``intent``."""
    if status is None or status.revision is None or status.revision < revision:
        seen = "nothing" if status is None or status.revision is None else status.revision
        return Verdict(Standing.UNSEEN, f"has seen {seen}, not {revision}")
    if not status.accepted:
        return Verdict(Standing.REFUSED, _refusal(status))
    applied = status.applied_revision is not None and status.applied_revision >= revision
    if applied and (status.live, status.canary) == (intent.live, intent.canary):
        return Verdict(Standing.CONVERGED)
    # A status has a reason while it loads too, so only the servables say whether waiting helps.
    wanted = [version for version in (intent.live, intent.canary) if version is not None]
    lost = _lost(status.servables, wanted)
    if lost is not None and lost.state == "FAILED":
        return Verdict(Standing.FAILED, _because(lost))
    if lost is not None or (status.reason or "").startswith("quarantined"):
        why = status.reason or (_because(lost) if lost is not None else "")
        return Verdict(Standing.DEVIATES, f"{_serves(status)}: {why}")
    if not applied and (status.reason or "").startswith("rollout aborted"):
        return Verdict(Standing.ABORTED, f"{_serves(status)}: {status.reason}")
    if (status.prepared_revision or 0) >= revision and not applied:
        return Verdict(Standing.HELD, status.reason or "ready")
    return Verdict(Standing.LOADING, _progress(status.servables, wanted) or _serves(status))


def _serves(status: ModelStatus) -> str:
    canary = "" if status.canary is None else f" and canary {status.canary}"
    return f"serves {status.live or 'nothing'}{canary}"


def _because(lost: ServableStatus) -> str:
    return f"{lost.version} {lost.state}: {lost.reason or 'no reason given'}"


def _refusal(status: ModelStatus) -> str:
    if not status.errors:
        return status.error or "no reason given"
    return "; ".join(
        f"{error.path or 'document'}"
        + (f" (line {error.line})" if error.line is not None else "")
        + f": {error.message}"
        for error in status.errors
    )


def _lost(servables: Sequence[ServableStatus], wanted: Sequence[Version]) -> ServableStatus | None:
    """A servable of a wanted version that will not come; ``None`` if there is none.

    A version may have two servables: the same text with other bytes loads beside the old one. Then
    the version is lost when both are, or when the new one failed and nothing wanted is on its way:
    the old bytes serve on.
    """
    mine = [servable for servable in servables if servable.version in wanted]
    for version in wanted:
        own = [servable for servable in mine if servable.version == version]
        if own and all(servable.state in _LOST for servable in own):
            return own[-1]
    if any(servable.state in _COMING for servable in mine):
        return None
    return next((servable for servable in mine if servable.state == "FAILED"), None)


def _progress(servables: Sequence[ServableStatus], wanted: Sequence[Version]) -> str:
    return ", ".join(f"{each.version} {each.state}" for each in servables if each.version in wanted)


@dataclass(frozen=True, slots=True)
class ModelView:
    """One model in the whole fleet."""

    model: ModelName
    revision: Revision | None
    """Of the document; ``None`` when it was deleted and nodes still drain it."""
    problem: str | None
    """Why the document does not parse."""
    intent: Intent
    statuses: tuple[ModelStatus, ...]
    verdicts: Mapping[NodeId, Verdict]
    """Of the nodes that must have it: registered, not draining, with the labels it asks for."""
    quarantine: tuple[dict[str, Any], ...]
    rollout: RolloutRecord | None = None
    """The coordinator's word on a document; perhaps not yet on this one."""
    is_gated: bool = False
    """Whether the document waits for that word."""
    canary: CanaryView | None = None
    """How far its canary is, where that grows by steps or is judged."""

    @property
    def decided(self) -> RolloutRecord | None:
        """The record of this very document."""
        record = self.rollout
        return record if record is not None and record.revision == self.revision else None

    @property
    def converged(self) -> bool:
        """Every node has it in force and serves what it means; false where there is no node."""
        return (
            self.revision is not None
            and bool(self.verdicts)
            and all(each.standing is Standing.CONVERGED for each in self.verdicts.values())
        )

    def as_json(self) -> dict[str, Any]:
        """SPEC section 7, with ``verdicts``, ``error`` and ``rollout`` added."""
        return {
            "model": self.model,
            "document_revision": self.revision,
            "error": self.problem,
            "intent": self.intent.to_dict(),
            "nodes": [status.to_dict() for status in self.statuses],
            "verdicts": {
                node: {"standing": str(verdict.standing), "detail": verdict.detail}
                for node, verdict in self.verdicts.items()
            },
            "quarantine": list(self.quarantine),
            "rollout": None if self.rollout is None else self.rollout.to_dict(),
            "converged": self.converged,
        }


def view(fleet: Fleet, model: ModelName, revision: Revision | None = None) -> ModelView:
    """``model`` as the fleet has it, judged against ``revision`` or the document's own."""
    document = fleet.documents.get(model)
    goal = revision if revision is not None or document is None else document.revision
    intent = Intent() if document is None else document.intent
    labels = {} if document is None else document.labels
    statuses = tuple(
        status for (name, _), status in sorted(fleet.statuses.items()) if name == model
    )
    verdicts = {
        node.id: judge(fleet.statuses.get((model, node.id)), goal, intent)
        for node in sorted(fleet.nodes.values(), key=lambda each: each.id)
        if goal is not None and _must_have(node, labels)
    }
    quarantine = tuple(
        {"version": version, **record.to_dict()}
        for (name, version), record in sorted(fleet.quarantines.items())
        if name == model
    )
    return ModelView(
        model=model,
        revision=None if document is None else document.revision,
        problem=None if document is None else document.problem,
        intent=intent if document is None or document.parsed else _in_force(statuses),
        statuses=statuses,
        verdicts=verdicts,
        quarantine=quarantine,
        rollout=fleet.rollouts.get(model),
        is_gated=(
            document is not None and document.parsed is not None and is_gated(document.parsed)
        ),
        canary=canary_view(
            None if document is None else document.parsed, fleet.rollouts.get(model)
        ),
    )


def _must_have(node: NodeRecord, labels: Mapping[str, str]) -> bool:
    return not node.draining and all(node.labels.get(key) == labels[key] for key in labels)


def _in_force(statuses: Iterable[ModelStatus]) -> Intent:
    """What the document asks for that a refused one has not replaced."""
    return next((status.intent for status in statuses if status.intent != Intent()), Intent())
