"""``paddlewheel bench gateway``: what a gateway costs, next to its node alone and to nginx.

nginx, as a plain proxy before the node, takes part where it is on PATH (Debian: ``nginx-light``):
one worker process, 200 idle connections to the node, no access log.

One small MLP, one node. All systems are up all the time and asked one after the other in short
turns, so that the machine's noise hits all alike; figures are medians over the rounds.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import shutil
import signal
import statistics
import sys
import tempfile
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import orjson
from rich.table import Table

from paddlewheel.bench.checks import infer_body
from paddlewheel.bench.closed_loop import closed_loop
from paddlewheel.bench.load import http_request
from paddlewheel.bench.report import grid_table
from paddlewheel.bench.stage import NodeProcess, StageFailed, Watcher, put_document, tail
from paddlewheel.bench.subjects import one_version
from paddlewheel.embedded_etcd import EmbeddedEtcd, free_ports
from paddlewheel.models import make_mlp
from paddlewheel.parentage import end_with_parent
from registry.etcd import EtcdSettings, EtcdStore

MODEL = "small"
FORMS = ("json", "binary")
CONCURRENCIES = (1, 8)
LOADS = tuple(f"{form} x{many}" for form in FORMS for many in CONCURRENCIES)
SYSTEMS = ("node", "gateway", "nginx")
_START_TIMEOUT_S = 30.0

Seen = Mapping[str, float]
"""``per_s``, ``p50_s`` and ``p99_s`` of one turn."""
Turn = Callable[[float], Awaitable[Seen]]
"""Loads one system for so many seconds."""


async def gateway(*, rounds: int = 15, turn_s: float = 0.5) -> dict[str, Any]:
    """Measure all systems in ``rounds`` turns of ``turn_s`` each; figures as JSON values."""
    async with contextlib.AsyncExitStack() as stack:
        name = stack.enter_context(tempfile.TemporaryDirectory(prefix="paddlewheel-bench-"))
        turns = await _systems(stack, Path(name))
        seen: dict[str, list[Seen]] = {system: [] for system in turns}
        for turn in turns.values():
            await turn(turn_s)  # the first round warms up
        for number in range(rounds):
            order = list(turns.items())
            for system, turn in order if number % 2 == 0 else reversed(order):
                seen[system].append(await turn(turn_s))
        return figures(seen)


def figures(seen: Mapping[str, Sequence[Seen]]) -> dict[str, Any]:
    """Medians of each system; and against the node alone, medians over the rounds.

    ``added_p50_ms`` and ``added_p99_ms`` say what passing through costs a request, ``ratio`` what
    is left of the requests per second.
    """
    systems: dict[str, dict[str, float]] = {}
    for system, turns in seen.items():
        shown = {
            "per_s": _median(turn["per_s"] for turn in turns),
            "p50_ms": _median(turn["p50_s"] * 1e3 for turn in turns),
            "p99_ms": _median(turn["p99_s"] * 1e3 for turn in turns),
        }
        kind, _, rest = system.partition(" ")
        alone = seen[f"node {rest}"]
        if kind != "node":
            pairs = list(zip(turns, alone, strict=True))
            shown |= {
                "added_p50_ms": _median((a["p50_s"] - b["p50_s"]) * 1e3 for a, b in pairs),
                "added_p99_ms": _median((a["p99_s"] - b["p99_s"]) * 1e3 for a, b in pairs),
                "ratio": _median(a["per_s"] / b["per_s"] for a, b in pairs),
            }
        systems[system] = shown
    return {
        "bench": "gateway",
        "rounds": len(next(iter(seen.values()))),
        "nginx": any(system.startswith("nginx") for system in seen),
        "systems": systems,
    }


def tables(run: Mapping[str, Any]) -> list[Table]:
    """The figures for people: for each load the node alone, then what passes through a proxy."""
    columns = ("load", "per second", "ratio", "p50", "p99", "added p50", "added p99")
    rows = [_row(f"{load}, {kind}", run["systems"].get(f"{kind} {load}"))
            for load in LOADS for kind in SYSTEMS]  # fmt: skip
    return [grid_table("A node alone, and through proxies", columns, rows)]


def _row(title: str, seen: Mapping[str, float] | None) -> list[str]:
    if seen is None:
        return [title, "not on PATH"]
    ratio = f"{seen['ratio']:.2f}" if "ratio" in seen else ""
    times = ("p50_ms", "p99_ms", "added_p50_ms", "added_p99_ms")
    shown = (f"{seen[name]:.2f} ms" if name in seen else "" for name in times)
    return [title, f"{seen['per_s']:.0f}", ratio, *shown]


def _median(values: Iterable[float]) -> float:
    return round(statistics.median(values), 3)


async def _systems(stack: contextlib.AsyncExitStack, folder: Path) -> dict[str, Turn]:
    etcd = await stack.enter_async_context(EmbeddedEtcd(folder / "etcd"))
    node_port = await stack.enter_async_context(_node(etcd.endpoint, folder))
    ports = {"node": node_port}
    ports["gateway"] = await stack.enter_async_context(_gateway(etcd.endpoint, folder))
    program = shutil.which("nginx")
    if program is not None:
        ports["nginx"] = await stack.enter_async_context(_nginx(program, node_port, folder))
    inputs = {"x": np.random.default_rng(7).random((1, 64), np.float32)}
    turns: dict[str, Turn] = {}
    for form in FORMS:
        headers, body = infer_body(inputs, binary=form == "binary")
        data = http_request("POST", f"/v2/models/{MODEL}/infer", body, headers=headers)
        for many in CONCURRENCIES:
            for system, port in ports.items():
                turns[f"{system} {form} x{many}"] = _turn(port, data, many)
    return turns


def _turn(port: int, data: bytes, concurrency: int) -> Turn:
    async def turn(seconds: float) -> Seen:
        # In a thread of this process, in which nothing else goes on meanwhile.
        done = await asyncio.to_thread(
            closed_loop, "127.0.0.1", port, itertools.repeat(data),
            concurrency=concurrency, duration_s=seconds,
        )  # fmt: skip
        return {"per_s": done.per_s, "p50_s": done.p50_s, "p99_s": done.p99_s}

    return turn


@contextlib.asynccontextmanager
async def _node(etcd: str, folder: Path) -> AsyncGenerator[int]:
    model = await asyncio.to_thread(make_mlp, folder / "models", seed=1)
    store = EtcdStore.connect(EtcdSettings(endpoints=(etcd,)))
    node = await NodeProcess.start(etcd, folder)
    watcher = Watcher(store)
    watching = asyncio.create_task(watcher.run())
    try:
        await put_document(store, MODEL, one_version(MODEL, model))
        await watcher.until(MODEL, lambda status: status["live"] == "1", what="live")
        yield node.ready.port
    finally:
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)
        await store.close()
        await node.stop()


@contextlib.asynccontextmanager
async def _gateway(etcd: str, folder: Path) -> AsyncGenerator[int]:
    log_path = folder / "gateway.log"
    async with _process(
        [sys.executable, "-m", "paddlewheel", "gateway", "--etcd", etcd,
         "--listen", "127.0.0.1:0"],
        log_path,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        async with asyncio.timeout(_START_TIMEOUT_S):
            line = await process.stdout.readline()
        if not line:
            raise StageFailed(f"the gateway did not start; its log: {tail(log_path)}")
        port = int(str(orjson.loads(line)["http"]).rpartition(":")[2])
        await _until_served(port)
        yield port


_NGINX = """
daemon off; worker_processes 1; pid {folder}/nginx.pid; error_log {folder}/nginx.err;
events {{ worker_connections 1024; }}
http {{
  access_log off; client_body_temp_path {folder}/b; proxy_temp_path {folder}/p;
  fastcgi_temp_path {folder}/f; uwsgi_temp_path {folder}/u; scgi_temp_path {folder}/s;
  keepalive_requests 1000000000;
  upstream node {{ server 127.0.0.1:{node}; keepalive 200; keepalive_requests 1000000000; }}
  server {{
    listen 127.0.0.1:{port};
    location / {{
      proxy_pass http://node; proxy_http_version 1.1; proxy_set_header Connection "";
    }}
  }}
}}
"""


@contextlib.asynccontextmanager
async def _nginx(program: str, node_port: int, folder: Path) -> AsyncGenerator[int]:
    (port,) = free_ports(0)
    config = folder / "nginx.conf"
    config.write_text(_NGINX.format(folder=folder, node=node_port, port=port))
    log_path = folder / "nginx.log"
    async with _process(
        [program, "-p", str(folder), "-c", str(config), "-e", str(folder / "nginx.err")], log_path
    ):
        await _until_served(port)
        yield port


@contextlib.asynccontextmanager
async def _process(
    command: Sequence[str], log_path: Path
) -> AsyncGenerator[asyncio.subprocess.Process]:
    with log_path.open("wb") as log_file:
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=log_file,
            start_new_session=True,
            preexec_fn=end_with_parent(signal.SIGTERM),
        )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()


async def _until_served(port: int) -> None:
    """Until the model is ready through whatever listens there. Raises `StageFailed`."""
    url = f"http://127.0.0.1:{port}/v2/models/{MODEL}/ready"
    try:
        async with aiohttp.ClientSession() as session, asyncio.timeout(_START_TIMEOUT_S):
            while True:
                with contextlib.suppress(aiohttp.ClientError):
                    async with session.get(url) as answer:
                        if answer.status == 200:
                            return
                await asyncio.sleep(0.05)
    except TimeoutError:
        raise StageFailed(f"{url} not ready within {_START_TIMEOUT_S:g} s") from None
