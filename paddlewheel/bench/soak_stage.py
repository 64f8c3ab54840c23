"""A node to be hurt, and the hands that do it (`paddlewheel.bench.soak`)."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import orjson
import psutil

from paddlewheel.bench.soak_plan import LIVELY, STEADY, VERSIONS, Step
from paddlewheel.bench.stage import PREFIX, NodeProcess, StageFailed, put_document
from paddlewheel.embedded_etcd import EmbeddedEtcd, free_ports
from paddlewheel.models import make_mlp
from registry.etcd import EtcdSettings, EtcdStore
from registry.keys import Keys
from registry.names import ModelName, NodeId, Revision
from registry.store import Store, StoreError

BROKEN = "broken"
"""A version whose parameters are cut short."""
NODE = NodeId("node-1")
REST_S = 60.0
_DRILLS = ("code", "crash", "hang", "slow", "nan", "oom")


@dataclass
class Wanted:
    """The document that a model has now, but for its versions."""

    live: str = "1"
    canary: str | None = None
    bake_s: float = 600
    timeout_s: float = 5
    queue: int = 256


@dataclass
class SoakStage:
    """An etcd, a node with drills enabled, two models."""

    folder: Path
    etcd: EmbeddedEtcd
    store: Store
    node: NodeProcess
    http: aiohttp.ClientSession
    keys: Keys = field(default_factory=lambda: Keys(PREFIX))
    wanted: dict[str, Wanted] = field(default_factory=lambda: {LIVELY: Wanted(), STEADY: Wanted()})
    done: Counter[str] = field(default_factory=Counter[str])
    """Steps that had something to work on, by kind."""
    _etcd_restart: asyncio.Task[None] | None = None

    @property
    def url(self) -> str:
        return f"http://{self.node.ready.host}:{self.node.ready.port}"

    def source(self, model: str, version: str) -> Path:
        return self.folder / "models" / model / version

    # --- documents ----------------------------------------------------------------------------

    def document(self, model: str) -> str:
        wanted = self.wanted[model]
        versions = (*VERSIONS, BROKEN) if model == LIVELY else ("1",)
        spec: dict[str, Any] = {
            "live": wanted.live,
            "versions": [
                {"version": v, "source": self.source(model, v).as_uri()} for v in versions
            ],
            "placement": {"replicas": 1 if model == LIVELY else 2, "memoryMB": 100},
            "rollback": {
                "bake_s": wanted.bake_s,
                "on": {"nan_rate": 0.5, "min_samples": 50},
            },
            "limits": {
                "timeout_s": wanted.timeout_s, "hang_s": 1, "queue": wanted.queue,
                "drain_s": 5, "poison_s": 5,
            },
        }  # fmt: skip
        if wanted.canary is not None and wanted.canary != wanted.live:
            spec["canary"] = {"version": wanted.canary, "rules": [{"percent": 20}]}
        metadata = {"name": model}
        return orjson.dumps(
            {"apiVersion": "paddlewheel/v1", "kind": "Model", "metadata": metadata, "spec": spec}
        ).decode()

    async def put(self, model: str) -> Revision:
        return await put_document(self.store, model, self.document(model))

    async def status(self, model: str) -> Mapping[str, Any]:
        kv = await self.store.get(self.keys.status(ModelName(model), NODE))
        return {} if kv is None else dict(orjson.loads(kv.value))

    # --- hurting ------------------------------------------------------------------------------

    async def do(self, step: Step) -> None:
        """Do one step. What has nothing to work on just now (no worker, no etcd) is left out."""
        with contextlib.suppress(StoreError, aiohttp.ClientError, psutil.Error, TimeoutError):
            if await self._do(step):
                self.done[step.kind] += 1

    async def _do(self, step: Step) -> bool:
        wanted = self.wanted[step.model]
        match step.kind:
            case kind if kind in _DRILLS:
                return await self._drill({"model": step.model, "kind": kind, **step.what})
            case "kill" | "stop":
                number = signal.SIGKILL if step.kind == "kill" else signal.SIGSTOP
                return self._signal_worker(step.what["pick"], number)
            case "etcd":
                return self._restart_etcd()
            case "release":
                return await self.release() > 0
            case "refused document":
                await put_document(self.store, step.model, "spec: {live: 1}\n")
                return True
            case "edit":
                wanted.timeout_s, wanted.queue = step.what["timeout_s"], step.what["queue"]
            case "load":
                wanted.live, wanted.bake_s = step.what["version"], step.what["bake_s"]
                wanted.canary = None
            case "canary":
                wanted.canary = step.what["version"]
            case "broken version":
                before, wanted.live = wanted.live, BROKEN
                try:
                    await self.put(step.model)
                finally:
                    wanted.live = before
                return True
            case kind:
                raise ValueError(kind)
        await self.put(step.model)
        return True

    async def _drill(self, document: Mapping[str, Any]) -> bool:
        async with self.http.post(f"{self.url}/admin/drill", json=document) as answer:
            return answer.status == 200

    def _signal_worker(self, pick: int, number: signal.Signals) -> bool:
        workers = self.workers()
        if workers:
            os.kill(workers[pick % len(workers)], number)
        return bool(workers)

    def _restart_etcd(self) -> bool:
        if self._etcd_restart is not None and not self._etcd_restart.done():
            return False
        self._etcd_restart = asyncio.create_task(self._stop_and_start())
        return True

    async def _stop_and_start(self) -> None:
        await self.etcd.stop(keep_folder=True)
        await self.etcd.start()

    def workers(self) -> list[int]:
        """Pids, in order of their birth."""
        children = psutil.Process(self.node.ready.pid).children(recursive=True)
        born: list[tuple[float, int]] = []
        for child in children:
            with contextlib.suppress(psutil.Error):
                if child.name() == "pw-worker" and child.status() != psutil.STATUS_ZOMBIE:
                    born.append((child.create_time(), child.pid))
        return [pid for _, pid in sorted(born)]

    # --- healing ------------------------------------------------------------------------------

    async def release(self) -> int:
        """Lift every quarantine; returns how many there were."""
        listing = await self.store.list_prefix(self.keys.quarantines_prefix)
        for kv in listing.kvs:
            await self.store.delete(kv.key)
        return len(listing.kvs)

    async def rest(self) -> None:
        """End all faults; wait until both models serve version 1 with all replicas and no other.

        Raises `StageFailed` when the node does not come to rest.
        """
        if self._etcd_restart is not None:
            await self._etcd_restart
        async with self.http.get(f"{self.url}/admin/drill") as answer:
            for drill in (await answer.json())["drills"]:
                await self.http.delete(f"{self.url}/admin/drill/{drill['id']}")
        for pid in self.workers():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
        self.wanted = {LIVELY: Wanted(bake_s=0), STEADY: Wanted(bake_s=0)}
        revisions = {model: await self.put(model) for model in self.wanted}
        deadline_s = asyncio.get_running_loop().time() + REST_S
        while (why := await self._unrest(revisions)) is not None:
            if asyncio.get_running_loop().time() > deadline_s:
                raise StageFailed(f"not at rest within {REST_S:g} s: {why}")
            with contextlib.suppress(StoreError):
                await self.release()
            await asyncio.sleep(0.2)
        await asyncio.sleep(1.0)  # the ends of the last workers have been dealt with

    async def _unrest(self, revisions: Mapping[str, Revision]) -> str | None:
        try:
            for model, revision in revisions.items():
                status = await self.status(model)
                servables = status.get("servables", [])
                is_calm = (
                    status.get("applied_revision") == revision
                    and status.get("reason") is None
                    and [servable["state"] for servable in servables] == ["LIVE"]
                    and all(w["alive"] for s in servables for w in s["workers"])
                )
                if not is_calm:
                    return orjson.dumps(status).decode()
            async with self.http.get(f"{self.url}/readyz?verbose") as answer:
                return None if answer.status == 200 else await answer.text()
        except (StoreError, aiohttp.ClientError) as exc:
            return repr(exc)


@contextlib.asynccontextmanager
async def soak_stage(folder: Path) -> AsyncGenerator[SoakStage]:
    """Started and at rest; at the end everything is ended."""
    (port,) = free_ports(0)
    make: Callable[..., Path] = make_mlp
    for n, version in enumerate(VERSIONS, 1):
        make(folder / "models" / LIVELY / version, seed=n, tag=n)
    make(folder / "models" / STEADY / "1", seed=9, tag=9)
    broken = make(folder / "models" / LIVELY / BROKEN, seed=5, tag=5) / "inference.pdiparams"
    broken.write_bytes(broken.read_bytes()[:-100])
    async with EmbeddedEtcd(folder / "etcd", client_port=port) as etcd:
        store = EtcdStore.connect(EtcdSettings(endpoints=(etcd.endpoint,)))
        options = ("--enable-drills", "--lease-ttl", "3")
        node = await NodeProcess.start(etcd.endpoint, folder, options=options)
        timeout = aiohttp.ClientTimeout(total=10)
        async with aiohttp.ClientSession(timeout=timeout) as http:
            stage = SoakStage(folder, etcd, store, node, http)
            try:
                await stage.rest()
                yield stage
            finally:
                await node.stop()
                await store.close()
