"""Making one servable ready: check, load, warm up, in worker processes of its own."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

from loader.compatibility import breach
from loader.courtesy import Courtesy
from loader.errors import LoadTimedOut, NotAdmitted
from loader.recipe import Recipe
from loader.worker import Worker
from registry.inference import Signature

Spawn = Callable[[], Awaitable[Worker]]
"""Forks a fresh worker with nothing loaded."""


@dataclass(frozen=True, slots=True)
class Predecessor:
    """The version that would be replaced, for the compatibility check."""

    version: str
    signature: Signature


@dataclass(frozen=True, slots=True)
class Ready:
    """A servable's workers, loaded and warm."""

    workers: tuple[Worker, ...]
    signature: Signature


@dataclass(slots=True)
class Loading:
    """The steps from bytes on disk to warm workers, in the order of SPEC section 4.

    Nothing outside is touched before the end: a failure at any step ends the workers made so far
    and raises `NotAdmitted`, `LoadFailed`, `LoadTimedOut` or `WorkerDied`.
    """

    recipe: Recipe
    folder: Path
    golden: Path | None
    predecessor: Predecessor | None
    compatibility: str
    spawn: Spawn
    reserve: Callable[[], None]
    """Books the memory, or raises `NotAdmitted` with the numbers."""
    restore: Callable[[], Awaitable[None]]
    """Sees to it that the files which were checked are still there, before a replacement."""
    on_phase: Callable[[str, float], None]
    """Told the name and length (s) of each phase as it ends: check, load, warm."""
    courtesy: Courtesy
    timeout_s: float
    """For all of `run`, and for each `replacement`."""

    async def run(self) -> Ready:
        """Make all replicas ready. The clock starts with the first worker's life, not before."""
        workers: list[Worker] = []
        try:
            first = await self.spawn()
            workers.append(first)
            async with asyncio.timeout(self.timeout_s):
                with self.courtesy.of(first):
                    signature = await self._make_first(first)
                started_s = time.perf_counter()
                for _ in range(1, self.recipe.replicas):
                    worker = await self.spawn()
                    workers.append(worker)
                    await self._make_serving(worker)
                if len(workers) > 1:
                    self.on_phase("replicas", time.perf_counter() - started_s)
                return Ready(tuple(workers), signature)
        except TimeoutError:
            await end(workers)
            raise LoadTimedOut(
                f"not ready within the load deadline of {self.timeout_s:g} s"
            ) from None
        except BaseException:
            await end(workers)
            raise

    async def replacement(self) -> Worker:
        """One more worker of the same servable; its files were checked before."""
        await self.restore()
        worker = await self.spawn()
        try:
            async with asyncio.timeout(self.timeout_s):
                await self._make_serving(worker)
        except BaseException:
            await end([worker])
            raise
        return worker

    async def _make_first(self, worker: Worker) -> Signature:
        """With all checks; the others are made of the same files."""
        started_s = time.perf_counter()
        checked = await worker.check(self.folder, self.recipe)
        if checked is not None:
            self._check_signature(checked)
        self.reserve()
        self.on_phase("check", time.perf_counter() - started_s)
        started_s = time.perf_counter()
        loaded = await worker.load(self.folder, self.recipe)
        self._check_signature(loaded.signature)
        self.on_phase("load", time.perf_counter() - started_s)
        started_s = time.perf_counter()
        await worker.warm(self.recipe, self.golden)
        await worker.serve()
        self.on_phase("warm", time.perf_counter() - started_s)
        return loaded.signature

    async def _make_serving(self, worker: Worker) -> None:
        with self.courtesy.of(worker):
            await worker.load(self.folder, self.recipe)
            await worker.warm(self.recipe, None)
            await worker.serve()

    def _check_signature(self, signature: Signature) -> None:
        if self.predecessor is None:
            return
        reason = breach(self.predecessor.signature, signature, self.compatibility)
        if reason is not None:
            raise NotAdmitted(
                "signature",
                f"not {self.compatibility}ly compatible with {self.predecessor.version}: {reason}",
            )


async def end(workers: list[Worker]) -> None:
    """Kill what was started; a worker that is not ready has nobody waiting on it."""
    for worker in workers:  # all of them before the first wait, which may be cancelled
        worker.kill()
    for worker in workers:
        with contextlib.suppress(Exception):
            await worker.close(timeout_s=2.0)
