"""Any graph of steps gives what one step after the other gives, in whatever order they end."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from registry.inference import Array, InferenceError, Signature, TensorSpec
from registry.names import ModelName, Revision
from registry.pipeline_spec import parse_pipeline
from router.pipeline import engine
from router.pipeline.engine import StepAnswer
from router.pipeline.errors import StepFailed
from router.pipeline.plan import Plan, PlannedStep, plan_of
from router.pipeline.wiring import wire
from tests.pipelines import document


@dataclass(frozen=True)
class Graph:
    """Each step adds up what it takes, and its own number."""

    takes: tuple[tuple[int, ...], ...]
    """For each step the numbers of earlier ones; -1 is the request."""
    turns: tuple[int, ...]
    """For how many turns of the loop each step waits."""

    def plan(self) -> Plan:
        steps = [
            {
                "name": f"s{at}",
                "model": f"m{len(takes)}",
                "inputs": {
                    f"x{n}": "request.x" if source < 0 else f"s{source}.y"
                    for n, source in enumerate(takes)
                },
            }
            for at, takes in enumerate(self.takes)
        ]
        outputs = {f"y{at}": f"s{at}.0" for at in range(len(self.takes))}
        text = document("p", list(reversed(steps)), outputs=outputs)
        return plan_of(parse_pipeline(text, name=ModelName("p")), Revision(1))

    def by_hand(self, x: float) -> list[float]:
        values: list[float] = []
        for at, takes in enumerate(self.takes):
            values.append(at + sum(x if source < 0 else values[source] for source in takes))
        return values


@st.composite
def graphs(draw: st.DrawFn) -> Graph:
    count = draw(st.integers(1, 8))
    takes = tuple(
        tuple(draw(st.lists(st.integers(-1, at - 1), min_size=1, max_size=3)))
        for at in range(count)
    )
    if not any(-1 in each for each in takes):
        takes = ((-1,), *takes[1:])
    return Graph(takes, tuple(draw(st.integers(0, 4)) for _ in range(count)))


async def run(graph: Graph, failing: int | None = None) -> tuple[Mapping[str, Array], list[str]]:
    plan = graph.plan()
    done: list[str] = []
    y = TensorSpec("y", "float64", (1,))
    signatures: dict[str, Signature | None] = {
        name: Signature(tuple(TensorSpec(n, "float64", (1,)) for n in planned.inputs), (y,))
        for name, planned in plan.steps.items()
    }
    wiring = wire(plan, signatures)

    async def perform(
        planned: PlannedStep, feeds: Mapping[str, Array], _until_s: float
    ) -> StepAnswer:
        at = int(planned.name[1:])
        assert planned.after <= set(done), "it began before its inputs were there"
        assert planned.name not in done
        for _ in range(graph.turns[at]):
            await asyncio.sleep(0)
        if at == failing:
            raise InferenceError("it would not")
        done.append(planned.name)
        return StepAnswer({"y": at + np.sum(list(feeds.values()), axis=0)})

    before = asyncio.all_tasks()
    try:
        ran = await engine.run(plan, wiring, perform, {"x": np.array([0.5])}, deadline_s=1e9)
    finally:
        assert asyncio.all_tasks() == before, "nothing is left running"
    return ran.outputs, done


@settings(max_examples=100, deadline=None)
@given(graphs())
def test_the_order_makes_no_difference(graph: Graph) -> None:
    outputs, done = asyncio.run(run(graph))
    assert [outputs[f"y{at}"][0] for at in range(len(graph.takes))] == graph.by_hand(0.5)
    assert len(done) == len(set(done)) == len(graph.takes)


@settings(max_examples=60, deadline=None)
@given(graphs(), st.data())
def test_a_failing_step_ends_it_by_name(graph: Graph, data: st.DataObject) -> None:
    failing = data.draw(st.integers(0, len(graph.takes) - 1))
    with pytest.raises(StepFailed, match=f"^step 's{failing}' .*it would not"):
        asyncio.run(run(graph, failing))
