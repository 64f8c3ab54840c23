"""``paddlewheel bench swap``: requests lost, latency and leaks over many swaps of a live model.

A real etcd, a real node and steady traffic from a process of its own. Documents are put into etcd
as ``etcdctl put`` would, alternating a new live version and a canary; each answer is held against
the numbers that the version it names must give.
"""

from __future__ import annotations

import asyncio
import math
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from paddlewheel.bench.checks import infer_body
from paddlewheel.bench.load import http_request
from paddlewheel.bench.load_process import LoadProcess, Plan, PlannedRequest
from paddlewheel.bench.samples import Result, percentile
from paddlewheel.bench.stage import NodeProcess, Watcher, put_document
from paddlewheel.embedded_etcd import EmbeddedEtcd
from paddlewheel.models import make_mlp, reference
from registry.etcd import EtcdSettings, EtcdStore
from registry.inference import Array

MODEL = "bench"
VERSIONS = ("1", "2", "3", "4")
SETTLE_S = 3.0
"""Steady traffic before the first and after the last swap."""
PAUSE_S = 1.0
"""Between a document's arrival in force and the next document: the steady state to compare with."""
WINDOW_AFTER_S = 0.25
"""A swap's window ends this long after its document is in force."""


@dataclass(frozen=True, slots=True)
class Subject:
    """A model to swap: its versions' folders, one input, and what each version must answer."""

    folders: Mapping[str, Path]
    inputs: Mapping[str, Array]
    expected: Mapping[str, Mapping[str, Array]]
    rate_per_s: float


@dataclass(frozen=True, slots=True)
class Swap:
    """One document, from its put to its being in force (monotonic seconds)."""

    kind: str
    put_s: float
    in_force_s: float


@dataclass(frozen=True, slots=True)
class Footprint:
    """What all of the node's processes hold."""

    pss_mb: float
    open_files: int
    processes: int


async def swap(
    *, n: int = 200, rate_per_s: float = 200.0, model: str = "mlp", pause_s: float = PAUSE_S
) -> dict[str, Any]:
    """Swap ``n`` times under load; returns the figures of one run as JSON values."""
    with tempfile.TemporaryDirectory(prefix="paddlewheel-bench-") as name:
        folder = Path(name)
        subject = _subject(model, folder, rate_per_s)
        async with EmbeddedEtcd() as etcd:
            store = EtcdStore.connect(EtcdSettings(endpoints=(etcd.endpoint,)))
            node = await NodeProcess.start(etcd.endpoint, folder)
            watcher = Watcher(store, lambda _before, _after: None)
            watching = asyncio.create_task(watcher.run())
            try:
                return await _measure(n, subject, store, node, watcher, pause_s)
            finally:
                watching.cancel()
                await node.stop()
                await store.close()


async def _measure(
    n: int, subject: Subject, store: EtcdStore, node: NodeProcess, watcher: Watcher, pause_s: float
) -> dict[str, Any]:
    await _apply(subject, "1", None, store, watcher)
    seconds_max = 2 * SETTLE_S + n * (pause_s + 60)
    before = footprint(node.ready.pid)
    load = await LoadProcess.start(_plan(subject, node, seconds_max))
    await asyncio.sleep(SETTLE_S)
    swaps: list[Swap] = []
    try:
        for index in range(n):
            live, canary, kind = _step(index)
            put_s = time.monotonic()
            await _apply(subject, live, canary, store, watcher)
            swaps.append(Swap(kind, put_s, time.monotonic()))
            await asyncio.sleep(pause_s)
        await asyncio.sleep(SETTLE_S)
        result = await load.stop()
    finally:
        await load.kill()
    # Back to one version, and without the load generator's connections: as before the first swap.
    await _apply(subject, "1", None, store, watcher)
    await asyncio.sleep(SETTLE_S)
    after = footprint(node.ready.pid)
    return figures(result, swaps, before, after, node.events("route_swapped"))


def _step(index: int) -> tuple[str, str | None, str]:
    """Live version, canary and the kind of the ``index``-th document.

    Of four versions in turn, each change names one that is not loaded.
    """
    turn = index // 2 + 1
    live, canary = VERSIONS[turn % 4], VERSIONS[(turn + 2) % 4]
    if index % 2 == 0:
        return live, VERSIONS[(turn + 1) % 4] if index else None, "live"
    return live, canary, "canary"


def _document(subject: Subject, live: str, canary: str | None) -> str:
    versions = "\n".join(
        f'    - {{version: "{version}", source: "{folder}"}}'
        for version, folder in subject.folders.items()
    )
    rules = (
        f'  canary: {{version: "{canary}", rules: [{{header: {{name: X-Canary, equals: "1"}}}}]}}\n'
        if canary
        else ""
    )
    return (
        f"apiVersion: paddlewheel/v1\nkind: Model\nmetadata: {{name: {MODEL}}}\nspec:\n"
        f'  live: "{live}"\n  versions:\n{versions}\n{rules}  rollback: {{bake_s: 0}}\n'
    )


async def _apply(
    subject: Subject, live: str, canary: str | None, store: EtcdStore, watcher: Watcher
) -> None:
    """Put the document and wait until it is in force."""
    revision = await put_document(store, MODEL, _document(subject, live, canary))
    await watcher.until(
        MODEL,
        lambda status: status["applied_revision"] == revision and status["canary"] == canary,
        what=f"live {live}, canary {canary}",
    )


def _plan(subject: Subject, node: NodeProcess, seconds_max: float) -> Plan:
    expected = {
        version: {name: array.tolist() for name, array in outputs.items()}
        for version, outputs in subject.expected.items()
    }
    requests: list[PlannedRequest] = []
    for binary in (False, True):
        for canary in (False, True):
            headers, body = infer_body(subject.inputs, binary=binary)
            if canary:
                headers = {**headers, "X-Canary": "1"}
            path = f"/v2/models/{MODEL}/infer"
            requests.append(
                PlannedRequest(
                    name=("binary" if binary else "json") + ("+canary" if canary else ""),
                    data=http_request("POST", path, body, headers=headers),
                    weight=1 if canary else 2,
                    judge="paddlewheel.bench.judges:version_answers",
                    judge_args={"expected": expected},
                )
            )
    return Plan(
        node.ready.host, node.ready.port, tuple(requests), subject.rate_per_s, seconds_max
    )


def _subject(model: str, folder: Path, rate_per_s: float) -> Subject:
    if model != "mlp":
        from paddlewheel.bench.ocr_subject import ocr_subject

        return ocr_subject(model, folder, rate_per_s)
    rng = np.random.default_rng(7)
    inputs = {"x": rng.standard_normal((1, 64), dtype=np.float32)}
    folders = {
        version: make_mlp(folder / "models" / version, seed=int(version), tag=float(version))
        for version in VERSIONS
    }
    expected = {
        version: {"fetch_name_0": reference(where, inputs["x"])}
        for version, where in folders.items()
    }
    return Subject(folders, inputs, expected, rate_per_s)


def footprint(pid: int) -> Footprint:
    """Proportional memory and descriptors of a process and all below it."""
    root = psutil.Process(pid)
    processes = [root, *root.children(recursive=True)]
    pss = files = count = 0
    for process in processes:
        try:
            pss += process.memory_full_info().pss
            files += process.num_fds()
            count += 1
        except psutil.Error:
            continue  # it ended just now
    return Footprint(pss / 2**20, files, count)


def figures(
    result: Result,
    swaps: list[Swap],
    before: Footprint,
    after: Footprint,
    events: list[dict[str, Any]],
) -> dict[str, Any]:
    """Everything that the table shows, from samples and swap times."""
    windows = [(swap.put_s, swap.in_force_s + WINDOW_AFTER_S) for swap in swaps]

    def is_steady(due_s: float) -> bool:
        return not any(start <= due_s < end for start, end in windows)

    steady = result.only(lambda sample: is_steady(sample.due_s))
    during = result.only(lambda sample: not is_steady(sample.due_s))
    steady_p99_s = steady.latency_s(99)
    by_kind = {
        kind: [s for s in swaps if s.kind == kind] for kind in dict.fromkeys(s.kind for s in swaps)
    }
    return {
        "bench": "swap",
        "swaps": len(swaps),
        "requests": len(result),
        "failed": result.failed,
        "failures": dict(result.failures()),
        "per_s": result.summary()["per_s"],
        "versions": dict(result.by(lambda sample: sample.version)),
        "steady_p50_ms": _ms(steady.latency_s(50)),
        "steady_p99_ms": _ms(steady_p99_s),
        "steady_max_ms": _ms(steady.latency_s(100)),
        "swap_p50_ms": _ms(during.latency_s(50)),
        "swap_p99_ms": _ms(during.latency_s(99)),
        "swap_max_ms": _ms(during.latency_s(100)),
        "p99_allowed_ms": _ms(max(1.5 * steady_p99_s, steady_p99_s + 0.030)),
        "longest_gap_ms": _ms(result.longest_gap_s()),
        "to_in_force_p50_ms": {
            kind: _ms(percentile((s.in_force_s - s.put_s for s in group), 50))
            for kind, group in by_kind.items()
        },
        "to_in_force_p99_ms": {
            kind: _ms(percentile((s.in_force_s - s.put_s for s in group), 99))
            for kind, group in by_kind.items()
        },
        "pointer_swap_p50_us": _us(events, 50),
        "pointer_swap_p99_us": _us(events, 99),
        "pss_before_mb": round(before.pss_mb, 1),
        "pss_after_mb": round(after.pss_mb, 1),
        "open_files_before": before.open_files,
        "open_files_after": after.open_files,
        "processes_before": before.processes,
        "processes_after": after.processes,
    }


def _ms(seconds: float) -> float | None:
    return None if math.isnan(seconds) else round(seconds * 1e3, 3)


def _us(events: list[dict[str, Any]], percent: float) -> float | None:
    values = [float(event["swap_us"]) for event in events]
    return round(percentile(values, percent), 1) if values else None
