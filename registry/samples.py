"""What nodes count while a canary is watched, and what the fleet's counts add up to (pure).

``P/samples/<model>/<node>``, under the node's lease. Counts start with a canary's step and only
grow until the next one; times go into fixed buckets, so that any two counts can be added.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Annotated

from annotated_types import Ge, MaxLen
from pydantic import model_validator

from registry.names import ModelName, NodeId, Version
from registry.records import At, Record

BUCKETS_PER_OCTAVE = 4
"""A bucket is 19 % wide; ratios of times are known to that at worst, and mostly far better."""
BOUNDS_S = tuple(1e-4 * 2 ** (place / BUCKETS_PER_OCTAVE) for place in range(84))
"""The upper end of each bucket, 0.1 ms to 177 s; one more bucket takes what is above."""

Number = Annotated[int, Ge(0)]
Numbers = Annotated[tuple[Number, ...], MaxLen(len(BOUNDS_S) + 1)]


def bucket_of(seconds: float) -> int:
    """The place of the bucket for a request of ``seconds``."""
    return bisect_left(BOUNDS_S, seconds)


class RouteSamples(Record):
    """Requests that one route was chosen for, as far as they say something about its version."""

    requests: Number = 0
    errors: Number = 0
    """Of those, the ones it did not answer: they were run elsewhere, or refused with a 5xx."""
    buckets: Numbers = ()
    """The answered ones by the time in the queue and in the worker; zeros at the end left out."""

    @model_validator(mode="after")
    def _add_up(self) -> RouteSamples:
        if self.errors + sum(self.buckets) > self.requests:
            raise ValueError("more parts than requests")
        return self

    @property
    def answered(self) -> int:
        return sum(self.buckets)

    @property
    def error_rate(self) -> float:
        """0 where there were no requests."""
        return self.errors / self.requests if self.requests else 0.0

    def quantile_s(self, share: float) -> float | None:
        """The time that ``share`` of the answers did not exceed; ``None`` without answers."""
        wanted = share * self.answered
        below = 0
        for place, count in enumerate(self.buckets):
            if count and below + count >= wanted:
                low, high = _edges(place)
                return low + (high - low) * (wanted - below) / count
            below += count
        return None

    def slower_than(self, seconds: float) -> int:
        """How many answers took longer; inside a bucket they are taken to lie evenly."""
        place = bucket_of(seconds)
        above = sum(self.buckets[place + 1 :])
        if place >= len(self.buckets):
            return above
        low, high = _edges(place)
        share = min(1.0, max(0.0, (high - seconds) / (high - low)))
        return above + round(self.buckets[place] * share)


def _edges(place: int) -> tuple[float, float]:
    low = BOUNDS_S[place - 1] if place else 0.0
    return low, BOUNDS_S[place] if place < len(BOUNDS_S) else 2 * low


class MirrorSamples(Record):
    """Copies of stable requests that the canary was given."""

    agreed: Number = 0
    differed: Number = 0
    failed: Number = 0
    """Without an answer to compare."""
    dropped: Number = 0
    """Never run: the canary was busy with users' requests, or with another copy."""

    @property
    def compared(self) -> int:
        return self.agreed + self.differed


class NodeSamples(Record):
    """``P/samples/<model>/<node>``"""

    model: ModelName
    node: NodeId
    version: Version
    """The canary's."""
    since: At | None = None
    """The ``since`` of the canary's step that they belong to, as its record says; ``None``: no
    step was known."""
    stable: RouteSamples = RouteSamples()
    canary: RouteSamples = RouteSamples()
    mirror: MirrorSamples = MirrorSamples()


@dataclass(frozen=True, slots=True)
class Window:
    """One step so far, over all nodes."""

    stable: RouteSamples = field(default_factory=RouteSamples)
    canary: RouteSamples = field(default_factory=RouteSamples)
    mirror: MirrorSamples = field(default_factory=MirrorSamples)


def merged(samples: Iterable[NodeSamples]) -> Window:
    """The sum of samples of one step."""
    every = list(samples)
    mirrors = [one.mirror for one in every]
    return Window(
        stable=add([one.stable for one in every]),
        canary=add([one.canary for one in every]),
        mirror=MirrorSamples(
            agreed=sum(one.agreed for one in mirrors),
            differed=sum(one.differed for one in mirrors),
            failed=sum(one.failed for one in mirrors),
            dropped=sum(one.dropped for one in mirrors),
        ),
    )


def add(routes: Sequence[RouteSamples]) -> RouteSamples:
    """All of them as if one node had counted them."""
    columns = zip_longest(*(one.buckets for one in routes), fillvalue=0)
    return RouteSamples(
        requests=sum(one.requests for one in routes),
        errors=sum(one.errors for one in routes),
        buckets=tuple(map(sum, columns)),
    )
