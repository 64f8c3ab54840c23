"""`paddlewheel node` (or another command that stays) as a real process, and what it says of itself.

Whatever a test does, nothing outlives it: everything ends by its pid, and so it does when the
test process itself is killed.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Self

import aiohttp

from paddlewheel.parentage import end_with_parent
from registry.etcd import EtcdSettings, EtcdStore
from registry.names import ModelName, NodeId, Revision
from registry.records import HistoryEntry, ModelStatus
from registry.store import KeyValue, Store
from tests.eventually import eventually
from tests.processes import Kin, descendants
from tests.served import KEYS, MLP

READY_WITHIN_S = 60.0
SERVES_WITHIN_S = 40.0
"""From a start to the first answer: Paddle's import from a cold disk is most of it."""
_ROOT = Path(__file__).parent.parent


class Command:
    """``paddlewheel ...`` that stays: its ready line, its log, its processes."""

    def __init__(self, process: asyncio.subprocess.Process, log_path: Path) -> None:
        self.process = process
        self.log_path = log_path
        self.ready: dict[str, Any] = {}
        self._kin: set[Kin] = set()

    @classmethod
    async def start(
        cls, arguments: Sequence[str], folder: Path, *, environment: Mapping[str, str] | None = None
    ) -> Self:
        """Start it and read its ready line; fails the test, with the log's end, without one."""
        log_path = _next_log(folder)
        kept = {k: v for k, v in os.environ.items() if not k.startswith("PADDLEWHEEL_")}
        state = {"XDG_STATE_HOME": str(folder / "state")}
        with log_path.open("wb") as log_file:
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "paddlewheel", *arguments,
                cwd=_ROOT,
                env=kept | state | dict(environment or {}),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=log_file,
                start_new_session=True,
                preexec_fn=end_with_parent(signal.SIGKILL),
            )  # fmt: skip
        command = cls(process, log_path)
        assert process.stdout is not None
        try:
            async with asyncio.timeout(READY_WITHIN_S):
                line = await process.stdout.readline()
            command.ready = json.loads(line)
        except BaseException as exc:
            await command.end()
            raise AssertionError(f"no ready line; the log ends with:\n{command.tail()}") from exc
        return command

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def http(self) -> str:
        return str(self.ready["http"])

    @property
    def is_running(self) -> bool:
        return self.process.returncode is None

    def kin(self) -> list[Kin]:
        """The processes below it now; all that were ever asked for end with `end`."""
        now = descendants(self.pid)
        self._kin.update(now)
        return now

    def named(self, name: str) -> list[Kin]:
        return [kin for kin in self.kin() if kin.name == name]

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)  # not send_signal: that may take the exit status away

    async def wait(self, within_s: float) -> int:
        """The exit status; fails the test when there is none in time."""
        try:
            async with asyncio.timeout(within_s):
                return await self.process.wait()
        except TimeoutError:
            raise AssertionError(f"still running after {within_s:g} s\n{self.tail()}") from None

    async def stop(self, within_s: float = 15.0) -> int:
        """SIGTERM, and the exit status."""
        if self.is_running:
            self.kin()
            with contextlib.suppress(ProcessLookupError):
                self.signal(signal.SIGTERM)
        return await self.wait(within_s)

    async def end(self) -> None:
        """Whatever state it is in, nothing of it is left."""
        if self.is_running:
            try:
                await self.stop(10)
            except AssertionError:
                self.signal(signal.SIGKILL)
                await self.process.wait()
        for kin in self._kin:
            if kin.is_alive:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(kin.pid, signal.SIGKILL)

    def events(self, name: str | None = None) -> list[dict[str, Any]]:
        """The events of the log, oldest first; of this name only when one is given."""
        found: list[dict[str, Any]] = []
        for line in self.log_path.read_bytes().splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                event: Any = json.loads(line)
                if isinstance(event, dict) and name in (None, event.get("event")):
                    found.append(event)
        return found

    def tail(self) -> str:
        return self.log_path.read_bytes()[-3000:].decode(errors="replace")


def _next_log(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{len(list(folder.glob('*.log')))}.log"


class Node(Command):
    """A node. ``id`` and ``folder`` outlive a restart."""

    id = NodeId("n1")

    @property
    def lease(self) -> int:
        """The lease that the node believes to hold, 0 without one; by its log."""
        for event in reversed(self.events()):
            if event["event"] == "lease_lost":
                return 0
            if event["event"] == "lease_granted":
                return int(event["lease"], 16)
        return 0

    async def get(self, path: str) -> tuple[int, Any]:
        """Status and JSON of a GET, over a connection of its own."""
        return await http_get(f"{self.http}{path}")


async def http_get(url: str) -> tuple[int, Any]:
    timeout = aiohttp.ClientTimeout(total=10)
    async with aiohttp.ClientSession(timeout=timeout) as session, session.get(url) as answer:
        return answer.status, await answer.json()


@asynccontextmanager
async def node(
    etcd: Sequence[str],
    folder: Path,
    *flags: str,
    lease_ttl_s: int = 2,
    listen: str = "127.0.0.1:0",
) -> AsyncGenerator[Node]:
    """A running node; its cache is ``folder/cache``, so the same folder makes it the same node."""
    started = await Node.start(
        (
            "node", "--etcd", ",".join(etcd), "--id", Node.id, "--listen", listen,
            "--device", "cpu", "--cache", str(folder / "cache"),
            "--lease-ttl", str(lease_ttl_s), *flags,
        ),
        folder,
    )  # fmt: skip
    try:
        yield started
    finally:
        await started.end()


@asynccontextmanager
async def store_of(endpoints: Iterable[str]) -> AsyncGenerator[EtcdStore]:
    """A plain client of etcd, apart from everything that the node has."""
    store = EtcdStore.connect(EtcdSettings(tuple(endpoints), timeout_s=10))
    try:
        yield store
    finally:
        await store.close()


# --- what etcd says of the node ---------------------------------------------------------------


async def status_of(store: Store, model: ModelName = MLP) -> ModelStatus | None:
    kv = await store.get(KEYS.status(model, Node.id))
    return None if kv is None else ModelStatus.from_json(kv.value)


async def until_applied(
    store: Store, revision: Revision, *, model: ModelName = MLP, within_s: float = SERVES_WITHIN_S
) -> ModelStatus:
    """Until the node says that this document is in force."""
    last: list[ModelStatus | None] = [None]

    async def applied() -> bool:
        last[0] = await status_of(store, model)
        return last[0] is not None and last[0].applied_revision == revision

    try:
        await eventually(applied, within_s=within_s)
    except AssertionError:
        raise AssertionError(f"{revision} not in force within {within_s:g} s: {last[0]}") from None
    assert last[0] is not None
    return last[0]


async def registration(store: Store) -> tuple[KeyValue | None, KeyValue | None]:
    """The node's key and the MLP's status key."""
    return await store.get(KEYS.node(Node.id)), await store.get(KEYS.status(MLP, Node.id))


async def until_registered(store: Store, started: Node, *, within_s: float) -> None:
    """Until both keys hang on the lease that the node holds now (not on one about to end)."""

    async def holds() -> bool:
        lease = started.lease
        return bool(lease) and all(
            kv is not None and kv.lease == lease for kv in await registration(store)
        )

    await eventually(holds, within_s=within_s, what="registered under a lease that is kept")


async def check_applied(
    store: Store, started: Node, revisions: Sequence[Revision], *, model: ModelName = MLP
) -> None:
    """Each of these documents was taken by the node and written to history, once, in order."""
    accepted = [e["revision"] for e in started.events("document_accepted") if e["model"] == model]
    assert accepted == list(revisions), "documents accepted"
    swapped = [e["revision"] for e in started.events("route_swapped") if e["model"] == model]
    assert sorted(swapped) == swapped, "routes swapped out of order"
    assert set(swapped) <= set(revisions)
    assert swapped[-1] == revisions[-1]

    async def written() -> bool:
        listing = await store.list_prefix(KEYS.history_prefix(model))
        return [HistoryEntry.from_json(kv.value).revision for kv in listing.kvs] == list(revisions)

    await eventually(written, within_s=10, what=f"history of {list(revisions)}")
    last = await until_applied(store, revisions[-1], model=model, within_s=5)
    assert last.accepted
    assert last.revision == revisions[-1]
