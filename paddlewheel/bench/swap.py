"""``paddlewheel bench swap``: requests lost, latency and leaks over many swaps of a live model.

A real etcd, a real node and steady traffic from a process of its own. Documents are put into etcd
as ``etcdctl put`` would, changing the live version and the canary in turns, each time to a version
that is not loaded; each answer is held against the numbers that the version it names must give.
"""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paddlewheel.bench.checks import infer_body
from paddlewheel.bench.closed_loop import closed_loop
from paddlewheel.bench.footprint import footprint
from paddlewheel.bench.load import Request, http_request, mix
from paddlewheel.bench.load_process import LoadProcess, Plan, PlannedRequest
from paddlewheel.bench.samples import Result
from paddlewheel.bench.stage import NodeProcess, Watcher, put_document
from paddlewheel.bench.subjects import HEADER, MODEL, VERSIONS, Subject, mlp_subject
from paddlewheel.bench.swap_figures import Swap, figures
from paddlewheel.embedded_etcd import EmbeddedEtcd
from registry.etcd import EtcdSettings, EtcdStore
from registry.store import Store

MODELS = ("mlp", "ocr-cls", "ocr-rec")
MLP_RATE_PER_S = 200.0
SETTLE_S = 2.0
"""Steady traffic before the first and after the last swap."""
PAUSE_S = 1.0
"""Between a document's arrival in force and the next document: the steady state to compare with."""
WARM_UP_SWAPS = 4
"""Before anything is counted: what is made at first use is no leak."""
_BUSY_SHARE = 0.5
_CAPACITY_S = 3.0
_SWAP_MAX_S = 60.0
_REQUESTS_MAX = 4_000_000

Progress = Callable[[int, int], None]
"""Told how many swaps are done, of how many."""


@dataclass(frozen=True, slots=True)
class _Stage:
    """What one run works on."""

    subject: Subject
    store: Store
    node: NodeProcess
    watcher: Watcher
    requests: tuple[PlannedRequest, ...]


async def swap(
    *,
    n: int = 200,
    model: str = "mlp",
    rate_per_s: float | None = None,
    pause_s: float = PAUSE_S,
    settle_s: float = SETTLE_S,
    progress: Progress = lambda _done, _all: None,
) -> dict[str, Any]:
    """Swap ``n`` times under load; returns the figures of one run as JSON values.

    rate_per_s: ``None`` means 200 for the MLP; for others half of what two connections that never
        pause get answered, measured first.
    """
    with tempfile.TemporaryDirectory(prefix="paddlewheel-bench-") as name:
        async with _staged(model, Path(name)) as stage:
            await _apply(stage, "1", None)
            capacity_per_s: float | None = None
            if rate_per_s is None and model == "mlp":
                rate_per_s = MLP_RATE_PER_S
            elif rate_per_s is None:
                capacity_per_s = await _capacity_per_s(stage)
                rate_per_s = _BUSY_SHARE * capacity_per_s
            await _swap_under_load(stage, min(n, WARM_UP_SWAPS), rate_per_s, 0.0, 0.5)
            pid = stage.node.ready.pid
            before, known = footprint(pid), len(stage.node.events("route_swapped"))
            result, swaps = await _swap_under_load(
                stage, n, rate_per_s, pause_s, settle_s, progress
            )
            after = footprint(pid)
            swaps_us = [e["swap_us"] for e in stage.node.events("route_swapped")][known:]
            return {
                "bench": "swap",
                "model": model,
                "rate_per_s": round(rate_per_s, 2),
                "capacity_per_s": capacity_per_s and round(capacity_per_s, 2),
                **figures(result, swaps, before, after, swaps_us),
            }


async def _swap_under_load(
    stage: _Stage,
    n: int,
    rate_per_s: float,
    pause_s: float,
    settle_s: float,
    progress: Progress = lambda _done, _all: None,
) -> tuple[Result, list[Swap]]:
    """Swap ``n`` times; then back to how it was before, without the generator's connections."""
    ready = stage.node.ready
    seconds_max = min(2 * settle_s + n * (pause_s + _SWAP_MAX_S), _REQUESTS_MAX / rate_per_s)
    plan = Plan(ready.host, ready.port, stage.requests, rate_per_s, seconds_max)
    load = await LoadProcess.start(plan)
    swaps: list[Swap] = []
    try:
        await asyncio.sleep(settle_s)
        for index in range(n):
            live, canary, kind = step(index)
            put_s = time.monotonic()
            await _apply(stage, live, canary)
            swaps.append(Swap(kind, put_s, time.monotonic()))
            progress(index + 1, n)
            await asyncio.sleep(pause_s)
        await asyncio.sleep(settle_s)
        result = await load.stop()
    finally:
        await load.kill()
    await _apply(stage, "1", None)
    await _until_unloaded(stage)
    return result, swaps


def step(index: int) -> tuple[str, str | None, str]:
    """Live version, canary and the kind of the ``index``-th document.

    Of the four versions in turn, each change names one that is not loaded.
    """
    turn = index // 2 + 1
    live, next_live, after_next = (VERSIONS[(turn + k) % 4] for k in range(3))
    if index % 2 == 0:
        return live, next_live if index else None, "live"
    return live, after_next, "canary"


async def _apply(stage: _Stage, live: str, canary: str | None) -> None:
    """Put the document and wait until it is in force."""
    revision = await put_document(stage.store, MODEL, stage.subject.document(live, canary))
    await stage.watcher.until(
        MODEL,
        lambda status: status["applied_revision"] == revision and status["canary"] == canary,
        what=f"live {live}, canary {canary}",
    )


async def _until_unloaded(stage: _Stage) -> None:
    """Wait until only the live version is there, and the last worker's end has been dealt with."""
    await stage.watcher.until(
        MODEL, lambda status: len(status["servables"]) == 1, what="the others unloaded"
    )
    await asyncio.sleep(1.0)


async def _capacity_per_s(stage: _Stage) -> float:
    ready = stage.node.ready
    requests = mix([Request(each.name, each.data, weight=each.weight) for each in stage.requests])
    done = await asyncio.to_thread(
        closed_loop, ready.host, ready.port, (each.data for each in requests),
        concurrency=2, duration_s=_CAPACITY_S,
    )  # fmt: skip
    return done.per_s


@contextlib.asynccontextmanager
async def _staged(model: str, folder: Path) -> AsyncGenerator[_Stage]:
    subject = await _subject(model, folder / "models")
    expected = folder / "expected.npz"
    subject.save_expected(expected)
    async with EmbeddedEtcd(folder / "etcd") as etcd:
        store = EtcdStore.connect(EtcdSettings(endpoints=(etcd.endpoint,)))
        node = await NodeProcess.start(etcd.endpoint, folder)
        watcher = Watcher(store)
        watching = asyncio.create_task(watcher.run())
        try:
            yield _Stage(subject, store, node, watcher, requests_for(subject, expected))
        finally:
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)
            await node.stop()
            await store.close()


def requests_for(subject: Subject, expected: Path) -> tuple[PlannedRequest, ...]:
    """JSON and binary, each also with the header that a canary takes (one in three)."""
    requests: list[PlannedRequest] = []
    for name, weight in (("json", 1), ("binary", subject.json_every - 1)):
        headers, body = infer_body(subject.inputs, binary=name == "binary")
        for suffix, more, share in (("", {}, 2), ("+canary", dict([HEADER]), 1)):
            data = http_request(
                "POST", f"/v2/models/{MODEL}/infer", body, headers={**headers, **more}
            )
            judge_args = {"expected": str(expected), "rtol": subject.rtol, "atol": subject.atol}
            requests.append(
                PlannedRequest(
                    name=name + suffix,
                    data=data,
                    weight=weight * share,
                    judge="paddlewheel.bench.judges:version_answers",
                    judge_args=judge_args,
                )
            )
    return tuple(requests)


async def _subject(model: str, folder: Path) -> Subject:
    if model == "mlp":
        return await asyncio.to_thread(mlp_subject, folder)
    from paddlewheel.bench.ocr_subject import ocr_subject

    return await ocr_subject(model, folder)
