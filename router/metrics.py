"""What the front door measures, on a registry of its own, as Prometheus or OpenMetrics text.

Labels are bounded: model, version, route, outcome; never a user. The hot path holds on to the
labelled children (`Series`) instead of looking them up for each request.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
)
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    Metric,
)
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

# A second series for each counter, only to say since when: nobody asked for it.
disable_created_metrics()  # type: ignore[no-untyped-call]

PREFIX = "paddlewheel_"
_LATENCY_BUCKETS_S = (
    0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0,
)  # fmt: skip
_SERIES_KEPT = 512
"""(model, version, route) triples that are remembered after they were last used."""


@dataclass(frozen=True, slots=True)
class Reading:
    """One gauge or counter that another layer shows, read when somebody asks for ``/metrics``."""

    name: str
    """Without the prefix; a counter's without ``_total``."""
    help: str
    samples: tuple[tuple[Mapping[str, str], float], ...]
    """Labels (the same names in all) and value."""
    is_counter: bool = False


@dataclass(slots=True)
class Series:
    """The children of one (model, version, route), resolved once."""

    duration: Histogram
    queue: Histogram
    in_flight: Gauge
    _requests: Counter
    _labels: tuple[str, str, str]
    _by_outcome: dict[str, Counter] = field(default_factory=dict[str, Counter])

    def count(self, outcome: str) -> None:
        """Count one request that ended as ``outcome`` (`router.http_errors.OUTCOMES`)."""
        child = self._by_outcome.get(outcome)
        if child is None:
            child = self._by_outcome[outcome] = self._requests.labels(*self._labels, outcome)
        child.inc()


class Metrics:
    """All metrics of a node. Other layers add theirs by `add` or on `registry` itself."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry(auto_describe=True)
        route = ("model", "version", "route")
        self._requests = Counter(
            PREFIX + "requests", "Inference requests by how they ended.",
            (*route, "outcome"), registry=self.registry,
        )  # fmt: skip
        self._duration = Histogram(
            PREFIX + "request_duration_seconds", "Time from a request's last byte to its answer.",
            route, registry=self.registry, buckets=_LATENCY_BUCKETS_S,
        )  # fmt: skip
        self._queue = Histogram(
            PREFIX + "queue_seconds", "Time that requests waited for a worker.",
            ("model",), registry=self.registry, buckets=_LATENCY_BUCKETS_S,
        )  # fmt: skip
        self._in_flight = Gauge(
            PREFIX + "in_flight", "Requests understood and not yet answered.",
            ("model",), registry=self.registry,
        )  # fmt: skip
        self._reruns = Counter(
            PREFIX + "reruns", "Requests run again because a servable failed.",
            ("model",), registry=self.registry,
        )  # fmt: skip
        self._refused = Counter(
            PREFIX + "refused", "Requests refused before a servable was chosen, by status.",
            ("code",), registry=self.registry,
        )  # fmt: skip
        self._series: OrderedDict[tuple[str, str, str], Series] = OrderedDict()

    def series(self, model: str, version: str, route: str) -> Series:
        """Return the children of one triple. The oldest unused are forgotten beyond a bound."""
        key = (model, version, route)
        series = self._series.get(key)
        if series is None:
            series = self._series[key] = Series(
                self._duration.labels(*key), self._queue.labels(model),
                self._in_flight.labels(model), self._requests, key,
            )  # fmt: skip
            if len(self._series) > _SERIES_KEPT:
                self._forget(*self._series.popitem(last=False))
        else:
            self._series.move_to_end(key)
        return series

    def rerun(self, model: str) -> None:
        self._reruns.labels(model).inc()

    def refused(self, status: int) -> None:
        self._refused.labels(str(status)).inc()

    def add(self, read: Callable[[], Iterable[Reading]]) -> None:
        """Show what ``read`` returns in every answer from now on; called on the event loop."""
        self.registry.register(_Readings(read))

    def render(self, accept: str) -> tuple[bytes, str]:
        """Return the text and its content type: OpenMetrics where ``accept`` asks for it."""
        encode, content_type = choose_encoder(accept)
        return encode(self.registry), content_type

    def _forget(self, key: tuple[str, str, str], series: Series) -> None:
        self._duration.remove(*key)
        for outcome in series._by_outcome:  # pyright: ignore[reportPrivateUsage]
            self._requests.remove(*key, outcome)


class _Readings(Collector):
    def __init__(self, read: Callable[[], Iterable[Reading]]) -> None:
        self._read = read

    def describe(self) -> Iterable[Metric]:
        """Nothing: the readings may need a node that is not up yet."""
        return ()

    def collect(self) -> Iterable[Metric]:
        for reading in self._read():
            family = CounterMetricFamily if reading.is_counter else GaugeMetricFamily
            names = list(reading.samples[0][0]) if reading.samples else []
            metric = family(PREFIX + reading.name, reading.help, labels=names)
            for labels, value in reading.samples:
                metric.add_metric([labels[name] for name in names], value)
            yield metric
