"""A copy of stable traffic for the canary: run after the answer, compared, dropped.

Nobody waits for it. A copy is made only while the canary has nothing else to do, one at a time, so
users of the canary wait for one copy's run at most, and memory holds one copy's tensors.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import structlog

from registry.inference import (
    Array,
    Inference,
    InferenceError,
    Overloaded,
    Poisonous,
    Predictor,
    ServableFailed,
    Signature,
)
from registry.spec_canary import Mirror as MirrorSpec
from router.agreement import agree

log = structlog.get_logger(__name__)

BESIDE_BYTES = 1 << 18
"""Answers larger than this are compared in a thread: it would hold up requests."""


@dataclass(slots=True)
class MirrorCounts:
    """How copies ended. All grow only."""

    agreed: int = 0
    differed: int = 0
    failed: int = 0
    """Without an answer to compare: the canary failed, took too long, or takes other inputs."""
    dropped: int = 0
    """Never run: the canary was busy with users' requests, or with another copy."""


class Mirror:
    """Copies for one canary. Loop-bound."""

    def __init__(
        self,
        canary: Predictor,
        stable: Signature,
        spec: MirrorSpec,
        *,
        timeout_s: float,
        counts: tuple[MirrorCounts, ...],
        chance: Callable[[], float] = random.random,
    ) -> None:
        """stable: the signature of the version whose answers are compared with.
        counts: every one of them is counted in: a step's, and the process's.
        chance: drawn for each request, uniform in [0, 1).
        """
        self._canary = canary
        self._stable = stable
        self._spec = spec
        self._share = spec.percent / 100
        self._timeout_s = timeout_s
        self._counts = counts
        self._chance = chance
        self._running: asyncio.Task[None] | None = None

    def offer(self, feeds: Mapping[str, Array], answer: Inference) -> None:
        """A stable request was answered: perhaps run it on the canary too. Returns at once.

        The arrays must not be changed any more.
        """
        if self._chance() >= self._share:
            return
        if self._running is not None or self._canary.in_flight or not self._canary.is_manned:
            self._count("dropped")
            return
        self._running = asyncio.get_running_loop().create_task(self._run(feeds, answer))
        self._running.add_done_callback(self._ended)

    def close(self) -> None:
        """Stop what is under way."""
        if self._running is not None:
            self._running.cancel()

    async def _run(self, feeds: Mapping[str, Array], answer: Inference) -> None:
        deadline_s = asyncio.get_running_loop().time() + self._timeout_s
        try:
            copy = await self._canary.infer(feeds, deadline_s=deadline_s)
        except ServableFailed as failure:
            if failure.was_run:
                # As after any rerun: the stable version has answered this very request.
                self._canary.answered_after(failure, by_other=True)
            self._count("failed" if failure.was_run else "dropped")
            return
        except (Overloaded, Poisonous):
            self._count("dropped")
            return
        except InferenceError:
            self._count("failed")
            return
        size = sum(array.nbytes for array in copy.outputs.values())
        if size > BESIDE_BYTES:
            is_same = await asyncio.to_thread(self._agree, answer, copy)
        else:
            is_same = self._agree(answer, copy)
        self._count("agreed" if is_same else "differed")

    def _agree(self, answer: Inference, copy: Inference) -> bool:
        return agree(answer.outputs, copy.outputs, self._spec.compare, self._stable)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._running = None
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("mirror_crashed", servable=str(self._canary.id), error=repr(error))
            self._count("failed")

    def _count(self, how: str) -> None:
        for counts in self._counts:
            setattr(counts, how, getattr(counts, how) + 1)
