"""What a load generator saw: one sample per request, and the figures taken from many."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Sample:
    """One request, from the moment it was due to the end of its answer."""

    name: str
    """The kind of request, as the plan called it: ``json``, ``binary`` ..."""
    due_s: float
    """When it should have been sent, on the machine's monotonic clock (all processes share it)."""
    latency_s: float
    """From ``due_s`` to the last byte of the answer, so that a stall of the server, or of the
    generator itself, is counted against every request that it delayed."""
    status: int
    """0 when there was no answer."""
    version: str
    """``X-Model-Version`` of the answer; empty without one."""
    route: str
    """``X-Model-Route`` of the answer, without its rule: ``stable``, ``canary`` ..."""
    failure: str | None
    """Why it counts as failed: no answer, a status that is not 200, or what ``verify`` said."""

    @property
    def done_s(self) -> float:
        """When its answer was complete, on the clock of ``due_s``."""
        return self.due_s + self.latency_s


def percentile(values: Iterable[float], percent: float) -> float:
    """The smallest value that at least ``percent`` of all values do not exceed (nearest rank).

    Never interpolates: what it returns was measured. NaN without values.
    """
    ordered = sorted(values)
    if not ordered:
        return math.nan
    rank = math.ceil(percent / 100 * len(ordered))
    return ordered[min(max(rank, 1), len(ordered)) - 1]


@dataclass(slots=True)
class Result:
    """All samples of a run, in the order in which they ended."""

    samples: list[Sample] = field(default_factory=list[Sample])
    started_s: float = 0.0
    """Monotonic time at which the first request was due."""
    ended_s: float = 0.0

    def __len__(self) -> int:
        return len(self.samples)

    def __iter__(self) -> Iterator[Sample]:
        return iter(self.samples)

    @property
    def failed(self) -> int:
        return sum(1 for sample in self.samples if sample.failure is not None)

    def failures(self) -> Mapping[str, int]:
        """How often each reason was given, most frequent first."""
        return dict(Counter(s.failure for s in self.samples if s.failure is not None).most_common())

    def by(self, label: Callable[[Sample], str]) -> Mapping[str, int]:
        """Samples per label: ``result.by(lambda s: s.version)``."""
        return dict(sorted(Counter(label(sample) for sample in self.samples).items()))

    def window(self, from_s: float = -math.inf, to_s: float = math.inf) -> Result:
        """The requests that were due within ``[from_s, to_s)``."""
        kept = [sample for sample in self.samples if from_s <= sample.due_s < to_s]
        return Result(kept, max(from_s, self.started_s), min(to_s, self.ended_s))

    def only(self, keep: Callable[[Sample], bool]) -> Result:
        """The requests for which ``keep`` is true, over the same span of time."""
        return Result([s for s in self.samples if keep(s)], self.started_s, self.ended_s)

    def latency_s(self, percent: float) -> float:
        """A percentile of the latency; 100 is the slowest. NaN without samples."""
        return percentile((sample.latency_s for sample in self.samples), percent)

    def longest_gap_s(self) -> float:
        """The longest time in which no request was answered well, between start and end.

        At a steady rate of r requests per second this is about 1/r while all is well.
        """
        ends = sorted(sample.done_s for sample in self.samples if sample.failure is None)
        marks = sorted([self.started_s, *ends, self.ended_s])
        return max(later - earlier for earlier, later in itertools.pairwise(marks))

    def summary(self) -> dict[str, Any]:
        """The figures as JSON: counts, milliseconds, the longest gap."""
        span_s = self.ended_s - self.started_s
        return {
            "requests": len(self),
            "failed": self.failed,
            "failures": dict(self.failures()),
            "duration_s": round(span_s, 3),
            "per_s": round(len(self) / span_s, 1) if span_s > 0 else None,
            "versions": dict(self.by(lambda sample: sample.version)),
            "routes": dict(self.by(lambda sample: sample.route)),
            "kinds": dict(self.by(lambda sample: sample.name)),
            "latency_ms": {
                name: _ms(self.latency_s(percent))
                for name, percent in (("p50", 50), ("p90", 90), ("p99", 99), ("max", 100))
            },
            "longest_gap_ms": _ms(self.longest_gap_s()),
        }

    def to_json(self, *, with_samples: bool = True) -> dict[str, Any]:
        """The summary, the span and (unless left out) the samples as rows of plain values."""
        document: dict[str, Any] = {
            "summary": self.summary(), "started_s": self.started_s, "ended_s": self.ended_s,
        }  # fmt: skip
        if with_samples:
            document["samples"] = [
                [s.name, s.due_s, s.latency_s, s.status, s.version, s.route, s.failure]
                for s in self.samples
            ]
        return document

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Result:
        """Read back what `to_json` wrote."""
        rows: Sequence[Sequence[Any]] = document.get("samples", [])
        samples = [Sample(*row) for row in rows]
        return cls(samples, document["started_s"], document["ended_s"])

    @classmethod
    def merged(cls, results: Iterable[Result]) -> Result:
        """Several runs at the same time as one."""
        parts = list(results)
        return cls(
            sorted((s for part in parts for s in part), key=lambda s: s.done_s),
            min((part.started_s for part in parts), default=0.0),
            max((part.ended_s for part in parts), default=0.0),
        )


def _ms(seconds: float) -> float | None:
    return None if math.isnan(seconds) else round(seconds * 1e3, 3)
