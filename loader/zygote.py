"""The front's side of the zygote: started once, asked for workers ever after."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from loader import wire
from loader.arena import LIMIT_BYTES, Slot
from loader.errors import LoaderError
from loader.orphans import become_subreaper, watch_adopted
from loader.worker import ORPHAN, Worker

SPAWN_TIMEOUT_S = 10.0
START_TIMEOUT_S = 120.0
"""`import paddle` from a cold disk takes up to 20 s."""


class ZygoteFailed(LoaderError):
    """It did not start, or it ended before it answered. Trying again may help."""


@dataclass(slots=True)
class _Process:
    """One run of the zygote; a new one has a new record."""

    popen: subprocess.Popen[bytes]
    sock: socket.socket
    leash_fd: int
    """Its close ends the zygote and all its workers; -1 once closed."""
    ready: asyncio.Future[float]
    spawned: dict[int, asyncio.Future[tuple[int, int]]] = field(
        default_factory=dict[int, "asyncio.Future[tuple[int, int]]"]
    )
    causes: dict[int, asyncio.Future[str]] = field(default_factory=dict[int, "asyncio.Future[str]"])
    """By pid: how each worker ended. A pid is listed from its birth to its report."""

    def report(self, pid: int, cause_of_end: str) -> None:
        """This worker has ended and was reaped."""
        cause = self.causes.pop(pid, None)
        if cause is not None and not cause.done():
            cause.set_result(cause_of_end)

    def let_go(self) -> None:
        """Close the leash when nobody is left on it."""
        if self.sock.fileno() < 0 and not self.causes:
            self.cut()

    def cut(self) -> None:
        if self.leash_fd >= 0:
            os.close(self.leash_fd)
            self.leash_fd = -1


class Zygote:
    """Forks workers that have paddle imported already. One a front; restarted when it dies.

    Its workers serve on without it (`loader.orphans`); a new one is started when the next worker
    is wanted.

    Not to be started from a short-lived thread: the kernel ends it with the thread that did.
    """

    def __init__(
        self,
        python: str = sys.executable,
        *,
        depth: int = 2,
        arena_limit_bytes: int = LIMIT_BYTES,
    ) -> None:
        """depth: slots of each worker; the next request is written while one runs."""
        self._python = python
        self._depth = depth
        self._arena_limit_bytes = arena_limit_bytes
        self._process: _Process | None = None
        self._starting = asyncio.Lock()
        self._last_id = 0
        self._is_closed = False
        self._workers: set[Worker] = set()
        self.import_s = 0.0
        """How long the present zygote took to import paddle."""

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.popen.pid

    async def start(self) -> None:
        """Start it unless it runs; the loop goes on meanwhile. Raises `ZygoteFailed`."""
        async with self._starting:
            if self._is_closed:
                raise ZygoteFailed("closed")
            if self._process is not None:
                return
            process = self._launched()
            try:
                async with asyncio.timeout(START_TIMEOUT_S):
                    self.import_s = await process.ready
            except BaseException as exc:
                self._end(process)
                if isinstance(exc, TimeoutError):
                    raise ZygoteFailed("not ready in time") from exc
                raise

    async def spawn(self) -> Worker:
        """Fork a worker with nothing loaded. Raises `ZygoteFailed`, `ArenaFull`, `OSError`."""
        await self.start()
        process = self._process
        if process is None:
            raise ZygoteFailed("ended while a worker was wanted")
        loop = asyncio.get_running_loop()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        slots: list[Slot] = []
        self._last_id += 1
        request_id = self._last_id
        answer: asyncio.Future[tuple[int, int]] = loop.create_future()
        process.spawned[request_id] = answer
        try:
            ours.setblocking(False)
            for index in range(self._depth):
                slot = Slot.create(f"pw-{index}", limit_bytes=self._arena_limit_bytes)
                slots.append(slot)  # one by one: a failure closes those before it
            fds = [theirs.fileno(), *(fd for slot in slots for fd in slot.fds)]
            message = wire.packed({"op": "spawn", "id": request_id})
            try:
                socket.send_fds(process.sock, [message], fds)
            except OSError as exc:
                raise ZygoteFailed(f"spawn: {exc}") from exc
            async with asyncio.timeout(SPAWN_TIMEOUT_S):
                pid, pidfd = await answer
        except BaseException as exc:
            # A worker that is forked all the same finds its socket ended and leaves.
            process.spawned.pop(request_id, None)
            if answer.done() and not answer.cancelled() and answer.exception() is None:
                os.close(answer.result()[1])
            ours.close()
            for slot in slots:
                slot.close()
            if isinstance(exc, TimeoutError):
                self._end(process)  # stopped or stuck: only another one helps
                raise ZygoteFailed("no worker in time") from exc
            raise
        finally:
            theirs.close()
        worker = Worker(pid, pidfd, ours, slots, process.causes[pid])
        self._workers.add(worker)
        worker.died.add_done_callback(lambda _: self._workers.discard(worker))
        return worker

    async def close(self) -> None:
        """End it and every worker. Nothing is left behind, nothing can be started again."""
        self._is_closed = True
        async with self._starting:
            workers = list(self._workers)
            for worker in workers:
                worker.kill()
            await asyncio.gather(*(worker.close(timeout_s=1.0) for worker in workers))
            if self._process is not None:
                self._end(self._process)

    # --- the process ----------------------------------------------------------------------------

    def _launched(self) -> _Process:
        loop = asyncio.get_running_loop()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        become_subreaper()
        held_fd, leash_fd = os.pipe()
        fds = (theirs.fileno(), held_fd)
        numbers = [str(number) for number in (*fds, os.getpid())]
        try:
            popen = subprocess.Popen(
                [self._python, "-P", "-m", "loader.zygote_main", *numbers],
                stdin=subprocess.DEVNULL,
                pass_fds=fds,
                env=_environment(),
                start_new_session=True,  # Ctrl-C is for the front, which drains first
            )
        except OSError as exc:
            ours.close()
            os.close(leash_fd)
            raise ZygoteFailed(f"{self._python}: {exc}") from exc
        finally:
            theirs.close()
            os.close(held_fd)
        process = _Process(popen, ours, leash_fd, loop.create_future())
        self._process = process
        loop.add_reader(ours.fileno(), self._readable, process)
        return process

    def _readable(self, process: _Process) -> None:
        try:
            data, fds, _, _ = socket.recv_fds(process.sock, wire.MESSAGE_MAX_BYTES, 4)
        except BlockingIOError:
            return
        except OSError:
            data, fds = b"", []
        if not data:
            self._end(process)
            return
        message = wire.unpacked(data)
        match message["op"]:
            case "ready":
                process.ready.set_result(message["import_s"])
            case "spawned":
                loop = asyncio.get_running_loop()
                process.causes[message["pid"]] = loop.create_future()
                answer = process.spawned.pop(message["id"], None)
                if answer is not None and not answer.done():
                    answer.set_result((message["pid"], fds.pop()))
            case "refused":
                answer = process.spawned.pop(message["id"], None)
                if answer is not None and not answer.done():
                    answer.set_exception(ZygoteFailed(message["message"]))
            case "exited":
                process.report(message["pid"], _code(message["status"]))
            case op:
                raise wire.Nonsense(f"from the zygote: {op!r}")
        for fd in fds:
            os.close(fd)

    def _end(self, process: _Process) -> None:
        """Forget this process. Its workers go on, as children of ours."""
        if self._process is process:
            self._process = None
        if process.sock.fileno() < 0:
            return
        asyncio.get_running_loop().remove_reader(process.sock.fileno())
        process.sock.close()
        process.popen.kill()
        process.popen.wait()  # killed and single-threaded: at once; now its children are ours
        failed = ZygoteFailed("the zygote ended")
        unanswered: list[asyncio.Future[Any]] = [process.ready, *process.spawned.values()]
        for answer in unanswered:
            if not answer.done():
                answer.set_exception(failed)
                answer.exception()  # seen: nobody may be waiting
        if self._is_closed:
            process.cut()
        for pid in list(process.causes):
            watch_adopted(pid, partial(self._adopted_ended, process, pid))
        process.let_go()

    def _adopted_ended(self, process: _Process, pid: int, status: int | None) -> None:
        process.report(pid, ORPHAN if status is None else _code(status))
        process.let_go()


def _code(status: int) -> str:
    """``SIGSEGV`` or ``EXIT:1`` from what `os.waitstatus_to_exitcode` gives."""
    if status >= 0:
        return f"EXIT:{status}"
    with contextlib.suppress(ValueError):
        return signal.Signals(-status).name
    return f"SIG{-status}"


def _environment() -> dict[str, str]:
    """Ours, plus where this package lies when it is run from a checkout."""
    environment = dict(os.environ)
    root = Path(__file__).resolve().parent.parent
    if root.name not in ("site-packages", "dist-packages"):
        known = environment.get("PYTHONPATH")
        environment["PYTHONPATH"] = f"{root}{os.pathsep}{known}" if known else str(root)
    return environment
