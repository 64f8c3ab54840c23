"""Pipelines as gateways see them: by what nodes say, in the form that models have (pure).

A node tells of a pipeline whether all that it runs on is there.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from registry.names import NodeId, Revision
from registry.spec import Limits
from router.fleet.members import PIPELINE_PREFIX, Fleet, Report, as_model
from router.table import NO_REVISION, Route


def pipelines_of(fleet: Fleet) -> Iterable[str]:
    """The names of all pipelines that some node tells of."""
    return sorted(
        model.removeprefix(PIPELINE_PREFIX)
        for model, reports in fleet.reports.items()
        if model.startswith(PIPELINE_PREFIX) and _heard(fleet, reports)
    )


def pipeline_route(fleet: Fleet, name: str) -> Route | None:
    """The routes of a pipeline, by the newest document in force; ``None``: nobody knows it."""
    model = as_model(name)
    heard = _heard(fleet, fleet.reports.get(model, {}))
    if not heard:
        return None
    newest = max(heard, key=lambda r: (r.serves_default, _revision(r)))
    version = newest.live
    return Route(
        model=model,
        live=None if version is None else newest.loaded[version],
        revision=_revision(newest),
        limits=Limits(timeout_s=newest.timeout_s, max_body_mb=newest.max_body_mb),
        reason=newest.status.reason,
    )


def _revision(report: Report) -> Revision:
    return report.status.applied_revision or NO_REVISION


def _heard(fleet: Fleet, reports: Mapping[NodeId, Report]) -> list[Report]:
    """The reports that stand, or that only their node's lease took away."""
    return [
        report
        for node, report in reports.items()
        if (member := fleet.members.get(node)) is not None
        and (report.gone_at is None or fleet.is_lost(report, member))
    ]
