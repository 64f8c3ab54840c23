"""``paddlewheel bench propagation``: from the put of a document to the last node's ACK.

A real etcd and many nodes, whole but for their predictors (`paddlewheel.bench.light_nodes`), in a
few processes. Each document changes the live version between two that are loaded. A node has
acknowledged it (ACK) once its status key says so, and has it in force once that says
``applied_revision``; both are timed where anybody would see them: at a watch of the status keys.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import tempfile
import time
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson
from rich.table import Table

from paddlewheel.bench.criteria import Criterion
from paddlewheel.bench.report import grid_table
from paddlewheel.bench.samples import percentile
from paddlewheel.bench.stage import PREFIX, StageFailed, put_document, tail
from paddlewheel.bench.subjects import MODEL
from paddlewheel.embedded_etcd import EmbeddedEtcd
from paddlewheel.models import make_mlp
from paddlewheel.parentage import end_with_parent
from registry.etcd import EtcdSettings, EtcdStore
from registry.store import Put, Store

WANTED_MS = 1000.0
"""p99 from the put to the last ACK."""
PROCESSES = 4
PAUSE_S = 0.5
"""Between two documents: what the one before left to do (history, snapshots) is then done."""
_VERSIONS = ("1", "2")
_START_TIMEOUT_S = 120.0
_ROUND_TIMEOUT_S = 60.0

Progress = Callable[[int, int], None]


@dataclass(slots=True)
class Round:
    """One document: when each node said what, in seconds since the put began."""

    put_s: float = 0.0
    """How long etcd took to answer the put."""
    acks_s: dict[str, float] = field(default_factory=dict[str, float])
    refused: set[str] = field(default_factory=set[str])
    in_force_s: dict[str, float] = field(default_factory=dict[str, float])


class Observer:
    """Notes, for each revision, which node acknowledged it when and has it in force since when."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._changed = asyncio.Event()
        self._acks: dict[int, dict[str, tuple[float, bool]]] = {}
        self._in_force: dict[int, dict[str, float]] = {}

    async def run(self) -> None:
        """Follow until cancelled."""
        async for batch in self._store.watch_prefix(f"{PREFIX}/status/{MODEL}/"):
            now_s = time.monotonic()
            for event in batch.events:
                if isinstance(event, Put):
                    self._note(orjson.loads(event.kv.value), now_s)
            self._changed.set()

    def _note(self, status: Mapping[str, Any], now_s: float) -> None:
        node, seen, applied = status["node"], status["revision"], status["applied_revision"]
        if seen is not None:
            self._acks.setdefault(seen, {}).setdefault(node, (now_s, status["accepted"]))
        if applied is not None:
            self._in_force.setdefault(applied, {}).setdefault(node, now_s)

    async def until_in_force(self, revision: int, count: int, timeout_s: float) -> None:
        """Wait for ``count`` nodes. Raises `StageFailed`."""
        try:
            async with asyncio.timeout(timeout_s):
                while len(self._in_force.get(revision, ())) < count:
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            acks, there = (len(seen.get(revision, ())) for seen in (self._acks, self._in_force))
            raise StageFailed(
                f"{acks} of {count} nodes acknowledged, {there} have it in force, {timeout_s:g} s"
                " after the put"
            ) from None

    def round(self, revision: int, began_s: float, put_s: float) -> Round:
        acks = self._acks.pop(revision, {})
        return Round(
            put_s,
            {node: at_s - began_s for node, (at_s, _) in acks.items()},
            {node for node, (_, accepted) in acks.items() if not accepted},
            {node: at_s - began_s for node, at_s in self._in_force.pop(revision, {}).items()},
        )


async def propagation(
    *,
    nodes: int = 100,
    n: int = 100,
    processes: int = PROCESSES,
    progress: Progress = lambda _done, _all: None,
) -> dict[str, Any]:
    """Put ``n`` documents, one after the other; returns the figures as JSON values.

    processes: over which the nodes are spread. Raises `StageFailed`.
    """
    with tempfile.TemporaryDirectory(prefix="paddlewheel-bench-") as name:
        async with _staged(Path(name), nodes, min(processes, nodes)) as (store, observer):
            documents = await asyncio.to_thread(_documents, Path(name) / "models")
            rounds: list[Round] = []
            for index in range(-len(documents), n):  # the first ones load the versions
                text = documents[index % len(documents)]
                began_s = time.monotonic()
                revision = await put_document(store, MODEL, text)
                put_s = time.monotonic() - began_s
                await observer.until_in_force(revision, nodes, _ROUND_TIMEOUT_S)
                if index >= 0:
                    rounds.append(observer.round(revision, began_s, put_s))
                    progress(index + 1, n)
                await asyncio.sleep(PAUSE_S)
    return {
        "bench": "propagation",
        "nodes": nodes,
        "processes": min(processes, nodes),
        **figures(rounds),
    }


def _documents(folder: Path) -> list[str]:
    """One that wants each version live; the other stays loaded."""
    sources = {v: make_mlp(folder / v, seed=int(v), tag=float(v)) for v in _VERSIONS}
    listed = "".join(
        f'    - {{version: "{v}", source: "{source.as_uri()}"}}\n' for v, source in sources.items()
    )
    return [
        f"apiVersion: paddlewheel/v1\nkind: Model\nmetadata: {{name: {MODEL}}}\nspec:\n"
        f'  live: "{live}"\n  versions:\n{listed}'
        f"  placement: {{memoryMB: 10}}\n  rollback: {{bake_s: 86400}}\n"
        for live in _VERSIONS
    ]


# --- the stage ----------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def _staged(
    folder: Path, nodes: int, processes: int
) -> AsyncGenerator[tuple[Store, Observer]]:
    async with contextlib.AsyncExitStack() as stack:
        etcd = await stack.enter_async_context(EmbeddedEtcd(folder / "etcd"))
        store = EtcdStore.connect(EtcdSettings(endpoints=(etcd.endpoint,)))
        stack.push_async_callback(store.close)
        observer = Observer(store)
        watching = asyncio.create_task(observer.run())

        async def stop_watching() -> None:
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)

        stack.push_async_callback(stop_watching)
        started: list[asyncio.subprocess.Process] = []

        async def stop_nodes() -> None:
            await asyncio.gather(*(_end(process) for process in started))

        stack.push_async_callback(stop_nodes)
        shares = [len(range(place, nodes, processes)) for place in range(processes)]
        first = 0
        for place, share in enumerate(shares):
            log_path = folder / f"nodes-{place}.log"
            started.append(await _start(etcd.endpoint, folder, first, share, log_path))
            first += share
        await _until_registered(store, nodes, folder / "nodes-0.log")
        yield store, observer


async def _start(
    etcd: str, folder: Path, first: int, count: int, log_path: Path
) -> asyncio.subprocess.Process:
    with log_path.open("wb") as log_file:
        return await asyncio.create_subprocess_exec(
            sys.executable, "-m", "paddlewheel.bench.light_nodes",
            etcd, str(folder), str(first), str(count),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=log_file,
            stderr=log_file,
            start_new_session=True,
            preexec_fn=end_with_parent(signal.SIGTERM),
        )  # fmt: skip


async def _until_registered(store: Store, nodes: int, log_path: Path) -> None:
    deadline_s = time.monotonic() + _START_TIMEOUT_S
    while len((await store.list_prefix(f"{PREFIX}/nodes/")).kvs) < nodes:
        if time.monotonic() > deadline_s:
            raise StageFailed(f"not all nodes came up; a log: {tail(log_path)}")
        await asyncio.sleep(0.1)


async def _end(process: asyncio.subprocess.Process) -> None:
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGTERM)
        try:
            async with asyncio.timeout(20):
                await process.wait()
        except TimeoutError:
            process.kill()
            await process.wait()


# --- figures (pure) -----------------------------------------------------------------------------


def figures(rounds: Sequence[Round]) -> dict[str, Any]:
    """What came of it, as JSON values. ``last_*``: of each document, the slowest node."""
    return {
        "documents": len(rounds),
        "refused": sum(len(each.refused) for each in rounds),
        "put_ms": _spread(each.put_s for each in rounds),
        "ack_ms": _spread(s for each in rounds for s in each.acks_s.values()),
        "last_ack_ms": _spread(max(each.acks_s.values()) for each in rounds),
        "last_in_force_ms": _spread(max(each.in_force_s.values()) for each in rounds),
    }


def _spread(seconds: Iterable[float]) -> dict[str, float]:
    values = [each * 1e3 for each in seconds]
    return {
        name: round(percentile(values, percent), 1)
        for name, percent in (("p50", 50), ("p99", 99), ("max", 100))
    }


def criteria(run: Mapping[str, Any]) -> list[Criterion]:
    p99_ms = run["last_ack_ms"]["p99"]
    return [
        Criterion("refusals", str(run["refused"]), "0", run["refused"] == 0, is_promise=True),
        Criterion(
            f"p99 from the put to the ACK of all {run['nodes']} nodes", f"{p99_ms:.0f} ms",
            f"<= {WANTED_MS:g} ms", p99_ms <= WANTED_MS,
        ),
    ]  # fmt: skip


def tables(run: Mapping[str, Any]) -> list[Table]:
    rows = [
        (what, *(f"{run[key][name]:.0f} ms" for name in ("p50", "p99", "max")))
        for what, key in STEPS.items()
    ]
    title = f"{run['documents']} documents to {run['nodes']} nodes"
    return [grid_table(title, ("from the put to", "p50", "p99", "max"), rows)]


STEPS = {
    "etcd's answer": "put_ms",
    "a node's ACK": "ack_ms",
    "the last node's ACK": "last_ack_ms",
    "in force on the last node": "last_in_force_ms",
}
