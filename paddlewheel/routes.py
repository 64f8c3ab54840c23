"""From what the manager has in force to what the router serves by."""

from __future__ import annotations

from dataclasses import replace

from loader.lifecycle import State
from loader.model import ModelView
from paddlewheel.samples import Windows
from registry.canary import NOT_YET, CanaryStand, canary_stand
from registry.inference import Predictor
from registry.names import ModelName, ServableId, Version
from registry.rollouts import CanaryProgress
from registry.spec import Limits
from router.canary_watch import CanaryWatch
from router.rules import canary_rules
from router.serving import Serving
from router.table import Route, RouteTable

_WEIGHT = {State.READY: 1, State.STANDBY: 2, State.CANARY: 3, State.LIVE: 4}


def route_of(view: ModelView, stand: CanaryStand = NOT_YET) -> Route:
    """Render one model's routes.

    stand: how far the canary of the document in force is.

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
        rules=canary_rules(view.name, canary, stand),
        revision=in_force.revision,
        is_barrier=document is not None and document.spec.rollout.strategy == "barrier",
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
        self.windows = Windows()
        self._by_model: dict[ModelName, dict[ServableId, Predictor]] = {}
        self._watches: dict[ModelName, CanaryWatch] = {}
        self._canaries: dict[ModelName, CanaryProgress] = {}

    def put(self, view: ModelView) -> Serving:
        """Return the serving value with this model as ``view`` shows it."""
        self._by_model[view.name] = dict(view.predictors())
        stand, watch = NOT_YET, None
        if view.document is None:
            self.windows.drop(view.name)
        else:
            stand = canary_stand(view.document.spec, self._canaries.get(view.name))
            watch = self.windows.watch(view, view.document.spec, stand)
        self._watches.pop(view.name, None)
        if watch is not None:
            self._watches[view.name] = watch
        return self._swap(self.serving.table.with_route(route_of(view, stand)))

    def steer(self, model: ModelName, progress: CanaryProgress | None) -> bool:
        """Take the coordinator's word on a model's canary: from the next `put` on.

        Returns whether that is another share than before for a model that is routed.
        """
        before = self._canaries.pop(model, None)
        if progress is not None:
            self._canaries[model] = progress
        return model in self.serving.table.models and _share(before) != _share(progress)

    def remove(self, model: ModelName) -> Serving:
        self._by_model.pop(model, None)
        self._watches.pop(model, None)
        self.windows.drop(model)
        return self._swap(self.serving.table.without(model))

    def complete(self) -> Serving:
        """All models are known from now on."""
        return self._swap(replace(self.serving.table, is_complete=True))

    def _swap(self, table: RouteTable) -> Serving:
        predictors = {id: p for model in self._by_model.values() for id, p in model.items()}
        self.serving = Serving(table, predictors, dict(self._watches))
        return self.serving


def _share(progress: CanaryProgress | None) -> tuple[object, ...] | None:
    """All of it that routing goes by; the rest is for people."""
    if progress is None:
        return None
    return progress.plan, progress.phase, progress.step, progress.percent, progress.since
