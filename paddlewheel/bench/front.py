"""``paddlewheel bench front``: what front and worker cost, against simpler servers, interleaved.

All servers are up all the time and asked one after the other in short turns, so that the machine's
noise hits all alike; figures are medians over the rounds, and ratios are what to trust.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import statistics
import sys
import tempfile
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import orjson

from paddlewheel.bench.checks import infer_body
from paddlewheel.bench.closed_loop import closed_loop
from paddlewheel.bench.criteria import Criterion
from paddlewheel.bench.load import http_request
from paddlewheel.bench.stage import NodeProcess, StageFailed, Watcher, put_document
from paddlewheel.bench.subjects import one_version
from paddlewheel.embedded_etcd import EmbeddedEtcd
from paddlewheel.models import make_mlp
from registry.etcd import EtcdSettings, EtcdStore
from registry.inference import Array

MODELS: Mapping[str, tuple[int, int]] = {"tiny": (128, 2), "small": (512, 4)}
"""MLPs by width and layers, ``x: float32 (1, 64)``; a run takes some 30 and some 100 us."""
CONCURRENCIES = (1, 8)
WANTED_RATIO = 1.3
_START_TIMEOUT_S = 60.0

Seen = Mapping[str, float]
"""``per_s`` and, over HTTP, ``p50_s`` and ``p99_s``."""
Turn = Callable[[float], Awaitable[Seen]]
"""Loads one system for so many seconds."""


@dataclass(frozen=True, slots=True)
class _Started:
    process: asyncio.subprocess.Process
    port: int


async def front(*, rounds: int = 15, turn_s: float = 0.5) -> dict[str, Any]:
    """Measure all systems in ``rounds`` turns of ``turn_s`` each; figures as JSON values."""
    with tempfile.TemporaryDirectory(prefix="paddlewheel-bench-") as name:
        async with contextlib.AsyncExitStack() as stack:
            turns = await _systems(stack, Path(name))
            seen: dict[str, list[Seen]] = {system: [] for system in turns}
            for turn in turns.values():
                await turn(turn_s)  # the first round warms up
            for number in range(rounds):
                order = list(turns.items())
                for system, turn in order if number % 2 == 0 else reversed(order):
                    seen[system].append(await turn(turn_s))
    return figures(seen)


_SHOWN = (("per_s", "per_s", 1.0), ("p50_s", "p50_ms", 1e3), ("p99_s", "p99_ms", 1e3))


def figures(seen: Mapping[str, Sequence[Seen]]) -> dict[str, Any]:
    """Medians of each system, and medians of the rounds' ratios."""
    systems = {
        system: {
            shown: round(statistics.median(turn[key] for turn in turns) * scale, 3)
            for key, shown, scale in _SHOWN
            if key in turns[0]
        }
        for system, turns in seen.items()
    }
    ratios = {
        f"{ours} / {theirs}": round(
            statistics.median(
                a["per_s"] / b["per_s"] for a, b in zip(seen[ours], seen[theirs], strict=True)
            ),
            3,
        )
        for ours, theirs in _pairs()
        if ours in seen and theirs in seen
    }
    return {
        "bench": "front",
        "rounds": len(next(iter(seen.values()))),
        "systems": systems,
        "ratios": ratios,
    }


def _pairs() -> list[tuple[str, str]]:
    return [
        (f"node {model} {form} x{many}", theirs)
        for model in MODELS
        for many in CONCURRENCIES
        for form in ("json", "binary")
        for theirs in (f"naive {model} x{many}", f"bare {model}", f"echo x{many}")
    ]


def criteria(run: Mapping[str, Any]) -> list[Criterion]:
    """The one aim that is set, for each model."""
    found: list[Criterion] = []
    for model in MODELS:
        ratio = run["ratios"].get(f"node {model} json x8 / naive {model} x8")
        if ratio is not None:
            what = f"requests per second, node / naive handler, {model} MLP, 8 at once"
            holds = ratio >= WANTED_RATIO
            found.append(Criterion(what, f"{ratio:.2f}", f">= {WANTED_RATIO}", holds))
    return found


async def _systems(stack: contextlib.AsyncExitStack, folder: Path) -> dict[str, Turn]:
    folders = {
        model: make_mlp(folder / "models" / model, seed=1, hidden=hidden, layers=layers)
        for model, (hidden, layers) in MODELS.items()
    }
    node_port = await stack.enter_async_context(_node(folders, folder))
    echo = await stack.enter_async_context(_server("echo", folder))
    inputs: dict[str, Array] = {"x": np.random.default_rng(7).random((1, 64), np.float32)}
    turns: dict[str, Turn] = {}
    for model, where in folders.items():
        bare = await stack.enter_async_context(_server("bare", where))
        naive = await stack.enter_async_context(_server("naive", where))
        turns[f"bare {model}"] = _bare_turn(bare.process)
        for form in ("json", "binary"):
            headers, body = infer_body(inputs, binary=form == "binary")
            data = http_request("POST", f"/v2/models/{model}/infer", body, headers=headers)
            for many in CONCURRENCIES:
                turns[f"node {model} {form} x{many}"] = _http_turn(node_port, data, many)
                if form == "json":
                    turns[f"naive {model} x{many}"] = _http_turn(naive.port, data, many)
                    turns[f"echo x{many}"] = _http_turn(echo.port, data, many)
    return turns


def _bare_turn(process: asyncio.subprocess.Process) -> Turn:
    async def turn(seconds: float) -> Seen:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(f"{seconds}\n".encode())
        await process.stdin.drain()
        return cast("Seen", orjson.loads(await process.stdout.readline()))

    return turn


def _http_turn(port: int, data: bytes, concurrency: int) -> Turn:
    async def turn(seconds: float) -> Seen:
        # In a thread of this process, in which nothing else goes on meanwhile.
        done = await asyncio.to_thread(
            closed_loop, "127.0.0.1", port, itertools.repeat(data),
            concurrency=concurrency, duration_s=seconds,
        )  # fmt: skip
        return {"per_s": done.per_s, "p50_s": done.p50_s, "p99_s": done.p99_s}

    return turn


@contextlib.asynccontextmanager
async def _server(kind: str, model: Path) -> AsyncGenerator[_Started]:
    """One of `paddlewheel.bench.front_servers`."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "paddlewheel.bench.front_servers", kind, str(model),
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        async with asyncio.timeout(_START_TIMEOUT_S):
            line = await process.stdout.readline()
        if not line:
            raise StageFailed(f"the {kind} server did not start")
        yield _Started(process, int(orjson.loads(line)["port"]))
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


@contextlib.asynccontextmanager
async def _node(folders: Mapping[str, Path], folder: Path) -> AsyncGenerator[int]:
    """A node that serves these models; its port."""
    async with EmbeddedEtcd(folder / "etcd") as etcd:
        store = EtcdStore.connect(EtcdSettings(endpoints=(etcd.endpoint,)))
        node = await NodeProcess.start(etcd.endpoint, folder)
        watcher = Watcher(store)
        watching = asyncio.create_task(watcher.run())
        try:
            for model, where in folders.items():
                await put_document(store, model, one_version(model, where))
                await watcher.until(model, lambda status: status["live"] == "1", what="live")
            yield node.ready.port
        finally:
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)
            await node.stop()
            await store.close()
