"""A gateway and its nodes as real processes, over one real etcd."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from registry.names import Revision
from registry.records import ModelStatus
from registry.store import Store
from tests.etcd import EtcdCluster
from tests.eventually import eventually
from tests.node import SERVES_WITHIN_S, Command, http_get, store_of
from tests.served import KEYS, MLP, Models

TTL_S = 2


@dataclass
class FleetNode:
    """A node that can end and come back at its address and with its cache."""

    id: str
    etcd: Sequence[str]
    folder: Path
    flags: Sequence[str] = ()
    port: int = 0
    command: Command | None = None

    @property
    def process(self) -> Command:
        assert self.command is not None
        return self.command

    async def start(self) -> None:
        self.command = await Command.start(
            (
                "node", "--etcd", ",".join(self.etcd), "--id", self.id,
                "--listen", f"127.0.0.1:{self.port}", "--device", "cpu,memoryMB=4000",
                "--cache", str(self.folder / "cache"), "--lease-ttl", str(TTL_S), *self.flags,
            ),
            self.folder,
        )  # fmt: skip
        self.port = int(self.command.http.rpartition(":")[2])


@dataclass
class FleetUnderTest:
    """Nodes that serve version 1 of `models`, and a gateway that knows them all."""

    cluster: EtcdCluster
    store: Store
    gateway: Command
    models: Models
    nodes: list[FleetNode] = field(default_factory=list[FleetNode])

    async def restart_gateway(self, folder: Path) -> None:
        """Another process with the same state on disk, which is in ``folder``."""
        assert await self.gateway.stop() == 0
        self.gateway = await start_gateway(self.cluster, folder)

    async def seen(self) -> dict[str, dict[str, Any]]:
        """The gateway's view of each node, by id."""
        _, body = await http_get(f"{self.gateway.http}/admin/nodes")
        return {node["id"]: node for node in body["nodes"]}

    async def taking(self) -> set[str]:
        """The nodes that default traffic goes to."""
        _, body = await http_get(f"{self.gateway.http}/admin/routes")
        route = body["models"].get(MLP)
        return set(route["nodes"]) if route is not None else set()

    async def until_taking(self, *nodes: FleetNode, within_s: float) -> None:
        wanted = {node.id for node in nodes}

        async def they_are() -> bool:
            return await self.taking() == wanted

        try:
            await eventually(they_are, within_s=within_s)
        except AssertionError:
            raise AssertionError(
                f"within {within_s:g} s traffic went to {await self.taking()}, not {wanted}:\n"
                f"{await self.seen()}\n{self.gateway.tail()}"
            ) from None

    async def statuses(self) -> dict[str, ModelStatus]:
        """What each node says of the model, by id."""
        listing = await self.store.list_prefix(KEYS.status_prefix(MLP))
        said = [ModelStatus.from_json(kv.value) for kv in listing.kvs]
        return {status.node: status for status in said}

    async def applied(self) -> dict[str, Revision | None]:
        """The document that each node has in force, by id."""
        return {id: said.applied_revision for id, said in (await self.statuses()).items()}

    async def until_applied(self, revision: Revision, *, within_s: float = SERVES_WITHIN_S) -> None:
        """Until every node says that this document is in force."""

        async def applied() -> bool:
            listing = await self.store.list_prefix(KEYS.status_prefix(MLP))
            said = [ModelStatus.from_json(kv.value).applied_revision for kv in listing.kvs]
            return said == [revision] * len(self.nodes)

        await eventually(applied, within_s=within_s, what=f"{revision} in force everywhere")


@asynccontextmanager
async def fleet(
    cluster: EtcdCluster,
    folder: Path,
    count: int = 3,
    *,
    gateway_flags: Sequence[str] = (),
    node_flags: Sequence[Sequence[str]] = (),
    **spec: Any,
) -> AsyncGenerator[FleetUnderTest]:
    """node_flags: more flags for each node. spec: more of the model's document."""
    models = Models(folder / "models", spec=spec)
    async with AsyncExitStack() as stack:
        store = await stack.enter_async_context(store_of(cluster.endpoints))
        revision = await models.put(store, "1")
        flags = [*node_flags, *[()] * (count - len(node_flags))]
        nodes = [
            FleetNode(f"n{index}", cluster.endpoints, folder / f"n{index}", flags[index])
            for index in range(count)
        ]

        async def end_nodes() -> None:
            started = [node.command for node in nodes if node.command is not None]
            await asyncio.gather(*(command.end() for command in started))

        stack.push_async_callback(end_nodes)
        await asyncio.gather(*(node.start() for node in nodes))
        gateway = await start_gateway(cluster, folder / "gateway", gateway_flags)
        world = FleetUnderTest(cluster, store, gateway, models, nodes)

        async def end_gateway() -> None:
            await world.gateway.end()

        stack.push_async_callback(end_gateway)
        await world.until_applied(revision)
        await world.until_taking(*nodes, within_s=10)
        yield world
        gateway = world.gateway
        assert gateway.is_running
        assert not [e for e in gateway.events() if e.get("level") == "error"], gateway.tail()


async def start_gateway(cluster: EtcdCluster, folder: Path, flags: Sequence[str] = ()) -> Command:
    return await Command.start(
        ("gateway", "--etcd", ",".join(cluster.endpoints), "--listen", "127.0.0.1:0", *flags),
        folder,
    )
