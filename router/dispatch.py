"""One inference on the chosen servable, and one more where that servable failed.

Inference has no side effects, so what failed on one servable may be run on another; the client
gets an answer instead of the error.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass

from registry.inference import (
    Array,
    DeadlineExceeded,
    Inference,
    Overloaded,
    Predictor,
    ServableFailed,
)
from registry.names import ServableId
from router.serving import Serving
from router.table import CANARY, PINNED, STABLE, STANDBY, Choice, Route

RETRY_AFTER_S = 1.0


@dataclass(frozen=True, slots=True)
class Served:
    """An answer and the choice that in the end gave it."""

    inference: Inference
    choice: Choice
    reruns: int


async def dispatch(
    serving: Serving,
    choice: Choice,
    feeds: Mapping[str, Array],
    *,
    deadline_s: float,
) -> Served:
    """Run one request on ``choice``; where the servable fails, once more elsewhere.

    deadline_s: the loop's time after which nobody waits; both runs share it.
    A request is run twice at most, so it ends two workers at most. Raises `InferenceError`, but
    never `ServableFailed`: a second failure is `Overloaded`, for the client to come back.
    """
    predictor = serving.predictors[choice.servable]
    try:
        return Served(await predictor.infer(feeds, deadline_s=deadline_s), choice, 0)
    except ServableFailed as first:
        if asyncio.get_running_loop().time() >= deadline_s:
            raise DeadlineExceeded(f"no time left to run it again after: {first}") from first
        route = serving.table.route(choice.servable.model)
        again = _second_choice(serving, route, choice, predictor)
        try:
            inference = await serving.predictors[again.servable].infer(feeds, deadline_s=deadline_s)
        except ServableFailed as second:
            if first.answer is not None and second.answer is not None:
                # Both gave it and both were held back: it is what this input leads to.
                return Served(first.answer, choice, 1)
            raise Overloaded(
                f"model {choice.servable.model!r} failed twice on this request: "
                f"{first}; then {second}",
                retry_after_s=RETRY_AFTER_S,
            ) from second
        if again.servable != choice.servable:
            predictor.proven(first)
        return Served(inference, again, 1)


def _second_choice(serving: Serving, route: Route, choice: Choice, failed: Predictor) -> Choice:
    """Return where to run a request again: another version where that is the same to the client.

    A pinned request stays with the version it asked for. Another version is only asked when it
    takes and returns the same tensors.
    """
    candidates: tuple[tuple[ServableId | None, str], ...] = ((route.standby, STANDBY),)
    if choice.kind == PINNED:
        return choice
    if choice.kind == CANARY:
        # What a failing canary would have replaced answers for it, before anything older does.
        candidates = ((route.live, STABLE), *candidates)
    for servable, kind in candidates:
        if servable is None or servable == choice.servable:
            continue
        if serving.predictors[servable].signature == failed.signature:
            return Choice(servable, kind, choice.rule, choice.bucket)
    return choice
