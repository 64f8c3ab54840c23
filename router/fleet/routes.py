"""The fleet's routing table, in the form that a node's has: for decisions and for people (pure)."""

from __future__ import annotations

from collections.abc import Mapping

from registry.canary import canary_stand
from registry.names import Digest, ModelName, NodeId, Revision, ServableId, Version
from registry.rollouts import CanaryProgress
from registry.spec import Limits, ModelDocument
from router.fleet.members import Report
from router.rules import canary_rules
from router.table import NO_REVISION, Route

NOBODY = "no node serves it"


def fleet_route(
    model: ModelName,
    reports: Mapping[NodeId, Report],
    documents: Mapping[Revision, ModelDocument],
    nodes: frozenset[NodeId],
    progress: CanaryProgress | None = None,
) -> Route:
    """One model's routes as the fleet serves them.

    While nodes change from one document to the next, the newest one that is in force anywhere
    speaks for all; what pins a version is looked up on every node.
    documents: the accepted ones that are known, by revision. nodes: those that may answer.
    progress: of the model's rollout record.
    """
    heard = {node: report for node, report in reports.items() if node in nodes}
    newest = max(
        heard.values(),
        key=lambda r: (r.serves_default, r.status.applied_revision or 0),
        default=None,
    )
    revision = NO_REVISION if newest is None else newest.status.applied_revision or NO_REVISION
    document = _in_force(documents, revision)
    pinned: dict[Version, ServableId] = {}
    unavailable: dict[Version, str] = {}
    for report in heard.values():
        pinned |= report.loaded
        unavailable |= report.unavailable
    reason = newest.status.reason if newest is not None else NOBODY
    canary = _servable(newest, model, newest.canary) if newest is not None else None
    rules = None
    if canary is not None and document is not None:
        stand = canary_stand(document.spec, progress)
        rules = canary_rules(model, document.spec.canary, stand)
    return Route(
        model=model,
        live=_servable(newest, model, newest.live) if newest is not None else None,
        standby=_servable(newest, model, newest.standby) if newest is not None else None,
        canary=canary,
        rules=rules,
        revision=revision,
        pinned=pinned,
        unavailable={v: why for v, why in unavailable.items() if v not in pinned},
        limits=document.spec.limits if document is not None else Limits(),
        reason=reason,
    )


def _in_force(
    documents: Mapping[Revision, ModelDocument], revision: Revision
) -> ModelDocument | None:
    """The document of this revision, or the one known that is nearest to it."""
    if revision in documents:
        return documents[revision]
    older = [known for known in documents if known < revision]
    if older:
        return documents[max(older)]
    return documents[min(documents)] if documents else None


def _servable(report: Report, model: ModelName, version: Version | None) -> ServableId | None:
    if version is None:
        return None
    return report.loaded.get(version, ServableId(model, version, Digest("")))
