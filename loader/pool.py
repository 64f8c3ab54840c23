"""The replicas of one servable behind one bounded queue: what the router calls to infer."""

from __future__ import annotations

import asyncio
import random
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from weakref import WeakKeyDictionary

from loader.drills import Order
from loader.errors import PredictorFault, WorkerDied
from loader.faults import Fault, FaultClass
from loader.feeds import check_feeds
from loader.oversight import FaultReport, Oversight
from loader.worker import ORPHAN, Outcome, Worker
from registry.inference import (
    HANDED_BACK,
    RETIRED,
    Array,
    BadInput,
    DeadlineExceeded,
    Inference,
    Overloaded,
    Poisonous,
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

KILL_AFTER_S = 0.02
"""A poisoned worker gets nothing more to do; its end, which keeps a core busy for milliseconds,
waits until the requests that met the fault were sent to another one."""

BACKOFF_FIRST_S = 0.25
BACKOFF_MAX_S = 30.0
REPLACE_TIMEOUT_S = 600.0
BREAKER_AFTER = 3
"""Failures in a row of every replica after which requests are refused at once, not queued."""

HEALTHY_AFTER_S = 10.0
"""A worker that lived this long is replaced at once, whatever came before: it is no crash loop.
With 60 s, two replicas that lost a worker every few seconds were left without one for most of a
soak: 58 % of the model's requests were answered, with 10 s 99 %."""

_POISONOUS = "this input ended workers of this model and is refused for {:.0f} s more"


@dataclass(slots=True, eq=False)
class _Request:
    feeds: Mapping[str, Array]
    answer: asyncio.Future[Inference]
    queued_s: float
    drill: Order | None = None
    timer: asyncio.TimerHandle | None = None
    started_s: float = 0.0


@dataclass(slots=True, eq=False)
class _Seat:
    """One replica's place: a worker, or a replacement under way."""

    worker: Worker | None
    sat_down_s: float
    restarts: int = 0
    next_try_s: float = 0.0
    """When a replacement is tried again (loop time)."""
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
        oversight: Oversight | None = None,
        queue: int = 256,
        hang_s: float = 5.0,
    ) -> None:
        """workers: loaded, warm and serving; at least one.

        make_worker: gives another such worker, or raises; tried again with growing pauses.
        queue: how many requests may wait for a worker, besides those sent to one.
        """
        self._id = id
        self._signature = signature
        self._make_worker = make_worker
        self._oversight = oversight or Oversight()
        self._queue_max = queue
        self._hang_s = hang_s
        self._loop = asyncio.get_running_loop()
        self._queue: OrderedDict[int, _Request] = OrderedDict()
        self._drills: list[Order] = []
        """Taken from the oversight for requests that then left unrun: for the next ones."""
        self._seats = [_Seat(worker, self._loop.time()) for worker in workers]
        self._unanswered = 0
        self._held = 0
        """By requests that will ask later: no reason to wait for, but one to stay."""
        self._retired = False
        self._closing = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._on_idle: list[Callable[[], None]] = []
        self._failures: WeakKeyDictionary[ServableFailed, FaultReport] = WeakKeyDictionary()
        self._answered = 0
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
        refuses = self._oversight.refuses
        if refuses is not None and (refused_s := refuses(feeds)) > 0:
            raise Poisonous(_POISONOUS.format(refused_s))
        if (broken_s := self._broken_s(now_s)) > 0:
            raise Overloaded(
                f"its workers keep failing: {self._last_error}", retry_after_s=broken_s
            )
        if deadline_s <= now_s:
            raise DeadlineExceeded("the deadline had passed before the request was queued")
        request = _Request(feeds, self._loop.create_future(), now_s)
        seat = None if self._queue else self._free_seat()
        if seat is None and len(self._queue) >= self._queue_max:
            raise Overloaded(
                f"the queue is full (limits.queue: {self._queue_max})",
                retry_after_s=self._retry_after_s(),
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
            if request.drill is not None and not self._is_sent(request):
                self._drills.append(request.drill)
            self._unanswered -= 1
            if not self.in_flight:
                self._became_idle()

    @contextmanager
    def held(self) -> Generator[None]:
        """Count as in flight (`registry.inference.Predictor.held`); no worker is taken."""
        self._held += 1
        self.idle.clear()
        try:
            yield
        finally:
            self._held -= 1
            if not self.in_flight:
                self._became_idle()

    # --- what the manager sees ------------------------------------------------------------------

    @property
    def in_flight(self) -> int:
        """Requests accepted and not answered: waiting, running or to come (`held`)."""
        return self._unanswered + self._held

    @property
    def is_retired(self) -> bool:
        return self._retired

    @property
    def answered(self) -> int:
        """Requests answered well, ever."""
        return self._answered

    @property
    def is_manned(self) -> bool:
        """Whether a worker is there now; without one a request waits for a replacement."""
        return any(seat.worker is not None and seat.worker.is_alive for seat in self._seats)

    @property
    def is_backed_up(self) -> bool:
        """Whether requests wait behind others for a worker that is there."""
        manned = sum(seat.worker is not None and seat.worker.is_alive for seat in self._seats)
        return 0 < manned < self._unanswered

    @property
    def can_serve(self) -> bool:
        """Whether a request now has a worker, or one that is about to come."""
        return not self._retired and self._broken_s(self._loop.time()) == 0.0

    def answered_after(self, failure: ServableFailed, *, by_other: bool) -> None:
        """The very request that failed here was answered after all: it was not the input."""
        report = self._failures.pop(failure, None)
        if report is not None:
            self._oversight.on_answered(report, by_other)

    def configure(self, *, queue: int, hang_s: float) -> None:
        """Take new limits; they hold for requests from now on."""
        self._queue_max, self._hang_s = queue, hang_s

    def oversee(self, oversight: Oversight) -> None:
        """Report to this one from now on."""
        self._oversight = oversight

    def on_idle(self, callback: Callable[[], None]) -> None:
        """Call once, from the loop, when nothing is in flight: soon when that is so already."""
        if self.in_flight:
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
        if request.drill is None and self._drills:
            request.drill = self._drills.pop()
        elif request.drill is None and self._oversight.drill is not None:
            # Kept with the request: one that is taken back unrun has not used it up.
            request.drill = self._oversight.drill()
        seat.worker.submit(
            request.feeds,
            partial(self._done, seat, seat.worker, request),
            hang_s=self._hang_s,
            drill=request.drill,
        )
        seat.requests.append(request)

    def _is_sent(self, request: _Request) -> bool:
        return any(request in seat.requests for seat in self._seats)

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
        request.drill = None
        self._runs += 1
        if isinstance(outcome, Inference):
            self._busy_s += outcome.run_s
            self._run_s += 0.1 * (outcome.run_s - self._run_s)
            self._answer(seat, request, outcome)
        elif isinstance(outcome, PredictorFault):
            self._faulted(seat, request, outcome)
        else:
            _fail(request, outcome)
        self._pump()

    def _answer(self, seat: _Seat, request: _Request, inference: Inference) -> None:
        waited_s = self._loop.time() - request.queued_s
        queue_s = max(0.0, waited_s - inference.run_s)
        answer = Inference(inference.outputs, queue_s, inference.run_s)
        inspect = self._oversight.inspect
        finding = inspect(answer, waited_s) if inspect is not None else None
        if finding is not None and seat.worker is not None:
            pid = seat.worker.pid
            if finding.is_held:
                self._report(finding.fault, pid, request, answer, is_breach=finding.is_breach)
                return
            self._oversight.on_fault(FaultReport(finding.fault, pid, None, finding.is_breach))
        self._answered += 1
        if not request.answer.done():
            request.answer.set_result(answer)

    def _faulted(self, seat: _Seat, request: _Request, raised: PredictorFault) -> None:
        assert seat.worker is not None
        fault = Fault(raised.code, FaultClass(raised.fault_class), str(raised))
        pid = seat.worker.pid
        if fault.handling.replaces_worker:
            # Its device context is poisoned: what waits behind must not be run there.
            worker, seat.worker = seat.worker, None
            self._loop.call_later(KILL_AFTER_S, worker.kill)
            self._take_back(seat)
            self._last_error = str(fault.message)
            self._report(fault, pid, request)
            self._replace(seat)
        else:
            self._report(fault, pid, request)

    def _expire(self, request: _Request) -> None:
        """The deadline passed: waiting requests leave the queue, running ones leave their run."""
        where = "in the queue" if self._queue.pop(id(request), None) else "while running"
        waited_s = self._loop.time() - request.queued_s
        _fail(request, DeadlineExceeded(f"deadline passed {where}, after {waited_s:.3f} s"))

    def _retry_after_s(self) -> float:
        return max(0.1, len(self._queue) * self._run_s / max(1, len(self._seats)))

    def _gone(self) -> ServableFailed:
        return ServableFailed(f"{self._id} is being retired", code=RETIRED, fault_class=HANDED_BACK)

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
                seat.requests.pop(0).drill = None
            self._take_back(seat)
            fault = Fault(code, FaultClass.CRASH, f"worker {worker.pid} ended: {code}")
            self._last_error = fault.message
            self._report(fault, worker.pid, running)
        self._replace(seat)

    def _take_back(self, seat: _Seat) -> None:
        """Requests behind the running one were never begun: back to the head of the queue."""
        for request in reversed(seat.requests):
            if not request.answer.done():
                self._queue[id(request)] = request
                self._queue.move_to_end(id(request), last=False)
            elif request.drill is not None:
                self._drills.append(request.drill)
        seat.requests.clear()
        if self._retired:
            self.retire()

    def _report(
        self,
        fault: Fault,
        pid: int,
        request: _Request | None,
        answer: Inference | None = None,
        *,
        is_breach: bool = False,
    ) -> None:
        """Tell the overseer first, then the request that met the fault.

        answer: what it would have been given, where it was given nothing for a bad answer.
        """
        feeds = request.feeds if request is not None else None
        report = FaultReport(fault, pid, feeds, is_breach)
        is_poison = self._oversight.on_fault(report)
        if request is None or request.answer.done():
            return
        if is_poison:
            _fail(request, Poisonous(_POISONOUS.format(self._oversight_refusal_s(request))))
            return
        failed = ServableFailed(
            fault.message, code=fault.code, fault_class=fault.fault_class, answer=answer
        )
        self._failures[failed] = report
        _fail(request, failed)

    def _oversight_refusal_s(self, request: _Request) -> float:
        refuses = self._oversight.refuses
        return refuses(request.feeds) if refuses is not None else 0.0

    def _broken_s(self, now_s: float) -> float:
        """The breaker: how long until a crash loop gets its next worker; 0 while there is one."""
        if any(seat.worker is not None or seat.failures < BREAKER_AFTER for seat in self._seats):
            return 0.0
        return max(0.1, min(seat.next_try_s for seat in self._seats) - now_s)

    def _give_up_waiting(self) -> None:
        """With the breaker open nobody waits in vain: what is queued is answered now."""
        if self._broken_s(self._loop.time()) > 0:
            self._give_back(f"its workers keep failing: {self._last_error}", "BROKEN")

    def _give_back(self, why: str, code: str) -> None:
        """What waits is run elsewhere; it is nobody's fault."""
        while self._queue:
            _, request = self._queue.popitem(last=False)
            _fail(request, ServableFailed(why, code=code, fault_class=HANDED_BACK))

    def _replace(self, seat: _Seat) -> None:
        self._pump()
        if self._retired:
            return
        if not self.is_manned and self._oversight.has_control():
            # Another version can answer now what would wait here for a worker to be loaded.
            self._give_back("no worker is there", "UNMANNED")
        if self._loop.time() - seat.sat_down_s > HEALTHY_AFTER_S:
            seat.failures = 0
        task = self._loop.create_task(self._refill(seat))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _refill(self, seat: _Seat) -> None:
        while not self._retired:
            if seat.failures:
                pause_s = min(BACKOFF_MAX_S, BACKOFF_FIRST_S * 2 ** (seat.failures - 1))
                pause_s *= random.uniform(0.8, 1.2)  # those that died together do not load together
                seat.next_try_s = self._loop.time() + pause_s
                self._give_up_waiting()
                await asyncio.sleep(pause_s)
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
