"""One seed, from an empty etcd to a fleet at rest: `run` plays it and returns what was found."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import paddlewheel.follower
from registry.catalog import (
    DocumentAccepted,
    DocumentDeleted,
    DocumentRefused,
    QuarantineChanged,
)
from registry.keys import Keys
from registry.names import ModelName, NodeId
from registry.rollouts import Phase, RolloutRecord
from registry.spec import ModelDocument
from registry.store import Listing
from tests.sim import rest
from tests.sim.fleet import Fleet, SimGateway, SimNode
from tests.sim.history import Barred, Did, Handed, History, Leapt
from tests.sim.loop import TimeStandsStill, VirtualLoop
from tests.sim.network import Etcd
from tests.sim.promises import ROLLOUTS, Found, check
from tests.sim.stage import Process, current, played, track
from tests.sim.user import User
from tests.sim.weather import Chaos

KEYS = Keys()
SHM = Path("/dev/shm")


@dataclass(frozen=True, slots=True)
class Plan:
    """How large a run is. All of it, with the seed, decides what happens."""

    nodes: int = 200
    gateways: int = 2
    models: int = 2
    span_s: float = 45.0
    """Of trouble; then the weather is fine."""
    deeds: int = 6
    """Of the user."""
    events: int = 9
    """Of the weather."""
    requests_s: float = 4.0
    """Through each gateway, for each model, each second."""
    settle_s: float = 150.0
    """In which everything must be at rest once the weather is fine."""
    gated: bool = True


@dataclass
class Outcome:
    seed: int
    plan: Plan
    history: History
    found: list[Found] = field(default_factory=list[Found])
    lasted_s: float = 0.0
    """Virtual."""


class World:
    """Everything of one run, for those who look on."""

    def __init__(self, plan: Plan, seed: int, folder: Path) -> None:
        self.plan = plan
        self.rng = random.Random(f"paddlewheel {seed}")
        self.history = History()
        self.etcd = Etcd()
        self.user = User(self.etcd, KEYS, self.history, self._stream(), gated=plan.gated)
        self.fleet = Fleet(self.etcd, self.history, folder, self._stream(), self.user.nature)
        self.chaos = Chaos(self.fleet, KEYS, self._stream(), events=plan.events)
        self.fleet.on_crash = self.chaos.crashed
        self.models = [ModelName(f"m{i}") for i in range(plan.models)]

    def _stream(self) -> random.Random:
        return random.Random(self.rng.getrandbits(64))

    # --- the play ---------------------------------------------------------------------------------

    async def play(self) -> list[Found]:
        plan, rng, fleet = self.plan, self.rng, self.fleet
        loop = asyncio.get_running_loop()
        for i in range(plan.nodes):
            id = NodeId(f"n{i:03}")
            fleet.nodes[id] = SimNode(fleet, id, {"zone": "abc"[i % 3]})
        for i in range(plan.gateways):
            fleet.gateways[f"g{i}"] = SimGateway(fleet, f"g{i}")
        if rng.random() < 0.5:
            self.user.put(self.models[0])
        for node in fleet.nodes.values():
            node.start()
            if rng.random() < 0.05:
                await asyncio.sleep(rng.uniform(0.0, 0.3))
        for gateway in fleet.gateways.values():
            gateway.start()
        self.chaos.climate()
        self._follow_links()
        clients = [
            loop.create_task(self._client(gateway, model))
            for gateway in fleet.gateways.values()
            for model in self.models
        ]
        clients.append(loop.create_task(self._direct_client()))
        trouble = loop.create_task(self.chaos.run(plan.span_s))
        for _ in range(plan.deeds):
            await asyncio.sleep(rng.expovariate(plan.deeds / plan.span_s))
            self.user.act(rng.choice(self.models))
            self._sometimes_release()
            self._sometimes_order()
        await trouble
        self.chaos.stop()
        self._let_go()
        found = await rest.until_at_rest(self, within_s=plan.settle_s)
        for client in clients:
            client.cancel()
        self.history.note(Did(loop.time(), "all", "the end"))
        return [*found, *check(self)]

    def _follow_links(self) -> None:
        """New processes get the climate too (`Chaos.rough`)."""

    def _sometimes_release(self) -> None:
        for model in self.models:
            listed = self.etcd.list_prefix(KEYS.quarantine_prefix(model)).kvs
            for kv in listed:
                if self.rng.random() < 0.2:
                    self.user.release(model, kv.key.rpartition("/")[2])  # type: ignore[arg-type]

    def _sometimes_order(self) -> None:
        if not self.plan.gated or self.rng.random() < 0.6:
            return
        model = self.rng.choice(self.models)
        wish = self.user.wishes.get(model)
        if wish is not None and wish.revision:
            self.user.order(
                model, self.rng.choice(["pause", "resume", "abort", "promote"]), wish.revision
            )

    def _let_go(self) -> None:
        """Nobody is left waiting for the user."""
        if self.plan.gated:
            for model, wish in self.user.wishes.items():
                if wish.revision:
                    self.user.order(model, "resume", wish.revision)

    # --- clients ----------------------------------------------------------------------------------

    async def _client(self, gateway: SimGateway, model: ModelName) -> None:
        rng, loop = self._stream(), asyncio.get_running_loop()
        under_way: set[asyncio.Task[None]] = set()
        while True:
            await asyncio.sleep(rng.expovariate(self.plan.requests_s))
            task = loop.create_task(gateway.request(model))
            under_way.add(task)
            task.add_done_callback(under_way.discard)

    async def _direct_client(self) -> None:
        """A few requests in a row at one node: what fails there shows there."""
        rng = self._stream()
        while True:
            await asyncio.sleep(rng.expovariate(2.0))
            node = rng.choice(list(self.fleet.nodes.values()))
            model = rng.choice(self.models)
            for _ in range(3):
                if node.is_up:
                    with contextlib.suppress(Exception):
                        await node.infer(model)

    def verdict(self, model: ModelName, document: ModelDocument, revision: int) -> str:
        """What the fleet is to do with the newest document: apply, revert, or not decided yet."""
        if not document.spec.rollout.is_gated:
            return "apply"
        kv = self.etcd.get(f"{ROLLOUTS}{model}")
        said = None if kv is None else RolloutRecord.from_json(kv.value)
        if said is None or said.revision != revision:
            return "not started"
        return {Phase.COMMITTED: "apply", Phase.ABORTED: "revert"}.get(said.phase, said.phase)

    def is_first(self, model: ModelName) -> bool:
        """Whether there is nothing to go back to: who serves it when it is aborted, goes on."""
        kv = self.etcd.get(f"{ROLLOUTS}{model}")
        return kv is not None and not RolloutRecord.from_json(kv.value).previous

    # --- looking on -------------------------------------------------------------------------------

    def handed_on(self, process: Process, follower: Any, change: object) -> None:
        """A node's follower passed on one change."""
        now_s, note = self.fleet.now_s(), self.history.note
        if process.link.is_dead:
            return
        match change:
            case DocumentAccepted(model, revision):
                note(Handed(now_s, process.name, "accepted", model, revision))
            case DocumentRefused(model, revision):
                note(Handed(now_s, process.name, "refused", model, revision))
            case DocumentDeleted(model, revision):
                note(Handed(now_s, process.name, "deleted", model, revision))
            case QuarantineChanged(model):
                quarantines = follower._catalog.quarantines
                barred = frozenset(version for name, version in quarantines if name == model)
                note(Barred(now_s, process.name, model, barred))
            case _:
                pass

    def listed(self, process: Process, prefix: str, listing: Listing) -> None:
        if prefix == KEYS.models_prefix and not process.link.is_dead:
            self.history.note(Leapt(self.fleet.now_s(), process.name, listing.revision))


@contextlib.contextmanager
def _watched(world: World) -> Iterator[None]:
    """Have the world told what followers hand on and links leap over."""
    follower = paddlewheel.follower.Follower
    hand_on = follower._hand_on
    make = world.fleet.process

    def told(self: Any, change: Any) -> None:
        hand_on(self, change)
        process = current.get()
        if process is not None:
            world.handed_on(process, self, change)

    def process(name: str) -> Process:
        made = make(name)
        made.link.on_listed = lambda prefix, listing: world.listed(made, prefix, listing)
        made.link.on_jump = lambda prefix, _from, to: world.listed(made, prefix, Listing((), to))
        return made

    follower._hand_on = told  # type: ignore[method-assign]
    world.fleet.process = process  # type: ignore[method-assign]
    try:
        yield
    finally:
        follower._hand_on = hand_on  # type: ignore[method-assign]


def run(
    seed: int,
    plan: Plan | None = None,
    *,
    mutation: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext,
) -> Outcome:
    """Play one seed. ``mutation``: a bug to plant, as a context manager."""
    plan = plan or Plan()
    folder = Path(tempfile.mkdtemp(prefix="sim-", dir=SHM if SHM.is_dir() else None))
    before = random.getstate()
    loop = VirtualLoop()
    loop.set_task_factory(track)
    loop.set_exception_handler(lambda _loop, _context: None)
    outcome = Outcome(seed, plan, History())
    try:
        random.seed(f"chance {seed}")
        asyncio.set_event_loop(loop)
        world = World(plan, seed, folder)
        fleet = world.fleet
        stage = played(
            make_app=fleet.make_app,
            make_gateway_app=fleet.make_gateway_app,
            make_zygote=fleet.make_zygote,
            make_repository=fleet.make_repository,
            make_upstream=fleet.make_upstream,
            ask=fleet.ask,
        )
        with stage, _watched(world), mutation(), _rare_collections():
            started_s = loop.time()
            outcome.history = world.history
            try:
                outcome.found = loop.run_until_complete(world.play())
                outcome.lasted_s = loop.time() - started_s
                _end(loop, fleet)
            except TimeStandsStill as exc:
                outcome.found = [Found("time goes on", loop.time(), str(exc))]
    finally:
        asyncio.set_event_loop(None)
        loop.close()
        random.setstate(before)
        shutil.rmtree(folder, ignore_errors=True)
    return outcome


@contextlib.contextmanager
def _rare_collections() -> Iterator[None]:
    """A run makes a fleet once and little garbage in circles: looking for it took half the time."""
    before = gc.get_threshold()
    gc.collect()
    gc.set_threshold(200_000, 20, 100)
    try:
        yield
    finally:
        gc.set_threshold(*before)


def _end(loop: VirtualLoop, fleet: Fleet) -> None:
    for link in fleet.links:
        link.die()
    for _ in range(20):
        left = asyncio.all_tasks(loop)
        if not left:
            break
        for task in left:
            task.cancel()
        loop.run_until_complete(_pass())


async def _pass() -> None:
    await asyncio.sleep(1.0)
