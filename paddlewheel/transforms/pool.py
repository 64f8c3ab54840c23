"""The node's transform processes: calls wait in line, and what hangs is ended at its deadline.

Processes, not threads: a Python loop in a thread stops the front's event loop for milliseconds at
a time, a thread that hangs can't be ended, and a library that crashes would take the node along.
None is started before a pipeline asks for one.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Coroutine, Mapping
from importlib.metadata import entry_points
from typing import Any, TypeVar

import structlog

from paddlewheel.transforms.process import ProcessDied, TransformProcess
from paddlewheel.transforms.wire import BadFrame, signature_of
from registry.inference import Array, BadInput, DeadlineExceeded, Overloaded, Signature
from registry.transforms import GROUP, misfit
from router.pipeline.errors import TransformFailed

log = structlog.get_logger(__name__)

T = TypeVar("T")

QUEUE_MAX = 256
START_RETRY_S = 5.0
"""How long calls are refused after a process could not be started."""


def default_count() -> int:
    """As many as there are processors to run them, four at most."""
    return max(1, min(4, len(os.sched_getaffinity(0))))


def installed() -> tuple[str, ...]:
    """Names of the installed transforms, whether or not they can be imported."""
    return tuple(sorted({entry.name for entry in entry_points(group=GROUP)}))


class TransformPool:
    """Keeps the protocol `router.pipeline.ports.Transforms`. All of it on one event loop."""

    def __init__(self, count: int | None = None) -> None:
        self._count = count or default_count()
        self._idle: list[TransformProcess] = []
        self._all: set[TransformProcess] = set()
        self._free = asyncio.Semaphore(self._count)
        self._waiting = 0
        self._tasks: set[asyncio.Task[Any]] = set()
        self._preparing = asyncio.Lock()
        self._retry_at_s = 0.0
        self._last_error = ""
        self._closed = False
        self.signatures: Mapping[str, Signature] = {}
        self.problems: Mapping[str, str] = {}
        """Why an installed transform can't be used."""

    async def prepare(self) -> None:
        """Import what is installed, in the processes that will run it. Idempotent.

        Raises `TransformFailed` when no process could be started.
        """
        async with self._preparing:
            if self.signatures or self.problems or not installed():
                return
            try:
                first = await self._start()
            except ProcessDied as exc:
                raise TransformFailed(f"the installed transforms can't be loaded: {exc}") from exc
            self._learn(first)
            self._idle.append(first)
            for _ in range(self._count - 1):
                self._go(self._add_one())

    def missing(self, name: str) -> str | None:
        """Why ``name`` can't be a step here; ``None``: it can. After `prepare`."""
        if name in self.signatures:
            return None
        if name in self.problems:
            return self.problems[name]
        there = ", ".join(sorted(self.signatures)) or "none"
        return f"no transform {name!r} is installed on this node; installed: {there}"

    async def run(
        self, name: str, feeds: Mapping[str, Array], *, deadline_s: float
    ) -> Mapping[str, Array]:
        """See `router.pipeline.ports.Transforms.run`."""
        signature = self.signatures[name]
        for spec in signature.inputs:
            if (why := misfit(feeds[spec.name], spec)) is not None:
                raise BadInput(f"input {why}")
        if self._waiting >= QUEUE_MAX:
            raise Overloaded(f"{QUEUE_MAX} calls of transforms are waiting")
        self._waiting += 1
        try:
            async with asyncio.timeout_at(deadline_s):
                await self._free.acquire()
        except TimeoutError as exc:
            raise DeadlineExceeded("no transform process was free in time") from exc
        finally:
            self._waiting -= 1
        # From here on it goes to its end, heard or not: a process half way through is no use.
        call = self._go(self._call(name, feeds, signature, deadline_s))
        return await asyncio.shield(call)

    async def _call(
        self, name: str, feeds: Mapping[str, Array], signature: Signature, deadline_s: float
    ) -> Mapping[str, Array]:
        try:
            try:
                return await self._once(name, feeds, signature, deadline_s)
            except ProcessDied as exc:
                log.warning("transform_process_died", transform=name, reason=str(exc))
            try:
                return await self._once(name, feeds, signature, deadline_s)
            except ProcessDied as exc:
                raise TransformFailed(f"{exc}, twice") from exc
        finally:
            self._free.release()

    async def _once(
        self, name: str, feeds: Mapping[str, Array], signature: Signature, deadline_s: float
    ) -> Mapping[str, Array]:
        """One try on one process. Raises `ProcessDied`."""
        process = self._idle.pop() if self._idle else await self._started(deadline_s)
        try:
            async with asyncio.timeout_at(deadline_s):
                head, outputs = await process.call(name, feeds, signature.inputs)
        except TimeoutError as exc:
            log.warning("transform_hung", transform=name, pid=process.pid)
            self._replace(process)
            raise DeadlineExceeded("it did not end in time; its process was ended") from exc
        except BaseException:
            self._replace(process)
            raise
        self._rest(process)
        if "request" in head:
            raise BadInput(str(head["request"]))
        if "failed" in head:
            raise TransformFailed(str(head["failed"]))
        for spec in signature.outputs:
            if (why := misfit(outputs.get(spec.name), spec)) is not None:
                raise TransformFailed(f"answered what it does not declare: {why}")
        return outputs

    # --- processes ------------------------------------------------------------------------------

    async def _started(self, deadline_s: float) -> TransformProcess:
        """A new process. The call's deadline does not end its start: it serves the next one."""
        loop = asyncio.get_running_loop()
        if loop.time() < self._retry_at_s:
            raise Overloaded(
                f"transforms can't be run now: {self._last_error}",
                retry_after_s=self._retry_at_s - loop.time(),
            )
        starting = self._go(self._start())
        try:
            async with asyncio.timeout_at(deadline_s):
                return await asyncio.shield(starting)
        except TimeoutError as exc:
            starting.add_done_callback(self._keep)
            raise DeadlineExceeded("its process was not ready in time") from exc

    def _keep(self, starting: asyncio.Task[TransformProcess]) -> None:
        if not starting.cancelled() and starting.exception() is None:
            self._rest(starting.result())

    async def _start(self) -> TransformProcess:
        """Raises `ProcessDied`."""
        try:
            process = await TransformProcess.start()
        except ProcessDied as exc:
            self._last_error = str(exc)
            self._retry_at_s = asyncio.get_running_loop().time() + START_RETRY_S
            log.error("transform_process_not_started", reason=str(exc))
            raise
        self._all.add(process)
        if self._closed:
            await self._end(process)
        return process

    async def _add_one(self) -> None:
        """One more process, where there is room for it."""
        if self._closed or len(self._all) >= self._count:
            return
        try:
            self._rest(await self._start())
        except ProcessDied:
            return  # logged; the next call tries again

    def _rest(self, process: TransformProcess) -> None:
        """Keep it for the next call, unless another one has taken its place meanwhile."""
        if len(self._all) > self._count:
            self._go(self._end(process))
        else:
            self._idle.append(process)

    def _replace(self, process: TransformProcess) -> None:
        self._all.discard(process)
        self._go(self._end(process))
        self._go(self._add_one())

    async def _end(self, process: TransformProcess) -> None:
        self._all.discard(process)
        await process.kill()

    def _learn(self, process: TransformProcess) -> None:
        signatures: dict[str, Signature] = {}
        problems: dict[str, str] = dict(process.described.get("problems", {}))
        for name, document in process.described.get("transforms", {}).items():
            try:
                signatures[name] = signature_of(document)
            except BadFrame as exc:
                problems[name] = str(exc)
        self.signatures, self.problems = signatures, problems
        for name, why in problems.items():
            log.warning("transform_not_usable", transform=name, reason=why)
        log.info("transforms_loaded", transforms=sorted(signatures), processes=self._count)

    def _go(self, work: Coroutine[None, None, T]) -> asyncio.Task[T]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # of a call that nobody hears any more

    async def close(self) -> None:
        """End every process."""
        self._closed = True
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.gather(*(self._end(process) for process in list(self._all)))
