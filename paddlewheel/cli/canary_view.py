"""A canary's progress in words, for `status` and `rollouts` (pure)."""

from __future__ import annotations

from dataclasses import dataclass

from registry.canary import plan_id
from registry.rollouts import RolloutRecord
from registry.spec import ModelDocument


@dataclass(frozen=True, slots=True)
class CanaryView:
    """How far the canary of a document is."""

    version: str
    step: str | None
    """``2/3``; ``None`` for one that is only mirrored to, or has not begun."""
    percent: float
    verdict: str
    """``pass``, ``inconclusive``, ``failed``, ``passed`` (all of it), or ``not begun``."""
    detail: str | None

    @property
    def style(self) -> str:
        return {"failed": "red", "pass": "green", "passed": "green"}.get(self.verdict, "yellow")

    @property
    def line(self) -> str:
        """One line of prose."""
        where = f" at {self.percent:g} %, step {self.step}" if self.step is not None else ""
        why = f": {self.detail}" if self.detail else ""
        return f"canary {self.version}{where}: {self.verdict}{why}"


def canary_view(document: ModelDocument | None, record: RolloutRecord | None) -> CanaryView | None:
    """``None`` for a document whose canary neither grows by steps nor is judged."""
    if document is None:
        return None
    canary = document.spec.canary
    if canary is None or not (canary.steps or canary.gates.agreement is not None):
        return None
    progress = None if record is None else record.canary
    if progress is None or progress.plan != plan_id(document.spec):
        return CanaryView(canary.version, None, 0.0, "not begun", None)
    ends = {"failed": "failed", "done": "passed"}
    return CanaryView(
        version=canary.version,
        step=f"{progress.step + 1}/{len(canary.steps)}" if canary.steps else None,
        percent=progress.percent,
        verdict=ends.get(progress.phase) or progress.verdict or "inconclusive",
        detail=progress.detail,
    )
