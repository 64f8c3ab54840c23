"""Puts events into the store, in the background and in order (`registry.events`)."""

from __future__ import annotations

import asyncio
import contextlib
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, time, timedelta
from typing import Any

import orjson
import structlog

from registry.events import SEEN_MAX, CloudEvent, EventType, event_key, stable_id
from registry.keys import Keys
from registry.names import Revision
from registry.store import LeaseNotFound, ModRevisionIs, PutOp, Store, StoreError, StoreRefused

log = structlog.get_logger("registry.events")

KEPT = timedelta(days=7)
"""How long an event stays at least: its lease is its day's and ends 7 days after that day."""
QUEUE_MAX = 1000
BATCH_MAX = 32
"""Events of one transaction; etcd takes 128 operations by default."""
BACKOFF_MIN_S = 0.1
BACKOFF_MAX_S = 5.0


@dataclass(slots=True)
class EventCounters:
    """For metrics. All grow only."""

    written: int = 0
    dropped: int = 0
    """Left out because the queue was full: etcd was away for long. The oldest go first."""
    failures: int = 0


class EventWriter:
    """Puts events into the store in order, in the background; `emit` never waits and never fails.

    All events of one day hang on one lease of this writer's, granted with the first of them: a
    lease each would load etcd with thousands. While etcd is away events queue up, at most
    ``queue_max``; the count of those dropped then becomes an event itself.
    """

    def __init__(
        self,
        store: Store,
        keys: Keys,
        source: str,
        *,
        queue_max: int = QUEUE_MAX,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._store = store
        self._keys = keys
        self._source = source
        self._now = now
        self._queue_max = queue_max
        self._queue: deque[tuple[str, CloudEvent]] = deque()
        self._last_ms = 0
        self._dropped_untold = 0
        self._is_failing = False
        self._recent: OrderedDict[tuple[str, str], None] = OrderedDict()
        self._lease = 0
        self._lease_day = datetime.min.date()
        self._wake = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._task: asyncio.Task[None] | None = None
        self.counters = EventCounters()

    def emit(
        self,
        type_: EventType,
        subject: str = "",
        data: Mapping[str, Any] | None = None,
        *,
        id_: str | None = None,
        source: str | None = None,
    ) -> CloudEvent:
        """Queue one event and return it.

        id_: `stable_id` of a fact that may be seen more than once; an id that this writer has
            queued before is not queued again. ``None``: a fresh one.
        source: `FLEET_SOURCE` for a fact of the fleet.
        data: JSON values. What JSON cannot hold is written as text.
        """
        at = self._now()
        # Strictly growing, so that keys keep the order of `emit` within one millisecond too.
        at_ms = max(int(at.timestamp() * 1000), self._last_ms + 1)
        safe = _as_json(data or {})
        name = id_ or stable_id(self._source, type_, subject, at_ms, self.counters.written, safe)
        event = CloudEvent(name, source or self._source, type_, at, subject, safe)
        if event.name in self._recent:
            return event
        self._recent[event.name] = None
        if len(self._recent) > SEEN_MAX:
            self._recent.popitem(last=False)
        self._last_ms = at_ms
        if len(self._queue) >= self._queue_max:
            self._queue.popleft()
            self.counters.dropped += 1
            self._dropped_untold += 1
        self._queue.append((self._keys.event(event_key(event, at_ms)), event))
        self._idle.clear()
        self._wake.set()
        return event

    @property
    def queued(self) -> int:
        return len(self._queue)

    async def start(self) -> None:
        """Begin to write. What was emitted before is written too."""
        if self._task is None:
            self._task = asyncio.create_task(self._run(), name="event-writer")

    async def stop(self, timeout_s: float = 2.0) -> None:
        """Write what is queued, as far as ``timeout_s`` allows, and end."""
        task, self._task = self._task, None
        if task is None:
            return
        with contextlib.suppress(TimeoutError):
            await self.flushed(timeout_s)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task

    async def flushed(self, timeout_s: float) -> None:
        """Wait until everything emitted so far is in the store. Raises `TimeoutError`."""
        async with asyncio.timeout(timeout_s):
            await self._idle.wait()

    async def _run(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._queue:
                batch = [self._queue.popleft() for _ in range(min(BATCH_MAX, len(self._queue)))]
                await self._write_all(batch)
                if not self._queue:  # not before: in a full queue it would push out another
                    self._tell_dropped()
            self._idle.set()

    async def _write_all(self, batch: list[tuple[str, CloudEvent]]) -> None:
        """Until it is written; what the store refuses for good is tried alone, then dropped."""
        backoff_s = BACKOFF_MIN_S
        try:
            while not await self._write(batch):
                await asyncio.sleep(backoff_s)
                backoff_s = min(BACKOFF_MAX_S, backoff_s * 2)
            self.counters.written += len(batch)
        except StoreRefused as exc:
            if len(batch) == 1:
                self.counters.dropped += 1
                log.warning("event_refused", type=batch[0][1].type, error=str(exc))
                return
            for one in batch:
                await self._write_all([one])

    async def _write(self, batch: list[tuple[str, CloudEvent]]) -> bool:
        """Write all of ``batch`` or nothing. False: try again, with the very same batch."""
        absent = [ModRevisionIs(key, Revision(0)) for key, _ in batch]
        try:
            lease = await self._day_lease()
            puts = [PutOp(key, event.to_json(), lease) for key, event in batch]
            # Refused: it is there already, from an attempt whose answer was lost.
            await self._store.txn(absent, puts)
        except LeaseNotFound:
            self._lease = 0
            return False
        except StoreRefused:
            raise
        except StoreError as exc:
            if not self._is_failing:
                log.warning("events_not_written", queued=len(self._queue), error=str(exc))
            self._is_failing = True
            self.counters.failures += 1
            return False
        self._is_failing = False
        return True

    async def _day_lease(self) -> int:
        now = self._now().astimezone(UTC)
        if self._lease == 0 or self._lease_day != now.date():
            tomorrow = datetime.combine(now.date() + timedelta(days=1), time.min, UTC)
            ttl_s = int((tomorrow - now + KEPT).total_seconds()) + 1
            self._lease = await self._store.lease_grant(ttl_s)
            self._lease_day = now.date()
        return self._lease

    def _tell_dropped(self) -> None:
        count, self._dropped_untold = self._dropped_untold, 0
        if count:
            self.emit(EventType.EVENTS_DROPPED, data={"count": count})


def _as_json(data: Mapping[str, Any]) -> dict[str, Any]:
    """``data`` as JSON will give it back. An event is worth having even with odd data in it."""
    try:
        safe = orjson.loads(orjson.dumps(dict(data), default=str, option=orjson.OPT_NON_STR_KEYS))
    except TypeError:
        return {"text": repr(data)}
    return safe if isinstance(safe, dict) else {}
