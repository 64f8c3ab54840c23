"""The reconcile loop of one node: the only writer of servable states and of what is in force.

Everybody else leaves a wish (`aspire`, `forget_model`, `set_quarantined`, `set_fallback`) and the
loop compares it with what is (`loader.policy`). Long work (fetching, loading, ending processes)
runs in tasks that report back; a step itself never waits, so routing follows the decision in the
same turn of the event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import structlog

from loader import policy
from loader.devices import BadDevice, Cordoned, DevicePool, OutOfQuota, Priority
from loader.errors import FetchFailed, LoaderError, NotAdmitted, WorkerDied
from loader.lifecycle import LOADED, State
from loader.loading import Loading, Predecessor
from loader.memory import required_mb
from loader.oversight import FaultReport, Oversight
from loader.plan import Order, aspire, is_pending, order_for
from loader.policy import Aspiration, InForce, World
from loader.pool import WorkerPool
from loader.repository import Fetched, ModelRepository
from loader.servable import Servable
from loader.zygote import Zygote
from registry.errors import PaddlewheelError
from registry.inference import Predictor
from registry.names import Digest, ModelName, Revision, ServableId, Version
from registry.records import Quarantine
from registry.spec import ModelDocument

log = structlog.get_logger(__name__)

RETRY_FIRST_S = 5.0
RETRY_MAX_S = 60.0


@dataclass(frozen=True, slots=True)
class ModelView:
    """One model as it is: what routing is built from and what the status tells."""

    name: ModelName
    document: ModelDocument | None
    """The document in force; ``None`` before the first one is."""
    aspired: ModelDocument | None
    aspired_revision: Revision | None
    aspiration: Aspiration | None
    in_force: InForce
    servables: tuple[Servable, ...]
    reason: str | None
    swap_s: float
    """How long the last swap of routing took."""
    swaps: int
    reloads: Mapping[str, int]
    """``ready`` and ``failed``: servables made ready, or not."""

    def predictors(self) -> Mapping[ServableId, Predictor]:
        return {s.id: s.pool for s in self.servables if s.is_loaded and s.pool is not None}


@dataclass(slots=True, eq=False)
class _Model:
    name: ModelName
    aspired: ModelDocument | None = None
    aspired_revision: Revision | None = None
    aspiration: Aspiration | None = None
    document: ModelDocument | None = None
    in_force: InForce = field(default_factory=InForce)
    servables: dict[ServableId, Servable] = field(default_factory=dict[ServableId, Servable])
    orders: dict[ServableId, Order] = field(default_factory=dict[ServableId, Order])
    fetched: dict[ServableId, Fetched] = field(default_factory=dict[ServableId, Fetched])
    quarantined: Mapping[Version, Quarantine] = field(default_factory=dict[Version, Quarantine])
    """Versions that the fleet took out."""
    fallback: ServableId | None = None
    retry_at_s: dict[ServableId, float] = field(default_factory=dict[ServableId, float])
    attempts: dict[ServableId, int] = field(default_factory=dict[ServableId, int])
    swap_s: float = 0.0
    swaps: int = 0
    reloads: Counter[str] = field(default_factory=Counter[str])
    reason: str | None = None

    def is_quarantined(self, id: ServableId) -> bool:
        quarantine = self.quarantined.get(id.version)
        return quarantine is not None and quarantine.digest in (None, id.digest)


@dataclass(frozen=True, slots=True)
class ManagerSettings:
    load_timeout_s: float = 300.0
    fetch_timeout_s: float = 3600.0
    load_slots: int = 2
    """How many servables may be loading at once on this node."""


class Manager:
    """Keeps the servables of one node in step with the documents.

    publish is called, in the same turn of the loop, with a model's view whenever what may be
    routed to changed; withdraw when the model is gone; changed when only its status did.
    """

    def __init__(
        self,
        *,
        zygote: Zygote,
        repository: ModelRepository,
        devices: DevicePool,
        publish: Callable[[ModelView], None],
        withdraw: Callable[[ModelName], None],
        changed: Callable[[ModelView], None],
        settings: ManagerSettings | None = None,
    ) -> None:
        self._zygote = zygote
        self._repository = repository
        self._devices = devices
        self._publish = publish
        self._withdraw = withdraw
        self._changed = changed
        self._settings = settings or ManagerSettings()
        self._models: dict[ModelName, _Model] = {}
        self._dirty: set[ModelName] = set()
        self._wake = asyncio.Event()
        self._slots = asyncio.Semaphore(self._settings.load_slots)
        self._closing = False
        self._tasks: set[asyncio.Task[None]] = set()
        self.last_turn_s = 0.0
        """When the loop last came round (loop time): the heartbeat behind `/livez`."""

    # --- wishes -------------------------------------------------------------------------------

    def aspire(self, document: ModelDocument, revision: Revision) -> None:
        """Make ``document`` what this node works towards. A newer one replaces an older one."""
        name = document.metadata.name
        model = self._models.setdefault(name, _Model(name))
        if revision == model.aspired_revision and document == model.aspired:
            return
        model.aspired, model.aspired_revision = document, revision
        model.aspiration, orders = aspire(document, revision)
        model.orders.update(orders)
        model.retry_at_s.clear()
        model.attempts.clear()
        for servable in model.servables.values():
            if servable.pool is not None:
                limits = document.spec.limits
                servable.pool.configure(queue=limits.queue, hang_s=limits.hang_s)
        self._publish(self._view(model))
        self._touch(name)

    def forget_model(self, name: ModelName) -> None:
        """The document was deleted: drain, unload, then know it no more."""
        if (model := self._models.get(name)) is not None:
            model.aspired = model.aspired_revision = model.aspiration = None
            model.fallback = None
            self._touch(name)

    def set_quarantined(self, name: ModelName, quarantined: Mapping[Version, Quarantine]) -> None:
        """Which versions of ``name`` must not serve, whatever the document says."""
        model = self._models.setdefault(name, _Model(name))
        model.quarantined = dict(quarantined)
        for servable in list(model.servables.values()):
            if servable.is_loaded and model.is_quarantined(servable.id):
                self._quarantine(model, servable)
            elif servable.state is State.QUARANTINED and not model.is_quarantined(servable.id):
                self._remove(model, servable)
        self._touch(name)

    def set_fallback(self, document: ModelDocument, version: Version, revision: Revision) -> None:
        """The last good version, to be loaded when the aspired one can't serve and nothing does."""
        name = document.metadata.name
        model = self._models.setdefault(name, _Model(name))
        with contextlib.suppress(KeyError):
            order = order_for(document, version)
            id = ServableId(
                name, version, Digest(f"pending:lastgood:{revision}"), order.recipe.key()
            )
            model.orders[id] = order
            model.fallback = id
            self._touch(name)

    # --- looking ------------------------------------------------------------------------------

    def views(self) -> tuple[ModelView, ...]:
        return tuple(self._view(model) for model in self._models.values())

    def view(self, name: ModelName) -> ModelView | None:
        model = self._models.get(name)
        return None if model is None else self._view(model)

    def _view(self, model: _Model) -> ModelView:
        return ModelView(
            name=model.name,
            document=model.document,
            aspired=model.aspired,
            aspired_revision=model.aspired_revision,
            aspiration=model.aspiration,
            in_force=model.in_force,
            servables=tuple(model.servables.values()),
            reason=model.reason,
            swap_s=model.swap_s,
            swaps=model.swaps,
            reloads=model.reloads,
        )

    # --- the loop -----------------------------------------------------------------------------

    async def run(self) -> None:
        """Reconcile until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            self.last_turn_s = loop.time()
            for name in sorted(self._dirty):
                self._dirty.discard(name)
                self._reconcile(name)
            timeout_s = 1.0
            wake_s = self._next_wake_s()
            if wake_s is not None:
                timeout_s = min(timeout_s, max(0.0, wake_s - loop.time()))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(timeout_s):
                    await self._wake.wait()
            self._wake.clear()
            self._wake_expired(loop.time())

    async def close(self) -> None:
        """End every worker and task. Requests in flight must have been drained before."""
        self._closing = True
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        pools = [s.pool for m in self._models.values() for s in m.servables.values() if s.pool]
        await asyncio.gather(*(pool.close() for pool in pools), return_exceptions=True)

    def _touch(self, name: ModelName) -> None:
        self._dirty.add(name)
        self._wake.set()

    def _next_wake_s(self) -> float | None:
        times = list[float]()
        for model in self._models.values():
            wake_s = policy.next_wake_s(self._world(model))
            times += [wake_s] if wake_s is not None else []
            times += model.retry_at_s.values()
        return min(times, default=None)

    def _wake_expired(self, now_s: float) -> None:
        for model in self._models.values():
            wake_s = policy.next_wake_s(self._world(model))
            if wake_s is not None and wake_s <= now_s:
                self._dirty.add(model.name)
            for id, at_s in list(model.retry_at_s.items()):
                if at_s <= now_s:
                    del model.retry_at_s[id]
                    servable = model.servables.get(id)
                    if servable is not None and servable.state is State.FAILED:
                        self._remove(model, servable)
                    self._dirty.add(model.name)

    def _world(self, model: _Model) -> World:
        return World(
            aspiration=model.aspiration,
            in_force=model.in_force,
            servables={id: s.snapshot() for id, s in model.servables.items()},
            now_s=asyncio.get_running_loop().time(),
            fallback=model.fallback,
            is_tight=self._is_tight(model),
        )

    def _is_tight(self, model: _Model) -> bool:
        """Whether what is wanted next only fits once this model's standby has gone."""
        aspiration = model.aspiration
        if aspiration is None or model.in_force.live is None:
            return False
        for id in (aspiration.live, aspiration.canary):
            fetched = model.fetched.get(id) if id is not None else None
            if id is None or id in model.servables or fetched is None:
                continue
            recipe = model.orders[id].recipe
            needed_mb = required_mb(recipe, fetched.bytes) * recipe.replicas
            try:
                if needed_mb > self._devices.free_mb(recipe.device):
                    return True
            except BadDevice:
                continue
        return False

    def _reconcile(self, name: ModelName) -> None:
        model = self._models[name]
        for _ in range(100):
            action = policy.next_action(self._world(model))
            if action is None:
                break
            self._perform(model, action)
        else:
            log.error("reconcile_did_not_converge", model=name)
        if model.aspiration is None and not model.servables:
            del self._models[name]
            self._withdraw(name)
            log.info("model_gone", model=name)
            return
        self._changed(self._view(model))

    def _perform(self, model: _Model, action: policy.Action) -> None:
        match action:
            case policy.Swap(to):
                self._swap(model, to)
            case policy.Load(id):
                self._load(model, id)
            case policy.Abandon(id):
                self._abandon(model, model.servables[id])
            case policy.Forget(id):
                self._remove(model, model.servables[id])
            case policy.Drain(id):
                self._drain(model, model.servables[id])
            case policy.Unload(id):
                self._unload(model, model.servables[id])

    # --- effects ------------------------------------------------------------------------------

    def _swap(self, model: _Model, to: InForce) -> None:
        before = model.in_force
        started_s = time.perf_counter()  # the loop's clock has no microseconds
        model.in_force = to
        if to.revision == model.aspired_revision and to.revision != before.revision:
            model.document = model.aspired
        for servable in model.servables.values():
            if servable.is_loaded:
                role = policy.role(servable.id, to)
                if role is not servable.state:
                    servable.move(role)
        self._publish(self._view(model))
        model.swaps += 1
        model.swap_s = time.perf_counter() - started_s
        log.info(
            "route_swapped",
            model=model.name,
            revision=to.revision,
            live=to.live and to.live.version,
            canary=to.canary and to.canary.version,
            standby=to.standby and to.standby.version,
            before=before.live and before.live.version,
            swap_us=round(model.swap_s * 1e6, 1),
        )

    def _load(self, model: _Model, id: ServableId) -> None:
        order = model.orders[id]
        servable = Servable(id, order.recipe)
        model.servables[id] = servable
        if model.is_quarantined(id):
            servable.move(State.QUARANTINED, model.quarantined[id.version].reason)
            return
        servable.attempts = model.attempts.get(id, 0) + 1
        servable.move(State.FETCHING)
        work = (
            self._fetch(model, servable, order)
            if is_pending(id)
            else self._make_ready(model, servable, order)
        )
        self._start(servable, work)

    def _start(self, servable: Servable, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work, name=f"servable {servable.id}")
        servable.task = task
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _fetch(self, model: _Model, servable: Servable, order: Order) -> None:
        recipe, pending = order.recipe, servable.id
        started_s = time.perf_counter()
        try:
            async with asyncio.timeout(self._settings.fetch_timeout_s):
                fetched = await self._repository.fetch(recipe.source, sha256=recipe.sha256)
        except TimeoutError:
            self._failed(model, servable, FetchFailed("the source did not answer in time"))
            return
        except (LoaderError, OSError) as exc:
            self._failed(model, servable, exc)
            return
        id = ServableId(pending.model, pending.version, fetched.digest, pending.recipe)
        model.orders[id] = model.orders.pop(pending)
        model.fetched[id] = fetched
        self._remove(model, servable)
        existing = model.servables.get(id)
        if existing is not None and existing.state is State.FAILED:
            self._remove(model, existing)
        if model.aspiration is not None:
            model.aspiration = _resolved(model.aspiration, pending, id)
        if model.fallback == pending:
            model.fallback = id
        log.info(
            "servable_fetched",
            servable=str(id),
            digest=fetched.digest,
            bytes=fetched.bytes,
            fetch_s=round(time.perf_counter() - started_s, 4),
        )
        self._touch(model.name)

    async def _make_ready(self, model: _Model, servable: Servable, order: Order) -> None:
        recipe, fetched = order.recipe, model.fetched[servable.id]
        self._repository.lease(fetched.digest)
        try:
            if not fetched.folder.exists():  # evicted while nobody needed it
                fetched = await self._repository.fetch(recipe.source, sha256=recipe.sha256)
            golden: Path | None = None
            if recipe.golden is not None:
                golden = await self._repository.fetch_file(recipe.golden)
            async with self._slots:
                servable.move(State.LOADING)
                self._changed(self._view(model))
                loading = Loading(
                    recipe=recipe,
                    folder=fetched.folder,
                    golden=golden,
                    predecessor=self._predecessor(model, servable.id),
                    compatibility=order.compatibility,
                    spawn=self._zygote.spawn,
                    reserve=partial(self._reserve, servable, fetched),
                    on_phase=partial(self._phase_ended, model, servable),
                    timeout_s=self._settings.load_timeout_s,
                )
                ready = await loading.run()
        except (PaddlewheelError, OSError) as exc:
            self._give_back(servable)
            self._failed(model, servable, exc)
            return
        except BaseException:
            self._give_back(servable)
            raise
        document = model.aspired or model.document
        limits = document.spec.limits if document is not None else None
        servable.signature = ready.signature
        servable.pool = WorkerPool(
            servable.id,
            ready.signature,
            ready.workers,
            make_worker=loading.replacement,
            oversight=Oversight(on_fault=partial(self._fault, model, servable)),
            queue=limits.queue if limits else 256,
            hang_s=limits.hang_s if limits else 5.0,
        )
        servable.loaded_at = datetime.now(UTC)
        servable.move(State.READY)
        model.reloads["ready"] += 1
        log.info("servable_ready", servable=str(servable.id), **servable.phases_ms)
        self._publish(self._view(model))
        self._touch(model.name)

    def _phase_ended(self, model: _Model, servable: Servable, phase: str, took_s: float) -> None:
        servable.phases_ms[phase] = round(took_s * 1000, 3)
        if phase == "load":
            servable.move(State.WARMING)
            self._changed(self._view(model))

    def _predecessor(self, model: _Model, id: ServableId) -> Predecessor | None:
        live = model.in_force.live
        if live is None or live == id or (servable := model.servables.get(live)) is None:
            return None
        if servable.signature is None:
            return None
        return Predecessor(live.version, servable.signature)

    def _reserve(self, servable: Servable, fetched: Fetched) -> None:
        recipe = servable.recipe
        memory_mb = required_mb(recipe, fetched.bytes) * recipe.replicas
        priority = Priority.parse(recipe.priority)
        try:
            self._devices.reserve(str(servable.id), recipe.device, memory_mb, priority=priority)
        except (OutOfQuota, Cordoned, BadDevice) as exc:
            raise NotAdmitted("memory", str(exc)) from exc
        servable.memory_mb = memory_mb

    def _failed(self, model: _Model, servable: Servable, error: Exception) -> None:
        reason = str(error) or repr(error)
        servable.move(State.FAILED, reason)
        model.reloads["failed"] += 1
        may_heal = isinstance(error, WorkerDied | OSError) or (
            isinstance(error, FetchFailed) and error.retryable
        )
        if may_heal:
            model.attempts[servable.id] = servable.attempts
            delay_s = min(RETRY_MAX_S, RETRY_FIRST_S * 2 ** (servable.attempts - 1))
            model.retry_at_s[servable.id] = asyncio.get_running_loop().time() + delay_s
        log.warning("servable_failed", servable=str(servable.id), reason=reason)
        self._publish(self._view(model))
        self._touch(model.name)

    def _abandon(self, model: _Model, servable: Servable) -> None:
        if servable.task is not None:
            servable.task.cancel()
        log.info("servable_abandoned", servable=str(servable.id), state=servable.state)
        self._remove(model, servable)

    def _remove(self, model: _Model, servable: Servable) -> None:
        servable.move(State.GONE)
        if model.servables.get(servable.id) is servable:
            del model.servables[servable.id]

    def _drain(self, model: _Model, servable: Servable) -> None:
        document = model.document or model.aspired
        drain_s = document.spec.limits.drain_s if document is not None else 30.0
        servable.drain_by_s = asyncio.get_running_loop().time() + drain_s
        servable.move(State.DRAINING)
        self._publish(self._view(model))
        assert servable.pool is not None
        servable.pool.on_idle(partial(self._touch, model.name))
        log.info("servable_draining", servable=str(servable.id))

    def _unload(self, model: _Model, servable: Servable) -> None:
        pool, servable.pool = servable.pool, None
        self._remove(model, servable)

        async def end() -> None:
            if pool is not None:
                await pool.close()
            self._give_back(servable)
            log.info("servable_unloaded", servable=str(servable.id))
            self._touch_if_known(model.name)

        self._start(servable, end())

    def _touch_if_known(self, name: ModelName) -> None:
        if name in self._models:
            self._touch(name)

    def _fault(self, model: _Model, servable: Servable, report: FaultReport) -> bool:
        fault = report.fault
        servable.errors[fault.code] += 1
        log.warning(
            "servable_fault",
            servable=str(servable.id),
            code=fault.code,
            fault_class=fault.fault_class,
            message=fault.message,
            pid=report.pid,
        )
        self._touch_if_known(model.name)
        return False

    def _quarantine(self, model: _Model, servable: Servable) -> None:
        servable.move(State.QUARANTINED, model.quarantined[servable.id.version].reason)
        if servable.pool is not None:
            servable.pool.retire()
        self._reconcile(model.name)
        pool, servable.pool = servable.pool, None

        async def end() -> None:
            if pool is not None:
                await pool.close()
            self._give_back(servable)

        self._start(servable, end())

    def _give_back(self, servable: Servable) -> None:
        """Its memory and its files may go to others."""
        self._devices.release(str(servable.id))
        self._repository.release(servable.id.digest)


def _resolved(aspiration: Aspiration, pending: ServableId, id: ServableId) -> Aspiration:
    return Aspiration(
        revision=aspiration.revision,
        live=id if aspiration.live == pending else aspiration.live,
        canary=id if aspiration.canary == pending else aspiration.canary,
        bake_s=aspiration.bake_s,
    )


__all__ = ["LOADED", "Manager", "ManagerSettings", "ModelView"]
