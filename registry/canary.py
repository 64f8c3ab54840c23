"""What a canary has of the traffic now: the document and the coordinator's word together (pure).

Nodes and gateways ask the same function, so they send the same user to the same side.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from datetime import datetime

import orjson

from registry.rollouts import CanaryProgress
from registry.spec import ModelSpec
from registry.spec_canary import CanarySpec


@dataclass(frozen=True, slots=True)
class CanaryStand:
    """How far the canary of the document in force is."""

    step: int | None = None
    """Its place among ``steps``, from 0; ``None``: no step was taken yet, or there are none."""
    percent: float = 0.0
    """The share of that step."""
    since: datetime | None = None
    """When the step began, as the coordinator wrote it down: tells one step from another."""
    is_failed: bool = False
    """No traffic by any rule or step, and nothing mirrored."""


NOT_YET = CanaryStand()


def plan_id(spec: ModelSpec) -> str | None:
    """A digest of all that makes a canary what it is; ``None`` without one that is watched.

    As long as it is the same, a new document takes over how far the old one's canary was, also
    that it failed. It covers the canary's section, its version's entry and the live version.
    """
    canary = spec.canary
    if canary is None or not canary.is_watched:
        return None
    parts = {
        "canary": canary.model_dump(mode="json", by_alias=True),
        "live": spec.live,
        "versions": [
            spec.version(version).model_dump(mode="json", by_alias=True)
            for version in (canary.version, spec.live)
            if spec.lists(version)
        ],
    }
    return hashlib.sha256(orjson.dumps(parts, option=orjson.OPT_SORT_KEYS)).hexdigest()[:16]


def canary_stand(spec: ModelSpec, progress: CanaryProgress | None) -> CanaryStand:
    """What the canary of the document in force has.

    progress: of the model's rollout record as last seen. Word about another canary does not count:
    until the coordinator has taken the first step there is none.
    """
    if progress is None or progress.plan != plan_id(spec):
        return NOT_YET
    if progress.phase == "failed":
        return CanaryStand(since=progress.since, is_failed=True)
    step = progress.step if _has_step(spec.canary, progress.step) else None
    return CanaryStand(step, progress.percent if step is not None else 0.0, progress.since)


def _has_step(canary: CanarySpec | None, step: int) -> bool:
    return canary is not None and 0 <= step < len(canary.steps)
