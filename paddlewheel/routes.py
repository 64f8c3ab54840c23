"""From what the manager has in force to what the router serves by."""

from __future__ import annotations

from dataclasses import replace

from loader.lifecycle import State
from loader.model import ModelView
from registry.inference import Predictor
from registry.names import ModelName, ServableId, Version
from registry.spec import Limits
from router.rules import compile_rules
from router.serving import Serving
from router.table import Route, RouteTable

_WEIGHT = {State.READY: 1, State.STANDBY: 2, State.CANARY: 3, State.LIVE: 4}


def route_of(view: ModelView) -> Route:
    """Render one model's routes.

    Rules and limits are those of the document in force; before there is one, limits come from
    the document that the node is working towards.
    """
    document = view.document or view.aspired or view.prepared
    in_force = view.in_force
    canary = document.spec.canary if document is not None else None
    # Of several loaded servables of one version, the one that routing points at is meant.
    by_weight = sorted(view.servables, key=lambda servable: _WEIGHT.get(servable.state, 0))
    pinned: dict[Version, ServableId] = {
        servable.id.version: servable.id
        for servable in by_weight
        if servable.is_loaded and servable.pool is not None
    }
    unavailable = {
        servable.id.version: f"{servable.state}: {servable.reason}"
        for servable in view.servables
        if servable.state in (State.FAILED, State.QUARANTINED) and servable.id.version not in pinned
    }
    return Route(
        model=view.name,
        live=in_force.live,
        standby=in_force.standby,
        canary=in_force.canary,
        rules=compile_rules(view.name, canary.rules) if canary is not None else None,
        revision=in_force.revision,
        required=view.is_required,
        pinned=pinned,
        unavailable=unavailable,
        limits=document.spec.limits if document is not None else Limits(),
        reason=view.reason,
    )


class Routes:
    """The serving value of this node, rebuilt for one model at a time and swapped whole."""

    def __init__(self) -> None:
        self.serving = Serving(RouteTable(is_complete=False), {})
        self._by_model: dict[ModelName, dict[ServableId, Predictor]] = {}

    def put(self, view: ModelView) -> Serving:
        """Return the serving value with this model as ``view`` shows it."""
        self._by_model[view.name] = dict(view.predictors())
        return self._swap(self.serving.table.with_route(route_of(view)))

    def remove(self, model: ModelName) -> Serving:
        self._by_model.pop(model, None)
        return self._swap(self.serving.table.without(model))

    def complete(self) -> Serving:
        """All models are known from now on."""
        return self._swap(replace(self.serving.table, is_complete=True))

    def _swap(self, table: RouteTable) -> Serving:
        predictors = {id: p for model in self._by_model.values() for id, p in model.items()}
        self.serving = Serving(table, predictors)
        return self.serving
