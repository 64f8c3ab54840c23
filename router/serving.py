"""What a request reads, once, from start to end: a routing table and its predictors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from registry.errors import Bug
from registry.inference import Predictor
from registry.names import ModelName, ServableId
from router.canary_watch import CanaryWatch
from router.table import RouteTable


@dataclass(frozen=True, slots=True)
class Serving:
    """A table and the predictors behind it, published together (`router.app.App.publish`)."""

    table: RouteTable = field(default_factory=RouteTable)
    predictors: Mapping[ServableId, Predictor] = field(default_factory=dict[ServableId, Predictor])
    watches: Mapping[ModelName, CanaryWatch] = field(default_factory=dict[ModelName, CanaryWatch])
    """Of the models whose canary is measured now; the others pay nothing for it."""

    def __post_init__(self) -> None:
        """Raise `Bug` for a table that routes to a servable without a predictor."""
        for route in self.table.models.values():
            named = {route.live, route.standby, route.canary, *route.pinned.values()} - {None}
            missing = named - self.predictors.keys()
            if missing:
                raise Bug(f"routed but not loaded: {', '.join(map(str, missing))}")
