"""A pipeline on one snapshot: which version each of its steps runs on, decided once (pure)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from registry.inference import Predictor, Signature
from registry.names import ServableId
from router.errors import RouterError
from router.pipeline.errors import PipelineBroken
from router.pipeline.plan import Plan
from router.pipeline.wiring import Wiring, wire
from router.rules import Headers
from router.table import STABLE, Choice, RequestFacts, RouteTable

_WIRINGS_MAX = 64

Predictors = Mapping[ServableId, Predictor]
"""Those that the table was published with."""


@dataclass(frozen=True, slots=True)
class Bound:
    """All that one request needs to know, of one moment."""

    plan: Plan
    choices: Mapping[str, Choice]
    """For each step that is a model of this node, the version it runs on."""
    wiring: Wiring

    @property
    def servables(self) -> frozenset[ServableId]:
        return frozenset(choice.servable for choice in self.choices.values())


class Binder:
    """Binds requests of one plan; what depends on versions alone is worked out once for each."""

    def __init__(self, plan: Plan, transforms: Mapping[str, Signature]) -> None:
        self.plan = plan
        self._transforms = transforms
        self._wirings: dict[tuple[ServableId, ...], Wiring] = {}

    def bind(
        self,
        table: RouteTable,
        predictors: Predictors,
        headers: Headers,
        *,
        claims: Mapping[str, Any] | None = None,
        chance: float = 0.0,
    ) -> Bound:
        """Choose every step's version by its model's own rules.

        Steps that ask for the same thing of a model get the same version. chance: one for all.
        Raises `PipelineBroken`.
        """
        choices: dict[str, Choice] = {}
        made: dict[tuple[str, str | None, str | None], Choice] = {}
        for name, planned in self.plan.steps.items():
            step = planned.step
            if not step.is_local_model:
                continue
            assert step.model is not None
            key = (step.model, step.version, step.label)
            if key not in made:
                try:
                    made[key] = table.pick(
                        RequestFacts(*key, headers=headers, claims=claims, chance=chance)
                    )
                except RouterError as exc:
                    raise PipelineBroken(self.plan.name, f"step {name!r}: {exc}") from exc
            choices[name] = made[key]
        return Bound(self.plan, choices, self._wiring(predictors, choices))

    def by_default(self, table: RouteTable, predictors: Predictors) -> Bound:
        """Bind for a request that no rule takes: what metadata and readiness speak of."""
        choices: dict[str, Choice] = {}
        for name, planned in self.plan.steps.items():
            step = planned.step
            if not step.is_local_model:
                continue
            assert step.model is not None
            label = step.label or (STABLE if step.version is None else None)
            try:
                choices[name] = table.pick(RequestFacts(step.model, step.version, label))
            except RouterError as exc:
                raise PipelineBroken(self.plan.name, f"step {name!r}: {exc}") from exc
        return Bound(self.plan, choices, self._wiring(predictors, choices))

    def _wiring(self, predictors: Predictors, choices: Mapping[str, Choice]) -> Wiring:
        key = tuple(choice.servable for choice in choices.values())
        wiring = self._wirings.get(key)
        if wiring is None:
            wiring = wire(self.plan, self._signatures(predictors, choices))
            if len(self._wirings) >= _WIRINGS_MAX:
                self._wirings.clear()  # versions that are long gone
            self._wirings[key] = wiring
        return wiring

    def _signatures(
        self, predictors: Predictors, choices: Mapping[str, Choice]
    ) -> Mapping[str, Signature | None]:
        signatures: dict[str, Signature | None] = {}
        for name, planned in self.plan.steps.items():
            transform = planned.step.transform
            if transform is not None:
                if transform not in self._transforms:
                    raise PipelineBroken(
                        self.plan.name, f"step {name!r}: no transform {transform!r} is installed"
                    )
                signatures[name] = self._transforms[transform]
            elif name in choices:
                signatures[name] = predictors[choices[name].servable].signature
            else:
                signatures[name] = None
        return signatures
