"""``paddlewheel bench responsiveness``: the front while its workers load and compute.

``/livez`` is asked at a steady rate by a process of its own in four spells: nothing going on, a
model of ResNet50's size loading, a small model and then a large one at all the load they can take.
Before that: how long from ``paddlewheel node`` to the first small model READY, phase by phase.
After it: whether the front has Paddle in its memory, and how much of it there is.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import tempfile
import time
from collections.abc import AsyncGenerator, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from paddlewheel.bench.checks import infer_body
from paddlewheel.bench.closed_loop import Throughput, closed_loop
from paddlewheel.bench.criteria import Criterion
from paddlewheel.bench.footprint import pss_mb
from paddlewheel.bench.load import http_request
from paddlewheel.bench.load_process import LoadProcess, Plan, PlannedRequest
from paddlewheel.bench.samples import Result
from paddlewheel.bench.stage import NodeProcess, Status, Watcher, delete_document, put_document
from paddlewheel.bench.subjects import one_version
from paddlewheel.bench.swap_figures import latencies
from paddlewheel.embedded_etcd import EmbeddedEtcd
from paddlewheel.models import make_mlp, make_resnet50
from registry.etcd import EtcdSettings, EtcdStore
from registry.inference import Array
from registry.store import Store

SMALL, LARGE = "small-0", "resnet50"
MODELS = 10
"""Small ones, by the time that the front's memory is looked at."""
LIVEZ_P99_MS = 20.0
FRONT_PSS_MB = 150.0
_LIVEZ_PER_S = 200.0
_CONCURRENCY = 8
_INPUTS: Mapping[str, tuple[int, ...]] = {SMALL: (1, 64), LARGE: (1, 3, 224, 224)}


@dataclass(frozen=True, slots=True)
class _Stage:
    store: Store
    node: NodeProcess
    watcher: Watcher
    folder: Path

    async def put(self, model: str, source: Path) -> None:
        await put_document(self.store, model, one_version(model, source))

    async def ready(self, model: str) -> Status:
        return await self.watcher.until(
            model, lambda status: status["live"] == "1", what=f"{model} live"
        )


async def responsiveness(*, spell_s: float = 10.0, loads: int = 3) -> dict[str, Any]:
    """Measure all of it once; spells of ``spell_s``, and ``loads`` loads of the large model."""
    with tempfile.TemporaryDirectory(prefix="paddlewheel-bench-") as name:
        folder = Path(name)
        await asyncio.to_thread(_make_models, folder / "models")
        async with _staged(folder) as (stage, start_ms):
            spells: dict[str, dict[str, Any]] = {}
            async with _asked(stage) as asked:
                await asyncio.sleep(spell_s)
            spells["idle"] = latencies(asked.result)
            spells["loading resnet50"] = await _loading(stage, loads)
            async with _asked(stage) as asked:
                small = await _full_load(stage, SMALL, spell_s)
            spells["small model at full load"] = {**latencies(asked.result), **_rate(small)}
            async with _asked(stage) as asked:
                large = await _full_load(stage, LARGE, spell_s)
            spells["resnet50 at full load"] = {**latencies(asked.result), **_rate(large)}
            for number in range(1, MODELS):
                await stage.put(f"small-{number}", folder / "models" / "small")
            for number in range(1, MODELS):
                await stage.ready(f"small-{number}")
            pid = stage.node.ready.pid
            return {
                "bench": "responsiveness",
                "start_ms": start_ms,
                "livez": spells,
                "front": {
                    "paddle_mapped": has_paddle(pid),
                    "pss_mb": round(pss_mb(pid), 1),
                    "models": MODELS + 1,
                },
            }


def criteria(run: Mapping[str, Any]) -> list[Criterion]:
    """What must hold of one run."""
    front = run["front"]
    found = [
        Criterion(
            f"/livez p99, {spell}", f"{seen['p99_ms']:.1f} ms", f"< {LIVEZ_P99_MS:g} ms",
            seen["p99_ms"] < LIVEZ_P99_MS,
        )
        for spell, seen in run["livez"].items()
    ]  # fmt: skip
    unanswered = sum(seen["failed"] for seen in run["livez"].values())
    return [
        *found,
        Criterion("/livez not answered 200", str(unanswered), "0", unanswered == 0, True),
        Criterion(
            "Paddle in the front's memory", "yes" if front["paddle_mapped"] else "no", "no",
            not front["paddle_mapped"], True,
        ),
        Criterion(
            f"front's memory (PSS), {front['models']} models", f"{front['pss_mb']:.1f} MB",
            f"< {FRONT_PSS_MB:g} MB", front["pss_mb"] < FRONT_PSS_MB,
        ),
    ]  # fmt: skip


def has_paddle(pid: int) -> bool:
    """Whether Paddle's library is mapped into a process."""
    return "libpaddle" in Path(f"/proc/{pid}/maps").read_text()


def _make_models(folder: Path) -> None:
    make_mlp(folder / "small", seed=1, tag=1.0)
    make_resnet50(folder / LARGE, seed=1, tag=1.0)


@contextlib.asynccontextmanager
async def _staged(folder: Path) -> AsyncGenerator[tuple[_Stage, dict[str, float]]]:
    """A node that starts with one small model's document already there; how long that took."""
    async with EmbeddedEtcd(folder / "etcd") as etcd:
        store = EtcdStore.connect(EtcdSettings(endpoints=(etcd.endpoint,)))
        phases = _Phases()
        watcher = Watcher(store, phases.status_changed)
        watching = asyncio.create_task(watcher.run())
        node: NodeProcess | None = None
        try:
            await put_document(store, SMALL, one_version(SMALL, folder / "models" / "small"))
            node = await NodeProcess.start(etcd.endpoint, folder)
            stage = _Stage(store, node, watcher, folder)
            status = await stage.ready(SMALL)
            yield stage, phases.report(node, status)
        finally:
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)
            if node is not None:
                await node.stop()
            await store.close()


class _Phases:
    """From the start of the process to READY, as seen in the status and told by it."""

    def __init__(self) -> None:
        self._loading_s = 0.0

    def status_changed(self, _before: Status | None, status: Status) -> None:
        states = {servable["state"] for servable in status["servables"]}
        if status["model"] == SMALL and "LOADING" in states and not self._loading_s:
            self._loading_s = time.monotonic()

    def report(self, node: NodeProcess, status: Status) -> dict[str, float]:
        """Milliseconds. ``zygote``: what was left to wait of Paddle's import, and one fork."""
        live_s = time.monotonic()
        ready = node.ready
        (servable,) = status["servables"]
        inside = {name: float(ms) for name, ms in servable["phases_ms"].items()}
        loading_ms = (live_s - self._loading_s) * 1e3
        return {
            "process_to_http": _ms(ready.listening_s - ready.started_s),
            "etcd_and_fetch": _ms(self._loading_s - ready.listening_s),
            "zygote": round(loading_ms - sum(inside.get(p, 0.0) for p in _IN_WORKER), 1),
            **{phase: round(inside.get(phase, 0.0), 1) for phase in _IN_WORKER},
            "total": _ms(live_s - ready.started_s),
        }


_IN_WORKER = ("check", "load", "warm")


class _Asked:
    """Filled when its spell is over."""

    def __init__(self) -> None:
        self.result = Result()


@contextlib.asynccontextmanager
async def _asked(stage: _Stage) -> AsyncGenerator[_Asked]:
    """Ask ``/livez`` as long as the block takes."""
    ready = stage.node.ready
    request = PlannedRequest("livez", http_request("GET", "/livez"))
    load = await LoadProcess.start(
        Plan(ready.host, ready.port, (request,), _LIVEZ_PER_S, duration_s=900)
    )
    asked = _Asked()
    try:
        await asyncio.sleep(0.5)  # the generator's own start is not what is measured
        began_s = time.monotonic()
        yield asked
        asked.result = (await load.stop()).window(began_s)
    finally:
        await load.kill()


async def _loading(stage: _Stage, loads: int) -> dict[str, Any]:
    """``/livez`` while the large model is loaded, unloaded and loaded again."""
    results: list[Result] = []
    took: list[float] = []
    for number in range(loads):
        if number:
            await delete_document(stage.store, LARGE)
            await stage.watcher.until_gone(LARGE)
        async with _asked(stage) as asked:
            put_s = time.monotonic()
            await stage.put(LARGE, stage.folder / "models" / LARGE)
            await stage.ready(LARGE)
            took.append(time.monotonic() - put_s)
        results.append(asked.result)
    return {**latencies(Result.merged(results)), "load_s": [round(s, 2) for s in took]}


async def _full_load(stage: _Stage, model: str, seconds: float) -> Throughput:
    ready = stage.node.ready
    return await asyncio.to_thread(
        closed_loop, ready.host, ready.port, _requests(model),
        concurrency=_CONCURRENCY, duration_s=seconds,
    )  # fmt: skip


def _requests(model: str) -> Iterator[bytes]:
    inputs: dict[str, Array] = {"x": np.zeros(_INPUTS[model], np.float32)}
    headers, body = infer_body(inputs, binary=True)
    path = f"/v2/models/{model}/infer"
    return itertools.repeat(http_request("POST", path, body, headers=headers))


def _rate(done: Throughput) -> dict[str, float]:
    return {"inferences_per_s": round(done.per_s, 1)}


def _ms(seconds: float) -> float:
    return round(seconds * 1e3, 1)
