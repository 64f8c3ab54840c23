"""What this node counts of watched canaries, and how the coordinator gets to know it.

A window belongs to one step of one canary: another step, or other servables, begin a new one. It is
written under the node's lease while it lasts, so a node that dies takes its counts along.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import datetime

from loader.model import ModelView
from registry.canary import CanaryStand
from registry.inference import Predictor
from registry.keys import Keys
from registry.names import ModelName, NodeId, ServableId, Version
from registry.samples import MirrorSamples, NodeSamples, RouteSamples
from registry.session import Session
from registry.spec import ModelSpec
from registry.spec_canary import Mirror as MirrorSpec
from router.canary_watch import CanaryWatch, RouteCounts
from router.metrics import Reading
from router.mirror import Mirror, MirrorCounts

WRITE_EVERY_S = 1.0
_TOTALS_KEPT = 64
"""Canaries whose mirror's counters `/metrics` still shows."""


@dataclass(frozen=True, slots=True)
class _Subject:
    """What a window is about: the same as long as this is equal."""

    stable: ServableId
    canary: ServableId
    since: datetime | None
    mirror: MirrorSpec | None


@dataclass(frozen=True, slots=True)
class _Window:
    subject: _Subject
    watch: CanaryWatch
    mirrored: MirrorCounts
    percent: float


class Windows:
    """The windows of this node, one for each model whose canary is watched. Loop-bound."""

    def __init__(self) -> None:
        self._windows: dict[ModelName, _Window] = {}
        self._totals: OrderedDict[tuple[ModelName, Version], MirrorCounts] = OrderedDict()

    def watch(self, view: ModelView, spec: ModelSpec, stand: CanaryStand) -> CanaryWatch | None:
        """What requests of the model are counted by from now on; ``None``: by nothing.

        spec: of the document in force. The watch is the one before as long as nothing that it
        compares has changed.
        """
        subject = _subject(view, spec, stand)
        before = self._windows.get(view.name)
        if before is not None and before.subject == subject and before.percent == stand.percent:
            return before.watch
        if subject is None:
            self.drop(view.name)
            return None
        predictors = view.predictors()
        stable, canary = predictors[subject.stable], predictors[subject.canary]
        self.drop(view.name)
        mirrored = MirrorCounts()
        mirror = None
        if subject.mirror is not None and subject.mirror.percent > 0:
            counts = (mirrored, self._total(view.name, subject.canary.version))
            mirror = _mirror(stable, canary, subject.mirror, spec.limits.timeout_s, counts)
        watch = CanaryWatch(mirror=mirror)
        self._windows[view.name] = _Window(subject, watch, mirrored, stand.percent)
        return watch

    def drop(self, model: ModelName) -> None:
        """Count no more for ``model``."""
        window = self._windows.pop(model, None)
        if window is not None and window.watch.mirror is not None:
            window.watch.mirror.close()

    def samples(self, node: NodeId) -> Iterator[NodeSamples]:
        """What has been counted, by model."""
        for model, window in self._windows.items():
            yield NodeSamples(
                model=model,
                node=node,
                version=window.subject.canary.version,
                since=window.subject.since,
                stable=_route(window.watch.stable),
                canary=_route(window.watch.canary),
                mirror=MirrorSamples(**asdict(window.mirrored)),
            )

    def readings(self) -> Iterator[Reading]:
        """For `/metrics`."""
        if self._windows:
            yield Reading(
                "canary_percent", "Share of traffic that the canary's step gives it.",
                tuple(
                    ({"model": model, "version": window.subject.canary.version}, window.percent)
                    for model, window in self._windows.items()
                ),
            )  # fmt: skip
        helps = {
            "agreed": "Mirrored requests that the canary answered like the stable version.",
            "differed": "Mirrored requests that the canary answered otherwise.",
            "failed": "Mirrored requests that the canary gave no answer to compare.",
            "dropped": "Requests not mirrored because the canary was busy.",
        }
        rows = [({"model": m, "version": v}, counts) for (m, v), counts in self._totals.items()]
        if not rows:
            return
        for how, help_ in helps.items():
            yield Reading(
                f"mirror_{how}", help_,
                tuple((labels, float(getattr(counts, how))) for labels, counts in rows),
                is_counter=True,
            )  # fmt: skip
        yield Reading(
            "mirror_compared", "Mirrored requests with two answers to compare.",
            tuple((labels, float(counts.agreed + counts.differed)) for labels, counts in rows),
            is_counter=True,
        )  # fmt: skip

    def _total(self, model: ModelName, version: Version) -> MirrorCounts:
        """The process's counters, which outlive a window: a counter may not go back."""
        counts = self._totals.setdefault((model, version), MirrorCounts())
        self._totals.move_to_end((model, version))
        if len(self._totals) > _TOTALS_KEPT:
            self._totals.popitem(last=False)
        return counts


def _subject(view: ModelView, spec: ModelSpec, stand: CanaryStand) -> _Subject | None:
    canary, in_force = spec.canary, view.in_force
    if canary is None or not canary.is_watched or stand.is_failed:
        return None
    if in_force.live is None or in_force.canary is None or in_force.live == in_force.canary:
        return None
    predictors = view.predictors()
    if not {in_force.live, in_force.canary} <= predictors.keys():
        return None
    return _Subject(in_force.live, in_force.canary, stand.since, canary.mirror)


def _mirror(
    stable: Predictor,
    canary: Predictor,
    spec: MirrorSpec,
    timeout_s: float,
    counts: tuple[MirrorCounts, ...],
) -> Mirror:
    return Mirror(canary, stable.signature, spec, timeout_s=timeout_s, counts=counts)


def _route(counts: RouteCounts) -> RouteSamples:
    last = max((place for place, count in enumerate(counts.buckets) if count), default=-1)
    return RouteSamples(
        requests=counts.requests,
        errors=counts.errors,
        buckets=tuple(counts.buckets[: last + 1]),
    )


class SampleWriter:
    """Writes this node's counts where the coordinator looks, on change only."""

    def __init__(self, windows: Windows, session: Session, keys: Keys, node: NodeId) -> None:
        self._windows = windows
        self._session = session
        self._keys = keys
        self._node = node
        self._written: set[str] = set()

    async def run(self) -> None:
        """Write until cancelled."""
        while True:
            self.write()
            await asyncio.sleep(WRITE_EVERY_S)

    def write(self) -> None:
        """Say what is counted now; the session compares and writes."""
        now: set[str] = set()
        for samples in self._windows.samples(self._node):
            key = self._keys.samples(samples.model, self._node)
            now.add(key)
            self._session.set(key, samples.to_json())
        for key in self._written - now:
            self._session.remove(key)
        self._written = now
