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
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import orjson

from paddlewheel.bench.checks import infer_body
from paddlewheel.bench.closed_loop import closed_loop
from paddlewheel.bench.criteria import Criterion
from paddlewheel.bench.load import http_request
from paddlewheel.bench.stage import NodeProcess, StageFailed, Watcher, put_document
from paddlewheel.bench.subjects import MODEL, Subject, mlp_subject
from paddlewheel.embedded_etcd import EmbeddedEtcd
from registry.etcd import EtcdSettings, EtcdStore

CONCURRENCIES = (1, 8)
WANTED_RATIO = 1.3
_START_TIMEOUT_S = 60.0

Turn = Callable[[float], Awaitable[Mapping[str, float]]]
"""Loads one system for so many seconds; returns ``per_s`` and, over HTTP, ``p50_s``, ``p99_s``."""


@dataclass(frozen=True, slots=True)
class _Started:
    process: asyncio.subprocess.Process
    port: int


async def front(*, rounds: int = 15, turn_s: float = 0.7) -> dict[str, Any]:
    """Measure all systems in ``rounds`` turns of ``turn_s`` each; figures as JSON values."""
    with tempfile.TemporaryDirectory(prefix="paddlewheel-bench-") as name:
        folder = Path(name)
        subject = await asyncio.to_thread(mlp_subject, folder / "models")
        async with contextlib.AsyncExitStack() as stack:
            turns = await _systems(stack, subject, folder)
            seen: dict[str, list[Mapping[str, float]]] = {system: [] for system in turns}
            for turn in turns.values():
                await turn(turn_s)  # the first round warms up
            for number in range(rounds):
                order = list(turns.items())
                for system, turn in order if number % 2 == 0 else reversed(order):
                    seen[system].append(await turn(turn_s))
    return figures(seen)


def figures(seen: Mapping[str, list[Mapping[str, float]]]) -> dict[str, Any]:
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
        for ours, theirs in _ratios(seen)
    }
    return {"bench": "front", "rounds": len(next(iter(seen.values()))), "systems": systems,
            "ratios": ratios}  # fmt: skip


_SHOWN = (("per_s", "per_s", 1.0), ("p50_s", "p50_ms", 1e3), ("p99_s", "p99_ms", 1e3))


def _ratios(seen: Mapping[str, Any]) -> list[tuple[str, str]]:
    pairs: list[tuple[str, str]] = []
    for concurrency in CONCURRENCIES:
        for ours in (f"node json x{concurrency}", f"node binary x{concurrency}"):
            pairs += [
                (ours, f"naive x{concurrency}"),
                (ours, f"echo x{concurrency}"),
                (ours, "bare"),
            ]
    return [(ours, theirs) for ours, theirs in pairs if ours in seen and theirs in seen]


def criteria(run: Mapping[str, Any]) -> list[Criterion]:
    """The one aim that is set."""
    ratio = run["ratios"]["node json x8 / naive x8"]
    return [
        Criterion(
            "requests per second, node / naive handler, 8 at once", f"{ratio:.2f}",
            f">= {WANTED_RATIO}", ratio >= WANTED_RATIO,
        )
    ]  # fmt: skip


async def _systems(
    stack: contextlib.AsyncExitStack, subject: Subject, folder: Path
) -> dict[str, Turn]:
    model = subject.folders["1"]
    ports = {
        "echo": await stack.enter_async_context(_server("echo", model)),
        "naive": await stack.enter_async_context(_server("naive", model)),
        "node": await stack.enter_async_context(_node(subject, folder)),
    }
    bare = await stack.enter_async_context(_process("bare", model))
    requests: dict[str, tuple[str, bytes]] = {}
    path = f"/v2/models/{MODEL}/infer"
    for binary in (False, True):
        headers, body = infer_body(subject.inputs, binary=binary)
        data = http_request("POST", path, body, headers=headers)
        requests["node binary" if binary else "node json"] = ("node", data)
        if not binary:
            requests |= {"naive": ("naive", data), "echo": ("echo", data)}
    turns: dict[str, Turn] = {"bare": _bare_turn(bare.process)}
    for concurrency in CONCURRENCIES:
        for system, (server, data) in requests.items():
            turns[f"{system} x{concurrency}"] = _http_turn(ports[server], data, concurrency)
    return turns


def _bare_turn(process: asyncio.subprocess.Process) -> Turn:
    async def turn(seconds: float) -> Mapping[str, float]:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(f"{seconds}\n".encode())
        await process.stdin.drain()
        return cast("dict[str, float]", orjson.loads(await process.stdout.readline()))

    return turn


def _http_turn(port: int, data: bytes, concurrency: int) -> Turn:
    async def turn(seconds: float) -> Mapping[str, float]:
        # In a thread of this process, in which nothing else goes on meanwhile.
        done = await asyncio.to_thread(
            closed_loop, "127.0.0.1", port, itertools.repeat(data),
            concurrency=concurrency, duration_s=seconds,
        )  # fmt: skip
        return {"per_s": done.per_s, "p50_s": done.p50_s, "p99_s": done.p99_s}

    return turn


@contextlib.asynccontextmanager
async def _process(kind: str, model: Path) -> AsyncGenerator[_Started]:
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
async def _server(kind: str, model: Path) -> AsyncGenerator[int]:
    async with _process(kind, model) as started:
        yield started.port


@contextlib.asynccontextmanager
async def _node(subject: Subject, folder: Path) -> AsyncGenerator[int]:
    async with EmbeddedEtcd(folder / "etcd") as etcd:
        store = EtcdStore.connect(EtcdSettings(endpoints=(etcd.endpoint,)))
        node = await NodeProcess.start(etcd.endpoint, folder)
        watcher = Watcher(store)
        watching = asyncio.create_task(watcher.run())
        try:
            await put_document(store, MODEL, subject.document("1"))
            await watcher.until(MODEL, lambda status: status["live"] == "1", what="live")
            yield node.ready.port
        finally:
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)
            await node.stop()
            await store.close()
