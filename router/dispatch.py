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
TRIES_MAX = 12
"""Each time handed back unrun takes the end of a worker that others sent it: it ends by itself."""


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

    deadline_s: the loop's time after which nobody waits; all runs share it.
    A request is run twice at most, so it ends two workers at most; being handed back unrun (its
    servable was taken out, or has no worker) is not a run. Raises `InferenceError`, but never
    `ServableFailed`: a second failure is `Overloaded`, for the client to come back.
    """
    route = serving.table.route(choice.servable.model)
    predictor = serving.predictors[choice.servable]
    if not predictor.is_manned:
        # Its workers are being replaced; a version that is ready answers in the meantime.
        other = _second_choice(serving, route, choice, predictor)
        if serving.predictors[other.servable].is_manned:
            choice = other
    failures: list[ServableFailed] = []
    failed_on: list[Predictor] = []
    at = choice
    while True:
        predictor = serving.predictors[at.servable]
        try:
            inference = await predictor.infer(feeds, deadline_s=deadline_s)
        except ServableFailed as failure:
            failures.append(failure)
            failed_on.append(predictor)
            if asyncio.get_running_loop().time() >= deadline_s:
                raise DeadlineExceeded(f"no time left after: {failure}") from failure
            if sum(each.was_run for each in failures) > 1 or len(failures) == TRIES_MAX:
                return _given_up(choice, failures)
            again = _second_choice(serving, route, at, predictor)
            if again.servable == at.servable and failure.is_final:
                return _given_up(choice, failures)
            at = again
            continue
        for failed, why in zip(failed_on, failures, strict=True):
            failed.answered_after(why, by_other=failed is not predictor)
        return Served(inference, at, len(failures))


def _given_up(choice: Choice, failures: list[ServableFailed]) -> Served:
    """What is left when every run failed: the answer that all of them held back, or 503."""
    answers = [failure.answer for failure in failures if failure.was_run]
    if answers and answers[0] is not None and all(answer is not None for answer in answers):
        # Every version gave it and every one was held back: it is what this input leads to.
        return Served(answers[0], choice, len(failures) - 1)
    told = "; then ".join(str(failure) for failure in failures)
    raise Overloaded(
        f"model {choice.servable.model!r} failed on this request: {told}",
        retry_after_s=RETRY_AFTER_S,
    ) from failures[-1]


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
    if choice.kind == STANDBY:
        candidates = ((route.live, STABLE),)
    for servable, kind in candidates:
        if servable is None or servable == choice.servable:
            continue
        if serving.predictors[servable].signature == failed.signature:
            return Choice(servable, kind, choice.rule, choice.bucket)
    return choice
