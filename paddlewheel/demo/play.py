"""The play: steady traffic on two OCR models while their documents in etcd are edited."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console

from paddlewheel.bench import load
from paddlewheel.bench.load_process import LoadProcess, Plan
from paddlewheel.bench.samples import Result, Sample
from paddlewheel.bench.stage import NodeProcess, StageFailed, Status, Watcher, put_document
from paddlewheel.demo import traffic
from paddlewheel.demo.documents import document
from paddlewheel.demo.models import (
    Published,
    copy_model,
    cut_weights,
    find_published,
    round_weights,
)
from paddlewheel.demo.teller import Teller
from paddlewheel.demo.traffic import CLS_MODEL, REC_MODEL
from paddlewheel.embedded_etcd import EmbeddedEtcd
from registry.etcd import EtcdSettings, EtcdStore
from registry.store import Store

NODE_ID = "demo-1"
STEADY_S = 6.0
"""Traffic before the first edit and between two edits, so that there is a steady state to
compare with."""
_RATES = (2.0, 40.0)
_BUSY_SHARE = 0.4
"""Of one core, by the models' own run time: the rest is for loading, etcd, and the generator."""


@dataclass(frozen=True, slots=True)
class Edit:
    """One document put into etcd under traffic, and what came of it."""

    title: str
    model: str
    started_s: float
    """Monotonic, when it was put."""
    settled_s: float
    """When the node's status showed the outcome."""
    swaps_routing: bool


@dataclass(slots=True)
class Report:
    """What the play leaves for the closing table."""

    result: Result = field(default_factory=Result)
    rate_per_s: float = 0.0
    """At which requests were due."""
    edits: list[Edit] = field(default_factory=list[Edit])
    swaps_us: list[float] = field(default_factory=list[float])
    problems: list[str] = field(default_factory=list[str])
    """What did not come as the play says it must; empty when all is well."""


@dataclass(frozen=True, slots=True)
class Folders:
    """Where the versions of both models lie."""

    rec: dict[str, Path]
    cls: dict[str, Path]
    cut: Path


def make_folders(published: Published, folder: Path) -> Folders:
    """Copy, round and cut the models into ``folder``."""
    rec, cls = published.recognition, published.direction
    return Folders(
        {"1": copy_model(rec, folder / "rec-1"), "2": round_weights(rec, folder / "rec-2")},
        {"1": copy_model(cls, folder / "cls-1"), "2": round_weights(cls, folder / "cls-2")},
        cut_weights(rec, folder / "rec-3"),
    )


class Play:
    """The scenes, in order. Each puts one document and waits for what it must bring about."""

    def __init__(
        self, store: Store, watcher: Watcher, folders: Folders, teller: Teller, report: Report
    ) -> None:
        self._store = store
        self._watcher = watcher
        self._folders = folders
        self._teller = teller
        self._report = report

    async def opening(self) -> None:
        """Both models at version 1, before there is traffic."""
        rec, cls = self._folders.rec["1"], self._folders.cls["1"]
        await put_document(self._store, REC_MODEL, document(REC_MODEL, "1", {"1": rec}))
        await put_document(self._store, CLS_MODEL, document(CLS_MODEL, "1", {"1": cls}))
        for model in (REC_MODEL, CLS_MODEL):
            await self._watcher.until(
                model, lambda status: status["live"] == "1", what=f"{model} 1 live"
            )

    async def scenes(self) -> None:
        """Every edit, with steady traffic between them."""
        rec, cls = self._folders.rec, self._folders.cls
        await self._edit(
            "direction model: live 1 -> 2", CLS_MODEL, document(CLS_MODEL, "2", cls),
            lambda status: status["live"] == "2",
        )  # fmt: skip
        await self._edit(
            "recognition model: 2 as canary for X-Canary: 1", REC_MODEL,
            document(REC_MODEL, "1", rec, canary="2"),
            lambda status: status["canary"] == "2" and status["live"] == "1",
        )  # fmt: skip
        await self._edit(
            "recognition model: live 1 -> 2", REC_MODEL, document(REC_MODEL, "2", rec),
            lambda status: status["live"] == "2" and status["canary"] is None,
        )  # fmt: skip
        broken = document(REC_MODEL, "2", rec).replace("warmup:", "warmpu:")
        await self._edit(
            "recognition model: a typing error in the document", REC_MODEL, broken,
            lambda status: not status["accepted"], keeps="2",
        )  # fmt: skip
        with_cut = document(REC_MODEL, "3", {**rec, "3": self._folders.cut})
        await self._edit(
            "recognition model: live 3, its weights cut short by 4 bytes", REC_MODEL, with_cut,
            lambda status: status["accepted"] and _state(status, "3") == "FAILED", keeps="2",
        )  # fmt: skip
        await self._edit(
            "recognition model: back to 1, still warm", REC_MODEL, document(REC_MODEL, "1", rec),
            lambda status: status["accepted"] and status["live"] == "1",
        )  # fmt: skip

    async def _edit(
        self,
        title: str,
        model: str,
        text: str,
        settled: Callable[[Status], bool],
        *,
        keeps: str | None = None,
    ) -> None:
        """Put a document and wait for its outcome; ``keeps`` is the version that must stay live."""
        started_s = time.monotonic()
        self._teller.say("etcd", f"put {title}", "cyan")
        revision = await put_document(self._store, model, text)
        status = await self._watcher.until(
            model, lambda status: status["revision"] >= revision and settled(status), what=title
        )
        settled_s = time.monotonic()
        swaps = keeps is None
        self._report.edits.append(Edit(title, model, started_s, settled_s, swaps))
        if keeps is not None and status["live"] != keeps:
            self._report.problems.append(f"{title}: live is {status['live']}, not {keeps}")
        outcome = "in force" if swaps else f"refused, {keeps} serves on,"
        self._teller.say("node", f"{outcome} after {settled_s - started_s:.2f} s", "green")
        await asyncio.sleep(STEADY_S)


def _state(status: Status, version: str) -> str | None:
    return next((s["state"] for s in status["servables"] if s["version"] == version), None)


async def steady_rate_per_s(host: str, port: int, requests: tuple[load.Request, ...]) -> float:
    """A rate that this machine answers with ease: each kind is timed alone first."""
    spent_s = 0.0
    for request in requests:
        result = await load.run(host, port, [request], rate_per_s=4, duration_s=0.75)
        spent_s += result.latency_s(50)
    rate_per_s = _BUSY_SHARE * len(requests) / spent_s
    return min(max(rate_per_s, _RATES[0]), _RATES[1])


def canary_problems(result: Result, edits: list[Edit]) -> list[str]:
    """Whether, while the canary was in force, it got the marked requests and no others."""
    starts = next((e for e in edits if "canary" in e.title), None)
    if starts is None:
        return ["the canary never came into force"]
    ends = next((e for e in edits if e.model == REC_MODEL and e.started_s > starts.settled_s), None)
    window = result.window(starts.settled_s, ends.started_s if ends else result.ended_s)
    problems: list[str] = []
    for name, version in (("rec-canary", "2"), ("rec", "1")):
        answered = window.only(_is_kind(name))
        strays = sum(1 for sample in answered if sample.version != version)
        if strays or not len(answered):
            problems.append(f"canary: {strays} of {len(answered)} {name} requests not by {version}")
    return problems


def _is_kind(name: str) -> Callable[[Sample], bool]:
    return lambda sample: sample.name == name


@contextlib.asynccontextmanager
async def _watching(watcher: Watcher) -> AsyncGenerator[None]:
    task = asyncio.create_task(watcher.run())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def perform(folder: Path, console: Console) -> Report:
    """Play it all in ``folder``; returns once nothing of it runs any more.

    Raises `PaddlewheelError` when the play could not be played to its end.
    """
    teller, report = Teller(console), Report()
    published = find_published()
    teller.say("models", "PP-OCRv4 as published is version 1; rounded to bfloat16, version 2")
    folders = await asyncio.to_thread(make_folders, published, folder)
    async with EmbeddedEtcd(folder / "etcd") as etcd:
        teller.say("etcd", f"serves at {etcd.endpoint}")
        node = await NodeProcess.start(etcd.endpoint, folder, node_id=NODE_ID)
        store = EtcdStore.connect(EtcdSettings(endpoints=(etcd.endpoint,)))
        try:
            teller.say("node", f"{NODE_ID} listens at http://{node.ready.host}:{node.ready.port}")
            watcher = Watcher(store, teller.status_changed)
            async with _watching(watcher):
                play = Play(store, watcher, folders, teller, report)
                await play.opening()
                await _under_traffic(play, node, published.alphabet, teller, report)
            report.swaps_us += [event["swap_us"] for event in node.events("route_swapped")]
        finally:
            code = await node.stop()
            await store.close()
        teller.say("node", f"stopped, exit {code}")
        if code != 0:
            report.problems.append(f"the node ended with {code}")
    report.problems += canary_problems(report.result, report.edits)
    return report


async def _under_traffic(
    play: Play, node: NodeProcess, alphabet: Path, teller: Teller, report: Report
) -> None:
    planned = traffic.planned_requests(alphabet)
    kinds = {request.name: load.Request(request.name, request.data) for request in planned}
    host, port = node.ready.host, node.ready.port
    rate_per_s = await steady_rate_per_s(host, port, (kinds["rec"], kinds["cls"]))
    report.rate_per_s = rate_per_s
    plan = Plan(host, port, planned, rate_per_s, duration_s=900)
    generator = await LoadProcess.start(plan, on_tick=teller.tick)
    teller.say("traffic", f"{rate_per_s:.1f} requests per second, in a process of their own")
    try:
        await asyncio.sleep(STEADY_S)
        await play.scenes()
        report.result = await generator.stop()
    except StageFailed:
        if node.returncode is not None:
            teller.say("node", f"ended with {node.returncode}", "bold red")
        raise
    finally:
        await generator.kill()
