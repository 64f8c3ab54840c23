"""The processes of one run: real nodes and gateways, started, killed and asked."""

from __future__ import annotations

import asyncio
import random
import re
from collections.abc import Callable
from contextvars import copy_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from paddlewheel.gateway import Gateway, GatewaySettings
from paddlewheel.node import Node
from paddlewheel.settings import NodeSettings
from registry.etcd.settings import EtcdSettings
from registry.inference import InferenceError
from registry.names import ModelName, NodeId, Revision, Version
from router.dispatch import dispatch
from router.errors import RouterError, UnknownModel
from router.fleet.probes import UNKNOWN, Vitals
from router.fleet.selection import ANY
from router.floor import FLOOR_HEADER, REVISION_HEADER, ROLLOUT_HEADER, Behind
from router.proxy import Forward, Proxy
from router.rotation import Rotation
from router.serving import Serving
from router.table import NO_REVISION, RequestFacts
from router.upstream import Upstream, UpstreamFailed
from tests.sim.history import Answered, History, Lived, Routed
from tests.sim.machine import FEEDS, Hardware, Nature, PlayedApp
from tests.sim.network import Etcd, Link
from tests.sim.stage import Process, current

ETCD = EtcdSettings(("127.0.0.1:2379",))
TTL_S = 15
REQUEST_S = 5.0
_FLOOR = re.compile(FLOOR_HEADER.encode() + rb": (\d+)")


class SimNode:
    """One machine, and the node process on it while there is one."""

    def __init__(self, fleet: Fleet, node: NodeId, labels: dict[str, str]) -> None:
        self.fleet = fleet
        self.id = node
        self.labels = labels
        self.process: Process | None = None
        self.node: Node | None = None
        self.app: PlayedApp | None = None
        self.hardware = Hardware(node, fleet.folder, fleet.nature, random.random)
        self.starts = 0
        self._disk = 0
        self._routes: dict[ModelName, tuple[Any, ...]] = {}

    @property
    def is_running(self) -> bool:
        return self.process is not None

    @property
    def is_up(self) -> bool:
        return self.app is not None and self.app.is_listening

    def start(self, *, with_disk: bool = True) -> None:
        """Begin another process; without its disk it knows nothing of before."""
        if self.process is not None:
            return
        if not with_disk:
            self._disk += 1
        self.starts += 1
        fleet = self.fleet
        self.process = fleet.process(f"{self.id}#{self.starts}")
        self.process.link.on_crash = lambda: fleet.on_crash(self)
        self._routes.clear()
        fleet.spawn(self.process, self._run(self.process))
        fleet.history.note(Lived(fleet.now_s(), self.process.name, "started"))

    async def _run(self, process: Process) -> None:
        settings = NodeSettings(
            id=self.id,
            etcd=ETCD,
            port=0,
            devices=("cpu,memoryMB=10000",),
            cache=self.fleet.folder / f"{self.id}.{self._disk}",
            labels=self.labels,
            lease_ttl_s=TTL_S,
            drain_s=1.0,
        )
        self.node = Node(settings)
        status = await self.node.run()
        if status:
            raise AssertionError(f"it stopped with status {status}")
        if self.process is process:
            self._ended("stopped")

    def kill(self) -> None:
        """Without a word, between any two of its steps."""
        process = self.process
        if process is None:
            return
        if self.node is not None:
            self.node._lodging.leave()  # as the lock falls with a process
        # What its last breath writes must not be found by the next one.
        old = self.fleet.folder / f"{self.id}.{self._disk}"
        self._disk += 1
        if old.exists():
            old.rename(self.fleet.folder / f"{self.id}.{self._disk}")
        self._ended("killed")
        process.kill()

    def stop(self) -> None:
        """SIGTERM."""
        if self.node is not None and self.process is not None:
            self.node._stop.set()

    def _ended(self, how: str) -> None:
        assert self.process is not None
        self.fleet.history.note(Lived(self.fleet.now_s(), self.process.name, how))
        if self.app is not None:
            self.app.is_listening = False
        self.process = self.node = self.app = None

    def published(self, process: Process, serving: Serving) -> None:
        """Note every route that changed."""
        if process is not self.process:
            return
        fleet, models = self.fleet, serving.table.models
        for model, route in models.items():
            live, standby = route.live, route.standby
            key = (
                route.revision,
                None if live is None else live.version,
                None if standby is None else standby.version,
            )
            if self._routes.get(model) != key:
                self._routes[model] = key
                fleet.history.note(
                    Routed(fleet.now_s(), process.name, self.id, model, *key, is_gone=False)
                )
        for model in self._routes.keys() - models.keys():
            del self._routes[model]
            fleet.history.note(
                Routed(
                    fleet.now_s(), process.name, self.id, model, Revision(0), None, None,
                    is_gone=True,
                )
            )  # fmt: skip

    async def infer(
        self, model: ModelName, floor: Revision = NO_REVISION
    ) -> tuple[Revision, Version, bool]:
        """One request by default, as the front door runs it (`router.http_infer`).

        Raises `InferenceError`, `RouterError`.
        """
        app = self.app
        assert app is not None
        if floor:
            app.serving.table.route(model)
            await app.floors.reach(model, floor, within_s=REQUEST_S)
        serving = app.serving
        route = serving.table.route(model)
        choice = route.pick(RequestFacts(model, chance=0.999))
        deadline_s = asyncio.get_running_loop().time() + REQUEST_S
        served = await dispatch(serving, choice, FEEDS, deadline_s=deadline_s)
        return route.revision, served.choice.servable.version, route.is_barrier


class Reply:
    """A node's answer, as `router.upstream.Exchange` shows it."""

    is_whole = True

    def __init__(
        self,
        status: int,
        revision: Revision | None,
        version: Version | None,
        is_barrier: bool = False,
    ) -> None:
        self.status = status
        self.version = version
        shown = {} if revision is None else {REVISION_HEADER: str(revision)}
        if is_barrier:
            shown[ROLLOUT_HEADER] = "barrier"
        self.message = SimpleNamespace(headers=shown, code=status)

    async def read(self) -> bytes:
        return b""

    def close(self) -> None:
        pass


class PlayedUpstream(Upstream):
    """One node as a gateway sees it, without connections."""

    def __init__(self, fleet: Fleet, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._fleet = fleet

    async def send(self, head: bytes, *_: Any, **__: Any) -> Any:
        node = self._fleet.nodes[self.id]
        model = ModelName(head.split(b" ", 2)[1].decode())
        asked = _FLOOR.search(head)
        floor = Revision(int(asked[1])) if asked else NO_REVISION
        process = node.process
        await asyncio.sleep(random.uniform(0.0002, 0.002))
        try:
            if not node.is_up:
                raise UpstreamFailed(self.id, "refused", refused=True, stale=False)
            reply = Reply(200, *await node.infer(model, floor))
        except Behind as exc:
            reply = Reply(503, exc.revision, None)
        except UnknownModel:
            reply = Reply(404, None, None)
        except (InferenceError, RouterError) as exc:
            if isinstance(exc, UpstreamFailed):
                raise
            reply = Reply(503, None, None)
        await asyncio.sleep(random.uniform(0.0002, 0.002))
        if node.process is not process:
            raise UpstreamFailed(self.id, "reset", refused=False, stale=False)
        return reply


class SimGateway:
    """One gateway's process."""

    def __init__(self, fleet: Fleet, name: str) -> None:
        self.fleet = fleet
        self.name = name
        self.starts = 0
        self.process: Process | None = None
        self.rotation: Rotation | None = None
        self.gateway: Gateway | None = None
        self._is_ready = False

    def start(self) -> None:
        if self.process is not None:
            return
        self.starts += 1
        self.process = self.fleet.process(f"{self.name}#{self.starts}")
        self.fleet.spawn(self.process, self._run())
        self.fleet.history.note(Lived(self.fleet.now_s(), self.process.name, "started"))

    async def _run(self) -> None:
        self.gateway = Gateway(GatewaySettings(etcd=ETCD, port=0))
        status = await self.gateway.run()
        raise AssertionError(f"nobody told it to stop, and it did: {status}")

    def kill(self) -> None:
        if self.process is not None:
            self.fleet.history.note(Lived(self.fleet.now_s(), self.process.name, "killed"))
            process, self.process, self.rotation = self.process, None, None
            self.gateway, self._is_ready = None, False
            process.kill()

    @property
    def is_ready(self) -> bool:
        """Whether a balancer would send it anything."""
        if not self._is_ready and self.gateway is not None:
            self._is_ready = self.gateway.health().ready
        return self._is_ready

    async def request(self, model: ModelName) -> None:
        """One request of a client, through the real proxy."""
        fleet, rotation, process = self.fleet, self.rotation, self.process
        if rotation is None or process is None or not self.is_ready:
            return
        if model not in rotation.table.models:
            return
        sent_s = fleet.now_s()
        forward = Forward(model, ANY, f"POST {model} ".encode(), b"", has_floor=True)
        node, revision, version = None, NO_REVISION, None
        try:
            answer = await Proxy(rotation).run(forward, deadline_s=sent_s + REQUEST_S)
        except (InferenceError, RouterError):
            pass
        else:
            reply: Any = answer.exchange
            if reply.status == 200:
                node, version = answer.node, reply.version
                revision = Revision(int(reply.message.headers[REVISION_HEADER]))
        if self.process is process:
            fleet.history.note(
                Answered(fleet.now_s(), sent_s, process.name, model, node, revision, version)
            )


class Fleet:
    """Everything of one run that is a process, or that processes share."""

    def __init__(
        self,
        etcd: Etcd,
        history: History,
        folder: Path,
        rng: random.Random,
        nature: Callable[[str], Nature],
    ) -> None:
        self.etcd = etcd
        self.history = history
        self.folder = folder
        self.nature = nature
        self.nodes: dict[NodeId, SimNode] = {}
        self.gateways: dict[str, SimGateway] = {}
        self._rng = rng
        self.links: list[Link] = []
        self.on_crash: Callable[[SimNode], None] = SimNode.kill
        self.failures: list[str] = []
        """Processes that ended by an exception: bugs, all of them."""

    def now_s(self) -> float:
        return asyncio.get_running_loop().time()

    def process(self, name: str) -> Process:
        rng = self._rng
        link = Link(self.etcd, name, random.Random(rng.getrandbits(64)))
        self.links.append(link)
        return Process(
            name, link, skew_s=rng.uniform(-300.0, 300.0), drift=rng.uniform(-0.002, 0.002)
        )

    def spawn(self, process: Process, work: Any) -> None:
        """Run ``work`` as the main task of ``process``."""
        context = copy_context()
        context.run(current.set, process)
        task = asyncio.get_running_loop().create_task(work, name=process.name, context=context)

        def ended(task: asyncio.Task[Any]) -> None:
            if not task.cancelled() and task.exception() is not None and not process.link.is_dead:
                self.failures.append(f"{process.name}: {task.exception()!r}")

        task.add_done_callback(ended)

    # --- what the stage asks ----------------------------------------------------------------------

    def by_process(self) -> SimNode:
        process = current.get()
        assert process is not None
        return self.nodes[NodeId(process.name.partition("#")[0])]

    def make_zygote(self, *_: Any, **__: Any) -> Any:
        from tests.sim.machine import PlayedZygote

        return PlayedZygote(self.by_process().hardware)

    def make_repository(self, *_: Any, **__: Any) -> Any:
        from tests.sim.machine import PlayedRepository

        return PlayedRepository(self.by_process().hardware)

    def make_app(self, *_: Any, **__: Any) -> PlayedApp:
        node, process = self.by_process(), current.get()
        assert process is not None
        node.app = PlayedApp(
            f"http://{node.id}:8500", lambda serving: node.published(process, serving)
        )
        return node.app

    def make_gateway_app(self, rotation: Rotation, *_: Any, **__: Any) -> PlayedApp:
        process = current.get()
        assert process is not None
        gateway = self.gateways[process.name.partition("#")[0]]
        gateway.rotation = rotation
        return PlayedApp(f"http://{gateway.name}:8600", lambda _serving: None)

    def make_upstream(self, *args: Any, **kwargs: Any) -> PlayedUpstream:
        return PlayedUpstream(self, *args, **kwargs)

    def ask(self, node: str) -> Vitals | None:
        found = self.nodes.get(NodeId(node))
        return UNKNOWN if found is not None and found.is_up else None
