"""The routing table as a value: which servable answers a request, and why.

A table is never edited: `RouteTable.with_route` makes the next one, and whoever serves swaps one
reference. It holds plain values only, so that it can be rendered for another data plane.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from registry.names import ModelName, Revision, ServableId, Version
from registry.spec import Limits, rule_document
from router.errors import NothingServes, UnknownModel, UnknownVersion
from router.rules import CompiledRules, Headers, Match

STABLE, CANARY, PINNED, STANDBY = "stable", "canary", "pinned", "standby"

NO_REVISION = Revision(0)
_NO_HEADERS: Mapping[str, str] = {}


class RequestFacts(NamedTuple):
    """All of a request that routing looks at."""

    model: str
    version: str | None = None
    """Asked for by path or by ``X-Model-Version``."""
    label: str | None = None
    """``stable`` or ``canary``, asked for by path."""
    headers: Headers = _NO_HEADERS
    claims: Mapping[str, Any] | None = None
    """Verified claims of a token; ``None`` when there is none."""
    chance: float = 0.0
    """Drawn for this request, uniform in [0, 1)."""


class Choice(NamedTuple):
    """Where a request goes, and why."""

    servable: ServableId
    kind: str
    """stable, canary, pinned or standby."""
    rule: Match | None = None
    bucket: int | None = None


@dataclass(frozen=True, slots=True)
class Route:
    """One model's routes. All servables named here are loaded, except those in ``unavailable``."""

    model: ModelName
    live: ServableId | None
    """Takes default traffic; ``None`` while no version was made ready."""
    standby: ServableId | None = None
    """The version before, still loaded and warm."""
    canary: ServableId | None = None
    rules: CompiledRules | None = None
    revision: Revision = NO_REVISION
    """Of the document in force: ``X-Config-Revision``."""
    is_barrier: bool = False
    """Whether that document came into force everywhere at once."""
    required: bool = True
    """Whether this node is unready without it."""
    pinned: Mapping[Version, ServableId] = field(default_factory=dict[Version, ServableId])
    """Every loaded version, whatever its role."""
    unavailable: Mapping[Version, str] = field(default_factory=dict[Version, str])
    """Why a version that the document names is FAILED or QUARANTINED."""
    limits: Limits = field(default_factory=Limits)
    reason: str | None = None
    """Why ``live`` is not what the document asks for, when it is not."""

    @property
    def loaded(self) -> tuple[Version, ...]:
        """The versions that can be pinned: 2 before 10, whatever came first."""
        return tuple(sorted(self.pinned, key=_number_order))

    @property
    def default(self) -> Choice | None:
        """Where a request goes that no rule takes: live, else standby, else nowhere."""
        if self.live is not None:
            return Choice(self.live, STABLE)
        return None if self.standby is None else Choice(self.standby, STANDBY)

    def pick(self, request: RequestFacts) -> Choice:
        """As `RouteTable.pick`, for a request that is for this model."""
        if request.version is not None:
            pinned = self.pinned.get(Version(request.version))
            if pinned is None:
                raise self._unknown_version(request.version)
            return Choice(pinned, PINNED)
        if request.label is not None:
            return self._labelled(request.label)
        bucket: int | None = None
        if self.rules is not None and self.canary is not None:
            match, bucket = self.rules.decide(request.headers, request.claims, request.chance)
            if match is not None:
                return Choice(self.canary, CANARY, match, bucket)
        if self.live is not None:
            return Choice(self.live, STABLE, None, bucket)
        if self.standby is not None:
            return Choice(self.standby, STANDBY, None, bucket)
        raise NothingServes(self.model, self.reason)

    def _labelled(self, label: str) -> Choice:
        rule = Match("label", 0, label)
        if label == CANARY:
            if self.canary is None:
                raise UnknownVersion(
                    self.model, label, loaded=self.loaded, reason="no canary is rolled out"
                )
            return Choice(self.canary, CANARY, rule)
        if label != STABLE:
            raise UnknownVersion(
                self.model,
                label,
                loaded=self.loaded,
                reason="labels are stable and canary",
            )
        default = self.default
        if default is None:
            raise NothingServes(self.model, self.reason)
        return default._replace(rule=rule)

    def _unknown_version(self, version: str) -> UnknownVersion:
        return UnknownVersion(
            self.model,
            version,
            loaded=self.loaded,
            reason=self.unavailable.get(Version(version)),
        )

    def as_dict(self) -> dict[str, Any]:
        """Return the model's entry of ``GET /admin/routes`` (SPEC section 7)."""
        canary: dict[str, Any] | None = None
        if self.canary is not None:
            written = self.rules.written if self.rules is not None else ()
            canary = {
                "version": self.canary.version,
                "digest": self.canary.digest,
                "rules": [dict(rule_document(rule)) for rule in written],
            }
            if self.rules is not None and self.rules.step is not None:
                canary["step"] = {
                    "index": self.rules.step.step,
                    "percent": self.rules.step.percent,
                }
        return {
            "live": self.live.version if self.live else None,
            "live_digest": self.live.digest if self.live else None,
            "standby": self.standby.version if self.standby else None,
            "canary": canary,
            "pinned": {version: str(servable.digest) for version, servable in self.pinned.items()},
            "unavailable": dict(self.unavailable),
            "required": self.required,
            "reason": self.reason,
            "config_revision": self.revision,
        }


def _number_order(version: Version) -> list[tuple[int, str]]:
    parts = re.split(r"([0-9]+)", version)
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts]


@dataclass(frozen=True, slots=True)
class RouteTable:
    """All routes of a node as of one moment."""

    revision: Revision = NO_REVISION
    """The newest document revision that went into it."""
    models: Mapping[ModelName, Route] = field(default_factory=dict[ModelName, Route])
    is_complete: bool = True
    """Whether all models are known. Before the documents were read once, a model that is not
    here may well exist."""

    def route(self, model: str) -> Route:
        """Raises `UnknownModel`, or `NothingServes` while the table is not complete."""
        route = self.models.get(ModelName(model))
        if route is None:
            raise self._unknown(model)
        return route

    def pick(self, request: RequestFacts) -> Choice:
        """Choose the servable for one request.

        A version in the path or in ``X-Model-Version`` pins it; else a label; else the canary
        rules; else live. Raises `UnknownModel`, `UnknownVersion` (with the loaded ones, and why
        this one is not) or `NothingServes`.
        """
        route = self.models.get(ModelName(request.model))
        if route is None:
            raise self._unknown(request.model)
        return route.pick(request)

    def _unknown(self, model: str) -> UnknownModel | NothingServes:
        if self.is_complete:
            return UnknownModel(model)
        return NothingServes(ModelName(model), "the documents were not read yet")

    def with_route(self, route: Route) -> RouteTable:
        """Return this table with ``route`` in the place of its model's."""
        revision = max(self.revision, route.revision)
        return replace(self, revision=revision, models={**self.models, route.model: route})

    def without(self, model: ModelName) -> RouteTable:
        """Return this table without ``model``: its requests are answered 404."""
        return replace(
            self, models={name: route for name, route in self.models.items() if name != model}
        )

    def as_dict(self) -> dict[str, Any]:
        """Return ``GET /admin/routes`` (SPEC section 7), plain values only."""
        return {
            "revision": self.revision,
            "models": {model: route.as_dict() for model, route in self.models.items()},
        }
