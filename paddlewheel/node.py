"""One node: the front process, wired. It never imports paddle (docs/architecture.md).

Order at start: HTTP listens and the ready line is printed; then the snapshot, the zygote and etcd,
none of which the others wait for. Order at the end: unready, lease gone, drain, workers ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import signal
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import orjson
import structlog
import uvloop

import paddlewheel
from loader.devices import Cordon as DeviceCordon
from loader.devices import DevicePool, DeviceUsage
from loader.drills import DrillBox
from loader.faults import Fault
from loader.manager import Manager, ManagerSettings
from loader.model import ModelView
from loader.nvml import GpuWatcher
from loader.prober import Prober
from loader.repository import ModelRepository
from loader.zygote import Zygote, ZygoteFailed
from paddlewheel.access import AccessControl
from paddlewheel.admission import DocumentAdmission
from paddlewheel.applied import Applied
from paddlewheel.follower import Follower
from paddlewheel.front import BadTls
from paddlewheel.front_door import Doors
from paddlewheel.gating import may_be_last_good
from paddlewheel.gpu_quota import quotas_mb
from paddlewheel.identity import IdTaken, Lodging, claim, guard
from paddlewheel.logs import configure_logs
from paddlewheel.node_drills import NodeDrills
from paddlewheel.pipelines import PipelineKeeper
from paddlewheel.readings import readings
from paddlewheel.report import model_status, one_line, servable_status
from paddlewheel.rollout.coordinator import TTL_MAX_S, Coordinator
from paddlewheel.routes import Routes
from paddlewheel.samples import SampleWriter
from paddlewheel.settings import NodeSettings
from paddlewheel.transforms.pool import TransformPool
from paddlewheel.verdicts import Verdicts
from registry.etcd import EtcdStore
from registry.event_writer import EventWriter
from registry.events import EventType, node_source
from registry.keys import Keys
from registry.names import ModelName, Revision, ServableId
from registry.records import Cordon, DeviceRecord, NodeRecord, Quarantine, rfc3339_ms
from registry.session import Session
from router.app import App
from router.metrics import Reading
from router.ports import Check, Health

log = structlog.get_logger(__name__)

ZYGOTE_RETRY_S = 5.0
PART_RETRY_S = 2.0
TELL_AFTER_S = 0.01
LEAVE_FIRST_S = 0.5
"""How long accepting goes on while this node's keys are taken out of etcd."""


def run_node(settings: NodeSettings) -> int:
    """Serve until SIGTERM or SIGINT; returns the exit status."""
    configure_logs()

    async def serve() -> int:
        try:
            node = Node(settings)  # made inside the loop that its parts belong to
        except IdTaken as exc:
            log.error("node_id_taken", node=settings.id, reason=str(exc))
            return 1
        return await node.run()

    return uvloop.run(serve())


class Node:
    """The parts of one node and how they hang together. Satisfies `router.ports.NodeView`."""

    def __init__(self, settings: NodeSettings, *, zygote: Zygote | None = None) -> None:
        """Raises `IdTaken`.

        zygote: what forks workers, where that is not to be a process with paddle in it.
        """
        self._settings = settings
        cache = settings.cache.expanduser()
        folder = cache / "nodes" / settings.id
        self._lodging = Lodging(folder, settings.id)
        self._keys = Keys(settings.prefix)
        self._started_at = datetime.now(UTC)
        self._draining = False
        self._unreported: set[ModelName] = set()
        self._was_ready = False
        self._stop = asyncio.Event()
        self._baked: dict[ModelName, tuple[ServableId, Revision]] = {}
        """What served through its bake and is not told of yet."""
        self._routes = Routes()
        self._store = EtcdStore.connect(settings.etcd)
        self._session = Session(self._store, settings.lease_ttl_s)
        self._zygote = zygote or Zygote()
        self._devices = DevicePool(quotas_mb(settings.devices))
        self._repository = ModelRepository(
            cache / "models",
            max_bytes=settings.cache_max_mb * 2**20 if settings.cache_max_mb else None,
            allow=settings.allow_sources,
        )
        drills = DrillBox() if settings.enable_drills else None
        self._manager = Manager(
            zygote=self._zygote,
            repository=self._repository,
            devices=self._devices,
            listener=self,
            settings=ManagerSettings(settings.id, load_timeout_s=settings.load_timeout_s),
            drills=drills,
        )
        self._prober = Prober(self._manager, self._devices)
        self._gpus = GpuWatcher(visible=os.environ.get("CUDA_VISIBLE_DEVICES"))
        self._claimed = asyncio.Event()
        self._taken = ""
        """Why this node may not be one: another has its id."""
        self._follower = Follower(
            store=self._store,
            keys=self._keys,
            node=settings.id,
            manager=self._manager,
            admission=DocumentAdmission(settings.allow_sources, self._devices, self._manager),
            labels=settings.labels,
            snapshot_path=folder / "snapshot.json",
            on_seen=self._seen,
            on_standing=self._stood,
        )
        self._verdicts = Verdicts(
            store=self._store,
            keys=self._keys,
            node=settings.id,
            manager=self._manager,
            path=folder / "quarantines.json",
        )
        self._applied = Applied(folder / "applied.json")
        self._events = EventWriter(self._store, self._keys, node_source(settings.id))
        self._coordinator = Coordinator(
            self._store, self._keys, settings.id,
            ttl_s=min(settings.lease_ttl_s, TTL_MAX_S), emit=self._events.emit,
        )  # fmt: skip
        self._app = App(
            self,
            product_version=paddlewheel.__version__,
            drills=None if drills is None else NodeDrills(drills, self._manager),
        )
        self._app.metrics.add(self._readings)
        self._app.metrics.add(self._routes.windows.readings)
        self._samples = SampleWriter(self._routes.windows, self._session, self._keys, settings.id)
        self._transforms = TransformPool(settings.transform_workers)
        self._pipelines = PipelineKeeper(
            store=self._store,
            keys=self._keys,
            node=settings.id,
            session=self._session,
            transforms=self._transforms,
            endpoint=self._app.pipelines,
            snapshot_path=folder / "pipelines.json",
        )
        self._access = AccessControl(
            self._app,
            store=self._store,
            keys=self._keys,
            required=settings.front.require_access,
            is_node=True,
            snapshot=folder / "gateway.json",
        )
        self._app.access_report = self._access.report
        self._doors = Doors(self._app, settings.host, settings.port, settings.front)

    # --- what the front door asks (router.ports.NodeView) -------------------------------------

    @property
    def node_id(self) -> str:
        return self._settings.id

    def health(self) -> Health:
        checks = [
            Check("draining", not self._draining, "draining" if self._draining else ""),
            Check(
                "configs_known",
                self._follower.configs_known.is_set(),
                ""
                if self._follower.configs_known.is_set()
                else "neither etcd nor a snapshot so far",
            ),
            self._access.check(),
        ]
        cordoned = {
            usage.id: usage.cordoned
            for usage in self._devices.usage()
            if usage.cordoned is not None
        }
        for view in self._manager.views():
            document = view.aspired or view.prepared or view.document
            if not view.is_required or document is None:
                continue
            devices = {s.recipe.device for s in view.servables if s.id in view.in_force.ids()}
            on = devices or {document.spec.placement.device}
            cordon = next((cordoned[device] for device in sorted(on & cordoned.keys())), None)
            if cordon is not None:
                detail = f"its device is cordoned: {cordon.reason}"
            else:
                detail = "" if view.can_serve else (view.reason or "no worker is alive")
            checks.append(Check(f"model:{view.name}", not detail, detail))
        ready = all(check.ok for check in checks)
        self._was_ready = self._was_ready or ready
        silent_s = asyncio.get_running_loop().time() - self._manager.last_turn_s
        live = silent_s < 2 * self._settings.lease_ttl_s
        checks.append(Check("control_loop", live, f"last turn {silent_s:.1f} s ago"))
        # For people: none of these makes a node that serves unready.
        for device, cordon in cordoned.items():
            checks.append(Check(f"device:{device}", False, f"cordoned: {cordon.reason}"))
        checks += self._access.remarks()
        checks.append(Check("etcd_lease", True, "held" if self._session.has_lease else "lost"))
        return Health(ready=ready, started=self._was_ready, live=live, checks=checks)

    def servables(self) -> Sequence[Mapping[str, Any]]:
        return [
            servable_status(servable).to_dict()
            for view in self._manager.views()
            for servable in view.servables
        ]

    # --- what the manager tells (loader.manager.Listener) ---------------------------------------

    def publish(self, view: ModelView) -> None:
        self._app.publish(self._routes.put(view))
        self._pipelines.models_changed()
        self._applied.note(view)

    def withdraw(self, model: ModelName) -> None:
        self._app.publish(self._routes.remove(model))
        self._pipelines.models_changed()
        self._applied.forget(model)
        self._baked.pop(model, None)
        self._report(model)  # of a refused document there is still something to say
        self._announce()

    def changed(self, view: ModelView) -> None:
        if not self._unreported:
            self._soon(self._report_changed)
        self._unreported.add(view.name)

    def _report_changed(self) -> None:
        names, self._unreported = self._unreported, set()
        for name in sorted(names):
            self._report(name)
        self._announce()

    def _soon(self, call: Callable[..., object], *args: Any) -> None:
        """After the requests that wait for a rollback were sent on: telling others can wait."""
        asyncio.get_running_loop().call_later(TELL_AFTER_S, call, *args)

    def quarantined(
        self, model: ModelName, servable: ServableId, quarantine: Quarantine, fault: Fault
    ) -> None:
        self._soon(self._verdicts.quarantined, model, servable, quarantine, fault)
        data = {
            "code": quarantine.code,
            "class": str(fault.fault_class),
            "reason": quarantine.reason,
        }
        self.happened(EventType.QUARANTINE, f"{model}/{servable.version}", data)

    def baked(self, model: ModelName, servable: ServableId, revision: Revision) -> None:
        self._baked[model] = (servable, revision)
        self._tell_baked(model)

    def _tell_baked(self, model: ModelName) -> None:
        """The last good version is the fleet's: one in force on some nodes only has to wait."""
        if (baked := self._baked.get(model)) is None:
            return
        servable, revision = baked
        may_be = may_be_last_good(revision, self._follower.rollout(model))
        if may_be is not None:
            del self._baked[model]
        if may_be:
            self._verdicts.baked(model, servable, revision, datetime.now(UTC))

    def happened(self, event: EventType, subject: str, data: Mapping[str, Any]) -> None:
        self._soon(self._events.emit, event, subject, data)

    def _seen(self, model: ModelName) -> None:
        self._report(model)
        seen = self._follower.seen.get(model)
        if seen is not None and not seen.accepted:
            data = {"revision": seen.revision, "errors": [one_line(e) for e in seen.errors[:5]]}
            self.happened(EventType.CONFIG_REJECTED, model, data)

    def _stood(self, model: ModelName) -> None:
        """The fleet's word on a model changed: the canary's share of traffic, or the status."""
        record = self._follower.rollout(model)
        canary = None if record is None else record.canary
        view = self._manager.view(model)
        if self._routes.steer(model, canary) and view is not None:
            self._app.publish(self._routes.put(view))
        self._tell_baked(model)
        self._report(model)

    def _report(self, model: ModelName) -> None:
        """Write the model's status, on change only (the session compares)."""
        seen, view = self._follower.seen.get(model), self._manager.view(model)
        key = self._keys.status(model, self._settings.id)
        if seen is None and (view is None or not view.servables):
            self._session.remove(key)
            return
        status = model_status(model, self._settings.id, seen, view)
        self._session.set(key, status.to_json())

    def _announce(self) -> None:
        self._session.set(self._keys.node(self._settings.id), self._record().to_json())

    def _record(self) -> NodeRecord:
        return NodeRecord(
            id=self._settings.id,
            http=self._settings.advertise or self._doors.http,
            started_at=self._started_at,
            devices=tuple(_device_record(usage) for usage in self._devices.usage()),
            labels=self._settings.labels,
            version=paddlewheel.__version__,
            draining=self._draining,
            lease_ttl_s=self._settings.lease_ttl_s,
            uid=self._lodging.uid,
        )

    def _readings(self) -> Iterable[Reading]:
        return readings(
            self._manager, self._session, self._follower, self._devices, self._gpus.readings
        )

    # --- life ---------------------------------------------------------------------------------

    def stop(self) -> None:
        """Drain, then let `run` return."""
        self._stop.set()

    async def run(self, *, with_signals: bool = True) -> int:
        """Serve until SIGTERM or SIGINT, or `stop`; returns the exit status.

        with_signals: not where several nodes share a process.
        """
        settings = self._settings
        loop = asyncio.get_running_loop()
        if with_signals:
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.add_signal_handler(number, self._stop.set)
        self._access.restore()
        try:
            await self._doors.open()
        except (OSError, BadTls) as exc:
            log.error("cannot_listen", address=f"{settings.host}:{settings.port}", reason=str(exc))
            await self._store.close()
            return 1
        self._app.publish(self._routes.serving)
        self._print_ready()
        async with contextlib.AsyncExitStack() as stack:
            stack.callback(self._lodging.leave)
            stack.push_async_callback(self._store.close)
            stack.push_async_callback(self._zygote.close)
            stack.push_async_callback(self._manager.close)
            stack.push_async_callback(self._gpus.close)
            stack.push_async_callback(self._transforms.close)
            self._applied.restore(self._manager)
            await self._follower.restore()
            self._verdicts.restore()
            self._announce()
            self._lodging.note(self._record())
            await self._events.start()
            parts: dict[str, Callable[[], Awaitable[None]]] = {
                "manager": self._manager.run,
                "routes": self._complete_routes,
                "follower": self._follower.run,
                "zygote": self._keep_zygote,
                "verdicts": self._verdicts.run,
                "applied": self._applied.run,
                "prober": self._prober.run,
                "pipelines": self._pipelines.run,
                "gpus": self._watch_gpus,
                "access": self._access.run,
                "doors": self._doors.keep,
                "samples": self._samples.run,
            }
            # What was made so far lives as long as the process: the collector need not look at it
            # again (a full collection stopped the front for 25 ms and more).
            gc.collect()
            gc.freeze()
            tasks = [
                asyncio.create_task(self._keep(name, part), name=name)
                for name, part in parts.items()
            ]
            fleeting = [
                asyncio.create_task(self._keep(name, part), name=name)
                for name, part in (("id", self._keep_id), ("coordinator", self._coordinate))
            ]
            await self._stop.wait()
            for task in fleeting:
                task.cancel()  # another coordinates at once
            await self._drain()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*fleeting, *tasks, return_exceptions=True)
        log.info("node_stopped", node=settings.id)
        return 1 if self._taken else 0

    async def _keep_id(self) -> None:
        """Be a node of the fleet once the id is ours, and for as long as it is."""
        mine = self._record()
        try:
            await claim(self._store, self._keys, mine)
            await self._session.start()
            self._claimed.set()
            self.happened(EventType.NODE_JOINED, mine.id, {"http": mine.http})
            await guard(self._store, self._keys, mine)
        except IdTaken as exc:
            log.error("node_id_taken", node=mine.id, reason=str(exc))
            self._taken = str(exc)
            self._stop.set()

    async def _coordinate(self) -> None:
        await self._claimed.wait()
        await self._coordinator.run()

    async def _keep(self, name: str, part: Callable[[], Awaitable[None]]) -> None:
        """Run one part for ever. What goes wrong in it is no reason to stop serving."""
        while True:
            try:
                await part()
                return
            except Exception:
                log.exception("node_part_failed", part=name)
            await asyncio.sleep(PART_RETRY_S)

    async def _complete_routes(self) -> None:
        """Only once the documents were read is a model that is not among them unknown: 404."""
        await self._follower.configs_known.wait()
        self._app.publish(self._routes.complete())
        self._pipelines.models_changed()

    def _print_ready(self) -> None:
        line = {
            "event": "ready",
            "http": self._doors.http,
            "grpc": None,
            **self._doors.admin_line(),
            "node": self._settings.id,
            "pid": os.getpid(),
            "etcd": [str(endpoint) for endpoint in self._settings.etcd.parsed()],
        }
        print(orjson.dumps(line).decode(), flush=True)

    async def _keep_zygote(self) -> None:
        """Have paddle imported before the first document asks for a worker, and after a crash."""
        while True:
            try:
                await self._zygote.start()
            except (ZygoteFailed, OSError) as exc:
                log.error("zygote_not_started", reason=str(exc))
            await asyncio.sleep(ZYGOTE_RETRY_S)

    async def _watch_gpus(self) -> None:
        """What the driver says of a device weighs more than what its versions do."""
        if not await self._gpus.start():
            return  # no driver, no GPU: nothing to watch, nothing wrong
        async for event in self._gpus.events():
            log.warning("gpu_event", device=event.device, xid=event.xid)
            if event.fault is not None:
                at = rfc3339_ms(datetime.now(UTC))
                fault = event.fault
                self._manager.cordon(event.device, DeviceCordon(fault.code, fault.message, at))

    async def _drain(self) -> None:
        """Unready, out of etcd, then no new connections, then the end of what is in flight."""
        settings = self._settings
        log.info("node_draining", node=settings.id)
        self._draining = True
        deadline_s = asyncio.get_running_loop().time() + settings.drain_s
        self._events.emit(EventType.NODE_LEFT, settings.id)
        leaving = asyncio.gather(self._session.stop(), self._events.stop())
        # An etcd that does not answer must not take the requests' time.
        await asyncio.wait([leaving], timeout=LEAVE_FIRST_S)
        await asyncio.sleep(min(settings.drain_delay_s, settings.drain_s))
        left_s = max(0.0, deadline_s - asyncio.get_running_loop().time())
        await self._app.stop(drain_s=left_s)
        await leaving


def _device_record(usage: DeviceUsage) -> DeviceRecord:
    cordoned = usage.cordoned
    return DeviceRecord(
        id=usage.id,
        memory_mb=usage.quota_mb,
        reserved_mb=usage.reserved_mb,
        cordoned=None if cordoned is None else Cordon.model_validate(cordoned.as_json()),
    )
