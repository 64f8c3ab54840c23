"""What one step of a canary is judged by, counted as requests end; and its mirror.

Counted are requests by the route that was *chosen* for them: one that the canary failed and the
live version then answered is the canary's error. Pinned and labelled requests say nothing of a
share of traffic, and refused inputs nothing of a version: neither is counted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from registry.inference import Array, BadInput, Inference, InferenceError, Poisonous
from registry.samples import BOUNDS_S, bucket_of
from router.mirror import Mirror
from router.table import CANARY, STABLE, Choice


@dataclass(slots=True)
class RouteCounts:
    """One route's requests since the step began. All grow only."""

    requests: int = 0
    errors: int = 0
    buckets: list[int] = field(default_factory=lambda: [0] * (len(BOUNDS_S) + 1))
    """As `registry.samples.RouteSamples.buckets`."""


@dataclass(slots=True)
class CanaryWatch:
    """Of one model, for one step. Loop-bound; a new step gets a new one."""

    stable: RouteCounts = field(default_factory=RouteCounts)
    canary: RouteCounts = field(default_factory=RouteCounts)
    mirror: Mirror | None = None

    def answered(
        self, choice: Choice, inference: Inference, feeds: Mapping[str, Array], *, as_chosen: bool
    ) -> None:
        """A request that ``choice`` was made for has its answer.

        as_chosen: whether from there and at once; else it was run elsewhere, or again.
        """
        counts = self._counts(choice)
        if counts is None:
            return
        counts.requests += 1
        if not as_chosen:
            counts.errors += 1
            return
        counts.buckets[bucket_of(inference.queue_s + inference.run_s)] += 1
        if self.mirror is not None and counts is self.stable:
            self.mirror.offer(feeds, inference)

    def refused(self, choice: Choice, error: InferenceError) -> None:
        """It got no answer at all."""
        counts = self._counts(choice)
        if counts is None or isinstance(error, BadInput | Poisonous):
            return
        counts.requests += 1
        counts.errors += 1

    def _counts(self, choice: Choice) -> RouteCounts | None:
        if choice.rule is not None and choice.rule.kind == "label":
            return None
        if choice.kind == CANARY:
            return self.canary
        return self.stable if choice.kind == STABLE else None
