"""A real inference now and then on what nobody asks: readiness through the serving path itself.

A ping says that a process answers; only an inference says that a predictor does. A probe that
fails or hangs is a fault like any other, so a worker set that is hung or poisoned while idle is
found, replaced and counted before a client meets it. On a device that was cordoned for what its
versions did, probes that succeed in a row lift the cordon.
"""

from __future__ import annotations

import asyncio
from collections import Counter

import structlog

from loader.devices import DevicePool
from loader.errors import NotAdmitted
from loader.manager import Manager
from loader.pool import WorkerPool
from loader.servable import Servable
from loader.warmup import warmup_feeds
from registry.inference import InferenceError, Overloaded
from registry.names import ServableId

log = structlog.get_logger(__name__)

IDLE_S = 10.0
LOOK_S = 2.0
"""How often idle servables are looked for, and a cordoned device is tried."""
GOOD_IN_A_ROW = 3
TIMEOUT_S = 30.0


class Prober:
    """Runs beside the manager, on its event loop."""

    def __init__(self, manager: Manager, devices: DevicePool, *, idle_s: float = IDLE_S) -> None:
        self._manager = manager
        self._devices = devices
        self._idle_s = idle_s
        self._seen: dict[ServableId, tuple[int, float]] = {}
        """The counter of answers as last seen, and since when (loop time) it has been that."""
        self._good: Counter[str] = Counter()

    async def run(self) -> None:
        """Probe until cancelled."""
        while True:
            await asyncio.sleep(min(LOOK_S, self._idle_s))
            await self._try_cordoned()
            await self._try_idle()

    async def _try_idle(self) -> None:
        now_s = asyncio.get_running_loop().time()
        loaded = [(s, s.pool.answered) for s in self._loaded() if s.pool is not None]
        self._seen = {
            s.id: seen if (seen := self._seen.get(s.id, (0, now_s)))[0] == answered
            else (answered, now_s)
            for s, answered in loaded
        }  # fmt: skip
        idle = [
            s for s, _ in loaded
            if s.pool and not s.pool.in_flight and now_s - self._seen[s.id][1] >= self._idle_s
        ]  # fmt: skip
        await asyncio.gather(*(self._probe_all(s) for s in idle))
        for servable in idle:
            if servable.pool is not None:
                self._seen[servable.id] = (servable.pool.answered, now_s)

    async def _try_cordoned(self) -> None:
        for usage in self._devices.usage():
            if usage.cordoned is None or usage.cordoned.is_hardware:
                self._good.pop(usage.id, None)
                continue
            servables = [s for s in self._loaded() if s.recipe.device == usage.id]
            answers = await asyncio.gather(*(self._probe_all(servable) for servable in servables))
            self._good[usage.id] = self._good[usage.id] + 1 if all(answers) else 0
            if self._good[usage.id] >= GOOD_IN_A_ROW:
                self._good.pop(usage.id)
                self._manager.uncordon(usage.id)

    def _loaded(self) -> list[Servable]:
        return [s for view in self._manager.views() for s in view.servables if s.is_loaded]

    async def _probe_all(self, servable: Servable) -> bool:
        """Whether every replica answers: so many probes at once find one each."""
        pool = servable.pool
        if pool is None:
            return False
        probes = (self._probe(servable, pool) for _ in pool.workers())
        return all(await asyncio.gather(*probes))

    async def _probe(self, servable: Servable, pool: WorkerPool) -> bool:
        """One run of the warm-up input; what its failure leads to, the fault path decides."""
        deadline_s = asyncio.get_running_loop().time() + TIMEOUT_S
        try:
            feeds = warmup_feeds(pool.signature, servable.recipe)[0]
            await pool.infer(feeds, deadline_s=deadline_s)
        except NotAdmitted:
            return False
        except InferenceError as exc:
            if not isinstance(exc, Overloaded):
                log.info("probe_failed", servable=str(servable.id), error=str(exc))
            return False
        except Exception:  # a bug, met by one model's probe: the node goes on
            log.exception("probe_crashed", servable=str(servable.id))
            return False
        return True
