"""What the coordinator says next about one model's rollout (pure).

The record alone carries a rollout from one coordinator to the next: each step reads the world and
the record, and what it writes is the whole of what has been decided.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from paddlewheel.rollout import canary_plan
from paddlewheel.rollout.reading import (
    BAD,
    READY,
    SETTLE_S,
    Answer,
    answer,
    complaint,
    concerned,
    enough,
    has_accepted,
    quarantined,
)
from paddlewheel.rollout.world import NodeSeen, World
from registry.names import NodeId, Revision
from registry.rollouts import (
    NONE_BEFORE,
    Order,
    OrderKind,
    Phase,
    Refusal,
    RolloutRecord,
    is_gated,
)
from registry.spec import ModelDocument

NAMED_MAX = 3
"""So many nodes are named in a reason; `RolloutRecord.refused` lists all of them."""


def wants_record(document: ModelDocument, record: RolloutRecord | None) -> bool:
    """Whether the document has, or needs, a record. Without one there is nothing to plan."""
    return record is not None or is_gated(document) or canary_plan.has_steps(document)


def next_record(world: World) -> RolloutRecord | None:
    """The record that should stand in place of ``world.record``, or ``None`` to leave it."""
    record = world.record
    if record is None or record.revision != world.revision:
        return _begin(world) if wants_record(world.document, record) else None
    if record.phase is Phase.COMMITTED:
        if canary_plan.is_stepping(record) and (obeyed := _pause(world, record)) is not None:
            return obeyed
        progress = canary_plan.advance(world, record)
        return None if progress is None else _written(world, record, canary=progress)
    if record.phase is Phase.ABORTED:
        return None
    return _obey(world, record) or (None if record.paused else _advance(world, record))


def wake_s(world: World) -> float | None:
    """In how many seconds to look again though nothing has changed, after `next_record` had
    nothing to say; ``None``: not for time's sake."""
    record = world.record
    if record is None or record.revision != world.revision or record.phase is Phase.ABORTED:
        return None
    if record.phase is Phase.COMMITTED:
        return canary_plan.wake_s(world, record)
    if record.paused or waits_for_nobody(world):
        return None
    left_s = [due_s - world.waited_s for due_s in (_bake_s(world, record), _patience_s(world))]
    left_s += [SETTLE_S - node.failing_s for node in concerned(world) if node.failing_s > 0]
    return min((each for each in left_s if each > 0), default=None)


def waits_for_nobody(world: World) -> bool:
    """Whether no node takes the model, so that no time counts: a commit would serve nobody, and
    nobody is late."""
    return not concerned(world)


# --- the beginning ------------------------------------------------------------------------------


def _begin(world: World) -> RolloutRecord:
    rollout = world.document.spec.rollout
    return RolloutRecord(
        model=world.model,
        revision=world.revision,
        previous=_previous(world),
        strategy=rollout.strategy,
        phase=Phase.PREPARING if rollout.is_gated else Phase.COMMITTED,
        since=world.now,
        canary=None if world.record is None else world.record.canary,
        coordinator=world.coordinator,
    )


def _previous(world: World) -> Revision:
    """The document to go back to: one that was in force, of this model since it was created."""
    old = world.record
    if old is not None and old.revision < world.revision:
        candidate = old.in_force
    elif old is not None:  # the store went back in time: what it says of later revisions is void
        candidate = old.previous
    else:
        applied = (
            node.status.applied_revision or NONE_BEFORE
            for node in world.nodes
            if node.status is not None
        )
        candidate = max((each for each in applied if each < world.revision), default=NONE_BEFORE)
    return candidate if world.created <= candidate < world.revision else NONE_BEFORE


# --- orders -------------------------------------------------------------------------------------


def _obey(world: World, record: RolloutRecord) -> RolloutRecord | None:
    order = _order(world)
    if order is None:
        return None
    match order.order:
        case OrderKind.ABORT:
            by = f" by {order.by}" if order.by else ""
            return _aborted(world, record, f"aborted{by}")
        case _:
            return _pause(world, record)


def _pause(world: World, record: RolloutRecord) -> RolloutRecord | None:
    order = _order(world)
    match None if order is None else order.order:
        case OrderKind.PAUSE if not record.paused:
            return _written(world, record, paused=True)
        case OrderKind.RESUME | OrderKind.PROMOTE if record.paused:
            # The clock starts anew: nobody was waited for, and nothing watched, meanwhile.
            return _written(world, record, paused=False, since=world.now)
        case _:
            return None


def _order(world: World) -> Order | None:
    order = world.order
    return order if order is not None and order.revision == world.revision else None


# --- steps --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Roll:
    """The nodes concerned, by what they say. Draining and gone ones are not waited for."""

    nodes: tuple[NodeSeen, ...]
    answers: dict[NodeId, Answer]
    needed: int
    """So many must not be bad."""

    @classmethod
    def call(cls, world: World) -> _Roll:
        nodes = concerned(world)
        answers = {node.id: answer(world, node) for node in nodes}
        return cls(nodes, answers, enough(len(nodes), world.document.spec.rollout.require_ack))

    def of(self, kinds: Iterable[Answer]) -> list[NodeSeen]:
        wanted = frozenset(kinds)
        return [node for node in self.nodes if self.answers[node.id] in wanted]

    def all_are(self, ids: Iterable[NodeId], kinds: Iterable[Answer]) -> bool:
        wanted = frozenset(kinds)
        return all(self.answers[id_] in wanted for id_ in ids)


def _advance(world: World, record: RolloutRecord) -> RolloutRecord | None:
    reason = quarantined(world)
    if reason is not None:
        return _aborted(world, record, reason)
    roll = _Roll.call(world)
    if not roll.nodes:
        return None
    step = _failed(world, record, roll) or _forward(world, record, roll)
    if step is None and world.waited_s >= _patience_s(world):
        return _timed_out(world, record, roll)
    return step


def _failed(world: World, record: RolloutRecord, roll: _Roll) -> RolloutRecord | None:
    """Abort when more nodes stand in the way than may, or one that serves the document already."""
    # A refusal is an answer to the document; a version that can't be made ready is not.
    kinds = {Answer.REFUSED} if record.strategy == "immediate" else BAD
    bad = roll.of(kinds)
    serving = [node for node in bad if node.id in record.released]
    if not serving and len(roll.nodes) - len(bad) >= roll.needed:
        return None
    blamed = serving or bad
    words = "failed in service" if serving else f"of {len(roll.nodes)} nodes can't take it"
    first = f"{blamed[0].id}: {complaint(world, blamed[0])}"
    return _aborted(world, record, f"{len(blamed)} {words}: {first}", _refusals(world, bad))


def _forward(world: World, record: RolloutRecord, roll: _Roll) -> RolloutRecord | None:
    left_behind = roll.of(BAD)
    match record.strategy:
        case "immediate":
            accepted = sum(has_accepted(world, node) for node in roll.nodes)
            if accepted < roll.needed:
                return None
            return _committed(world, record, roll.of({Answer.REFUSED}))
        case "barrier":
            ready = roll.of(READY)
            if len(ready) + len(left_behind) < len(roll.nodes) or len(ready) < roll.needed:
                return None
            return _committed(world, record, left_behind)
        case "waves":
            return _wave(world, record, roll)


def _committed(
    world: World, record: RolloutRecord, left_behind: Iterable[NodeSeen]
) -> RolloutRecord:
    return _written(
        world,
        record,
        phase=Phase.COMMITTED,
        is_baking=False,
        refused=_refusals(world, left_behind),
        since=world.now,
    )


def _aborted(
    world: World, record: RolloutRecord, reason: str, refused: tuple[Refusal, ...] = ()
) -> RolloutRecord:
    return _written(
        world,
        record,
        phase=Phase.ABORTED,
        paused=False,
        is_baking=False,
        released=(),
        reason=reason,
        refused=refused,
        since=world.now,
    )


def _timed_out(world: World, record: RolloutRecord, roll: _Roll) -> RolloutRecord:
    if record.strategy == "immediate":
        late = [node for node in roll.nodes if not has_accepted(world, node)]
    else:
        done = READY if record.phase is Phase.PREPARING else {Answer.APPLIED}
        late = [node for node in roll.nodes if roll.answers[node.id] not in done]
        if record.phase is Phase.WAVING and record.released and not record.is_baking:
            late = [node for node in late if node.id in record.released] or late
    named = ", ".join(f"{node.id} ({roll.answers[node.id]})" for node in late[:NAMED_MAX])
    more = f" and {len(late) - NAMED_MAX} more" if len(late) > NAMED_MAX else ""
    timeout_s = world.document.spec.rollout.timeout_s
    refused = tuple(Refusal(node=node.id, reason=_why_late(world, node)) for node in late)
    who = f": {named}{more}" if late else ""
    return _aborted(world, record, f"not ready within {timeout_s:g} s{who}", refused)


def _why_late(world: World, node: NodeSeen) -> str:
    return f"not ready in time: {complaint(world, node)}"


# --- waves --------------------------------------------------------------------------------------


def _wave(world: World, record: RolloutRecord, roll: _Roll) -> RolloutRecord | None:
    if record.phase is Phase.PREPARING:
        return _release(world, record, roll, 0)
    if _promoted(world) and record.wave != _last(world):
        return _release(world, record, roll, _last(world))
    if not _serves(record, roll):
        return None
    bake_s = _bake_s(world, record)
    if bake_s > 0 and not record.is_baking:
        return _written(world, record, is_baking=True, since=world.now)
    if world.waited_s < bake_s:
        return None
    return _release(world, record, roll, 0 if record.wave is None else record.wave + 1)


def _serves(record: RolloutRecord, roll: _Roll) -> bool:
    """Whether the nodes released have it in force. With all of them gone there is nobody to have
    shown that it works."""
    here = [id_ for id_ in record.released if id_ in roll.answers]
    return bool(here) and roll.all_are(here, {Answer.APPLIED})


def _release(world: World, record: RolloutRecord, roll: _Roll, wave: int) -> RolloutRecord | None:
    """Let the next wave that adds anybody have it, once all of them are ready; when no wave does,
    and the nodes released serve it, it is committed."""
    if _promoted(world):
        wave = max(wave, _last(world))
    for at in range(wave, _last(world) + 1):
        joining = _joining(world, record, roll, at)
        if joining and not roll.all_are(joining, READY):
            return None
        if joining:
            return _written(
                world,
                record,
                phase=Phase.WAVING,
                wave=at,
                is_baking=False,
                released=tuple(sorted({*record.released, *joining})),
                since=world.now,
            )
    return _committed(world, record, roll.of(BAD)) if _serves(record, roll) else None


def _joining(world: World, record: RolloutRecord, roll: _Roll, wave: int) -> list[NodeId]:
    """Whom ``wave`` adds to those released; nodes that can't take it are left behind."""
    waiting = [
        node for node in roll.nodes
        if node.id not in record.released and roll.answers[node.id] not in BAD
    ]  # fmt: skip
    if wave == _last(world):
        return [node.id for node in waiting]
    spec = world.document.spec.rollout.waves[wave]
    if spec.labels is not None:
        return [node.id for node in waiting if spec.labels.items() <= node.labels.items()]
    if not spec.percent:
        return []
    have = sum(id_ in roll.answers for id_ in record.released)
    missing = max(0, enough(len(roll.nodes), spec.percent) - have)
    return [node.id for node in waiting[:missing]]


def _promoted(world: World) -> bool:
    order = _order(world)
    return order is not None and order.order is OrderKind.PROMOTE


def _last(world: World) -> int:
    """Index of the wave of all that are left over, after those that the document names."""
    return len(world.document.spec.rollout.waves)


def _bake_s(world: World, record: RolloutRecord) -> float:
    waves = world.document.spec.rollout.waves
    if record.phase is not Phase.WAVING or record.wave is None or record.wave >= len(waves):
        return 0.0
    return waves[record.wave].bake_s


# --- small things -------------------------------------------------------------------------------


def _patience_s(world: World) -> float:
    """How long the record may stand as it is."""
    record = world.record
    baking_s = _bake_s(world, record) if record is not None and record.is_baking else 0.0
    return baking_s + world.document.spec.rollout.timeout_s


def _refusals(world: World, nodes: Iterable[NodeSeen]) -> tuple[Refusal, ...]:
    return tuple(Refusal(node=node.id, reason=complaint(world, node)) for node in nodes)


def _written(world: World, record: RolloutRecord, **changes: object) -> RolloutRecord:
    return record.model_copy(update={**changes, "coordinator": world.coordinator})
