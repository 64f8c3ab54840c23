"""The events that a change of a rollout's record is worth (pure)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from paddlewheel.rollout.canary_plan import news
from registry.events import EventType, stable_id
from registry.names import ModelName
from registry.rollouts import Phase, RolloutRecord


@dataclass(frozen=True, slots=True)
class Telling:
    """One event, with an id made of the fact: told twice, it is the same."""

    type: EventType
    subject: ModelName
    id: str
    data: Mapping[str, Any] = field(default_factory=dict[str, Any])


def tellings(before: RolloutRecord | None, now: RolloutRecord) -> Iterator[Telling]:
    """What to tell of the step from ``before`` to ``now``.

    before: ``None`` too when it is not known, by a coordinator that has just taken over; what is
        told twice then has the same id.
    """
    same = before if before is not None and before.revision == now.revision else None
    if same is None and now.strategy != "immediate":
        yield _telling(EventType.ROLLOUT_STARTED, now, strategy=now.strategy)
    if (now.paused) != (same is not None and same.paused):
        kind = EventType.ROLLOUT_PAUSED if now.paused else EventType.ROLLOUT_RESUMED
        yield _telling(kind, now, str(now.since), wave=now.wave)
    if now.phase is Phase.WAVING and (same is None or same.wave != now.wave):
        yield _telling(
            EventType.ROLLOUT_WAVE, now, now.wave, wave=now.wave, released=list(now.released)
        )
    yield from _of_canary(before, now)
    if same is not None and same.phase is now.phase:
        return
    refused = [entry.to_dict() for entry in now.refused]
    if now.phase is Phase.COMMITTED and (same is not None or now.strategy != "immediate"):
        yield _telling(EventType.ROLLOUT_COMMITTED, now, left_behind=refused)
    if now.phase is Phase.ABORTED:
        yield _telling(EventType.ROLLOUT_ABORTED, now, reason=now.reason, refused=refused)


def _of_canary(before: RolloutRecord | None, now: RolloutRecord) -> Iterator[Telling]:
    canary = now.canary
    kind = news(None if before is None else before.canary, canary)
    if kind is None or canary is None:
        return
    data = {
        "revision": now.revision, "version": canary.version, "step": canary.step,
        "percent": canary.percent, "detail": canary.detail,
    }  # fmt: skip
    id_ = stable_id(kind, now.model, canary.plan, canary.step, str(canary.since))
    yield Telling(kind, now.model, id_, data)


def _telling(kind: EventType, now: RolloutRecord, *facts: object, **data: object) -> Telling:
    id_ = stable_id(kind, now.model, now.revision, *facts)
    shared = {"revision": now.revision, "previous": now.previous}
    return Telling(kind, now.model, id_, {**shared, **data})
