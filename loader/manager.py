"""The reconcile loop of one node: the only writer of servable states and of what is in force.

Everybody else leaves a wish (`aspire`, `prepare`, `forget_model`, `set_quarantined`,
`set_fallback`) and the loop compares it with what is (`loader.policy`). Long work (fetching,
loading, ending processes) runs in tasks that report back; a step itself never waits, so routing
follows the decision in the same turn of the event loop. Faults come in through
`loader.fault_desk`.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Protocol

import structlog

from loader import policy
from loader.devices import BadDevice, Cordon, DevicePool
from loader.drills import DrillBox
from loader.fault_desk import FaultDesk
from loader.faults import Fault
from loader.lifecycle import UNDERWAY, State
from loader.model import Model, ModelView
from loader.plan import fallback_id, order_for
from loader.policy import InForce, World
from loader.readying import Readying
from loader.repository import ModelRepository
from loader.room import is_tight
from loader.servable import Servable
from loader.upkeep import RETRY_FIRST_S, Upkeep
from loader.wishes import take_aspired, take_prepared
from loader.zygote import Zygote
from registry.events import EventType
from registry.names import Digest, ModelName, NodeId, Revision, ServableId, Version
from registry.records import Quarantine
from registry.spec import ModelDocument

log = structlog.get_logger(__name__)

IDLE_TURN_S = 1.0
"""The loop comes round at least this often: its heartbeat."""


class Listener(Protocol):
    """Told by the manager, in the same turn of the event loop in which it happens."""

    def publish(self, view: ModelView) -> None:
        """What may be routed to changed."""
        ...

    def withdraw(self, model: ModelName) -> None:
        """The model is gone from this node."""
        ...

    def changed(self, view: ModelView) -> None:
        """What a status shows may have changed."""
        ...

    def quarantined(
        self, model: ModelName, servable: ServableId, quarantine: Quarantine, fault: Fault
    ) -> None:
        """This node took a version out; the fleet is to know."""
        ...

    def baked(self, model: ModelName, servable: ServableId, revision: Revision) -> None:
        """A live version served through its whole bake."""
        ...

    def happened(self, event: EventType, subject: str, data: Mapping[str, Any]) -> None:
        """Something that goes into `P/events`."""
        ...


@dataclass(frozen=True, slots=True)
class ManagerSettings:
    node: NodeId
    load_timeout_s: float = 300.0
    fetch_timeout_s: float = 3600.0
    load_slots: int = 2
    """How many servables may be loading at once on this node."""


class Manager:
    """Keeps the servables of one node in step with the documents."""

    def __init__(
        self,
        *,
        zygote: Zygote,
        repository: ModelRepository,
        devices: DevicePool,
        listener: Listener,
        settings: ManagerSettings,
        drills: DrillBox | None = None,
    ) -> None:
        self._devices = devices
        self._listener = listener
        self._settings = settings
        self._desk = FaultDesk(self, drills=drills)
        self._models: dict[ModelName, Model] = {}
        self._dirty: set[ModelName] = set()
        self._wake = asyncio.Event()
        readying = Readying(
            zygote=zygote,
            repository=repository,
            devices=devices,
            load_timeout_s=settings.load_timeout_s,
            fetch_timeout_s=settings.fetch_timeout_s,
            load_slots=settings.load_slots,
            is_waited=self._is_waited,
        )
        self._upkeep = Upkeep(self, readying, self._desk)
        self.last_turn_s = asyncio.get_running_loop().time()
        """When the loop last came round (loop time): the heartbeat behind `/livez`."""

    # --- wishes -------------------------------------------------------------------------------

    def aspire(
        self, document: ModelDocument, revision: Revision, *, is_tentative: bool = False
    ) -> None:
        """Make ``document`` what this node works towards. A newer one replaces an older one.

        One that was prepared, or was in force just before, comes into force by a change of
        pointer.
        is_tentative: the fleet may still take it back: the version before stays loaded till it
        is said that it may not, however long that takes.
        """
        model = self._model(document.name)
        model.is_tentative = is_tentative
        if take_aspired(model, document, revision):
            self._try_all_again(model)
        self.publish(model)
        self.touch(model.name)

    def prepare(self, document: ModelDocument, revision: Revision) -> None:
        """Make the versions of ``document`` ready beside what serves; routing stays as it is."""
        model = self._model(document.name)
        if take_prepared(model, document, revision):
            self._try_all_again(model)
        self.publish(model)
        self.touch(model.name)

    def drop_prepared(self, name: ModelName) -> None:
        """Prepare nothing: what was loaded only for that goes."""
        model = self._models.get(name)
        if model is not None and model.prepared is not None:
            model.prepared = None
            self.publish(model)
            self.touch(name)

    def await_base(self, name: ModelName, *, is_awaited: bool = True) -> None:
        """No document is to be in force: one is still being looked up, or there is none to find.

        What serves goes on. Until something serves, what is prepared leaves the memory to it, and
        the last good version is loaded.
        """
        if not is_awaited and name not in self._models:
            return
        model = self._model(name)
        if model.awaits_base != is_awaited or not model.keeps:
            model.awaits_base, model.keeps = is_awaited, True
            model.is_deleted = False
            self.touch(name)

    def _try_all_again(self, model: Model) -> None:
        """A new document is a new chance for all that failed."""
        model.retry_at_s.clear()
        model.attempts.clear()
        for servable in [s for s in model.servables.values() if s.state is State.FAILED]:
            self._upkeep.remove(model, servable)
        model.trouble = None

    def forget_model(self, name: ModelName) -> None:
        """The document was deleted: drain, unload, then know it no more."""
        if (model := self._models.get(name)) is not None:
            model.aspired = model.aspired_revision = model.aspiration = None
            model.prepared, model.awaits_base, model.keeps = None, False, False
            model.fallback, model.is_deleted = None, True
            model.former.clear()
            self.touch(name)

    def set_quarantined(self, name: ModelName, quarantined: Mapping[Version, Quarantine]) -> None:
        """Which versions of ``name`` the fleet says must not serve, whatever the document says."""
        model = self._model(name)
        for version in model.quarantined.keys() - quarantined.keys():
            model.own_quarantines.pop(version, None)  # released
        model.quarantined = dict(quarantined)
        self._apply_quarantines(model)

    def keep_quarantined(self, name: ModelName, version: Version, quarantine: Quarantine) -> None:
        """Take up a quarantine of this node's own from before its restart."""
        model = self._model(name)
        model.own_quarantines[version] = quarantine
        self._apply_quarantines(model)

    def release(self, name: ModelName, version: Version) -> None:
        """Lift this node's own quarantine of ``version``."""
        model = self._models.get(name)
        if model is not None and model.own_quarantines.pop(version, None) is not None:
            self._apply_quarantines(model)

    def set_fallback(self, document: ModelDocument, version: Version, revision: Revision) -> None:
        """The last good version, to be loaded when the aspired one can't serve and nothing does."""
        model = self._model(document.name)
        if model.is_deleted:
            return
        with contextlib.suppress(KeyError):
            order = order_for(document, version)
            id = fallback_id(order.recipe, revision)
            if id not in model.orders:
                model.orders[id] = order
                model.fallback, model.fallback_revision = id, revision
                model.fallback_document = document
            self.touch(model.name)

    def remember_served(
        self, name: ModelName, version: Version, source: str, digest: Digest
    ) -> None:
        """What was in force before a restart: served on from the cache if its source is gone."""
        self._model(name).served[version, source] = digest

    # --- looking ------------------------------------------------------------------------------

    def views(self) -> tuple[ModelView, ...]:
        return tuple(model.view() for model in self._models.values())

    def view(self, name: ModelName) -> ModelView | None:
        model = self._models.get(name)
        return None if model is None else model.view()

    @property
    def desk(self) -> FaultDesk:
        return self._desk

    # --- the loop -----------------------------------------------------------------------------

    async def run(self) -> None:
        """Reconcile until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            self.last_turn_s = loop.time()
            for name in sorted(self._dirty):
                self._reconcile_contained(name)
            wake_s = self._next_wake_s()
            timeout_s = IDLE_TURN_S
            if wake_s is not None:
                timeout_s = min(timeout_s, max(0.001, wake_s - loop.time()))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(timeout_s):
                    await self._wake.wait()
            self._wake.clear()
            self._wake_expired(loop.time())

    async def close(self) -> None:
        """End every worker and task. Requests in flight must have been drained before."""
        self._desk.close()
        await self._upkeep.close()
        pools = [s.pool for m in self._models.values() for s in m.servables.values() if s.pool]
        await asyncio.gather(*(pool.close(timeout_s=0.2) for pool in pools), return_exceptions=True)

    def _is_waited(self) -> bool:
        """Whether requests wait behind others for a worker, of whichever model."""
        return any(
            servable.pool is not None and servable.pool.is_backed_up
            for model in self._models.values()
            for servable in model.servables.values()
        )

    def _model(self, name: ModelName) -> Model:
        return self._models.setdefault(name, Model(name))

    def _reconcile_contained(self, name: ModelName) -> None:
        """A bug met in one model must not take the others, or the node, with it."""
        try:
            self._reconcile(name)
        except Exception as exc:
            log.exception("reconcile_failed", model=name)
            self._dirty.discard(name)
            if (model := self._models.get(name)) is not None:
                model.trouble = f"internal error: {exc!r}"
                asyncio.get_running_loop().call_later(RETRY_FIRST_S, self._try_again, model)

    def _try_again(self, model: Model) -> None:
        """After a step that failed half way: what is in force may never have been published."""
        self.publish(model)
        self.touch(model.name)

    def touch_all(self) -> None:
        for name in self._models:
            self.touch(name)

    def changed(self, model: Model) -> None:
        self._listener.changed(model.view())

    def happened(self, event: EventType, subject: str, data: Mapping[str, Any]) -> None:
        self._listener.happened(event, subject, data)

    def publish(self, model: Model) -> None:
        """Contained: it is called on the path of a request whose version is taken out."""
        if self._models.get(model.name) is not model:
            return  # gone from this node
        try:
            self._listener.publish(model.view())
        except Exception:
            log.exception("publish_failed", model=model.name)
            asyncio.get_running_loop().call_later(RETRY_FIRST_S, self._try_again, model)

    def touch(self, name: ModelName) -> None:
        if name in self._models:
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
        for model in list(self._models.values()):
            try:
                self._look_after(model, now_s)
            except Exception:
                log.exception("look_failed", model=model.name)

    def _look_after(self, model: Model, now_s: float) -> None:
        """What time alone brings: the end of a bake, a retry, workers that came and went."""
        wake_s = policy.next_wake_s(self._world(model))
        if wake_s is not None and wake_s <= now_s:
            self._dirty.add(model.name)
        for id, at_s in list(model.retry_at_s.items()):
            if at_s <= now_s:
                del model.retry_at_s[id]
                servable = model.servables.get(id)
                if servable is not None and servable.state is State.FAILED:
                    self._upkeep.remove(model, servable)
                self._dirty.add(model.name)
        if model.trouble is not None and model.answered > model.trouble_answered:
            self.troubled(model, None)
        self._report_bake(model)
        self._look_at_workers(model)

    def _look_at_workers(self, model: Model) -> None:
        """Workers die and are replaced without a step of ours: tell the status."""
        for servable in model.servables.values():
            if servable.pool is not None:
                workers = tuple((view.pid, view.alive) for view in servable.pool.workers())
                if workers != servable.shown_workers:
                    servable.shown_workers = workers
                    self._dirty.add(model.name)

    def _world(self, model: Model) -> World:
        return World(
            aspiration=model.aspiration,
            in_force=model.in_force,
            servables={id: s.snapshot() for id, s in model.servables.items()},
            now_s=asyncio.get_running_loop().time(),
            fallback=model.fallback,
            fallback_revision=model.fallback_revision,
            is_tight=is_tight(model, self._devices),
            suspected=model.suspected,
            prepared=None if model.prepared is None else model.prepared.aspiration,
            awaits_base=model.awaits_base,
            keeps=model.keeps,
            is_tentative=model.is_tentative,
        )

    def _reconcile(self, name: ModelName) -> None:
        self._dirty.discard(name)
        model = self._models.get(name)
        if model is None:
            return
        for _ in range(100):
            action = policy.next_action(self._world(model))
            if action is None:
                break
            self._perform(model, action)
        else:
            log.error("reconcile_did_not_converge", model=name)
        if model.is_over:
            if not model.quarantined and not model.own_quarantines:
                del self._models[name]
            self._desk.drop(name)
            self._listener.withdraw(name)
            log.info("model_gone", model=name)
            return
        if model.in_force.revision == model.aspired_revision and model.document != model.aspired:
            # The same revision with other words: a store restored from a backup.
            self._take_up(model)
            self.publish(model)
        self._report_bake(model)
        self._listener.changed(model.view())

    def _perform(self, model: Model, action: policy.Action) -> None:
        match action:
            case policy.Swap(to):
                self._swap(model, to)
            case policy.Load(id):
                self._upkeep.load(model, id)
            case policy.Abandon(id):
                self._upkeep.abandon(model, model.servables[id])
            case policy.Forget(id):
                self._upkeep.remove(model, model.servables[id])
                self._desk.forget(model, id)
            case policy.Drain(id):
                self._upkeep.drain(model, model.servables[id])
            case policy.Unload(id):
                self._upkeep.unload(model, model.servables[id])

    # --- routing ------------------------------------------------------------------------------

    def _swap(self, model: Model, to: InForce) -> None:
        before = model.in_force
        started_s = time.perf_counter()  # the loop's clock has no microseconds
        model.in_force = to
        if to.revision == model.aspired_revision:
            self._take_up(model)
        elif to.live is not None and to.live == model.fallback and model.document is None:
            model.document = model.fallback_document
        for servable in model.servables.values():
            if servable.is_loaded:
                role = policy.role(servable.id, to)
                if role is not servable.state:
                    servable.move(role)
        self.publish(model)
        model.swaps += 1
        model.swap_s = time.perf_counter() - started_s
        facts = {
            "revision": to.revision,
            "live": to.live and to.live.version,
            "canary": to.canary and to.canary.version,
            "standby": to.standby and to.standby.version,
            "before": before.live and before.live.version,
            "swap_us": round(model.swap_s * 1e6, 1),
        }
        log.info("route_swapped", model=model.name, **facts)
        self._listener.happened(EventType.ROUTE_SWAPPED, model.name, facts)
        if to.revision != before.revision and to.revision == model.aspired_revision:
            self._listener.happened(EventType.CONFIG_APPLIED, model.name, {"revision": to.revision})

    def _take_up(self, model: Model) -> None:
        """The aspired document is in force now, its limits too."""
        if model.document == model.aspired or model.aspired is None:
            return
        model.document = model.aspired
        limits, rollback = model.document.spec.limits, model.document.spec.rollback
        for servable in model.servables.values():
            if servable.pool is not None:
                servable.pool.configure(queue=limits.queue, hang_s=limits.hang_s)
                servable.pool.oversee(self._desk.oversight(model, servable, rollback))
        self._desk.configure(model, rollback)

    def _report_bake(self, model: Model) -> None:
        """What serves after its bake, or after a rollback to it, is the last good version."""
        in_force = model.in_force
        if in_force.live is None or model.aspiration is None or model.trouble is not None:
            return
        if model.document is None or not model.document.spec.lists(in_force.live.version):
            return  # the record that was written when it was asked for says where it comes from
        if in_force.bake_until_s > asyncio.get_running_loop().time():
            return
        proven = (in_force.live, in_force.revision)
        if model.baked != proven:
            model.baked = proven
            self._listener.baked(model.name, *proven)

    # --- quarantine ---------------------------------------------------------------------------

    def _apply_quarantines(self, model: Model) -> None:
        for servable in list(model.servables.values()):
            quarantine = model.quarantine_of(servable.id)
            if quarantine is not None and servable.is_loaded:
                self.take_out(model, servable, quarantine)
            elif quarantine is not None and servable.state in UNDERWAY:
                self._upkeep.abandon(model, servable)  # loaded again, it is what it says
            elif quarantine is None and servable.state is State.QUARANTINED:
                self._upkeep.remove(model, servable)
                self._desk.forget(model, servable.id)
                subject = f"{model.name}/{servable.id.version}"
                self._listener.happened(EventType.RELEASE, subject, {})
        self.touch(model.name)

    def take_out(self, model: Model, servable: Servable, quarantine: Quarantine) -> None:
        """Route away at once; then end what failed."""
        before = model.in_force
        model.suspected -= {servable.id}
        servable.move(State.QUARANTINED, quarantine.reason)
        if servable.pool is not None:
            servable.pool.retire()
        self._reconcile_contained(model.name)
        self._upkeep.end_pool(model, servable)
        if servable.id == before.live:
            model.rollbacks[str(quarantine.code)] += 1
            to = model.in_force.live
            self._listener.happened(
                EventType.ROLLBACK,
                f"{model.name}/{servable.id.version}",
                {"to": to and to.version, "code": quarantine.code, "reason": quarantine.reason},
            )
        self.publish(model)

    # --- what the fault desk has done (loader.fault_desk.Deeds) ---------------------------------

    def suspect(self, model: Model, id: ServableId) -> None:
        model.suspected |= {id}
        log.warning("servable_suspected", servable=str(id))
        self._reconcile_contained(model.name)

    def acquit(self, model: Model, id: ServableId) -> None:
        if id in model.suspected:
            model.suspected -= {id}
            log.info("servable_acquitted", servable=str(id))
            self._reconcile_contained(model.name)

    def quarantine(self, model: Model, servable: Servable, fault: Fault, reason: str) -> None:
        id = servable.id
        if not servable.is_loaded:
            return
        quarantine = Quarantine(
            reason=reason,
            code=fault.code,
            nodes=(self._settings.node,),
            at=datetime.now(UTC),
            digest=id.digest,
        )
        model.own_quarantines[id.version] = quarantine
        log.warning("servable_quarantined", servable=str(id), code=fault.code, reason=reason)
        self.take_out(model, servable, quarantine)
        self._listener.quarantined(model.name, id, quarantine, fault)

    def cordon(self, device: str, cordon: Cordon) -> None:
        try:
            if not self._devices.cordon(device, cordon):
                return
        except BadDevice:
            return
        log.error("device_cordoned", device=device, code=cordon.code, reason=cordon.reason)
        self._listener.happened(
            EventType.DEVICE_CORDONED, f"{self._settings.node}/{device}", cordon.as_json()
        )
        for name in self._models:
            self.touch(name)

    def is_cordoned(self, device: str) -> bool:
        with contextlib.suppress(BadDevice):
            return self._devices.cordoned(device) is not None
        return False

    def uncordon(self, device: str) -> None:
        """The device is well again: what was held against it is forgotten."""
        if not self._devices.uncordon(device):
            return
        log.info("device_uncordoned", device=device)
        self._listener.happened(EventType.DEVICE_UNCORDONED, f"{self._settings.node}/{device}", {})
        for model in self._models.values():
            for servable in model.servables.values():
                if servable.recipe.device == device:
                    self._desk.forget(model, servable.id)
                    model.suspected -= {servable.id}
            self.touch(model.name)

    def noted(self, model: Model) -> None:
        self.touch(model.name)

    def troubled(self, model: Model, reason: str | None) -> None:
        if model.trouble != reason:
            model.trouble = reason
            model.trouble_answered = model.answered
            log.warning("model_troubled", model=model.name, reason=reason)
            self.touch(model.name)
