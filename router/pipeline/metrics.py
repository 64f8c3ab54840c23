"""What is measured of pipelines and their steps. Labels are names of documents: bounded."""

from __future__ import annotations

from prometheus_client import Counter, Histogram

from router.http_errors import outcome_of
from router.metrics import PREFIX, Metrics

_BUCKETS_S = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0,
)  # fmt: skip


class PipelineMetrics:
    """On the node's own registry."""

    def __init__(self, base: Metrics) -> None:
        self._base = base
        self._requests = Counter(
            PREFIX + "pipeline_requests", "Pipeline requests by how they ended.",
            ("pipeline", "outcome"), registry=base.registry,
        )  # fmt: skip
        self._duration = Histogram(
            PREFIX + "pipeline_duration_seconds",
            "Time from a pipeline request's last byte to its answer.",
            ("pipeline",), registry=base.registry, buckets=_BUCKETS_S,
        )  # fmt: skip
        self._steps = Histogram(
            PREFIX + "pipeline_step_duration_seconds",
            "Time of one step, queue included, of pipeline requests that were answered.",
            ("pipeline", "step"), registry=base.registry, buckets=_BUCKETS_S,
        )  # fmt: skip
        self._failures = Counter(
            PREFIX + "pipeline_step_failures", "Pipeline requests that this step ended.",
            ("pipeline", "step", "outcome"), registry=base.registry,
        )  # fmt: skip

    def count(self, pipeline: str | None, status: int, took_s: float | None) -> None:
        """One request ended. pipeline: ``None`` where there is no such one: a name is a client's
        own, and labels are kept for ever."""
        if pipeline is None:
            self._base.refused(status)
            return
        self._requests.labels(pipeline, outcome_of(status)).inc()
        if status < 400 and took_s is not None:
            self._duration.labels(pipeline).observe(took_s)

    def step_took(self, pipeline: str, step: str, took_s: float) -> None:
        self._steps.labels(pipeline, step).observe(took_s)

    def step_failed(self, pipeline: str, step: str, status: int) -> None:
        self._failures.labels(pipeline, step, outcome_of(status)).inc()
