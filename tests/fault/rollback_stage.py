"""Two real nodes on one etcd that obey drills, and what a rollback is looked at with.

Both serve the same MLP; the last column of every answer says which version gave it, and every
answer of the traffic is held against that version's own numbers.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import aiohttp

from paddlewheel.bench.load_process import LoadProcess, Plan
from registry.etcd import EtcdStore
from registry.names import ModelName, NodeId, Revision, Version
from registry.records import ModelStatus, Quarantine, ServableStatus
from tests.etcd import EtcdCluster
from tests.eventually import eventually
from tests.node import Command
from tests.served import KEYS, Models, Traffic

RATE_PER_S = 100.0
ROLLS_BACK_WITHIN_S = 15.0
"""Three crashes with two new workers in between are the slowest; a code takes milliseconds."""
SERVES_WITHIN_S = 40.0


class DrilledNode(Command):
    """A node with ``--enable-drills``; the same ``id`` and folder make it the same node."""

    id: NodeId

    async def call(
        self, method: str, path: str, document: Mapping[str, Any] | None = None
    ) -> tuple[int, Any]:
        """Status and JSON of one request."""
        timeout = aiohttp.ClientTimeout(total=20)
        async with (
            aiohttp.ClientSession(timeout=timeout) as session,
            session.request(method, f"{self.http}{path}", json=document) as answer,
        ):
            return answer.status, json.loads(await answer.read())

    async def drill(self, model: ModelName, **document: Any) -> str:
        """Arm a drill; its id."""
        status, armed = await self.call("POST", "/admin/drill", {"model": model, **document})
        assert status == 200, armed
        return str(armed["id"])

    async def drills_left(self) -> int:
        _, body = await self.call("GET", "/admin/drill")
        return sum(drill["left"] for drill in body["drills"])

    async def until_drilled(self) -> None:
        """Until no drill is left."""

        async def is_over() -> bool:
            return not await self.drills_left()

        await eventually(is_over, within_s=20, what="the drill is over")

    async def servables(self, model: ModelName) -> dict[str, Mapping[str, Any]]:
        """By version, from the node itself."""
        _, body = await self.call("GET", "/admin/servables")
        return {s["version"]: s for s in body["servables"] if s["model"] == model}

    async def pids(self, model: ModelName) -> dict[str, list[int]]:
        """The workers of each version."""
        return {
            version: [worker["pid"] for worker in servable["workers"] if worker["alive"]]
            for version, servable in (await self.servables(model)).items()
        }

    def at(self, event: str, **fields: Any) -> datetime:
        """When the latest such event was logged."""
        return datetime.fromisoformat(self.logged(event, **fields)[-1]["timestamp"])

    def logged(self, event: str, **fields: Any) -> list[dict[str, Any]]:
        return [e for e in self.events(event) if fields.items() <= e.items()]


@dataclass
class Fleet:
    """The nodes, their etcd, and a client of it that is the test's own."""

    cluster: EtcdCluster
    store: EtcdStore
    folder: Path
    nodes: dict[str, DrilledNode] = field(default_factory=dict[str, DrilledNode])

    def __getitem__(self, id: str) -> DrilledNode:
        return self.nodes[id]

    async def start(self, id: str, *flags: str) -> DrilledNode:
        """Start the node ``id``, anew or for the first time."""
        folder = self.folder / id
        started = await DrilledNode.start(
            (
                "node", "--etcd", ",".join(self.cluster.endpoints), "--id", id,
                "--listen", "127.0.0.1:0", "--device", "cpu", "--cache", str(folder / "cache"),
                "--lease-ttl", "2", "--enable-drills", *flags,
            ),
            folder,
        )  # fmt: skip
        assert isinstance(started, DrilledNode)
        started.id = NodeId(id)
        self.nodes[id] = started
        return started

    async def close(self) -> None:
        await asyncio.gather(*(node.end() for node in self.nodes.values()))

    # --- what etcd says -------------------------------------------------------------------------

    async def status(self, id: str, model: ModelName) -> ModelStatus | None:
        kv = await self.store.get(KEYS.status(model, NodeId(id)))
        return None if kv is None else ModelStatus.from_json(kv.value)

    async def until(
        self,
        id: str,
        model: ModelName,
        holds: Callable[[ModelStatus], bool],
        *,
        within_s: float,
        what: str,
    ) -> ModelStatus:
        """Until the node's status is so; the failure shows the last one and the log."""
        last: list[ModelStatus | None] = [None]

        async def is_so() -> bool:
            last[0] = await self.status(id, model)
            return last[0] is not None and holds(last[0])

        try:
            await eventually(is_so, within_s=within_s)
        except AssertionError:
            shown = None if last[0] is None else last[0].to_json().decode()
            log = self[id].tail() if id in self.nodes else ""
            raise AssertionError(
                f"{id}: not within {within_s:g} s: {what}: {shown}\n{log}"
            ) from None
        assert last[0] is not None
        return last[0]

    async def until_serves(
        self,
        model: ModelName,
        live: str,
        *,
        standby: str | None = None,
        canary: str | None = None,
        revision: Revision | None = None,
        nodes: Sequence[str] | None = None,
        within_s: float = SERVES_WITHIN_S,
    ) -> None:
        """Until every node routes like this."""

        def holds(status: ModelStatus) -> bool:
            routed = (status.live, status.standby, status.canary)
            is_applied = revision is None or status.applied_revision == revision
            return routed == (live, standby, canary) and is_applied

        what = f"live {live}, standby {standby}, canary {canary}"
        for id in nodes or self.nodes:
            await self.until(id, model, holds, within_s=within_s, what=what)

    async def quarantine(self, model: ModelName, version: str) -> Quarantine | None:
        kv = await self.store.get(KEYS.quarantine(model, Version(version)))
        return None if kv is None else Quarantine.from_json(kv.value)

    async def release(self, model: ModelName, version: str) -> None:
        """What ``paddlewheel release`` does, in two writes."""
        await self.store.delete(KEYS.quarantine(model, Version(version)))
        await self.store.delete_prefix(KEYS.faults_prefix(model, Version(version)))

    # --- what to serve --------------------------------------------------------------------------

    async def serve(
        self,
        models: Models,
        live: str = "2",
        *,
        before: str | None = "1",
        standby: str | None = "before",
    ) -> Revision:
        """Have ``live`` served everywhere after ``before``, which is its standby unless said."""
        if before is not None:
            revision = await models.put(self.store, before)
            await self.until_serves(models.name, before, revision=revision)
        revision = await models.put(self.store, live)
        standby = before if standby == "before" else standby
        await self.until_serves(models.name, live, standby=standby, revision=revision)
        return revision


@asynccontextmanager
async def fleet_of(
    cluster: EtcdCluster, folder: Path, *ids: str, flags: Sequence[str] = ()
) -> AsyncIterator[Fleet]:
    store = EtcdStore.connect(cluster.settings(timeout_s=10))
    fleet = Fleet(cluster, store, folder)
    try:
        for id in ids:
            await fleet.start(id, *flags)
        yield fleet
    finally:
        await fleet.close()
        await store.close()


@asynccontextmanager
async def steady(
    command: Command,
    models: Models,
    *,
    rate_per_s: float = RATE_PER_S,
    timeout_s: float = 15.0,
    may_fail: bool = False,
) -> AsyncIterator[Traffic]:
    """Judged requests from here to the end of the block, which fails when a single one did."""
    host, _, port = command.http.removeprefix("http://").rpartition(":")
    ticked = asyncio.Event()
    plan = Plan(host, int(port), models.requests(), rate_per_s, 600.0, timeout_s=timeout_s)
    process = await LoadProcess.start(plan, on_tick=lambda _: ticked.set())
    running = Traffic(process)
    try:
        async with asyncio.timeout(20):
            await ticked.wait()
        yield running
        result = await running.stop()
    finally:
        await process.kill()
    assert len(result) > rate_per_s / 2
    if not may_fail:
        assert not result.failed, (result.summary(), command.tail())


def servable(status: ModelStatus, version: str) -> ServableStatus:
    """The servable of ``version``; fails the test when there is none."""
    found = [each for each in status.servables if each.version == version]
    assert found, f"no servable {version}: {status.to_json().decode()}"
    return found[0]


@dataclass(frozen=True)
class Asked:
    """One request's answer."""

    status: int
    version: str
    retry_after: str | None
    text: str


async def ask(command: Command, models: Models, **headers: str) -> Asked:
    """One inference, as JSON."""
    body = {"inputs": {"x": [[0.5] * 64]}}
    timeout = aiohttp.ClientTimeout(total=20)
    url = f"{command.http}/v1/models/{models.name}/predict"
    async with (
        aiohttp.ClientSession(timeout=timeout) as session,
        session.post(url, json=body, headers=headers) as answer,
    ):
        shown = answer.headers
        return Asked(
            answer.status,
            shown.get("X-Model-Version", ""),
            shown.get("Retry-After"),
            await answer.text(),
        )
