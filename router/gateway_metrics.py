"""What a gateway measures. Labels are bounded by models and nodes; never a user."""

from __future__ import annotations

from dataclasses import dataclass, field

from prometheus_client import Counter, Histogram

from router.http_errors import outcome_of
from router.metrics import PREFIX, Metrics

_BUCKETS_S = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0,
)  # fmt: skip


@dataclass(slots=True)
class ModelSeries:
    """One model's children, resolved once."""

    duration: Histogram
    _requests: Counter
    _model: str
    _by_outcome: dict[str, Counter] = field(default_factory=dict[str, Counter])

    def count(self, status: int) -> None:
        outcome = outcome_of(status)
        child = self._by_outcome.get(outcome)
        if child is None:
            child = self._by_outcome[outcome] = self._requests.labels(self._model, outcome)
        child.inc()


class GatewayMetrics:
    """On ``base``'s registry, beside what every front door shows."""

    def __init__(self, base: Metrics) -> None:
        self.base = base
        self._requests = Counter(
            PREFIX + "gateway_requests", "Requests about a model by how they ended.",
            ("model", "outcome"), registry=base.registry,
        )  # fmt: skip
        self._duration = Histogram(
            PREFIX + "gateway_request_duration_seconds",
            "Time from a request's head to the end of its answer.",
            ("model",), registry=base.registry, buckets=_BUCKETS_S,
        )  # fmt: skip
        self._retries = Counter(
            PREFIX + "gateway_retries", "Requests that were run again on another node, by why.",
            ("model", "reason"), registry=base.registry,
        )  # fmt: skip
        self._series: dict[str, ModelSeries] = {}

    def series(self, model: str) -> ModelSeries:
        """Return a model's children; only for models that exist."""
        series = self._series.get(model)
        if series is None:
            series = self._series[model] = ModelSeries(
                self._duration.labels(model), self._requests, model
            )
        return series

    def retried(self, model: str, reason: str) -> None:
        self._retries.labels(model, reason).inc()
