"""The gateway: one process that follows etcd and forwards requests to the nodes, wired.

Losing etcd changes nothing here: what was known stays in use, and the probes tell which nodes
are there. HTTP listens before anything is known; `/readyz` says when that changed.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

import orjson
import structlog
import uvloop

import paddlewheel
from paddlewheel.access import AccessControl
from paddlewheel.front import BadTls, ClientTls, Front
from paddlewheel.front_door import Doors
from paddlewheel.gateway_memory import GatewayMemory, News
from paddlewheel.gateway_probes import Prober
from paddlewheel.logs import configure_logs
from registry.catalog import Catalog, DocumentAccepted, DocumentDeleted, DocumentRefused
from registry.etcd import EtcdStore
from registry.etcd.settings import EtcdSettings
from registry.gateway_spec import GatewayDocument, UpstreamSpec
from registry.keys import Keys
from registry.names import ModelName, NodeId, Revision
from registry.spec import ModelDocument
from router.fleet.members import Fleet
from router.gateway_app import GatewayApp
from router.ports import Check, Health
from router.rotation import Rotation

log = structlog.get_logger(__name__)

FORGET_AFTER_S = 30.0
"""A node without a lease is forgotten when it has answered no probe for so long."""
_SWEEP_S = 5.0
_NO_DOCUMENTS: Mapping[Revision, ModelDocument] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class GatewaySettings:
    etcd: EtcdSettings
    prefix: str = "/paddlewheel"
    host: str = "127.0.0.1"
    port: int = 8600
    """0 asks for a free one."""
    zone: dict[str, str] = field(default_factory=dict[str, str])
    """Labels of nodes that are asked first; empty: all are alike."""
    drain_s: float = 30.0
    """How long requests in flight may take after SIGTERM."""
    drain_delay_s: float = 0.0
    """How long to go on accepting after being unready, for balancers that poll."""
    state: Path | None = None
    """A folder for what etcd last said, for a start while it is away; ``None``: not kept."""
    front: Front = field(default_factory=Front)
    node_tls: ClientTls | None = None
    """For nodes at ``https://``; ``None``: the system's CAs vouch for them."""


def run_gateway(settings: GatewaySettings) -> int:
    """Serve until SIGTERM or SIGINT; returns the exit status."""
    configure_logs()

    async def serve() -> int:
        return await Gateway(settings).run()

    return uvloop.run(serve())


class Gateway:
    """The parts of a gateway and how they hang together."""

    def __init__(self, settings: GatewaySettings) -> None:
        self._settings = settings
        self._keys = Keys(settings.prefix)
        self._store = EtcdStore.connect(settings.etcd)
        self._memory = GatewayMemory(
            self._store,
            settings.state,
            prefix=settings.prefix,
            endpoints=[str(endpoint) for endpoint in settings.etcd.parsed()],
        )
        self._stop = asyncio.Event()
        self._draining = False
        self._was_ready = False
        self._known: set[str] = set()
        """Prefixes that were read once."""
        self._catalog = Catalog()
        self._rollouts = Catalog()
        self._documents: dict[ModelName, Mapping[Revision, ModelDocument]] = {}
        self._fleet = Fleet()
        node_tls = settings.node_tls
        self._rotation = Rotation(
            zone=settings.zone,
            on_suspect=self._suspect,
            tls=None if node_tls is None else node_tls.context(),
        )
        self._prober = Prober(self._rotation)
        self._app = GatewayApp(
            self._rotation, product_version=paddlewheel.__version__, read_health=self.health
        )
        self._access = AccessControl(
            self._app,
            store=self._store,
            keys=self._keys,
            required=settings.front.require_access,
            is_node=False,
            snapshot=None if settings.state is None else settings.state / "gateway.json",
            on_document=self._tune,
        )
        self._app.access_report = self._access.report
        self._doors = Doors(self._app, settings.host, settings.port, settings.front)

    def _tune(self, document: GatewayDocument | None) -> None:
        wanted = UpstreamSpec() if document is None else document.spec.upstream
        tuning = self._rotation.tuning
        tuning.connect_s = wanted.connect_timeout_s
        tuning.idle_max = wanted.idle_max
        tuning.idle_s = wanted.idle_s
        tuning.replay_max_bytes = wanted.replay_max_mb * 1_000_000
        tuning.retries = wanted.retry

    def health(self) -> Health:
        """Ready: the fleet is known, some node answers, and we are not draining.

        One model that nobody can serve makes no gateway unready: the others go on through it.
        """
        vitals = self._rotation.vitals
        answering = [node for node, seen in vitals.items() if seen.answers]
        prefixes = {self._keys.models_prefix, self._keys.rollouts_prefix, *self._fleet_prefixes()}
        unknown = prefixes - self._known
        checks = [
            Check("draining", not self._draining, "draining" if self._draining else ""),
            Check("fleet_known", not unknown, "nothing heard from etcd so far" if unknown else ""),
            Check("nodes", bool(answering), f"{len(answering)} of {len(vitals)} answer"),
            self._access.check(),
        ]
        ready = all(check.ok for check in checks)
        self._was_ready = self._was_ready or ready
        for model, route in self._rotation.table.models.items():
            good = len(self._rotation.default_candidates(model).nodes)
            detail = f"{good} nodes" if good else (route.reason or "no node serves it")
            checks.append(Check(f"model:{model}", good > 0, detail))
        checks += self._access.remarks()
        return Health(ready=ready, started=self._was_ready, live=True, checks=checks)

    def _fleet_prefixes(self) -> tuple[str, ...]:
        keys = self._keys
        return keys.nodes_prefix, keys.status_prefix(), keys.pipeline_status_prefix()

    def _suspect(self, node: NodeId) -> None:
        self._prober.wake(node)

    # --- from etcd --------------------------------------------------------------------------

    async def _follow_fleet(self, prefix: str) -> None:
        async for news in self._memory.follow(prefix):
            was = self._fleet
            self._fleet, ignored = was.apply(news.batch, self._keys)
            for record in ignored:
                log.warning("record_ignored", key=record.key, reason=record.reason)
            self._known.add(prefix)
            self._publish()
            for node, member in self._fleet.members.items():
                if member is not was.members.get(node):
                    self._prober.wake(node)

    async def _follow_documents(self) -> None:
        """Every revision of a document, parsed off the loop: a large one takes a while."""
        async for news in self._memory.follow(self._keys.models_prefix):
            await self._take_documents(news)
            self._known.add(self._keys.models_prefix)
            self._publish()

    async def _follow_rollouts(self) -> None:
        """What the coordinator says of documents in force: how much of the traffic canaries get."""
        prefix = self._keys.rollouts_prefix
        async for news in self._memory.follow(prefix):
            # A catalog of their own: documents are folded into theirs in a thread meanwhile.
            if news.whole is None:
                self._rollouts, _ = self._rollouts.apply(news.batch, self._keys)
            else:
                self._rollouts, _ = self._rollouts.relist(news.whole, self._keys, prefix)
            self._known.add(prefix)
            self._publish()

    async def _take_documents(self, news: News) -> None:
        """What another store than before does not have was deleted by nobody, as on nodes."""
        was, keys, listing = self._catalog, self._keys, news.whole
        if listing is None:
            folded = await asyncio.to_thread(was.apply, news.batch, keys)
        else:
            folded = await asyncio.to_thread(was.relist, listing, keys, keys.models_prefix)
        self._catalog, changes = folded
        for change in changes:
            match change:
                case DocumentAccepted(model, revision, document):
                    log.info("document_accepted", model=model, revision=revision)
                    before = self._documents.get(model, _NO_DOCUMENTS)
                    self._documents[model] = {**before, revision: document}
                case DocumentRefused(model, revision):
                    log.warning("document_refused", model=model, revision=revision)
                    # Known by name: nodes may serve what it replaced.
                    self._documents.setdefault(model, _NO_DOCUMENTS)
                case DocumentDeleted(model, revision):
                    log.info("document_deleted", model=model, revision=revision)
                    self._documents.pop(model, None)
                    self._fleet = self._fleet.without_model(model)
                case _:
                    pass

    def _publish(self) -> None:
        self._documents = {
            model: _still_served(documents, self._fleet, model)
            for model, documents in self._documents.items()
        }
        self._rotation.publish(self._fleet, self._documents, self._rollouts.rollouts)
        self._prober.follow()

    async def _sweep(self) -> None:
        """Forget the nodes that went for good."""
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(_SWEEP_S)
            for node, since_s in list(self._prober.silent_since_s.items()):
                member = self._fleet.members.get(node)
                if member is None or member.is_registered:
                    continue
                if loop.time() - since_s > FORGET_AFTER_S:
                    log.info("node_forgotten", node=node)
                    self._fleet = self._fleet.without_node(node)
                    self._publish()

    # --- life ---------------------------------------------------------------------------------

    async def run(self) -> int:
        settings = self._settings
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop.set)
        failed: list[asyncio.Task[None]] = []
        self._access.restore()
        try:
            await self._doors.open()
        except (OSError, BadTls) as exc:
            log.error("cannot_listen", address=f"{settings.host}:{settings.port}", reason=str(exc))
            await self._store.close()
            return 1
        self._print_ready()
        await self._memory.restore()
        async with contextlib.AsyncExitStack() as stack:
            stack.push_async_callback(self._store.close)
            stack.callback(self._rotation.close)
            stack.push_async_callback(self._prober.close)
            tasks = [
                asyncio.create_task(work, name=name)
                for name, work in (
                    ("documents", self._follow_documents()),
                    ("rollouts", self._follow_rollouts()),
                    *((prefix, self._follow_fleet(prefix)) for prefix in self._fleet_prefixes()),
                    ("sweep", self._sweep()),
                    *((("memory", self._memory.run()),) if settings.state else ()),
                    ("access", self._access.run()),
                    ("doors", self._doors.keep()),
                    ("stop", self._wait_for_stop()),
                )
            ]
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            failed = [task for task in tasks[:-1] if task.done()]
            for task in failed:
                log.error("gateway_part_ended", part=task.get_name(), error=repr(task.exception()))
            await self._drain()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        log.info("gateway_stopped")
        return 1 if failed else 0

    async def _wait_for_stop(self) -> None:
        await self._stop.wait()

    def _print_ready(self) -> None:
        line = {
            "event": "ready",
            "http": self._doors.http,
            "grpc": None,
            **self._doors.admin_line(),
            "pid": os.getpid(),
            "etcd": [str(endpoint) for endpoint in self._settings.etcd.parsed()],
        }
        print(orjson.dumps(line).decode(), flush=True)

    async def _drain(self) -> None:
        """Unready, then no new connections, then the end of what is in flight."""
        log.info("gateway_draining")
        self._draining = True
        await asyncio.sleep(min(self._settings.drain_delay_s, self._settings.drain_s))
        await self._app.stop(drain_s=self._settings.drain_s)


def _still_served(
    documents: Mapping[Revision, ModelDocument], fleet: Fleet, model: ModelName
) -> Mapping[Revision, ModelDocument]:
    """The newest document, and those from the oldest on that a node still serves by."""
    if len(documents) < 2:
        return documents
    applied = [
        report.status.applied_revision or 0 for report in fleet.reports.get(model, {}).values()
    ]
    newest = max(documents)
    oldest = min((revision for revision in documents if revision in applied), default=newest)
    kept = {revision: document for revision, document in documents.items() if revision >= oldest}
    return documents if len(kept) == len(documents) else kept
