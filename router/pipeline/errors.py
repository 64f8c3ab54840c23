"""Why a pipeline gives no answer. `router.http_errors` gives the status."""

from __future__ import annotations

from registry.errors import PaddlewheelError
from registry.inference import InferenceError
from router.errors import NotFound, RouterError


class UnknownPipeline(NotFound):
    """No document names this pipeline here."""

    def __init__(self, name: str) -> None:
        super().__init__(f"unknown pipeline {name[:128]!r}")


class PipelineBroken(RouterError):
    """It can't be run as things are: a model is not there, or tensors do not fit together."""

    def __init__(self, pipeline: str, why: str) -> None:
        super().__init__(f"pipeline {pipeline!r} can't be run now: {why}")
        self.why = why


class StepFailed(RouterError):
    """One step gave no answer; ``error`` is its own reason, which decides the status."""

    def __init__(self, step: str, who: str, error: PaddlewheelError) -> None:
        super().__init__(f"step {step!r} ({who}): {error}")
        self.step = step
        self.error = error


class TransformFailed(InferenceError):
    """A transform raised, died or returned something else than it declares."""


class RemoteFailed(InferenceError):
    """Another server refused a step's request, or its answer could not be understood."""
