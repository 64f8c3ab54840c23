"""``paddlewheel bench soak``: everything goes wrong, about once a second, under steady traffic.

Faults of every kind through drills, workers killed and stopped from outside, etcd restarted,
documents edited, refused and replaced, versions loaded, rolled back and released. Each request must
be answered with the numbers of the version that the answer names, or refused with 503, 504 or 422
and a reason. Before and after, at rest, the node holds the same: memory, processes, open files.
"""

from __future__ import annotations

import asyncio
import re
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import psutil
from rich.table import Table

from paddlewheel.bench.checks import infer_body, outputs_of_version
from paddlewheel.bench.criteria import Criterion
from paddlewheel.bench.footprint import footprint
from paddlewheel.bench.load import Headers, Verify, http_request
from paddlewheel.bench.load_process import LoadProcess, Plan, PlannedRequest
from paddlewheel.bench.report import counts, fact_table
from paddlewheel.bench.samples import Result
from paddlewheel.bench.soak_plan import LIVELY, STEADY, VERSIONS, plan
from paddlewheel.bench.soak_stage import SoakStage, soak_stage
from paddlewheel.models import reference
from registry.inference import Array

RATE_PER_S = 100.0
WARM_UP_S = 15.0
"""Of the same treatment, before anything is counted: what is made at first use is no leak."""
INPUTS = 32
ANSWERED_SHARE_MIN = 0.5
"""A node that refused everything would lose nothing either. What is refused depends on the faults:
the only version of a model, in a crash loop, answers nobody."""
GROWTH_MAX_MB = 12.0
"""Of the memory at rest. Allocators keep some of what was used at the busiest moment."""
GROWTH_MAX_MB_PER_MINUTE = 0.5
"""On top, for series, history and logs that grow up to a bound."""
OUTPUT = "fetch_name_0"
REFUSALS = (422, 503, 504)
REFUSED = "refused: "
"""Starts what the judge says of a refusal that is in order."""
_SHM = Path("/dev/shm")  # noqa: S108 - only looked at

Progress = Callable[[int, int], None]
"""Told how many seconds are over, of how many."""


def _untold(_done: int, _all: int) -> None:
    pass


async def soak(
    *,
    duration_s: float = 60.0,
    seed: int = 1,
    rate_per_s: float = RATE_PER_S,
    warm_up_s: float = WARM_UP_S,
    progress: Progress = _untold,
) -> dict[str, Any]:
    """Hurt a node for ``duration_s``; returns the figures of one run as JSON values."""
    with tempfile.TemporaryDirectory(prefix="paddlewheel-soak-") as name:
        shm_before = _shm()
        async with soak_stage(Path(name)) as stage:
            if warm_up_s:
                await _hurt(stage, seed + 1_000_000, warm_up_s, rate_per_s, _untold)
                await stage.rest()
            stage.done.clear()
            pid = stage.node.ready.pid
            before = held_by(pid)
            known = {name: len(stage.node.events(name)) for name in _EVENTS}
            result = await _hurt(stage, seed, duration_s, rate_per_s, progress)
            await stage.rest()
            after = held_by(pid)
            happened = {name: len(stage.node.events(name)) - known[name] for name in _EVENTS}
            steps = dict(sorted(stage.done.items()))
        return _figures(result, steps, happened, before, after, _shm() - shm_before) | {
            "seed": seed, "duration_s": duration_s, "rate_per_s": rate_per_s,
        }  # fmt: skip


_EVENTS = (
    "servable_fault", "servable_quarantined", "route_swapped", "servable_ready", "servable_failed",
    "device_cordoned", "document_refused", "input_refused", "lease_lost",
)  # fmt: skip
"""In the node's log."""


async def _hurt(
    stage: SoakStage, seed: int, duration_s: float, rate_per_s: float, progress: Progress
) -> Result:
    ready = stage.node.ready
    load = await LoadProcess.start(
        Plan(ready.host, ready.port, _requests(stage), rate_per_s, duration_s + 60, timeout_s=20)
    )
    loop = asyncio.get_running_loop()
    started_s = loop.time()
    try:
        for step in plan(seed, duration_s):
            await asyncio.sleep(max(0.0, started_s + step.at_s - loop.time()))
            await stage.do(step)
            progress(int(step.at_s), int(duration_s))
        await asyncio.sleep(max(0.0, started_s + duration_s - loop.time()))
        return await load.stop()
    finally:
        await load.kill()


# --- requests and their judge -----------------------------------------------------------------


def _requests(stage: SoakStage) -> tuple[PlannedRequest, ...]:
    """Many inputs, so that one taken for poison is one of many; JSON and binary."""
    requests: list[PlannedRequest] = []
    for seed in range(INPUTS):
        for model, versions in ((LIVELY, VERSIONS), (STEADY, ("1",))):
            headers, body = infer_body({"x": input_of(seed)}, binary=seed % 2 == 0)
            folders = {version: str(stage.source(model, version)) for version in versions}
            requests.append(
                PlannedRequest(
                    model,
                    http_request("POST", f"/v2/models/{model}/infer", body, headers=headers),
                    judge="paddlewheel.bench.soak:answered_or_refused",
                    judge_args={"folders": folders, "seed": seed},
                )
            )
    return tuple(requests)


def input_of(seed: int) -> Array:
    """``float32 (1 to 4, 64)``"""
    return np.random.default_rng(seed).standard_normal((1 + seed % 4, 64), dtype=np.float32)


def answered_or_refused(folders: Mapping[str, str], seed: int) -> Verify:
    """The right numbers of the version named, or a refusal that says why and when to come back."""
    x = input_of(seed)
    expected = {version: {OUTPUT: reference(folder, x)} for version, folder in folders.items()}
    answered = outputs_of_version(expected)

    def verify(status: int, headers: Headers, body: bytes) -> str | None:
        if status not in REFUSALS:
            return answered(status, headers, body)
        reason = str(orjson.loads(body).get("error", "")).strip()
        if not reason:
            return f"status {status} without a reason"
        if status == 503 and not float(headers.get("retry-after", "0")) > 0:
            return "status 503 without Retry-After"
        return f"{REFUSED}{status} {_kind_of(reason)}"

    return verify


def _kind_of(reason: str) -> str:
    """The same for all that say the same but for numbers and names."""
    for pattern, word in _VARYING.items():
        reason = pattern.sub(word, reason)
    return reason[:160]


_VARYING = {
    re.compile(r"'[^']*'"): "'...'", re.compile(r"\d+(\.\d+)?"): "n",
    re.compile(r"\bSIG[A-Z]+\b|\bEXIT:n\b|\bHANG\b"): "SIG",
}  # fmt: skip


# --- figures ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Held:
    """What a node holds, its zygote's and its workers' included."""

    memory_mb: float
    """Anonymous and shared memory, a page shared by n of them counting once. Files that are mapped
    are left out: Paddle's libraries are shared with whatever else runs on the machine."""
    front_mb: float
    """Of that, the front's own."""
    processes: int
    open_files: int


def held_by(pid: int) -> Held:
    """Look now. Raises `psutil.Error` when the node is gone."""
    sums = footprint(pid)
    children = psutil.Process(pid).children(recursive=True)
    workers_mb = sum(_own_mb(child.pid) for child in children)
    front_mb = _own_mb(pid)
    return Held(front_mb + workers_mb, front_mb, sums.processes, sums.open_files)


def _own_mb(pid: int) -> float:
    """Proportional share of anonymous and shared memory (proc(5), ``smaps_rollup``)."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0.0  # a worker that ended just now
    fields = dict(line.split(":") for line in lines[1:])
    return sum(int(fields[name].split()[0]) for name in ("Pss_Anon", "Pss_Shmem")) / 1024


def _shm() -> frozenset[str]:
    """Segments are files; a folder there is somebody else's."""
    if not _SHM.is_dir():
        return frozenset()
    return frozenset(entry.name for entry in _SHM.iterdir() if not entry.is_dir())


def _figures(
    result: Result,
    steps: Mapping[str, int],
    happened: Mapping[str, int],
    before: Held,
    after: Held,
    shm: frozenset[str],
) -> dict[str, Any]:
    answered = result.only(lambda sample: sample.failure is None)
    refused = result.only(lambda sample: (sample.failure or "").startswith(REFUSED))
    failures = {
        why: number for why, number in result.failures().items() if not why.startswith(REFUSED)
    }
    return {
        "bench": "soak",
        "requests": len(result),
        "answered": len(answered),
        "refused": dict(refused.by(lambda sample: str(sample.status))),
        "refused_by_model": dict(refused.by(lambda sample: sample.name)),
        "refused_because": {
            why.removeprefix(REFUSED): number for why, number in refused.failures().items()
        },
        "failed": sum(failures.values()),
        "failures": failures,
        "versions": dict(answered.by(lambda sample: f"{sample.name} {sample.version}")),
        "latency_ms": {
            f"p{percent}": round(answered.latency_s(percent) * 1e3, 2) for percent in (50, 99, 100)
        },
        "longest_gap_s": round(answered.longest_gap_s(), 3),
        "steps": dict(steps),
        "events": dict(happened),
        "memory_mb": {"before": round(before.memory_mb, 1), "after": round(after.memory_mb, 1)},
        "front_mb": {"before": round(before.front_mb, 1), "after": round(after.front_mb, 1)},
        "processes": {"before": before.processes, "after": after.processes},
        "open_files": {"before": before.open_files, "after": after.open_files},
        "dev_shm": sorted(shm),
    }


def criteria(run: Mapping[str, Any]) -> list[Criterion]:
    """What the run promised."""
    answered_share = run["answered"] / max(1, run["requests"])
    allowed_mb = GROWTH_MAX_MB + GROWTH_MAX_MB_PER_MINUTE * run["duration_s"] / 60
    memory, processes, files = run["memory_mb"], run["processes"], run["open_files"]
    return [
        Criterion(
            "requests lost, wrong or refused without a reason", str(run["failed"]), "0",
            run["failed"] == 0, is_promise=True,
        ),
        Criterion(
            "requests answered; the others refused with a reason", f"{answered_share:.1%}",
            f">= {ANSWERED_SHARE_MIN:.0%}", answered_share >= ANSWERED_SHARE_MIN,
            is_promise=True,
        ),
        Criterion(
            "memory at rest", f"{memory['after']:.1f} MB, was {memory['before']:.1f} MB",
            f"<= {allowed_mb:.0f} MB more", memory["after"] <= memory["before"] + allowed_mb,
            is_promise=True,
        ),
        Criterion(
            "processes at rest", f"{processes['after']}, was {processes['before']}", "the same",
            processes["after"] == processes["before"], is_promise=True,
        ),
        Criterion(
            "open files at rest", f"{files['after']}, was {files['before']}", "no more",
            files["after"] <= files["before"], is_promise=True,
        ),
        Criterion(
            "left in /dev/shm", counts(dict.fromkeys(run["dev_shm"], 1)), "-",
            not run["dev_shm"], is_promise=True,
        ),
    ]  # fmt: skip


def tables(run: Mapping[str, Any]) -> list[Table]:
    facts = [
        ("requests", str(run["requests"])),
        ("answered", str(run["answered"])),
        ("refused", counts(run["refused"])),
        ("  by model", counts(run["refused_by_model"])),
        *((f"  {number}", reason) for reason, number in run["refused_because"].items()),
        ("failed", str(run["failed"])),
        *((f"  {reason}", str(number)) for reason, number in run["failures"].items()),
        ("answered by", counts(run["versions"])),
        *((name, f"{ms:.1f} ms") for name, ms in run["latency_ms"].items()),
        ("longest gap", f"{run['longest_gap_s']:.2f} s"),
        ("done to it", counts(run["steps"])),
        ("what it did", counts(run["events"])),
        ("memory of the front", "{before:.1f} MB, then {after:.1f} MB".format(**run["front_mb"])),
    ]
    title = f"Soak, {run['duration_s']:g} s at {run['rate_per_s']:g}/s, seed {run['seed']}"
    return [fact_table(title, facts)]
