"""A pipeline's document as a graph: which steps can begin, once which are done (pure)."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

from registry.names import ModelName, Revision
from registry.pipeline_spec import PipelineDocument, PipelineLimits, Reference, Step


@dataclass(frozen=True, slots=True)
class PlannedStep:
    """A step with its place in the graph."""

    step: Step
    inputs: Mapping[str, Reference]
    after: frozenset[str]
    """Names of the steps whose outputs it takes."""

    @property
    def name(self) -> str:
        return self.step.name

    @property
    def who(self) -> str:
        """What does the work, as errors name it."""
        step = self.step
        if step.transform is not None:
            return f"transform {step.transform}"
        where = f" at {step.endpoint}" if step.endpoint else ""
        pinned = f" {step.version or step.label}" if step.version or step.label else ""
        return f"model {step.model}{pinned}{where}"


@dataclass(frozen=True, slots=True)
class Plan:
    """One accepted pipeline document, ready to be run."""

    name: ModelName
    revision: Revision
    document: PipelineDocument
    steps: Mapping[str, PlannedStep]

    @property
    def limits(self) -> PipelineLimits:
        return self.document.spec.limits

    @property
    def models(self) -> frozenset[ModelName]:
        """The models that have to serve on this very node."""
        return frozenset(
            planned.step.model
            for planned in self.steps.values()
            if planned.step.model is not None and planned.step.endpoint is None
        )

    @property
    def transforms(self) -> frozenset[str]:
        return frozenset(p.step.transform for p in self.steps.values() if p.step.transform)

    def ready(self, done: AbstractSet[str], begun: AbstractSet[str]) -> tuple[PlannedStep, ...]:
        """The steps that can begin: all that they take is there, and they have not begun."""
        return tuple(
            planned
            for planned in self.steps.values()
            if planned.name not in begun and planned.after <= done
        )


def plan_of(document: PipelineDocument, revision: Revision) -> Plan:
    """The graph of a document that `registry.pipeline_spec.parse_pipeline` accepted."""
    steps: dict[str, PlannedStep] = {}
    for step in document.spec.steps:
        inputs = step.references()
        after = frozenset(source.step for source in inputs.values() if not source.is_request)
        steps[step.name] = PlannedStep(step, inputs, after)
    return Plan(document.name, revision, document, steps)
