"""One servable of this node: its record, and the workers behind it once it is loaded."""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import dataclass, field
from datetime import datetime

from loader.lifecycle import LOADED, State, transition
from loader.policy import Snapshot
from loader.pool import WorkerPool
from loader.recipe import Recipe
from registry.inference import Signature
from registry.names import Digest, ServableId


@dataclass(slots=True, eq=False)
class Servable:
    """Written by the manager only; everybody else reads."""

    id: ServableId
    recipe: Recipe
    state: State = State.NEW
    reason: str | None = None
    memory_mb: int = 0
    """Reserved for all replicas together."""
    loaded_at: datetime | None = None
    phases_ms: dict[str, float] = field(default_factory=dict[str, float])
    errors: Counter[str] = field(default_factory=Counter[str])
    """Counted faults by code."""
    attempts: int = 0
    signature: Signature | None = None
    pool: WorkerPool | None = None
    """The workers; ``None`` before READY and after the unloading."""
    task: asyncio.Task[None] | None = None
    """What is making it ready, or ending it."""
    drain_by_s: float = 0.0
    owner: str | None = None
    """Under which name it holds memory in the device pool."""
    leased: Digest | None = None
    """Whose files it keeps from eviction."""
    shown_workers: tuple[tuple[int, bool], ...] = ()
    """Pid and life of each worker as the status last told."""

    def move(self, state: State, reason: str | None = None) -> None:
        """Take a legal step. Raises `loader.lifecycle.IllegalTransition`."""
        self.state = transition(self.state, state)
        self.reason = reason

    @property
    def is_loaded(self) -> bool:
        return self.state in LOADED

    def snapshot(self) -> Snapshot:
        in_flight = self.pool.in_flight if self.pool is not None else 0
        return Snapshot(self.id, self.state, in_flight, self.drain_by_s)
