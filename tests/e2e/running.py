"""A real node on a real etcd, seen from outside: documents in, requests in, answers and status out.

What a test learns comes from etcd, from HTTP and from the process table, never from the node's
insides.
"""

from __future__ import annotations

import asyncio
import io
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import aiohttp
import orjson

from paddlewheel.bench.checks import infer_body, read_outputs
from registry.etcd import EtcdStore
from registry.inference import Array
from registry.keys import Keys
from registry.names import ModelName, NodeId, Revision
from registry.store import Store
from tests.etcd import EtcdCluster
from tests.eventually import eventually
from tests.node import Command

OUTPUT = "fetch_name_0"
"""What Paddle 3 calls the first output of every exported program."""

Status = dict[str, Any]
"""The JSON of ``/paddlewheel/status/<model>/<node>``."""


# --- documents -----------------------------------------------------------------------------------


def document(
    model: str, live: str, versions: Mapping[str, Path | dict[str, Any]], **spec: Any
) -> bytes:
    """A model document as JSON.

    versions: each version's folder, or the whole entry but for its name.
    spec: what else stands under ``spec``.
    """
    entries = [
        {"version": version} | (given if isinstance(given, dict) else {"source": str(given)})
        for version, given in versions.items()
    ]
    return orjson.dumps(
        {
            "apiVersion": "paddlewheel/v1",
            "kind": "Model",
            "metadata": {"name": model},
            "spec": {"live": live, "versions": entries, **spec},
        },
        option=orjson.OPT_INDENT_2,
    )


# --- the node ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Answer:
    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return orjson.loads(self.body)

    @property
    def version(self) -> str:
        return self.headers.get("X-Model-Version", "")

    @property
    def error(self) -> str:
        return str(self.json["error"])

    def outputs(self) -> dict[str, Array]:
        """Of an Open Inference Protocol answer, JSON or binary."""
        assert self.status == 200, (self.status, self.body[:500])
        return read_outputs({k.lower(): v for k, v in self.headers.items()}, self.body)


@dataclass(eq=False)
class RunningNode:
    """``paddlewheel node`` as a process, the etcd that it follows, and a client of both."""

    etcd: EtcdCluster
    folder: Path
    """For its cache and its logs."""
    arguments: tuple[str, ...]
    store: Store
    session: aiohttp.ClientSession
    id: str = "n1"
    prefix: str = "/paddlewheel"
    command: Command | None = field(default=None, repr=False)

    # --- life ---

    async def start(self, *, cache: str = "cache") -> None:
        """cache: another name, another memory: nothing of what this node was before is known."""
        arguments = (
            "node", "--etcd", ",".join(self.etcd.endpoints), "--id", self.id,
            "--prefix", self.prefix, "--listen", "127.0.0.1:0",
            "--cache", str(self.folder / cache), *self.arguments,
        )  # fmt: skip
        self.command = await Command.start(arguments, self.folder)

    async def stop(self) -> None:
        """SIGTERM; the exit status must be 0."""
        assert await self.process.stop() == 0, self.log_tail()

    @property
    def process(self) -> Command:
        assert self.command is not None, "not started"
        return self.command

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def url(self) -> str:
        return self.process.http

    def log_tail(self) -> str:
        return self.process.tail()

    @property
    def host_port(self) -> str:
        return self.url.removeprefix("http://")

    # --- documents and status ---

    @property
    def keys(self) -> Keys:
        return Keys(self.prefix)

    async def put(self, model: str, text: bytes | str) -> Revision:
        """What ``etcdctl put`` does."""
        data = text if isinstance(text, bytes) else text.encode()
        return await self.store.put(self.keys.model(ModelName(model)), data)

    async def delete(self, model: str) -> None:
        await self.store.delete(self.keys.model(ModelName(model)))

    async def status(self, model: str) -> Status:
        """Empty while there is none."""
        kv = await self.store.get(self.keys.status(ModelName(model), NodeId(self.id)))
        return {} if kv is None else cast("Status", orjson.loads(kv.value))

    async def registration(self) -> dict[str, Any]:
        """What the node says of itself under ``/paddlewheel/nodes/``."""
        kv = await self.store.get(self.keys.node(NodeId(self.id)))
        assert kv is not None, "not registered"
        return cast("dict[str, Any]", orjson.loads(kv.value))

    async def until(
        self, model: str, holds: Callable[[Status], bool], *, what: str, within_s: float = 30.0
    ) -> Status:
        """The first status for which ``holds``."""
        seen: Status = {}

        async def look() -> bool:
            nonlocal seen
            assert self.process.is_running, "the node ended by itself"
            seen = await self.status(model)
            return bool(seen) and holds(seen)

        try:
            await eventually(look, within_s=within_s, what=what)
        except AssertionError as exc:
            raise AssertionError(f"{exc}; status {seen}; log {self.log_tail()}") from None
        return seen

    async def applied(self, model: str, revision: Revision, *, within_s: float = 30.0) -> Status:
        """Wait until the document ``revision`` is in force, live and canary as it says."""
        return await self.until(
            model,
            lambda s: s["applied_revision"] == s["revision"] == revision and s["reason"] is None,
            what=f"{model} at revision {revision}",
            within_s=within_s,
        )

    async def apply(self, model: str, text: bytes | str, *, within_s: float = 30.0) -> Status:
        """Put a document and wait until it is in force."""
        return await self.applied(model, await self.put(model, text), within_s=within_s)

    async def refused(self, model: str, revision: Revision) -> Status:
        """Wait until the document ``revision`` was seen and refused."""
        return await self.until(
            model,
            lambda s: s["revision"] == revision and not s["accepted"],
            what=f"{model} refused at {revision}",
        )

    async def failed(
        self, model: str, revision: Revision, version: str, *, within_s: float = 30.0
    ) -> Status:
        """Wait until ``version`` of the document ``revision`` is FAILED."""
        return await self.until(
            model,
            lambda s: s["revision"] == revision and "FAILED" in states_of(s, version),
            what=f"{model} {version} FAILED",
            within_s=within_s,
        )

    # --- HTTP ---

    async def get(self, path: str, **headers: str) -> Answer:
        return await self.request("GET", path, headers=headers)

    async def request(
        self,
        method: str,
        path: str,
        data: bytes | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Answer:
        body = None if data is None else io.BytesIO(data)  # bytes over 1 MiB make aiohttp warn
        async with self.session.request(
            method, self.url + path, data=body, headers=headers, skip_auto_headers=("Accept",)
        ) as reply:
            return Answer(reply.status, reply.headers.copy(), await reply.read())

    async def post(self, path: str, document: Any, **headers: str) -> Answer:
        """JSON in; header names are given with underscores."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return await self.request(
            "POST", path, orjson.dumps(document), {"Content-Type": "application/json"} | named
        )

    async def infer(
        self,
        model: str,
        inputs: Mapping[str, Array],
        *,
        version: str | None = None,
        binary: bool = True,
        headers: Mapping[str, str] | None = None,
    ) -> Answer:
        """By the Open Inference Protocol."""
        own, body = infer_body(inputs, binary=binary)
        path = f"/v2/models/{model}" + (f"/versions/{version}" if version is not None else "")
        return await self.request("POST", f"{path}/infer", body, {**own, **(headers or {})})

    # --- processes ---

    def worker_pids(self) -> frozenset[int]:
        """None while Paddle is being imported."""
        zygotes = [child for child in children_of(self.pid) if comm_of(child) == "pw-zygote"]
        return frozenset(pid for zygote in zygotes for pid in children_of(zygote))

    async def next_worker(self, before: frozenset[int], *, within_s: float = 10.0) -> int:
        """The pid of the first worker that was not there ``before``, as soon as it is forked."""
        loop = asyncio.get_running_loop()
        deadline_s = loop.time() + within_s
        while not (found := self.worker_pids() - before):
            assert loop.time() < deadline_s, f"no new worker; {self.log_tail()}"
            await asyncio.sleep(0.001)
        return min(found)


def states_of(status: Status, version: str) -> list[str]:
    """The states of the servables of one version; two while its bytes are being replaced."""
    return [str(s["state"]) for s in status["servables"] if s["version"] == version]


def reason_of(status: Status, version: str) -> str:
    """Why ``version`` failed."""
    (reason,) = [
        str(s["reason"])
        for s in status["servables"]
        if s["version"] == version and s["state"] == "FAILED"
    ]
    return reason


def children_of(pid: int) -> list[int]:
    """Direct children; none when the process is gone."""
    try:
        return [int(n) for n in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except (FileNotFoundError, ProcessLookupError):
        return []


def comm_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def is_alive(pid: int) -> bool:
    """Whether the process exists and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@asynccontextmanager
async def running_node(
    etcd: EtcdCluster,
    folder: Path,
    *arguments: str,
    id: str = "n1",
    prefix: str = "/paddlewheel",
) -> AsyncIterator[RunningNode]:
    """A node under ``prefix`` of ``etcd``; SIGTERM at the end, and its exit status must be 0."""
    store = EtcdStore.connect(etcd.settings())
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(60)) as session:
        node = RunningNode(etcd, folder, arguments, store, session, id, prefix)
        try:
            await node.start()
            yield node
            assert node.process.is_running, f"the node ended by itself: {node.log_tail()}"
            await node.stop()
        finally:
            if node.command is not None:
                await node.command.end()
            await store.close()
