"""The steps of a canary: what share of the traffic it has, and when it gets more (pure).

`paddlewheel.rollout.plan` asks here once a document is committed; before, its canary has nothing.
A step is over when its gates are passed and ``hold_s`` has gone by. A failure is final for this
canary: until its section, or a version it names, is another one. The document is never rewritten
by a failure; by success only where ``promote`` is ``auto``.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

from paddlewheel.rollout.canary_judge import Judgement, Verdict, judge
from paddlewheel.rollout.reading import quarantine_of
from paddlewheel.rollout.world import World
from registry.canary import plan_id
from registry.events import EventType
from registry.names import NodeId
from registry.records import BadRecord
from registry.rollouts import CanaryProgress, OrderKind, RolloutRecord
from registry.samples import NodeSamples, Window, merged
from registry.spec import ModelDocument
from registry.spec_canary import CanarySpec, CanaryStep

TELL_AFTER_S = 5.0
"""Numbers that change no verdict are written down this often: each write goes to every node."""


def has_steps(document: ModelDocument) -> bool:
    """Whether the document's canary is advanced by the coordinator, so that it needs a record even
    where nothing waits for a commit."""
    canary = document.spec.canary
    return canary is not None and (bool(canary.steps) or canary.gates.agreement is not None)


def advance(world: World, record: RolloutRecord) -> CanaryProgress | None:
    """The canary's next progress, or ``None`` while there is nothing to change.

    record: about ``world``'s document, and committed.
    """
    canary = world.document.spec.canary
    if canary is None or not has_steps(world.document):
        return None
    progress = record.canary
    if progress is None or progress.plan != plan_id(world.document.spec):
        return _first(world, canary) if _is_served(world, canary) else None
    if progress.phase != "stepping":
        return None
    quarantine = quarantine_of(world, canary.version)
    if quarantine is not None:
        return _failed(world, progress, f"{canary.version} is quarantined: {quarantine.reason}")
    if _is_ordered(world, OrderKind.ABORT):
        by = world.order.by if world.order is not None else ""
        return _failed(world, progress, f"aborted by {by}" if by else "aborted")
    found = _judge(canary, progress, window_of(progress, world.samples))
    if found.verdict is Verdict.FAIL:
        return _failed(world, progress, found.detail)
    if found.verdict is Verdict.PASS and not record.paused and _is_over(world, canary, progress):
        return _next(world, canary, progress, found)
    return _noted(world, canary, progress, found, is_paused=record.paused)


def is_stepping(record: RolloutRecord) -> bool:
    """Whether there is a canary under way that can be paused."""
    return record.canary is not None and record.canary.phase == "stepping"


def wake_s(world: World, record: RolloutRecord) -> float | None:
    """In how many seconds to ask again though nothing has changed; ``None``: not for time's sake.

    record: as in `advance`, which has just returned ``None``.
    """
    canary, progress = world.document.spec.canary, record.canary
    if canary is None or progress is None or progress.phase != "stepping":
        return None
    step = step_of(canary, progress)
    if step is None:
        return None
    left_s = step.hold_s - world.canary_waited_s
    return left_s if left_s > 0 else None


def promotes(world: World, record: RolloutRecord) -> bool:
    """Whether the document is now to be rewritten with the canary as its live version."""
    progress = record.canary
    return (
        progress is not None
        and progress.phase == "done"
        and record.revision == world.revision
        and progress.plan == plan_id(world.document.spec)
    )


def news(before: CanaryProgress | None, now: CanaryProgress | None) -> EventType | None:
    """What kind of event the step from ``before`` to ``now`` is worth."""
    if now is None:
        return None
    same = before if before is not None and before.plan == now.plan else None
    if now.phase != "stepping":
        if same is not None and same.phase == now.phase:
            return None
        return EventType.CANARY_FAILED if now.phase == "failed" else EventType.CANARY_PASSED
    return EventType.CANARY_STEP if same is None or same.step != now.step else None


def window_of(progress: CanaryProgress, samples: Mapping[NodeId, bytes]) -> Window:
    """All that nodes have counted in this step. What can't be read, or is of another one, is
    left out: it takes the part of nobody."""
    return merged(
        one
        for raw in samples.values()
        if (one := _read(raw)) is not None
        and (one.version, one.since) == (progress.version, progress.since)
    )


def step_of(canary: CanarySpec, progress: CanaryProgress) -> CanaryStep | None:
    """The step that it is in; ``None`` for a canary that only mirrors."""
    return canary.steps[progress.step] if progress.step < len(canary.steps) else None


@lru_cache(maxsize=4096)
def _read(raw: bytes) -> NodeSamples | None:
    try:
        return NodeSamples.from_json(raw)
    except BadRecord:
        return None


def _judge(canary: CanarySpec, progress: CanaryProgress, window: Window) -> Judgement:
    return judge(
        canary.gates,
        window,
        takes_traffic=bool(canary.steps) and progress.percent > 0,
        leaves_traffic=progress.percent < 100,
    )


def _is_served(world: World, canary: CanarySpec) -> bool:
    """Whether some node would answer by it: before, there is nothing to give a share of."""
    return any(
        node.status is not None
        and node.status.canary == canary.version
        and (node.status.applied_revision or 0) >= world.revision
        for node in world.nodes
    )


def _is_ordered(world: World, kind: OrderKind) -> bool:
    order = world.order
    return order is not None and order.revision == world.revision and order.order is kind


def _is_over(world: World, canary: CanarySpec, progress: CanaryProgress) -> bool:
    """Whether the step has lasted as long as it has to."""
    step = step_of(canary, progress)
    return step is not None and world.canary_waited_s >= step.hold_s


def _first(world: World, canary: CanarySpec) -> CanaryProgress:
    return CanaryProgress(
        version=canary.version,
        plan=plan_id(world.document.spec) or "",
        percent=canary.steps[0].percent if canary.steps else 0.0,
        since=world.now,
    )


def _next(
    world: World, canary: CanarySpec, progress: CanaryProgress, found: Judgement
) -> CanaryProgress | None:
    place = progress.step + 1
    if place < len(canary.steps):
        return CanaryProgress(
            version=progress.version,
            plan=progress.plan,
            step=place,
            percent=canary.steps[place].percent,
            since=world.now,
        )
    if canary.promote == "manual":
        return _noted(world, canary, progress, found, is_paused=False)
    return _changed(world, progress, "done", Verdict.PASS, found.detail)


def _failed(world: World, progress: CanaryProgress, reason: str) -> CanaryProgress:
    failed = _changed(world, progress, "failed", Verdict.FAIL, reason)
    return failed.model_copy(update={"percent": 0.0})


def _noted(
    world: World,
    canary: CanarySpec,
    progress: CanaryProgress,
    found: Judgement,
    *,
    is_paused: bool,
) -> CanaryProgress | None:
    """The verdict of now, where that is news or the last numbers are old."""
    detail = found.detail
    is_last = progress.step + 1 == len(canary.steps)
    waits = found.verdict is Verdict.PASS and is_last and _is_over(world, canary, progress)
    if waits and canary.promote == "manual":
        detail = f"waits for paddlewheel promote {world.model}; {detail}"
    if is_paused:
        detail = f"paused; {detail}"
    if progress.verdict == found.verdict.value and progress.detail == detail:
        return None
    told = progress.judged_at
    is_old = told is None or abs((world.now - told).total_seconds()) >= TELL_AFTER_S
    was_paused = (progress.detail or "").startswith("paused; ")
    if progress.verdict == found.verdict.value and not is_old and is_paused == was_paused:
        return None
    return _changed(world, progress, "stepping", found.verdict, detail)


def _changed(
    world: World, progress: CanaryProgress, phase: str, verdict: Verdict, detail: str
) -> CanaryProgress:
    return progress.model_copy(
        update={
            "phase": phase, "verdict": verdict.value, "detail": detail, "judged_at": world.now
        }
    )  # fmt: skip
