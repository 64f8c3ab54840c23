"""One etcd and the ways to it, each with weather of its own.

`Etcd` is the cluster in memory with a journal: who wrote what, when, at which revision. `Link` is
one process's client: every call takes time, and may be refused, lost on the way there or on the
way back, arrive late, stand still while the link is frozen, or be the last thing its process does.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TypeVar

from registry.memory_store import MemoryCluster, MemoryStore, event_key
from registry.names import Revision
from registry.store import (
    Ambiguous,
    Batch,
    Event,
    LeaseNotFound,
    Listing,
    StoreRefused,
    Unavailable,
)

T = TypeVar("T")

CALL_DEADLINE_S = 5.0
"""When a client stops waiting for an answer: `registry.etcd` has one for each call."""
WATCH_STALL_S = 9.0
"""When a frozen stream is noticed and made anew: keepalive's interval and timeout."""


@dataclass(frozen=True, slots=True)
class Written:
    """One event in the journal."""

    at_s: float
    revision: Revision
    writer: str
    """The process that asked for it; empty for an ended lease."""
    event: Event


class Etcd(MemoryCluster):
    """The cluster and its journal, which no compaction touches."""

    def __init__(self) -> None:
        super().__init__()
        self.journal: list[Written] = []
        self.on_write: list[Callable[[Written], None]] = []
        self.writer = ""
        """Who is being served just now."""

    def _record(self, revision: Revision, events: Sequence[Event]) -> None:
        now_s = self.now_s()
        for event in events:
            written = Written(now_s, revision, self.writer, event)
            self.journal.append(written)
            for tell in self.on_write:
                tell(written)
        super()._record(revision, events)

    def tick(self) -> None:
        before, self.writer = self.writer, ""
        try:
            super().tick()
        finally:
            self.writer = before


@dataclass(slots=True)
class Weather:
    """How one link is. Shares are of calls."""

    delay_s: tuple[float, float] = (0.0005, 0.004)
    slow_share: float = 0.0
    slow_s: float = 1.0
    """A slow call, or batch of a watch, takes up to so long more."""
    refused_share: float = 0.0
    lost_share: float = 0.0
    """The answer to a write is lost; a third of these writes never arrive, a third come late."""
    is_cut: bool = False
    """Refused connections."""
    is_frozen: bool = False
    """Open connections on which nothing comes."""


class Link(MemoryStore):
    """One process's client. ``owner`` is its name in the journal."""

    def __init__(self, etcd: Etcd, owner: str, rng: random.Random) -> None:
        super().__init__(etcd)
        self.etcd = etcd
        self.owner = owner
        self.weather = Weather()
        self.is_dead = False
        self.crash_in = 0
        """Calls until the process ends, before or after that call took effect; 0: never."""
        self.on_crash: Callable[[], None] = lambda: None
        self.on_listed: Callable[[str, Listing], None] = lambda _prefix, _listing: None
        self.on_jump: Callable[[str, Revision, Revision], None] = lambda _p, _from, _to: None
        """A compaction was bridged: (prefix, from, to)."""
        self._rng = rng
        self._thaw = asyncio.Event()

    # --- weather --------------------------------------------------------------------------------

    def cut(self) -> None:
        self.weather.is_cut = True
        self.cut_watches()

    def freeze(self) -> None:
        self._thaw.clear()
        self.weather.is_frozen = True

    def mend(self) -> None:
        """Fine weather from now on."""
        self.weather = Weather()
        self.deliver_late()
        self._thaw.set()
        self._wake_watches()

    def die(self) -> None:
        """Nothing that this process does has any effect from now on."""
        self.is_dead = True

    # --- calls ----------------------------------------------------------------------------------

    async def _call(self, name: str, do: Callable[[], T], *, is_write: bool = False) -> T:
        rng, weather = self._rng, self.weather
        await self._travel()
        if weather.is_frozen:
            await self._stand_still(name, is_write=is_write, do=do)
        if self.is_dead:
            await self._never()
        if self.crash_in:
            self.crash_in -= 1
            if not self.crash_in:
                if rng.random() < 0.5:
                    self._do(do)
                self.on_crash()
                await self._never()
        if weather.is_cut or (weather.refused_share and rng.random() < weather.refused_share):
            raise Unavailable(f"{name}: connection refused")
        if is_write and weather.lost_share and rng.random() < weather.lost_share:
            fate = rng.randrange(3)
            if fate == 0:
                self._do(do)
            elif fate == 1:
                self._late.append(lambda: self._do(do))
                delay_s = rng.uniform(0.1, 20.0)
                asyncio.get_running_loop().call_later(delay_s, self.deliver_late)
            raise Ambiguous(f"{name}: the answer was lost")
        result = self._do(do)
        if rng.random() < 0.25:
            await self._travel()
            if self.is_dead:
                await self._never()
        return result

    def _do(self, do: Callable[[], T]) -> T:
        etcd = self.etcd
        etcd.tick()
        before, etcd.writer = etcd.writer, self.owner
        try:
            return do()
        finally:
            etcd.writer = before

    def deliver_late(self) -> None:
        late, self._late = self._late, []
        for do in late:
            with suppress(LeaseNotFound, StoreRefused):
                do()

    async def list_prefix(self, prefix: str) -> Listing:
        listing = await super().list_prefix(prefix)
        self.on_listed(prefix, listing)
        return listing

    async def _travel(self) -> None:
        """One way."""
        weather = self.weather
        low, high = weather.delay_s
        delay_s = self._rng.uniform(low, high)
        if weather.slow_share and self._rng.random() < weather.slow_share:
            delay_s += self._rng.uniform(0.0, weather.slow_s)
        await asyncio.sleep(delay_s)

    async def _stand_still(self, name: str, *, is_write: bool, do: Callable[[], object]) -> None:
        """Sent into a connection on which nothing comes back, to the call's deadline."""
        try:
            async with asyncio.timeout(CALL_DEADLINE_S):
                await self._thaw.wait()
        except TimeoutError:
            if not is_write:
                raise Unavailable(f"{name}: no answer") from None
            if self._rng.random() < 0.5 and not self.is_dead:
                self._late.append(lambda: self._do(do))
            raise Ambiguous(f"{name}: no answer") from None

    async def _never(self) -> None:
        await asyncio.get_running_loop().create_future()

    # --- watches --------------------------------------------------------------------------------

    async def _before(self, name: str) -> None:
        """On the way of one batch of a watch."""
        await self._travel()
        while self.weather.is_frozen:
            await self._thaw.wait()
        if self.is_dead:
            await self._never()

    async def _list_until_answered(self, prefix: str, wake: asyncio.Event) -> Listing:
        while True:
            try:
                return await self.list_prefix(prefix)
            except Unavailable:
                await asyncio.sleep(self._rng.uniform(0.1, 1.0))

    def _since(self, prefix: str, seen: object) -> list[Batch]:
        if self.is_dead or self.weather.is_cut or self.weather.is_frozen:
            return []
        before = seen.revision  # type: ignore[attr-defined]
        restarts = self.watch_restarts["compacted"]
        batches = super()._since(prefix, seen)  # type: ignore[arg-type]
        if self.watch_restarts["compacted"] != restarts:
            self.on_jump(prefix, before, batches[0].revision)
        return batches


def written_key(written: Written) -> str:
    return event_key(written.event)
