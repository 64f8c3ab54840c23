"""Sets the stage: real nodes and gateways made of real parts, but for what reaches outside.

`played` replaces, for as long as it lasts, the names under which the product makes its store,
worker processes, HTTP servers and clocks. Everything is then a function of the seed alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime as wall
import functools
import random
import sys
import time
import types
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import structlog

import loader.manager
import loader.readying
import paddlewheel.follower
import paddlewheel.gateway
import paddlewheel.history
import paddlewheel.node
import registry.catalog
import registry.records
import router.rotation
from registry.document_tree import ConfigError
from router.fleet.probes import UNKNOWN, Vitals, after_refusal
from tests.sim.loop import START_S
from tests.sim.machine import PlayedAccess, PlayedGpus, Quiet
from tests.sim.network import Link

EPOCH = wall.datetime(2024, 5, 21, tzinfo=wall.UTC)
PACKAGES = ("registry", "loader", "router", "paddlewheel")


class Process:
    """A process of the fleet: what it reaches the world by, and everything that runs in it."""

    def __init__(self, name: str, link: Link, *, skew_s: float = 0.0, drift: float = 0.0) -> None:
        self.name = name
        self.link = link
        self.skew_s = skew_s
        """How far its wall clock is off."""
        self.drift = drift
        """How much faster its monotonic clock runs: 0.001 is a second in a quarter of an hour."""
        self.tasks: dict[asyncio.Task[Any], None] = {}

    def now_s(self) -> float:
        """Its monotonic clock."""
        return START_S + (asyncio.get_running_loop().time() - START_S) * (1 + self.drift)

    def kill(self) -> None:
        """As kill -9: what it has sent may arrive, and nothing else of it has any effect."""
        self.link.die()
        for task in list(self.tasks):
            task.cancel()


current: ContextVar[Process | None] = ContextVar("process", default=None)


def process_now() -> Process:
    process = current.get()
    assert process is not None, "asked for outside of any process"
    return process


def track(loop: asyncio.AbstractEventLoop, coro: Any, **kwargs: Any) -> asyncio.Task[Any]:
    """A task factory: every task belongs to the process in which it was made."""
    task: asyncio.Task[Any] = asyncio.Task(coro, loop=loop, **kwargs)
    process = current.get()
    if process is not None:
        process.tasks[task] = None
        task.add_done_callback(process.tasks.pop)
        if process.link.is_dead:
            task.cancel()
    return task


# --- clocks -----------------------------------------------------------------------------------


class _PlayedDatetimeType(type):
    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, wall.datetime)


class _PlayedDatetime(wall.datetime, metaclass=_PlayedDatetimeType):
    @classmethod
    def now(cls, tz: wall.tzinfo | None = None) -> wall.datetime:  # type: ignore[override]
        process = current.get()
        skew_s = 0.0 if process is None else process.skew_s
        passed_s = asyncio.get_running_loop().time() - START_S + skew_s
        return (EPOCH + wall.timedelta(seconds=passed_s)).astimezone(tz)


def _loop_time() -> float:
    return asyncio.get_running_loop().time()


def _no_sleep(_seconds: float) -> None:
    raise AssertionError("a thread that sleeps stops the time it waits for")


def _played_time() -> types.SimpleNamespace:
    names = {name: getattr(time, name) for name in dir(time) if not name.startswith("_")}
    names.update(time=lambda: EPOCH.timestamp() + _loop_time() - START_S)
    names.update(monotonic=_loop_time, perf_counter=_loop_time, sleep=_no_sleep)
    return types.SimpleNamespace(**names)


class _SeededRandom(random.Random):
    """What asks for a seed of chance gets one of this run's."""

    def __init__(self, seed: Any = None) -> None:
        super().__init__(random.getrandbits(64) if seed is None else seed)


# --- parts ------------------------------------------------------------------------------------


class _Connector:
    @staticmethod
    def connect(_settings: object) -> Link:
        return process_now().link


class PlayedProber:
    """`paddlewheel.gateway_probes.Prober` without sockets: the same probes, asked of the stage."""

    def __init__(self, rotation: Any, ask: Callable[[str], Vitals | None]) -> None:
        self._rotation = rotation
        self._ask = ask
        self.silent_since_s: dict[Any, float] = {}
        self._task: asyncio.Task[None] | None = None

    def follow(self) -> None:
        if self._task is None:
            self._task = asyncio.create_task(self._keep())

    async def _keep(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            for node in list(self._rotation.upstreams):
                self.probe(node, loop.time())
            await asyncio.sleep(random.uniform(0.8, 1.2))

    def probe(self, node: Any, now_s: float) -> None:
        before = self._rotation.vitals.get(node, UNKNOWN)
        vitals = self._ask(node)
        if vitals is None:
            vitals = after_refusal(before)
            self.silent_since_s.setdefault(node, now_s)
        else:
            self.silent_since_s.pop(node, None)
        self._rotation.observe(node, vitals)

    def wake(self, node: Any) -> None:
        if node in self._rotation.upstreams:
            self.probe(node, asyncio.get_running_loop().time())

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()


class _NoCourtesy:
    def __init__(self, *_: object) -> None:
        pass

    @contextlib.contextmanager
    def of(self, _worker: object) -> Iterator[None]:
        yield


def _ask_at_once(coro: Any, _loop: object) -> types.SimpleNamespace:
    """`asyncio.run_coroutine_threadsafe` where the asking thread is the loop's own.

    What is asked so does not wait: it is done before it is looked at.
    """
    try:
        coro.send(None)
    except StopIteration as done:
        value = done.value
        return types.SimpleNamespace(result=lambda: value)
    raise AssertionError("it would wait for the loop that waits for it")


def _remembering(parse: Callable[..., Any]) -> Callable[..., Any]:
    """Two hundred nodes read the same bytes; what comes of them is a value."""
    known: dict[Any, Any] = {}

    @functools.wraps(parse)
    def remembered(raw: Any, *, name: Any) -> Any:
        key = (raw, name)
        if key not in known:
            try:
                known[key] = parse(raw, name=name)
            except ConfigError as exc:
                known[key] = exc.errors
        found = known[key]
        if isinstance(found, tuple):
            raise ConfigError(found)
        return found

    return remembered


def _remembering_records(from_json: Any) -> Any:
    known: dict[Any, Any] = {}

    def remembered(cls: type, raw: bytes | str) -> Any:
        key = (cls, raw)
        if key not in known:
            if len(known) > 20_000:
                known.clear()
            known[key] = from_json.__func__(cls, raw)
        return known[key]

    return classmethod(remembered)


@contextlib.contextmanager
def played(
    *,
    make_app: Callable[..., Any],
    make_gateway_app: Callable[..., Any],
    make_zygote: Callable[..., Any],
    make_repository: Callable[..., Any],
    make_upstream: Callable[..., Any],
    ask: Callable[[str], Vitals | None],
) -> Iterator[None]:
    """Everything that reaches outside, replaced until the end of the block."""
    with contextlib.ExitStack() as stack:

        def put(owner: Any, name: str, value: Any) -> None:
            missing = object()
            before = vars(owner).get(name, missing)
            setattr(owner, name, value)
            if before is missing:
                stack.callback(delattr, owner, name)
            else:
                stack.callback(setattr, owner, name, before)

        def quiet(*_: object, **__: object) -> Quiet:
            return Quiet()

        node, gateway = paddlewheel.node, paddlewheel.gateway
        put(node, "EtcdStore", _Connector)
        put(node, "Zygote", make_zygote)
        put(node, "ModelRepository", make_repository)
        put(node, "GpuWatcher", lambda **_: PlayedGpus())
        put(node, "Prober", quiet)
        put(node, "EventWriter", quiet)
        put(node, "PipelineKeeper", quiet)
        put(node, "TransformPool", quiet)
        put(node, "App", make_app)
        put(node, "AccessControl", lambda *_, **__: PlayedAccess())
        put(gateway, "AccessControl", lambda *_, **__: PlayedAccess())
        put(node, "print", lambda *_, **__: None)
        put(node, "gc", types.SimpleNamespace(collect=int, freeze=int))
        put(node, "Session", _session)
        put(gateway, "EtcdStore", _Connector)
        put(gateway, "GatewayApp", make_gateway_app)
        put(gateway, "Prober", lambda rotation: PlayedProber(rotation, ask))
        put(gateway, "Rotation", functools.partial(router.rotation.Rotation, clock=_loop_time))
        put(gateway, "print", lambda *_, **__: None)
        put(router.rotation, "Upstream", make_upstream)
        put(loader.readying, "Courtesy", _NoCourtesy)
        put(loader.manager, "IDLE_TURN_S", 20.0)
        put(asyncio, "run_coroutine_threadsafe", _ask_at_once)
        for module in (registry.catalog, paddlewheel.history):
            put(module, "parse_model", _remembering(vars(module)["parse_model"]))
        record = registry.records.Record
        put(record, "from_json", _remembering_records(vars(record)["from_json"]))
        put(random, "Random", _SeededRandom)
        times = _played_time()
        for name, module in list(sys.modules.items()):
            if name.partition(".")[0] in PACKAGES and module is not None:
                if vars(module).get("datetime") is wall.datetime:
                    put(module, "datetime", _PlayedDatetime)
                if vars(module).get("time") is time:
                    put(module, "time", times)
        before = structlog.get_config()
        structlog.configure(
            processors=[_drop],
            wrapper_class=structlog.make_filtering_bound_logger(50),
            cache_logger_on_first_use=False,
        )
        stack.callback(structlog.configure, **before)
        yield


def _drop(*_: object) -> Any:
    raise structlog.DropEvent


def _session(store: Any, ttl_s: int = 10, **kwargs: Any) -> Any:
    from registry.session import Session

    return Session(store, ttl_s, **{"now_s": process_now().now_s, **kwargs})
