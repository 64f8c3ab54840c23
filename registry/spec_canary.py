"""How a canary grows, what it is judged by and what is mirrored to it, as values (pure).

How steps are taken is `paddlewheel.rollout`'s business, how a percent routes `router.rules`'.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Literal

from pydantic import AfterValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from registry.spec_rules import RuleEntry, Value, choose_one, exactly_one
from registry.spec_values import (
    Count,
    HeaderName,
    Percent,
    Seconds,
    Share,
    Text,
    Tolerance,
    VersionText,
    wants,
)

Promotion = Literal["auto", "manual"]


def _said(message: str) -> PydanticCustomError:
    return PydanticCustomError("said", "{said}", {"said": message})


class CanaryStep(Value):
    """One step of a canary that grows."""

    percent: Percent
    """Share of the users (of the requests, where there is no user id) that no rule took."""
    hold_s: Seconds
    """Seconds that the step lasts at least; longer while there is too little to judge by."""


def _rising(steps: tuple[CanaryStep, ...]) -> tuple[CanaryStep, ...]:
    for place, (before, after) in enumerate(pairwise(steps), start=1):
        if after.percent <= before.percent:
            raise _said(
                f"want percents that rise from step to step, got {after.percent:g} in step "
                f"{place} after {before.percent:g}"
            )
    return steps


class Sticky(Value):
    """Where the id is that keeps a user on one side through all steps."""

    model_config = ConfigDict(json_schema_extra=exactly_one("header", "claim"))

    header: HeaderName | None = None
    """The header with the user's id."""
    claim: Text | None = None
    """The verified JWT claim with the user's id."""

    @model_validator(mode="after")
    def _one_id(self) -> Sticky:
        given = tuple(name for name in ("header", "claim") if getattr(self, name) is not None)
        if len(given) != 1:
            raise choose_one(("header", "claim"), given)
        return self


class Gates(Value):
    """What a step has to pass, compared with the stable version over the same time."""

    error_rate: Share = 0.01
    """Share of failed requests, 0 to 1, by which the canary may exceed the stable version."""
    p95_ratio: Annotated[float, Field(ge=1, le=1000), wants("a number in 1..1000")] = 1.5
    """The canary's 95th percentile of time, in multiples of the stable version's."""
    min_samples: Count = 100
    """Requests of each version that a step takes; with fewer it is inconclusive and holds."""
    agreement: Share | None = None
    """Share of mirrored answers, 0 to 1, that have to agree; not a gate unless given."""


class Compare(Value):
    """When two answers agree."""

    rtol: Tolerance = 1e-3
    """Relative tolerance."""
    atol: Tolerance = 1e-5
    """Absolute tolerance."""
    topk: Count | None = None
    """Only the places of the k highest values along the last axis have to be the same."""


class Mirror(Value):
    """A copy of stable traffic for the canary, whose answers are compared and dropped."""

    percent: Percent
    """Share of the answered stable requests."""
    compare: Compare = Compare()
    """When two answers agree."""


class CanarySpec(Value):
    """A second version that takes some of the traffic."""

    version: VersionText
    """One of ``spec.versions``."""
    rules: tuple[RuleEntry, ...] = ()
    """Who gets it; the first match wins, tried in the order header, user, region, percent."""
    steps: Annotated[tuple[CanaryStep, ...], Field(max_length=100), AfterValidator(_rising)] = ()
    """Shares that grow by themselves, after the rules, as long as the gates are passed."""
    sticky: Sticky | None = None
    """The user id of the steps; the first user rule's, else ``X-User-Id``, unless given."""
    gates: Gates = Gates()
    """What a step has to pass, compared with the stable version over the same time."""
    promote: Annotated[Promotion, wants("auto or manual")] = "auto"
    """Whether the canary becomes live by itself after its last step."""
    mirror: Mirror | None = None
    """A copy of stable traffic for the canary, its answers compared and dropped."""

    @model_validator(mode="after")
    def _belong_together(self) -> CanarySpec:
        if self.sticky is not None and not self.steps:
            raise _said("sticky is about steps, and there are none")
        if self.gates.agreement is not None and self.mirror is None:
            raise _said("gates.agreement is about mirrored answers: want mirror too")
        return self

    @property
    def is_watched(self) -> bool:
        """Whether nodes measure it: it grows by steps, or answers are compared."""
        return bool(self.steps) or self.mirror is not None
