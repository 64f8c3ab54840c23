"""The replicas of one servable behind one bounded queue: what the router calls to infer."""

from __future__ import annotations

import asyncio
import random
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from loader.errors import PredictorFault, WorkerDied
from loader.fault_tables import HANDLING, FaultClass
from loader.feeds import check_feeds
from loader.worker import ORPHAN, Outcome, Worker
from registry.inference import (
    Array,
    BadInput,
    DeadlineExceeded,
    Inference,
    Overloaded,
    ServableFailed,
    Signature,
)
from registry.names import ServableId

OnFault = Callable[[str, str, str, int], None]
"""Told ``(code, fault_class, message, pid)``, once a fault, before any request learns of it."""

PREFETCH_BELOW_S = 0.005
"""With replicas, a second request is put behind a running one only while runs are this short:
then it hides the way to the worker and back. Behind a long run it would wait for that worker
while another one goes idle."""

BACKOFF_FIRST_S = 0.25
BACKOFF_MAX_S = 30.0
REPLACE_TIMEOUT_S = 600.0
HEALTHY_AFTER_S = 60.0
"""A worker that lived this long is replaced at once, whatever came before."""


@dataclass(slots=True, eq=False)
class _Request:
    feeds: Mapping[str, Array]
    answer: asyncio.Future[Inference]
    queued_s: float
    timer: asyncio.TimerHandle | None = None
    started_s: float = 0.0


@dataclass(slots=True, eq=False)
class _Seat:
    """One replica's place: a worker, or a replacement under way."""

    worker: Worker | None
    sat_down_s: float
    restarts: int = 0
    failures: int = 0
    """In a row: deaths soon after the start, and replacements that could not be made."""
    requests: list[_Request] = field(default_factory=list[_Request])
    """Sent to the worker, in order: the first is running."""


@dataclass(frozen=True, slots=True)
class WorkerView:
    """A replica as seen from outside. ``pid`` is 0 while there is none."""

    pid: int
    alive: bool
    restarts: int


@dataclass(frozen=True, slots=True)
class PoolStats:
    queued: int
    running: int
    runs: int
    """Answered by a worker, faults included."""
    busy_s: float
    """Time inside predictors."""
    restarts: int
    last_error: str | None
    """Why the latest replacement could not be made."""


class WorkerPool:
    """Requests in order of arrival, each to the first replica that has room.

    Keeps the protocol `registry.inference.Predictor`. All of it runs on one event loop. The pool
    owns its workers: it replaces dead ones and ends them all in `close`.
    """

    def __init__(
        self,
        id: ServableId,
        signature: Signature,
        workers: Sequence[Worker],
        *,
        make_worker: Callable[[], Awaitable[Worker]],
        on_fault: OnFault,
        queue: int = 256,
        hang_s: float = 5.0,
    ) -> None:
        """workers: loaded, warm and serving; at least one.

        make_worker: gives another such worker, or raises; tried again with growing pauses.
        on_fault: called from the loop; may call `retire`. Must not raise.
        queue: how many requests may wait for a worker, besides those sent to one.
        """
        self._id = id
        self._signature = signature
        self._make_worker = make_worker
        self._on_fault = on_fault
        self._queue_max = queue
        self._hang_s = hang_s
        self._loop = asyncio.get_running_loop()
        self._queue: OrderedDict[int, _Request] = OrderedDict()
        self._seats = [_Seat(worker, self._loop.time()) for worker in workers]
        self._unanswered = 0
        self._retired = False
        self._closing = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._on_idle: list[Callable[[], None]] = []
        self._runs = 0
        self._busy_s = 0.0
        self._run_s = 0.0
        self._last_error: str | None = None
        self.idle = asyncio.Event()
        """Set while nobody waits for an answer."""
        self.idle.set()
        for seat in self._seats:
            self._watch(seat)

    # --- what the router sees -------------------------------------------------------------------

    @property
    def id(self) -> ServableId:
        return self._id

    @property
    def signature(self) -> Signature:
        return self._signature

    async def infer(self, feeds: Mapping[str, Array], *, deadline_s: float) -> Inference:
        """Run one request (`registry.inference.Predictor.infer`).

        The arrays of ``feeds`` must not change before the answer. A cancelled caller leaves the
        queue; a run that it had begun goes on, unheard.
        Raises `BadInput`, `Overloaded`, `DeadlineExceeded`, `ServableFailed`.
        """
        check_feeds(self._signature, feeds)
        if self._retired:
            raise self._gone()
        now_s = self._loop.time()
        if deadline_s <= now_s:
            raise DeadlineExceeded("the deadline had passed before the request was queued")
        request = _Request(feeds, self._loop.create_future(), now_s)
        seat = None if self._queue else self._free_seat()
        if seat is None and len(self._queue) >= self._queue_max:
            raise Overloaded(
                f"{len(self._queue)} requests are waiting", retry_after_s=self._retry_after_s()
            )
        self._unanswered += 1
        self.idle.clear()
        request.timer = self._loop.call_at(deadline_s, self._expire, request)
        try:
            if seat is None:
                self._queue[id(request)] = request
            else:
                self._send(seat, request)
            return await request.answer
        finally:
            request.timer.cancel()
            self._queue.pop(id(request), None)
            self._unanswered -= 1
            if not self._unanswered:
                self._became_idle()

    # --- what the manager sees ------------------------------------------------------------------

    @property
    def in_flight(self) -> int:
        """Requests accepted and not answered: waiting or running."""
        return self._unanswered

    @property
    def is_retired(self) -> bool:
        return self._retired

    def configure(self, *, queue: int, hang_s: float) -> None:
        """Take new limits; they hold for requests from now on."""
        self._queue_max, self._hang_s = queue, hang_s

    def on_idle(self, callback: Callable[[], None]) -> None:
        """Call once, from the loop, when nothing is in flight: soon when that is so already."""
        if self._unanswered:
            self._on_idle.append(callback)
        else:
            self._loop.call_soon(callback)

    def retire(self) -> None:
        """Refuse new requests and give back those still waiting, to be run elsewhere.

        What runs now is answered as usual. Dead workers are not replaced any more. Idempotent.
        """
        self._retired = True
        while self._queue:
            _, request = self._queue.popitem(last=False)
            _fail(request, self._gone())

    def workers(self) -> tuple[WorkerView, ...]:
        return tuple(
            WorkerView(
                pid=seat.worker.pid if seat.worker else 0,
                alive=seat.worker is not None and seat.worker.is_alive,
                restarts=seat.restarts,
            )
            for seat in self._seats
        )

    @property
    def stats(self) -> PoolStats:
        return PoolStats(
            queued=len(self._queue),
            running=sum(len(seat.requests) for seat in self._seats),
            runs=self._runs,
            busy_s=self._busy_s,
            restarts=sum(seat.restarts for seat in self._seats),
            last_error=self._last_error,
        )

    async def close(self, timeout_s: float = 5.0) -> None:
        """Retire and end every worker; what still runs after ``timeout_s`` is cut off."""
        self.retire()
        self._closing = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        workers = [seat.worker for seat in self._seats if seat.worker is not None]
        await asyncio.gather(*(worker.close(timeout_s) for worker in workers))

    # --- requests -------------------------------------------------------------------------------

    def _free_seat(self) -> _Seat | None:
        """The least busy replica with room, the first of equals."""
        best: _Seat | None = None
        for seat in self._seats:
            worker = seat.worker
            if worker is None or not worker.is_alive:
                continue
            busy = worker.in_flight
            if not busy:
                return seat
            if busy < worker.depth and (best is None or busy < len(best.requests)):
                best = seat
        if best is not None and len(self._seats) > 1 and self._run_s > PREFETCH_BELOW_S:
            return None
        return best

    def _send(self, seat: _Seat, request: _Request) -> None:
        """Raises `BadInput` when the tensors cannot travel."""
        assert seat.worker is not None
        request.started_s = self._loop.time()
        on_done = partial(self._done, seat, seat.worker, request)
        seat.worker.submit(request.feeds, on_done, hang_s=self._hang_s)
        seat.requests.append(request)

    def _pump(self) -> None:
        """Send what waits to whoever has room."""
        while self._queue and (seat := self._free_seat()) is not None:
            _, request = self._queue.popitem(last=False)
            if request.answer.done():
                continue
            try:
                self._send(seat, request)
            except BadInput as exc:
                _fail(request, exc)

    def _done(self, seat: _Seat, worker: Worker, request: _Request, outcome: Outcome) -> None:
        if isinstance(outcome, WorkerDied) or seat.worker is not worker:
            return  # `_worker_died` and `_faulted` dealt with all that it had
        seat.requests.remove(request)
        self._runs += 1
        if isinstance(outcome, Inference):
            self._busy_s += outcome.run_s
            self._run_s += 0.1 * (outcome.run_s - self._run_s)
            if not request.answer.done():
                queue_s = max(0.0, self._loop.time() - request.queued_s - outcome.run_s)
                request.answer.set_result(Inference(outcome.outputs, queue_s, outcome.run_s))
        elif isinstance(outcome, PredictorFault):
            self._faulted(seat, request, outcome)
        else:
            _fail(request, outcome)
        self._pump()

    def _faulted(self, seat: _Seat, request: _Request, fault: PredictorFault) -> None:
        assert seat.worker is not None
        if HANDLING[FaultClass(fault.fault_class)].replaces_worker:
            # Its device context is poisoned: what waits behind must not be run there.
            worker, seat.worker = seat.worker, None
            worker.kill()
            self._take_back(seat)
            self._report(fault.code, fault.fault_class, str(fault), worker.pid)
            self._replace(seat)
        else:
            self._report(fault.code, fault.fault_class, str(fault), seat.worker.pid)
        _fail(request, ServableFailed(str(fault), code=fault.code, fault_class=fault.fault_class))

    def _expire(self, request: _Request) -> None:
        """The deadline passed: waiting requests leave the queue, running ones leave their run."""
        where = "in the queue" if self._queue.pop(id(request), None) else "while running"
        waited_s = self._loop.time() - request.queued_s
        _fail(request, DeadlineExceeded(f"deadline passed {where}, after {waited_s:.3f} s"))

    def _retry_after_s(self) -> float:
        return max(0.1, len(self._queue) * self._run_s / max(1, len(self._seats)))

    def _gone(self) -> ServableFailed:
        return ServableFailed(f"{self._id} is being retired", code="RETIRED", fault_class="retired")

    def _became_idle(self) -> None:
        self.idle.set()
        callbacks, self._on_idle = self._on_idle, []
        for callback in callbacks:
            callback()

    # --- workers --------------------------------------------------------------------------------

    def _watch(self, seat: _Seat) -> None:
        assert seat.worker is not None
        seat.worker.died.add_done_callback(partial(self._worker_died, seat, seat.worker))

    def _worker_died(self, seat: _Seat, worker: Worker, died: asyncio.Future[str]) -> None:
        if seat.worker is not worker:
            return  # replaced already
        seat.worker = None
        code = died.result()
        running = seat.requests[0] if seat.requests else None
        if code == ORPHAN:
            self._take_back(seat)  # not this servable's fault: the same requests run again
        elif self._closing:
            for request in seat.requests:
                _fail(request, self._gone())
            seat.requests.clear()
        elif not self._retired or running is not None:
            if running is not None:
                seat.requests.pop(0)
            self._take_back(seat)
            message = f"worker {worker.pid} ended: {code}"
            self._report(code, FaultClass.CRASH, message, worker.pid)
            if running is not None:
                crash = ServableFailed(message, code=code, fault_class=FaultClass.CRASH)
                _fail(running, crash)
        self._replace(seat)

    def _take_back(self, seat: _Seat) -> None:
        """Requests behind the running one were never begun: back to the head of the queue."""
        for request in reversed(seat.requests):
            if not request.answer.done():
                self._queue[id(request)] = request
                self._queue.move_to_end(id(request), last=False)
        seat.requests.clear()
        if self._retired:
            self.retire()

    def _report(self, code: str, fault_class: str, message: str, pid: int) -> None:
        self._on_fault(code, fault_class, message, pid)

    def _replace(self, seat: _Seat) -> None:
        self._pump()
        if self._retired:
            return
        if self._loop.time() - seat.sat_down_s > HEALTHY_AFTER_S:
            seat.failures = 0
        task = self._loop.create_task(self._refill(seat))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _refill(self, seat: _Seat) -> None:
        while not self._retired:
            if seat.failures:
                pause_s = min(BACKOFF_MAX_S, BACKOFF_FIRST_S * 2 ** (seat.failures - 1))
                # Replicas that died together do not load together.
                await asyncio.sleep(pause_s * random.uniform(0.8, 1.2))
            seat.failures += 1
            try:
                async with asyncio.timeout(REPLACE_TIMEOUT_S):
                    worker = await self._make_worker()
            except Exception as exc:  # whatever it is, the next attempt may go better
                self._last_error = f"{type(exc).__name__}: {exc}"
                continue
            seat.worker = worker
            seat.sat_down_s = self._loop.time()
            seat.restarts += 1
            self._watch(seat)
            self._pump()
            return


def _fail(request: _Request, error: Exception) -> None:
    if not request.answer.done():
        request.answer.set_exception(error)
