"""One servable's life in effects: made ready, failed and tried again, drained, ended.

Part of the manager, which is the only one to call it: all moves of servables are made here and in
`loader.manager`, on the event loop. Tasks report back; a step itself never waits.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from typing import Any, Protocol

import structlog

from loader.errors import FetchFailed, LoadTimedOut, NotAdmitted, SourceGone, WorkerDied
from loader.fault_desk import FaultDesk
from loader.lifecycle import State
from loader.loading import Predecessor
from loader.model import Model
from loader.plan import Order, is_pending
from loader.pool import WorkerPool
from loader.readying import Readying
from loader.recipe import Recipe
from loader.repository import Fetched
from loader.servable import Servable
from loader.wishes import resolve
from loader.zygote import ZygoteFailed
from registry.errors import PaddlewheelError
from registry.events import EventType
from registry.names import ModelName, ServableId
from registry.records import Quarantine
from registry.spec import Limits, Rollback

log = structlog.get_logger(__name__)

RETRY_FIRST_S = 5.0
RETRY_MAX_S = 60.0
END_AFTER_S = 0.01
"""What waits for a rollback is sent on before workers are ended: that takes the CPU a while."""


class Host(Protocol):
    """What the manager does about what happened to a servable."""

    def touch(self, name: ModelName) -> None:
        """Reconcile this model soon."""
        ...

    def touch_all(self) -> None: ...

    def publish(self, model: Model) -> None:
        """What may be routed to changed."""
        ...

    def changed(self, model: Model) -> None:
        """What a status shows may have changed."""
        ...

    def happened(self, event: EventType, subject: str, data: Mapping[str, Any]) -> None: ...

    def take_out(self, model: Model, servable: Servable, quarantine: Quarantine) -> None: ...


class Upkeep:
    """Loads and unloads servables, and keeps their records."""

    def __init__(self, host: Host, readying: Readying, desk: FaultDesk) -> None:
        self._host = host
        self._readying = readying
        self._desk = desk
        self._tasks: set[asyncio.Task[None]] = set()

    async def close(self) -> None:
        """Stop what is under way; pools are not closed here."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # --- making ready ---------------------------------------------------------------------------

    def load(self, model: Model, id: ServableId) -> None:
        order = model.orders[id]
        servable = Servable(id, order.recipe)
        model.servables[id] = servable
        quarantine = model.quarantine_of(id)
        if quarantine is not None:
            servable.move(State.QUARANTINED, quarantine.reason)
            return
        servable.attempts = model.attempts.get(id, 0) + 1
        servable.move(State.FETCHING)
        if is_pending(id):
            self._start(servable, self._fetch(model, servable, order))
        else:
            servable.phases_ms["fetch"] = model.fetch_ms.get(id, 0.0)
            self._start(servable, self._make_ready(model, servable, order))

    def _start(self, servable: Servable, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work, name=f"servable {servable.id}")
        servable.task = task
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _fetch(self, model: Model, servable: Servable, order: Order) -> None:
        started_s = time.perf_counter()
        try:
            fetched = await self._fetched(model, order)
        except Exception as exc:
            self._failed(model, servable, exc)
            return
        fetch_ms = round((time.perf_counter() - started_s) * 1000, 3)
        self._resolve(model, servable, order, fetched, fetch_ms)

    async def _fetched(self, model: Model, order: Order) -> Fetched:
        """From the source; of a version that served here before also without it."""
        recipe = order.recipe
        try:
            return await self._readying.fetch(recipe)
        except FetchFailed as exc:
            served = model.served.get((recipe.version, recipe.source))
            cached = None if served is None else await self._readying.cached(recipe, served)
            if cached is None:
                raise
            log.warning(
                "source_gone", model=model.name, version=recipe.version, reason=str(exc),
                digest=cached.digest,
            )  # fmt: skip
            return cached

    def _resolve(
        self, model: Model, servable: Servable, order: Order, fetched: Fetched, fetch_ms: float
    ) -> None:
        """The bytes are known now: what stood for them becomes the servable that they make."""
        pending = servable.id
        id = replace(pending, digest=fetched.digest)
        model.orders.pop(pending, None)
        model.orders[id] = order
        model.fetched[id] = fetched
        model.fetch_ms[id] = fetch_ms
        self.remove(model, servable)
        existing = model.servables.get(id)
        if existing is not None and existing.state is State.FAILED:
            self.remove(model, existing)
        elif existing is not None and existing.is_loaded:
            self._book_anew(existing, order.recipe, fetched)
        resolve(model, pending, id)
        log.info(
            "servable_fetched",
            servable=str(id),
            digest=fetched.digest,
            bytes=fetched.bytes,
            fetch_ms=fetch_ms,
        )
        self._host.touch(model.name)

    def _book_anew(self, servable: Servable, recipe: Recipe, fetched: Fetched) -> None:
        """What serves goes on as it is; the document may say anew how much memory it takes."""
        servable.recipe = recipe
        try:
            self._readying.reserve(servable, fetched)
        except NotAdmitted as exc:
            log.warning("memory_not_booked_anew", servable=str(servable.id), reason=exc.reason)

    async def _make_ready(self, model: Model, servable: Servable, order: Order) -> None:
        fetched = model.fetched[servable.id]
        try:
            if not fetched.folder.exists():  # evicted while nobody needed it
                fetched = await self._readying.fetch(order.recipe)
                if fetched.digest != servable.id.digest:
                    self._resolve(model, servable, order, fetched, 0.0)
                    return
            loading, ready = await self._readying.make(
                servable,
                order,
                fetched,
                predecessor=lambda: self._predecessor(model, servable.id),
                on_waiting=partial(self._waits, model, servable),
                on_loading=partial(self._loads, model, servable),
                on_phase=partial(self._phase_ended, model, servable),
            )
        except Exception as exc:
            self._readying.give_back(servable)
            self._failed(model, servable, exc)
            return
        except BaseException:
            self._readying.give_back(servable)
            raise
        document = model.document_of(servable.id)
        limits = document.spec.limits if document is not None else Limits()
        rollback = document.spec.rollback if document is not None else Rollback()
        servable.signature = ready.signature
        servable.pool = WorkerPool(
            servable.id,
            ready.signature,
            ready.workers,
            make_worker=loading.replacement,
            oversight=self._desk.oversight(model, servable, rollback),
            queue=limits.queue,
            hang_s=limits.hang_s,
        )
        servable.loaded_at = datetime.now(UTC)
        servable.move(State.READY)
        model.reloads["ready"] += 1
        log.info("servable_ready", servable=str(servable.id), **servable.phases_ms)
        self._host.happened(
            EventType.SERVABLE_READY,
            f"{model.name}/{servable.id.version}",
            {"digest": servable.id.digest, "phases_ms": dict(servable.phases_ms)},
        )
        quarantine = model.quarantine_of(servable.id)
        if quarantine is not None:  # taken out elsewhere while it was loading here
            self._host.take_out(model, servable, quarantine)
            return
        self._host.publish(model)
        self._host.touch(model.name)

    def _waits(self, model: Model, servable: Servable, reason: str) -> None:
        servable.reason = reason
        log.info("servable_waits", servable=str(servable.id), reason=reason)
        self._host.touch_all()  # standbys of a lower priority yield

    def _loads(self, model: Model, servable: Servable) -> None:
        servable.move(State.LOADING)
        self._host.changed(model)

    def _phase_ended(self, model: Model, servable: Servable, phase: str, took_s: float) -> None:
        servable.phases_ms[phase] = round(took_s * 1000, 3)
        if phase == "load":
            servable.move(State.WARMING)
            self._host.changed(model)

    def _predecessor(self, model: Model, id: ServableId) -> Predecessor | None:
        live = model.in_force.live
        if live is None or live == id or (servable := model.servables.get(live)) is None:
            return None
        if servable.signature is None:
            return None
        return Predecessor(live.version, servable.signature)

    def _failed(self, model: Model, servable: Servable, error: Exception) -> None:
        if not isinstance(error, PaddlewheelError | OSError):
            log.error("servable_crashed", servable=str(servable.id), exc_info=error)
        reason = str(error) or repr(error)
        servable.move(State.FAILED, reason)
        model.reloads["failed"] += 1
        match error:
            case FetchFailed():
                may_heal = error.retryable or isinstance(error, SourceGone)
            case NotAdmitted():
                may_heal = error.may_heal
            case WorkerDied() | LoadTimedOut() | ZygoteFailed() | OSError():
                may_heal = True
            case _:
                may_heal = False
        if may_heal:
            model.attempts[servable.id] = servable.attempts
            delay_s = min(RETRY_MAX_S, RETRY_FIRST_S * 2 ** (servable.attempts - 1))
            model.retry_at_s[servable.id] = asyncio.get_running_loop().time() + delay_s
        log.warning("servable_failed", servable=str(servable.id), reason=reason)
        self._host.happened(
            EventType.SERVABLE_FAILED, f"{model.name}/{servable.id.version}", {"reason": reason}
        )
        self._host.publish(model)
        self._host.touch(model.name)

    # --- ending -------------------------------------------------------------------------------

    def abandon(self, model: Model, servable: Servable) -> None:
        if servable.task is not None:
            servable.task.cancel()
        log.info("servable_abandoned", servable=str(servable.id), state=servable.state)
        self.remove(model, servable)

    def remove(self, model: Model, servable: Servable) -> None:
        servable.move(State.GONE)
        model.suspected -= {servable.id}
        if model.servables.get(servable.id) is servable:
            del model.servables[servable.id]

    def drain(self, model: Model, servable: Servable) -> None:
        document = model.document or model.aspired
        drain_s = document.spec.limits.drain_s if document is not None else Limits().drain_s
        servable.drain_by_s = asyncio.get_running_loop().time() + drain_s
        servable.move(State.DRAINING)
        self._host.publish(model)
        assert servable.pool is not None
        servable.pool.on_idle(partial(self._host.touch, model.name))
        log.info("servable_draining", servable=str(servable.id))

    def unload(self, model: Model, servable: Servable) -> None:
        self.remove(model, servable)
        self._desk.forget(model, servable.id)
        self.end_pool(model, servable)

    def end_pool(self, model: Model, servable: Servable) -> None:
        """End the workers in the background; their memory and files may go to others then."""
        pool, servable.pool = servable.pool, None
        if pool is not None:
            model.answered_before += pool.answered

        async def end() -> None:
            try:
                await asyncio.sleep(END_AFTER_S)
                if pool is not None:
                    await pool.close()
            finally:
                self._readying.give_back(servable)
            log.info("servable_unloaded", servable=str(servable.id))
            self._host.touch(model.name)

        self._start(servable, end())
