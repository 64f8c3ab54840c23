"""Runs one request through a pipeline: what can begin begins, and what is ready is passed on."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from registry.errors import PaddlewheelError
from registry.inference import Array, BadInput, InferenceError, Signature
from registry.pipeline_spec import REQUEST
from registry.transforms import carrier
from router.pipeline.errors import StepFailed
from router.pipeline.plan import Plan, PlannedStep
from router.pipeline.wiring import Wiring


@dataclass(frozen=True, slots=True)
class StepAnswer:
    """What one step returned."""

    outputs: Mapping[str, Array]
    version: str | None = None
    """Of the model that gave it; ``None`` for a transform."""


@dataclass(frozen=True, slots=True)
class StepRun:
    """One step of one request, for headers and metrics."""

    version: str | None
    took_s: float
    is_skipped: bool
    """Nothing was there to run it on."""


@dataclass(frozen=True, slots=True)
class Ran:
    """The answer to one request."""

    outputs: Mapping[str, Array]
    steps: Mapping[str, StepRun] = field(default_factory=dict[str, StepRun])


Perform = Callable[[PlannedStep, Mapping[str, Array], float], Awaitable[StepAnswer]]
"""Does one step's work: the step, its feeds, the loop's time after which nobody waits for it.
Raises `PaddlewheelError`."""


async def run(
    plan: Plan,
    wiring: Wiring,
    perform: Perform,
    feeds: Mapping[str, Array],
    *,
    deadline_s: float,
) -> Ran:
    """Run every step once, side by side where the graph lets them.

    feeds: one array for each input of the pipeline. deadline_s: the loop's time; shared by all
    steps, each of which may have less. Raises `StepFailed` for the first step that fails; what
    runs beside it is given up then.
    """
    values: dict[str, Mapping[str, Array]] = {REQUEST: feeds}
    runs: dict[str, StepRun] = {}
    running: dict[asyncio.Task[tuple[StepAnswer, StepRun]], PlannedStep] = {}
    begun: set[str] = set()
    try:
        while len(runs) < len(plan.steps):
            for planned in plan.ready(runs.keys(), begun):
                begun.add(planned.name)
                given = {
                    name: values[source.step][source.name]
                    for name, source in wiring.sources[planned.name].items()
                }
                work = _step(planned, wiring, perform, given, deadline_s)
                running[asyncio.create_task(work)] = planned
            finished, _ = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
            for task in finished:
                planned = running.pop(task)
                answer, runs[planned.name] = task.result()
                values[planned.name] = _named(answer.outputs, planned, plan, wiring)
    finally:
        for task in running:
            task.cancel()
        if running:
            await asyncio.gather(*running, return_exceptions=True)
    outputs = {name: values[ref.step][ref.name] for name, ref in wiring.outputs.items()}
    return Ran(outputs, runs)


async def _step(
    planned: PlannedStep,
    wiring: Wiring,
    perform: Perform,
    feeds: Mapping[str, Array],
    deadline_s: float,
) -> tuple[StepAnswer, StepRun]:
    loop = asyncio.get_running_loop()
    began_s = loop.time()
    own_s = planned.step.timeout_s
    until_s = deadline_s if own_s is None else min(deadline_s, began_s + own_s)
    signature = wiring.steps[planned.name]
    try:
        if planned.step.model is not None and _is_empty(feeds):
            return StepAnswer(_empty_outputs(signature)), StepRun(None, 0.0, True)
        answer = await perform(planned, feeds, until_s)
    except PaddlewheelError as exc:
        raise StepFailed(planned.name, planned.who, _at_fault(exc, planned)) from exc
    return answer, StepRun(answer.version, loop.time() - began_s, False)


def _at_fault(error: PaddlewheelError, planned: PlannedStep) -> PaddlewheelError:
    """A tensor that another step made is not the client's fault, whatever the model says of it."""
    is_of_request = any(source.is_request for source in planned.inputs.values())
    if isinstance(error, BadInput) and planned.step.model is not None and not is_of_request:
        return InferenceError(str(error))
    return error


def _is_empty(feeds: Mapping[str, Array]) -> bool:
    return any(array.ndim and not array.shape[0] for array in feeds.values())


def _empty_outputs(signature: Signature | None) -> Mapping[str, Array]:
    """No rows in, no rows out: kernels differ in what they do with none, so none is asked."""
    if signature is None:
        raise InferenceError("there is nothing to ask it about, and its outputs are not known here")
    return {
        spec.name: np.zeros(
            tuple(0 if at == 0 or dim == -1 else dim for at, dim in enumerate(spec.shape)),
            carrier(spec.dtype),
        )
        for spec in signature.outputs
    }


def _named(
    outputs: Mapping[str, Array], planned: PlannedStep, plan: Plan, wiring: Wiring
) -> Mapping[str, Array]:
    """The outputs as others refer to them: of a step elsewhere, positions are known only now."""
    if wiring.steps[planned.name] is not None:
        return outputs
    named = dict(outputs)
    in_order = list(outputs.values())
    refs = [ref for by in wiring.sources.values() for ref in by.values()]
    for ref in (*refs, *wiring.outputs.values()):
        if ref.step != planned.name or ref.name in named:
            continue
        if ref.name.isascii() and ref.name.isdigit() and int(ref.name[:4]) < len(in_order):
            named[ref.name] = in_order[int(ref.name[:4])]
            continue
        known = ", ".join(map(repr, outputs))
        why = InferenceError(f"has no output {ref.name!r}; it returned {known}")
        raise StepFailed(planned.name, planned.who, why)
    return named
