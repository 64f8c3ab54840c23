"""Bugs to plant: each breaks one promise, and the simulation is worth something if it says so."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import paddlewheel.rollout.plan
from loader.model import Model
from paddlewheel.rollout.reading import Answer
from registry.memory_store import MemoryStore
from registry.session import Session
from registry.store import Compare, Op, PutOp, TxnResult
from tests.sim.network import Link
from tests.sim.promises import COORDINATOR, ROLLOUTS

Mutation = Callable[[], AbstractContextManager[None]]


@contextmanager
def _instead(owner: Any, name: str, make: Callable[[Any], Any]) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, make(before))
    try:
        yield
    finally:
        setattr(owner, name, before)


def skipped_revision() -> AbstractContextManager[None]:
    """A watch that was broken resumes one event too late."""

    def make(since: Any) -> Any:
        def mutated(self: MemoryStore, prefix: str, seen: Any) -> Any:
            batches = since(self, prefix, seen)
            return batches[1:] if len(batches) > 1 else batches

        return mutated

    return _instead(MemoryStore, "_since", make)


def lost_rollback() -> AbstractContextManager[None]:
    """What the fleet took out is remembered only by the node that saw it fail."""

    def make(quarantine_of: Any) -> Any:
        def mutated(self: Model, id: Any) -> Any:
            found = quarantine_of(self, id)
            return found if id.version in self.own_quarantines else None

        return mutated

    return _instead(Model, "quarantine_of", make)


def double_coordinator() -> AbstractContextManager[None]:
    """Records are written without a look at who the coordinator is by now."""

    def make(txn: Any) -> Any:
        async def mutated(
            self: Link, compares: Sequence[Compare], success: Sequence[Op] = (), failure: Any = ()
        ) -> TxnResult:
            if any(isinstance(op, PutOp) and op.key.startswith(ROLLOUTS) for op in success):
                compares = [each for each in compares if each.key != COORDINATOR]
            result: TxnResult = await txn(self, compares, success, failure)
            return result

        return mutated

    return _instead(Link, "txn", make)


def early_commit() -> AbstractContextManager[None]:
    """Nodes that have not answered yet count as ready."""

    def make(answer: Any) -> Any:
        def mutated(world: Any, node: Any) -> Answer:
            found: Answer = answer(world, node)
            is_open = found in (Answer.SILENT, Answer.LOADING)
            return Answer.PREPARED if is_open else found

        return mutated

    return _instead(paddlewheel.rollout.plan, "answer", make)


def unnoticed_loss() -> AbstractContextManager[None]:
    """A lease that has ended is held on to."""

    def make(_lose: Any) -> Any:
        def mutated(self: Session, _why: str) -> None:
            self._expires_s = self._clock_s() + self._ttl_s

        return mutated

    return _instead(Session, "_lose", make)


MUTATIONS: dict[str, tuple[Mutation, str]] = {
    "skipped-revision": (skipped_revision, "each revision once"),
    "lost-rollback": (lost_rollback, "no rollback lost"),
    "double-coordinator": (double_coordinator, "one coordinator"),
    "early-commit": (early_commit, "not before all are ready"),
    "unnoticed-loss": (unnoticed_loss, "convergence"),
}
"""By name: the bug, and the promise that it breaks."""
