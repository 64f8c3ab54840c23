"""``paddlewheel bench rollback``: from the error that is one too many to an answer by the standby.

A real etcd, a real node and steady judged traffic from a process of its own. In each run a drill
makes the live version fail, through the path of real faults; then the quarantine is lifted and the
version is live again for the next run. Requests lost are counted over all of it.

Two clocks tell the same story: the node's log says when each fault arrived and when routing had
changed, the load generator says when each answer was complete. Both run on this machine, so times
of day of the one are turned into the monotonic times of the other.
"""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import aiohttp
import psutil
from rich.table import Table

from paddlewheel.bench.closed_loop import closed_loop
from paddlewheel.bench.criteria import Criterion
from paddlewheel.bench.guards import GUARDS_RATIO, guards, in_force
from paddlewheel.bench.load import Request, mix
from paddlewheel.bench.load_process import LoadProcess, Plan, PlannedRequest
from paddlewheel.bench.report import counts, fact_table
from paddlewheel.bench.samples import Result, percentile
from paddlewheel.bench.stage import PREFIX, NodeProcess, StageFailed, Watcher, put_document
from paddlewheel.bench.subjects import MODEL, Subject, mlp_subject
from paddlewheel.bench.swap import requests_for
from paddlewheel.embedded_etcd import EmbeddedEtcd
from registry.etcd import EtcdSettings, EtcdStore
from registry.keys import Keys
from registry.names import ModelName, Version
from registry.store import Store

MODELS = ("mlp", "ocr-cls")
MLP_RATE_PER_S = 200.0
WANTED_MS = 5.0
"""p99 from the last error that counts to the first answer by the standby."""
ERRORS = 3
"""``rollback.consecutive`` of the document."""
STANDBY, LIVE = Version("1"), Version("2")
_BUSY_SHARE = 0.5
_CAPACITY_S = 3.0
_RUN_MAX_S = 60.0
_REQUESTS_MAX = 4_000_000
_AROUND_S = 0.02

Progress = Callable[[int, int], None]
"""Told how many runs are done, of how many."""


@dataclass(frozen=True, slots=True)
class _Stage:
    """What one run works on."""

    subject: Subject
    store: Store
    node: NodeProcess
    watcher: Watcher
    requests: tuple[PlannedRequest, ...]


@dataclass(frozen=True, slots=True)
class Run:
    """One rollback, as monotonic times."""

    armed_s: float
    errors_s: tuple[float, ...]
    """When the node took up each fault, up to the one that was one too many."""
    flipped_s: float
    """When its routes no longer led to the failing version."""
    workers_left: int
    """Workers that met a sticky fault and still live."""


async def rollback(
    *,
    n: int = 100,
    model: str = "mlp",
    code: int = 700,
    rate_per_s: float | None = None,
    guard_rounds: int = 40,
    progress: Progress = lambda _done, _all: None,
) -> dict[str, Any]:
    """Roll back ``n`` times under load; returns the figures as JSON values.

    rate_per_s: ``None`` means 200 for the MLP; for others half of what two connections that never
        pause get answered, measured first.
    guard_rounds: turns of the comparison with and without output guards; 0: none.
    Raises `StageFailed` when the node does not get there in time.
    """
    with tempfile.TemporaryDirectory(prefix="paddlewheel-bench-") as name:
        async with _staged(model, Path(name)) as stage:
            await _serve(stage)
            if rate_per_s is None:
                rate_per_s = MLP_RATE_PER_S
                if model != "mlp":
                    rate_per_s = _BUSY_SHARE * await _capacity_per_s(stage)
            result, runs = await _under_load(stage, n, code, rate_per_s, progress)
            compared = None
            if guard_rounds:
                ready = stage.node.ready
                compared = await guards(
                    stage.store, stage.watcher, ready, stage.subject, guard_rounds
                )
    return {
        "bench": "rollback",
        "model": model,
        "code": code,
        "rate_per_s": round(rate_per_s, 2),
        **figures(result, runs),
        "guards": compared,
    }


async def _under_load(
    stage: _Stage, n: int, code: int, rate_per_s: float, progress: Progress
) -> tuple[Result, list[Run]]:
    ready = stage.node.ready
    seconds_max = min(60 + n * _RUN_MAX_S, _REQUESTS_MAX / rate_per_s)
    load = await LoadProcess.start(
        Plan(ready.host, ready.port, stage.requests, rate_per_s, seconds_max)
    )
    runs: list[Run] = []
    try:
        await asyncio.sleep(1.0)
        for index in range(n):
            runs.append(await _roll_back(stage, code))
            progress(index + 1, n)
        await asyncio.sleep(0.5)
        return await load.stop(), runs
    finally:
        await load.kill()


async def _roll_back(stage: _Stage, code: int) -> Run:
    """Arm, wait for the rollback, lift the quarantine, wait for the version to be live again."""
    known = {name: len(stage.node.events(name)) for name in ("servable_fault", "route_swapped")}
    armed_s = time.monotonic()
    await _arm(stage, {"model": MODEL, "version": LIVE, "code": code, "count": ERRORS})
    await stage.watcher.until(
        MODEL, lambda status: status["live"] == STANDBY, what="rolled back", timeout_s=_RUN_MAX_S
    )
    away_s = time.time() - time.monotonic()
    faults, swaps = (stage.node.events(name)[count:] for name, count in known.items())
    flips = [_moment_s(e, away_s) for e in swaps if e["live"] == STANDBY]
    errors_s = tuple(_moment_s(e, away_s) for e in faults if e["code"] == str(code))
    if len(errors_s) < ERRORS or not flips:
        raise StageFailed(f"rolled back after {len(errors_s)} faults of code {code}")
    replaced = {e["pid"] for e in faults if e["fault_class"] in ("sticky", "crash")}
    left = await _still_there(replaced)
    await _release(stage)
    return Run(armed_s, errors_s[:ERRORS], flips[0], left)


def _moment_s(event: Mapping[str, Any], away_s: float) -> float:
    """An event's time of day as monotonic time."""
    return datetime.fromisoformat(event["timestamp"]).timestamp() - away_s


async def _still_there(pids: set[int], within_s: float = 5.0) -> int:
    """How many of these processes live on after ``within_s``."""
    deadline_s = time.monotonic() + within_s
    while left := sum(psutil.pid_exists(pid) for pid in pids):
        if time.monotonic() > deadline_s:
            break
        await asyncio.sleep(0.02)
    return left


async def _arm(stage: _Stage, drill: Mapping[str, Any]) -> None:
    ready = stage.node.ready
    url = f"http://{ready.host}:{ready.port}/admin/drill"
    async with aiohttp.ClientSession() as session, session.post(url, json=drill) as answer:
        if answer.status != 200:
            raise StageFailed(f"drill: {answer.status} {await answer.text()}")


async def _serve(stage: _Stage) -> None:
    """Version 2 live, version 1 its standby for longer than any bench runs."""
    for live in (STANDBY, LIVE):
        text = stage.subject.document(live).replace("bake_s: 0", "bake_s: 86400")
        revision = await put_document(stage.store, MODEL, text)
        await stage.watcher.until(MODEL, in_force(revision), what=f"live {live}")


async def _release(stage: _Stage) -> None:
    """What ``paddlewheel release`` does."""
    keys, model = Keys(PREFIX), ModelName(MODEL)
    key = keys.quarantine(model, LIVE)
    deadline_s = time.monotonic() + _RUN_MAX_S
    while not await stage.store.delete(key):
        if time.monotonic() > deadline_s:
            raise StageFailed("no quarantine in etcd")
        await asyncio.sleep(0.01)
    await stage.store.delete_prefix(keys.faults_prefix(model, LIVE))
    await stage.watcher.until(
        MODEL,
        lambda status: (status["live"], status["standby"]) == (LIVE, STANDBY),
        what="released",
        timeout_s=_RUN_MAX_S,
    )


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
        node = await NodeProcess.start(etcd.endpoint, folder, options=("--enable-drills",))
        watcher = Watcher(store)
        watching = asyncio.create_task(watcher.run())
        try:
            yield _Stage(subject, store, node, watcher, requests_for(subject, expected))
        finally:
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)
            await node.stop()
            await store.close()


async def _subject(model: str, folder: Path) -> Subject:
    if model == "mlp":
        return await asyncio.to_thread(mlp_subject, folder)
    from paddlewheel.bench.ocr_subject import ocr_subject

    return await ocr_subject(model, folder)


# --- figures (pure) ---------------------------------------------------------------------------


def figures(result: Result, runs: Sequence[Run]) -> dict[str, Any]:
    """What came of it, as JSON values."""
    by_end = sorted(result, key=lambda sample: sample.done_s)
    answers_ms: list[float] = []
    slowest_ms: list[float] = []
    for run in runs:
        last_s = run.errors_s[-1]
        answers_ms += [
            (sample.done_s - last_s) * 1e3
            for sample in by_end
            if sample.version == STANDBY and sample.done_s >= last_s
        ][:1]
        around = [
            sample.latency_s * 1e3
            for sample in by_end
            if sample.due_s < last_s + _AROUND_S and sample.done_s >= last_s
        ]
        slowest_ms += [max(around)] if around else []
    return {
        "rollbacks": len(runs),
        "requests": len(result),
        "failed": result.failed,
        "failures": dict(result.failures()),
        "versions": dict(result.by(lambda sample: sample.version)),
        "routes": dict(result.by(lambda sample: sample.route)),
        "error_to_answer_ms": _spread(answers_ms),
        "error_to_flip_ms": _spread([(run.flipped_s - run.errors_s[-1]) * 1e3 for run in runs]),
        "slowest_request_ms": _spread(slowest_ms),
        "request_ms": _spread([sample.latency_s * 1e3 for sample in by_end]),
        "first_to_last_error_ms": _spread(
            [(run.errors_s[-1] - run.errors_s[0]) * 1e3 for run in runs]
        ),
        "workers_left": sum(run.workers_left for run in runs),
    }


def _spread(values: Sequence[float]) -> dict[str, float | None]:
    if not values:
        return {"p50": None, "p99": None, "max": None}
    return {
        name: round(percentile(values, percent), 3)
        for name, percent in (("p50", 50), ("p99", 99), ("max", 100))
    }


def criteria(run: Mapping[str, Any]) -> list[Criterion]:
    p99_ms = run["error_to_answer_ms"]["p99"]
    found = [
        Criterion("requests failed", str(run["failed"]), "0", run["failed"] == 0, is_promise=True),
        Criterion(
            "poisoned workers left", str(run["workers_left"]), "0", run["workers_left"] == 0,
            is_promise=True,
        ),
        Criterion(
            f"p99 from error {ERRORS} to the standby's first answer", _ms(p99_ms),
            f"<= {WANTED_MS:g} ms", p99_ms is not None and p99_ms <= WANTED_MS,
        ),
    ]  # fmt: skip
    if run["guards"] is not None:
        ratio = run["guards"]["ratio"]
        what = "requests per second with output guards / without"
        wanted = f">= {GUARDS_RATIO:g}"
        found.append(Criterion(what, f"{ratio:.3f}", wanted, ratio >= GUARDS_RATIO))
    return found


def tables(run: Mapping[str, Any]) -> list[Table]:
    facts = [
        ("rollbacks", f"{run['rollbacks']}, each after {ERRORS} x code {run['code']}"),
        ("requests", f"{run['requests']} at {run['rate_per_s']:g}/s"),
        ("failed", " ".join([str(run["failed"]), *run["failures"]])),
        ("answered by version", counts(run["versions"])),
        ("answered by route", counts(run["routes"])),
        (f"error {ERRORS} to the standby's first answer", _times(run["error_to_answer_ms"])),
        (f"error {ERRORS} to changed routes, by the node's log", _times(run["error_to_flip_ms"])),
        (f"slowest request around error {ERRORS}", _times(run["slowest_request_ms"])),
        ("any request of the run, to compare with", _times(run["request_ms"])),
        (f"first error to error {ERRORS}", _times(run["first_to_last_error_ms"])),
        ("poisoned workers left", str(run["workers_left"])),
    ]
    compared = run["guards"]
    if compared is not None:
        facts += [
            ("requests per second, with guards", f"{compared['guarded']['per_s']:.0f}"),
            ("requests per second, without", f"{compared['plain']['per_s']:.0f}"),
            ("ratio of two without: the noise", f"{compared['noise']:.3f}"),
        ]
    return [fact_table(f"Rollbacks of {run['model']}", facts)]


def _times(spread: Mapping[str, float | None]) -> str:
    return ", ".join(f"{name} {_ms(value)}" for name, value in spread.items())


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f} ms"
