"""A node's manager with everything around it played: no process, no disk but empty folders.

Time is virtual (``@pytest.mark.looptime``), so `ManagedNode.passes` may let minutes pass at no
cost. At every look (`ManagedNode.check`) what is loaded must hold its memory and its files; a route
to what is not loaded raises when it is published.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import itertools
from collections import Counter, defaultdict, deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import numpy as np
import orjson

from loader.devices import DevicePool
from loader.errors import FetchFailed, PredictorFault, WorkerDied
from loader.faults import Fault
from loader.manager import Manager, ManagerSettings
from loader.model import ModelView
from loader.recipe import Recipe
from loader.repository import Fetched, ModelRepository
from loader.servable import Servable
from loader.wire import Loaded, Warmed
from loader.worker import OnDone, Outcome, Worker
from loader.zygote import Zygote
from paddlewheel.report import Seen, model_status
from paddlewheel.routes import Routes
from registry.events import EventType
from registry.inference import Array, Inference, Overloaded, Signature, TensorSpec
from registry.names import Digest, ModelName, NodeId, Revision, ServableId, Version
from registry.records import ModelStatus, Quarantine
from registry.spec import ModelDocument, parse_model
from router.dispatch import Served, dispatch
from router.table import RequestFacts, Route

MODEL = ModelName("m")
NODE = NodeId("n1")
SIGNATURE = Signature((TensorSpec("x", "float32", (-1, 2)),), (TensorSpec("y", "float32", (-1,)),))
SIZE_BYTES = 4 << 20

Step = Callable[[], Awaitable[None]]
Answer = Callable[[], Outcome]


def document(
    live: str,
    *versions: str,
    canary: str | None = None,
    model: str = MODEL,
    sources: Mapping[str, str] | None = None,
    compatibility: str = "none",
    **spec: Any,
) -> ModelDocument:
    """A document of ``versions`` (live and canary anyway), each from the source of its name.

    spec: more of the document's ``spec``, as written: ``limits={"drain_s": 5}``.
    """
    named = [live, *versions] if canary is None else [live, *versions, canary]
    where = sources or {}
    body: dict[str, Any] = {
        "live": live,
        "versions": [
            {
                "version": v,
                "source": where.get(v, f"/models/{v}"),
                "compatibility": compatibility,
            }
            for v in dict.fromkeys(named)
        ],
        **spec,
    }
    if canary is not None:
        body["canary"] = {"version": canary, "rules": spec.pop("rules", [{"percent": 50}])}
    body.pop("rules", None)
    text = orjson.dumps(
        {
            "apiVersion": "paddlewheel/v1", "kind": "Model",
            "metadata": {"name": model}, "spec": body,
        }
    )  # fmt: skip
    return parse_model(text, name=ModelName(model))


def digest_of(content: str) -> Digest:
    return Digest("sha256:" + hashlib.sha256(content.encode()).hexdigest())


def quarantine(digest: Digest | None = None, *, code: int | str = 700) -> Quarantine:
    return Quarantine(
        reason=f"code {code}", code=code, nodes=(NODE,), at=datetime.now(UTC), digest=digest
    )


def sticky() -> PredictorFault:
    """What a run gives on a device whose context is poisoned."""
    return PredictorFault("CUDA error(700)", code="700", fault_class="sticky")


# --- what is played ---------------------------------------------------------------------------


class PlayedWorker:
    """A worker without a process. What its phases and runs do, `World` says."""

    depth = 1

    def __init__(self, world: World, pid: int) -> None:
        self.world, self.pid = world, pid
        self.died: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.recipe: Recipe | None = None
        self.folder: Path | None = None
        self.ended = False
        self._runs: deque[OnDone] = deque()

    @property
    def content(self) -> str:
        """What the bytes it loaded say."""
        return "" if self.folder is None else (self.folder / "content").read_text()

    @property
    def in_flight(self) -> int:
        return len(self._runs)

    @property
    def is_alive(self) -> bool:
        return not self.died.done()

    async def check(self, folder: Path, recipe: Recipe) -> Signature | None:
        self.recipe, self.folder = recipe, folder
        await self._phase("check")
        return self.world.signatures.get(recipe.version, SIGNATURE)

    async def load(self, folder: Path, recipe: Recipe) -> Loaded:
        self.recipe, self.folder = recipe, folder
        await self._phase("load")
        signature = self.world.signatures.get(recipe.version, SIGNATURE)
        return Loaded(signature, recipe.device, 0.0, 0)

    async def warm(self, _recipe: Recipe, _golden: Path | None) -> Warmed:
        await self._phase("warm")
        return Warmed(0.0, 1)

    async def serve(self) -> None:
        await self._phase("serve")

    async def _phase(self, phase: str) -> None:
        assert self.recipe is not None
        if self.died.done():
            raise WorkerDied(self.died.result())
        step = self.world.steps.get((self.recipe.version, phase))
        try:
            if step is not None:
                await step()
        except asyncio.CancelledError:
            self.kill()
            raise

    def submit(
        self, feeds: Mapping[str, Array], on_done: OnDone, *, hang_s: float, drill: object = None
    ) -> None:
        self._runs.append(on_done)
        answers = self.world.answers[self.content]
        answer = answers.popleft() if answers else self.world.always.get(self.content, self._well)
        loop = asyncio.get_running_loop()
        if self.world.run_s > hang_s:
            loop.call_later(hang_s, self.die, "HANG")
        else:
            loop.call_later(self.world.run_s, self._finish, answer)

    def _well(self) -> Outcome:
        return Inference({"y": np.zeros(1, "float32")}, 0.0, self.world.run_s)

    def _finish(self, answer: Answer) -> None:
        if self.died.done():
            return
        outcome = answer()
        if isinstance(outcome, WorkerDied):
            self.die(outcome.code)
        else:
            self._runs.popleft()(outcome)

    def die(self, code: str = "SIGKILL") -> None:
        if not self.died.done():
            self.died.set_result(code)
            while self._runs:
                self._runs.popleft()(WorkerDied(code))

    def kill(self) -> None:
        self.die()

    async def close(self, timeout_s: float = 5.0) -> None:
        if self.world.close_s and self.is_alive:
            await asyncio.sleep(min(self.world.close_s, timeout_s))
        self.die("EXIT:0")
        self.ended = True


@dataclass
class World:
    """What sources hold and what workers do; a test writes here."""

    folder: Path
    content: dict[str, str] = field(default_factory=dict[str, str])
    """Source to what it holds; a source that is not here holds its own name."""
    steps: dict[tuple[str, str], Step] = field(default_factory=dict[tuple[str, str], Step])
    """(version, check | load | warm | serve) or (source, fetch | golden): what comes first."""
    signatures: dict[str, Signature] = field(default_factory=dict[str, Signature])
    answers: dict[str, deque[Answer]] = field(
        default_factory=lambda: defaultdict[str, deque[Answer]](deque)
    )
    """Bytes (as in `content`) to what their next runs give; a good answer once none is left."""
    always: dict[str, Answer] = field(default_factory=dict[str, Answer])
    """The same for every run after those."""
    run_s: float = 0.001
    close_s: float = 0.0
    """How long a worker takes to end."""
    spawn: Step | None = None
    workers: list[PlayedWorker] = field(default_factory=list[PlayedWorker])
    leases: Counter[str] = field(default_factory=Counter[str])

    def alive(self) -> list[PlayedWorker]:
        return [worker for worker in self.workers if worker.is_alive]

    def takes(self, what: str, phase: str, seconds: float) -> None:
        async def step() -> None:
            await asyncio.sleep(seconds)

        self.steps[what, phase] = step

    def fails(self, what: str, phase: str, error: Exception, *, after_s: float = 0.0) -> None:
        async def step() -> None:
            await asyncio.sleep(after_s)
            raise error

        self.steps[what, phase] = step

    def waits(self, what: str, phase: str) -> asyncio.Event:
        """Hold ``what`` there until the event is set."""
        gate = asyncio.Event()

        async def step() -> None:
            await gate.wait()

        self.steps[what, phase] = step
        return gate


class PlayedZygote:
    def __init__(self, world: World) -> None:
        self._world = world
        self._pids = itertools.count(1000)

    async def spawn(self) -> Worker:
        if self._world.spawn is not None:
            await self._world.spawn()
        worker = PlayedWorker(self._world, next(self._pids))
        self._world.workers.append(worker)
        return cast("Worker", worker)


class PlayedRepository:
    """Keeps `loader.repository.ModelRepository`'s contract, with counted leases."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.fetches: Counter[str] = Counter()

    async def fetch(self, source: str, *, sha256: Mapping[str, str] | None = None) -> Fetched:
        self.fetches[source] += 1
        step = self._world.steps.get((source, "fetch"))
        if step is not None:
            await step()
        content = self._world.content.get(source, source)
        digest = digest_of(content)
        folder = self._world.folder / digest.removeprefix("sha256:")
        folder.mkdir(exist_ok=True)
        (folder / "content").write_text(content)
        return Fetched(folder, digest, SIZE_BYTES)

    async def fetch_file(self, url: str) -> Path:
        step = self._world.steps.get((url, "golden"))
        if step is not None:
            await step()
        return self._world.folder / "golden.npz"

    def has(self, digest: Digest) -> bool:
        return (self._world.folder / digest.removeprefix("sha256:")).exists()

    def lease(self, digest: Digest) -> None:
        if not (self._world.folder / digest.removeprefix("sha256:")).exists():
            raise FetchFailed(f"{digest} is not in the cache")
        self._world.leases[digest] += 1

    def release(self, digest: Digest) -> None:
        self._world.leases[digest] = max(0, self._world.leases[digest] - 1)

    def evict(self, content: str) -> None:
        folder = self._world.folder / digest_of(content).removeprefix("sha256:")
        (folder / "content").unlink()
        folder.rmdir()


@dataclass
class Recorder:
    """The manager's listener: keeps what a node would publish and write."""

    routes: Routes = field(default_factory=Routes)
    seen: dict[ModelName, Seen] = field(default_factory=dict[ModelName, Seen])
    published: list[ModelView] = field(default_factory=list[ModelView])
    statuses: list[ModelStatus] = field(default_factory=list[ModelStatus])
    withdrawn: list[ModelName] = field(default_factory=list[ModelName])
    quarantines: list[tuple[ServableId, Quarantine]] = field(
        default_factory=list[tuple[ServableId, Quarantine]]
    )
    good: list[tuple[ServableId, Revision]] = field(
        default_factory=list[tuple[ServableId, Revision]]
    )
    events: list[tuple[EventType, str, Mapping[str, Any]]] = field(
        default_factory=list[tuple[EventType, str, Mapping[str, Any]]]
    )
    faulty: Callable[[ModelView], None] | None = None
    """Raises in `publish` where a test wants that."""

    def publish(self, view: ModelView) -> None:
        if self.faulty is not None:
            self.faulty(view)
        self.routes.put(view)  # raises Bug for a route to what is not loaded
        self.published.append(view)

    def withdraw(self, model: ModelName) -> None:
        self.routes.remove(model)
        self.withdrawn.append(model)

    def changed(self, view: ModelView) -> None:
        status = model_status(view.name, NODE, self.seen.get(view.name), view)
        orjson.loads(status.to_json())
        self.statuses.append(status)

    def quarantined(
        self, model: ModelName, servable: ServableId, quarantine: Quarantine, fault: Fault
    ) -> None:
        self.quarantines.append((servable, quarantine))

    def baked(self, model: ModelName, servable: ServableId, revision: Revision) -> None:
        self.good.append((servable, revision))

    def happened(self, event: EventType, subject: str, data: Mapping[str, Any]) -> None:
        orjson.dumps(dict(data))
        self.events.append((event, subject, data))


# --- the whole --------------------------------------------------------------------------------


class ManagedNode:
    """A running manager and the short forms that tests speak in."""

    def __init__(self, folder: Path, *, quotas_mb: Mapping[str, int], **settings: Any) -> None:
        self.world = World(folder)
        self.repository = PlayedRepository(self.world)
        self.devices = DevicePool(quotas_mb)
        self.told = Recorder()
        self.manager = Manager(
            zygote=cast("Zygote", PlayedZygote(self.world)),
            repository=cast("ModelRepository", self.repository),
            devices=self.devices,
            listener=self.told,
            settings=ManagerSettings(NODE, **settings),
        )
        self.task = asyncio.create_task(self.manager.run(), name="manager")

    # --- doing

    def put(self, document: ModelDocument, revision: int) -> None:
        """A document is accepted."""
        self.told.seen[document.name] = Seen(Revision(revision))
        self.manager.aspire(document, Revision(revision))

    def delete(self, model: str = MODEL) -> None:
        self.told.seen.pop(ModelName(model), None)
        self.manager.forget_model(ModelName(model))

    def quarantine(self, **versions: Quarantine) -> None:
        """What all of the fleet's quarantine keys say from now on; ``v2`` is version 2."""
        named = {Version(key.removeprefix("v")): held for key, held in versions.items()}
        self.manager.set_quarantined(MODEL, named)

    async def passes(self, seconds: float) -> None:
        """Let that much time pass; the manager must still be there at the end."""
        await asyncio.sleep(seconds)
        self.check()

    async def settle(self) -> None:
        """Until everything that takes no time is done."""
        await self.passes(0.05)

    async def put_and_settle(self, document: ModelDocument, revision: int) -> None:
        self.put(document, revision)
        await self.settle()

    async def fail(self, content: str, times: int = 3) -> None:
        """So many requests in a row, a second apart, whose run on these bytes poisons a device."""
        self.world.answers[content].extend([sticky] * times)
        for _ in range(times):
            with contextlib.suppress(Overloaded):  # where nothing else could answer it
                await self.infer()
            await self.passes(1)

    async def infer(
        self,
        model: str = MODEL,
        *,
        version: str | None = None,
        chance: float = 0.99,
        within_s: float = 10.0,
    ) -> Served:
        """One request by the route table, as the front door sends it.

        chance: below a canary's percent it goes there.
        """
        serving = self.told.routes.serving
        choice = serving.table.pick(RequestFacts(model, version, chance=chance))
        deadline_s = asyncio.get_running_loop().time() + within_s
        return await dispatch(serving, choice, FEEDS, deadline_s=deadline_s)

    # --- looking

    def check(self) -> None:
        """The manager runs, and what is loaded holds its memory and its files."""
        if self.task.done():
            self.task.result()
            raise AssertionError("the manager's loop ended")
        for view in self.manager.views():
            for servable in view.servables:
                if servable.is_loaded:
                    digest = servable.id.digest
                    assert self.world.leases[digest], f"{servable.id} has no lease"
        reserved = sum(usage.reserved_mb for usage in self.devices.usage())
        loaded = sum(
            servable.memory_mb
            for view in self.manager.views()
            for servable in view.servables
            if servable.is_loaded
        )
        assert reserved >= loaded, f"{loaded} MB are loaded, {reserved} MB reserved"

    @property
    def route(self) -> Route:
        return self.told.routes.serving.table.route(MODEL)

    @property
    def live(self) -> str | None:
        """The version that default traffic goes to."""
        route = self.told.routes.serving.table.models.get(MODEL)
        return None if route is None or route.live is None else route.live.version

    @property
    def live_content(self) -> str:
        """What the bytes of that version say."""
        assert self.route.live is not None
        return self.content_of(self.route.live)

    def content_of(self, id: ServableId) -> str:
        pids = {worker.pid for worker in self.servable(id).pool.workers()}  # type: ignore[union-attr]
        (content,) = {w.content for w in self.world.workers if w.pid in pids}
        return content

    @property
    def status(self) -> ModelStatus:
        """As it would be written now."""
        view = self.manager.view(MODEL)
        return model_status(MODEL, NODE, self.told.seen.get(MODEL), view)

    @property
    def states(self) -> str:
        """``2 LIVE, 1 STANDBY``: every servable, in order of version and state."""
        view = self.manager.view(MODEL)
        rows = sorted(
            (s.id.version, str(s.state)) for s in (view.servables if view is not None else ())
        )
        return ", ".join(" ".join(row) for row in rows)

    def servable(self, id: ServableId) -> Servable:
        view = self.manager.view(id.model)
        assert view is not None
        return next(s for s in view.servables if s.id == id)

    def of_version(self, version: str) -> Servable:
        view = self.manager.view(MODEL)
        assert view is not None
        (found,) = [s for s in view.servables if s.id.version == version]
        return found

    def reserved_mb(self, device: str = "cpu") -> int:
        (usage,) = [usage for usage in self.devices.usage() if usage.id == device]
        return usage.reserved_mb

    def leased(self) -> dict[str, int]:
        return {digest: count for digest, count in self.world.leases.items() if count}


FEEDS = {"x": np.zeros((1, 2), "float32")}


@contextlib.asynccontextmanager
async def managed(
    folder: Path, *, quotas_mb: Mapping[str, int] | None = None, **settings: Any
) -> AsyncGenerator[ManagedNode]:
    """A node with one CPU of 10 GB unless ``quotas_mb`` says otherwise.

    At the end everything must have been given back.
    """
    node = ManagedNode(folder, quotas_mb=quotas_mb or {"cpu": 10_000}, **settings)
    try:
        yield node
    finally:
        node.task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await node.task
        await node.manager.close()
