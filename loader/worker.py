"""The front's side of a worker process. Everything here runs on the event loop; no threads."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from loader import wire
from loader.arena import ArenaFull, OutOfBounds, Slot
from loader.drills import Order
from loader.errors import LoadFailed, NotAdmitted, PredictorFault, WorkerDied
from loader.fault_tables import FaultClass
from loader.recipe import Recipe
from loader.wire import Body, Failure, Loaded, Nonsense, Warmed
from registry.errors import Bug
from registry.inference import Array, BadInput, Inference, Signature

_T = TypeVar("_T")

ORPHAN = "ORPHAN"
"""Ended because the zygote did: no fault of the version's."""

_CAUSE_WAIT_S = 2.0
"""How long after the end of its socket a process may take to be reaped (a core dump is over)."""

_FAULT_CLASSES = frozenset(FaultClass)

Outcome = Inference | Exception
OnDone = Callable[[Outcome], None]


@dataclass(slots=True)
class _Run:
    slot: Slot
    slot_index: int
    on_done: OnDone
    hang_s: float
    started_s: float
    """Loop time at which the worker was free to begin with it; 0 while another one runs."""


class Worker:
    """One process, from fork to end: check, load, warm, serve, then runs.

    Runs are answered in the order of their submission; up to `depth` may be under way, of which
    the first is running and the others wait in the worker's socket.
    """

    def __init__(
        self,
        pid: int,
        pidfd: int,
        sock: socket.socket,
        slots: Sequence[Slot],
        cause: asyncio.Future[str],
    ) -> None:
        """Made by `loader.zygote.Zygote.spawn` only. ``cause``: the zygote's report, once."""
        self.pid = pid
        self._pidfd = pidfd
        self._sock = sock
        self._slots = tuple(slots)
        self._cause = cause
        self._loop = asyncio.get_running_loop()
        self.died: asyncio.Future[str] = self._loop.create_future()
        """Resolved once, when the process has ended: ``SIGSEGV``, ``EXIT:1``, ``HANG`` ..."""
        self._free = list(range(len(self._slots)))
        self._runs: deque[tuple[int, _Run]] = deque()
        self._call: tuple[int, asyncio.Future[Body]] | None = None
        self._last_id = 0
        self._outbox: list[bytes] = []
        """Runs submitted in this turn of the loop. They leave together, at its end: waking the
        worker costs more than a small run does."""
        self._blame: str | None = None
        self._is_open = True
        self._is_closing = False
        self._ending: asyncio.Task[None] | None = None
        self._watchdog: asyncio.TimerHandle | None = None
        self._loop.add_reader(sock.fileno(), self._readable)

    @property
    def depth(self) -> int:
        return len(self._slots)

    @property
    def in_flight(self) -> int:
        """Runs that the worker has not answered, whether anybody still waits for them or not."""
        return len(self._runs)

    @property
    def is_alive(self) -> bool:
        """Whether it takes requests: neither ended nor about to be."""
        return self._is_open and self._blame is None and not self._is_closing

    # --- phases ---------------------------------------------------------------------------------

    async def check(
        self, folder: Path, recipe: Recipe, *, deadline_s: float | None = None
    ) -> Signature | None:
        """Digest, params and finite checks (SPEC section 4), inside the worker.

        deadline_s: the loop's time; a worker that has not answered by then is killed. A phase that
        is cancelled kills the worker too: it could not be stopped otherwise.
        Raises `NotAdmitted`, `LoadFailed`, `WorkerDied`.
        """
        body = {"op": "check", "folder": str(folder), "recipe": wire.recipe_json(recipe)}
        return await self._ask(body, deadline_s, wire.parse_checked)

    async def load(
        self, folder: Path, recipe: Recipe, *, deadline_s: float | None = None
    ) -> Loaded:
        """Make the predictor, on the device that the recipe names. As `check` otherwise."""
        body = {"op": "load", "folder": str(folder), "recipe": wire.recipe_json(recipe)}
        return await self._ask(body, deadline_s, wire.parse_loaded)

    async def warm(
        self, recipe: Recipe, golden: Path | None, *, deadline_s: float | None = None
    ) -> Warmed:
        """Run each warm-up shape, then the golden inputs. As `check` otherwise."""
        body = {
            "op": "warm",
            "recipe": wire.recipe_json(recipe),
            "golden": None if golden is None else str(golden),
        }
        return await self._ask(body, deadline_s, wire.parse_warmed)

    async def serve(self, *, deadline_s: float | None = None) -> None:
        """From loading to serving priority; from here on only runs. As `check` otherwise."""
        await self._ask({"op": "serve"}, deadline_s, dict)

    async def _ask(
        self, body: Mapping[str, Any], deadline_s: float | None, parse: Callable[[Body], _T]
    ) -> _T:
        if not self._is_open:
            raise WorkerDied(await self.died)
        if self._call is not None or self._runs:
            raise Bug("one phase at a time")
        self._last_id += 1
        answer: asyncio.Future[Body] = self._loop.create_future()
        self._call = (self._last_id, answer)
        self._send({"id": self._last_id, **body})
        try:
            async with asyncio.timeout_at(deadline_s):
                return parse(await answer)
        except Nonsense as exc:
            self.kill()
            raise LoadFailed(f"{body['op']}: {exc}") from exc
        except TimeoutError:
            self._fail("HANG")
            raise LoadFailed(f"{body['op']}: no answer within its deadline") from None
        except asyncio.CancelledError:
            self.kill()
            raise

    # --- runs -----------------------------------------------------------------------------------

    async def run(self, feeds: Mapping[str, Array], *, timeout_s: float) -> Inference:
        """Run one request and wait for it; see `submit`.

        Cancelling stops the wait, not the run. Raises `BadInput`, `PredictorFault`, `WorkerDied`.
        """
        answer: asyncio.Future[Inference] = self._loop.create_future()

        def on_done(outcome: Outcome) -> None:
            if answer.done():
                return
            if isinstance(outcome, Exception):
                answer.set_exception(outcome)
            else:
                answer.set_result(outcome)

        self.submit(feeds, on_done, hang_s=timeout_s)
        return await answer

    def submit(
        self,
        feeds: Mapping[str, Array],
        on_done: OnDone,
        *,
        hang_s: float,
        drill: Order | None = None,
    ) -> None:
        """Send one request; a slot must be free (``in_flight < depth``).

        on_done: called once, from the loop, with an `Inference` whose arrays are the caller's own,
            or with `BadInput`, `PredictorFault`, `WorkerDied`.
        hang_s: a run longer than this ends the worker (``HANG``), counted from when the worker
            was free to begin with it.
        drill: what this run is to do instead.
        Raises `BadInput` when the tensors do not fit into an arena or cannot travel, `WorkerDied`.
        """
        if not self.is_alive:
            raise WorkerDied(self.died.result() if self.died.done() else self._blame or "SIGKILL")
        if not self._free:
            raise Bug("no free slot")
        index = self._free.pop()
        slot = self._slots[index]
        try:
            places = slot.input.write(feeds.items())
            self._last_id += 1
            message: dict[str, Any] = {
                "op": "run",
                "id": self._last_id,
                "slot": index,
                "arena_bytes": slot.input.size_bytes,
                "inputs": wire.placed_json(places),
            }
            if drill is not None:
                message["drill"] = drill.as_json()
            data = wire.packed(message)
        except (ArenaFull, TypeError, Nonsense) as exc:
            self._free.append(index)
            raise BadInput(str(exc)) from exc
        started_s = 0.0 if self._runs else self._loop.time()
        self._runs.append((self._last_id, _Run(slot, index, on_done, hang_s, started_s)))
        if self._watchdog is None or self._watchdog.when() > self._loop.time() + hang_s:
            if self._watchdog is not None:
                self._watchdog.cancel()
            self._watchdog = self._loop.call_later(hang_s, self._watch)
        if not self._outbox:
            self._loop.call_soon(self._flush)
        self._outbox.append(data)

    def _flush(self) -> None:
        if self._outbox and self._is_open:
            outbox, self._outbox = self._outbox, []
            for packet in wire.joined(outbox):
                self._send_bytes(packet)

    def _watch(self) -> None:
        """One timer a worker, wound up lazily: a run's start and end do not touch it."""
        self._watchdog = None
        if not self._runs or not self._is_open:
            return
        _, run = self._runs[0]
        left_s = run.started_s + run.hang_s - self._loop.time()
        if left_s <= 0:
            self._fail("HANG")
        else:
            self._watchdog = self._loop.call_later(left_s, self._watch)

    # --- the socket -----------------------------------------------------------------------------

    def _send(self, message: Mapping[str, Any]) -> None:
        self._send_bytes(wire.packed(message))

    def _send_bytes(self, data: bytes) -> None:
        try:
            self._sock.send(data)
        except (BrokenPipeError, ConnectionResetError):
            pass  # its end is about to be read
        except BlockingIOError:
            self._fail("HANG")  # `depth` small packets always fit, unless nobody reads

    def _readable(self) -> None:
        try:
            data = self._sock.recv(wire.MESSAGE_MAX_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._ended()
            return
        try:
            reply = wire.parse_reply(data)
            if self._runs and self._runs[0][0] == reply.id:
                self._answer_run(reply)
            elif self._call is not None and self._call[0] == reply.id:
                _, answer = self._call
                self._call = None
                if answer.done():
                    return
                if reply.failure is not None:
                    answer.set_exception(_phase_error(reply.failure))
                else:
                    assert reply.body is not None
                    answer.set_result(reply.body)
            else:
                raise Nonsense(f"an answer to {reply.id}, which nobody asked")
        except (Nonsense, OutOfBounds):
            self._fail("SIGKILL")

    def _answer_run(self, reply: wire.Reply) -> None:
        _, run = self._runs[0]
        outcome: Outcome
        if reply.failure is not None:
            outcome = _run_error(reply.failure)
        else:
            assert reply.body is not None
            done = wire.parse_run_done(reply.body)
            run.slot.output.follow(done.arena_bytes)
            # Copies: the slot is used again at once, the caller's arrays are its own for ever.
            outcome = Inference(
                {place.name: run.slot.output.view(place).copy() for place in done.outputs},
                run_s=done.run_s,
            )
        self._runs.popleft()
        self._free.append(run.slot_index)
        if self._runs:
            self._runs[0][1].started_s = self._loop.time()
        run.on_done(outcome)

    # --- the end --------------------------------------------------------------------------------

    def pause(self) -> None:
        """Stand still until `resume`; only for a worker that is not serving yet."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    def kill(self) -> None:
        self._signal(signal.SIGKILL)

    def _signal(self, number: signal.Signals) -> None:
        """By pidfd: never another process that has the pid now."""
        if self._pidfd >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, number)

    def _fail(self, code: str) -> None:
        if self._blame is None:
            self._blame = code
        self.kill()

    def _ended(self) -> None:
        if self._is_open:
            self._is_open = False
            self._loop.remove_reader(self._sock.fileno())
            self._ending = self._loop.create_task(self._bury())

    async def _bury(self) -> None:
        self.kill()  # a worker that closed its socket but lives is of no use
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(asyncio.shield(self._cause), _CAUSE_WAIT_S)
        code = self._cause.result() if self._cause.done() else "SIGKILL"
        if self._blame is not None:
            code = self._blame
        self._sock.close()
        os.close(self._pidfd)
        self._pidfd = -1
        for slot in self._slots:
            slot.close()
        if self._watchdog is not None:
            self._watchdog.cancel()
        self.died.set_result(code)
        if self._call is not None and not self._call[1].done():
            self._call[1].set_exception(WorkerDied(code))
        self._call = None
        while self._runs:
            _, run = self._runs.popleft()
            run.on_done(WorkerDied(code))

    async def close(self, timeout_s: float = 5.0) -> None:
        """End the process: by itself after the present run, or killed after ``timeout_s``.

        Afterwards nothing of it is left in the front: no descriptor, no memory.
        """
        self._is_closing = True
        if self._is_open:
            self._flush()
            with contextlib.suppress(OSError):
                self._sock.shutdown(socket.SHUT_WR)
            try:
                await asyncio.wait_for(asyncio.shield(self.died), timeout_s)
            except TimeoutError:
                self.kill()
        await asyncio.shield(self.died)


def _phase_error(failure: Failure) -> Exception:
    if failure.kind == "admission":
        return NotAdmitted(failure.code, failure.message)
    return LoadFailed(failure.message)


def _run_error(failure: Failure) -> Exception:
    """Raises `Nonsense` for a class that does not exist."""
    if failure.fault_class not in _FAULT_CLASSES:
        raise Nonsense(f"fault class {failure.fault_class!r:.80}")
    if failure.fault_class == "request":
        return BadInput(failure.message)
    return PredictorFault(failure.message, code=failure.code, fault_class=failure.fault_class)
