"""What a measurement on a real node needs around it: the node as a process, and eyes on both."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import orjson

from paddlewheel.parentage import end_with_parent
from registry.errors import PaddlewheelError
from registry.names import Revision
from registry.store import Put, Store

PREFIX = "/paddlewheel"
_READY_TIMEOUT_S = 60.0
_STOP_TIMEOUT_S = 45.0

Status = Mapping[str, Any]
"""The JSON of ``/paddlewheel/status/<model>/<node>``."""


class StageFailed(PaddlewheelError):
    """The node did not start, ended, or did not get there in time."""


@dataclass(frozen=True, slots=True)
class Ready:
    """From the node's ready line."""

    host: str
    port: int
    pid: int
    started_s: float
    """Monotonic time at which the process was started."""
    listening_s: float
    """Monotonic time at which its ready line was read."""


class NodeProcess:
    """``paddlewheel node`` as users run it; it goes when we go, however that ends."""

    def __init__(self, process: asyncio.subprocess.Process, log_path: Path, ready: Ready) -> None:
        self._process = process
        self.log_path = log_path
        self.ready = ready

    @classmethod
    async def start(
        cls, etcd: str, folder: Path, *, node_id: str = "node-1", options: Sequence[str] = ()
    ) -> NodeProcess:
        """Start it and wait for its ready line. Raises `StageFailed`; its log says why.

        folder: for its log and its cache. options: further flags of ``paddlewheel node``.
        """
        log_path = folder / "node.log"
        started_s = time.monotonic()
        with log_path.open("wb") as log_file:
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "paddlewheel", "node",
                "--etcd", etcd, "--id", node_id, "--prefix", PREFIX,
                "--listen", "127.0.0.1:0", "--device", "cpu", "--cache", str(folder / "cache"),
                *options,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=log_file,
                start_new_session=True,  # a Ctrl-C in the terminal is for us
                preexec_fn=end_with_parent(signal.SIGTERM),
            )  # fmt: skip
        assert process.stdout is not None
        try:
            async with asyncio.timeout(_READY_TIMEOUT_S):
                line = await process.stdout.readline()
            event = cast("dict[str, Any]", orjson.loads(line))
            host, _, port = str(event["http"]).rpartition("//")[2].rpartition(":")
            ready = Ready(host, int(port), process.pid, started_s, time.monotonic())
            return cls(process, log_path, ready)
        except BaseException as exc:
            await _end(process)
            if isinstance(exc, TimeoutError | ValueError | KeyError):
                raise StageFailed(f"the node did not start; its log: {tail(log_path)}") from exc
            raise

    @property
    def returncode(self) -> int | None:
        return self._process.returncode

    async def stop(self) -> int:
        """SIGTERM, as any supervisor stops it; SIGKILL when that is not enough."""
        return await _end(self._process)

    def events(self, name: str) -> list[dict[str, Any]]:
        """The events of this name in the node's log, oldest first."""
        found: list[dict[str, Any]] = []
        for line in self.log_path.read_bytes().splitlines():
            with contextlib.suppress(orjson.JSONDecodeError):
                event = cast("dict[str, Any]", orjson.loads(line))
                if event.get("event") == name:
                    found.append(event)
        return found


async def _end(process: asyncio.subprocess.Process) -> int:
    if process.returncode is None:
        # Not process.terminate(): for a child that ended just now it would take the exit status
        # away from asyncio, which then reports 255.
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGTERM)
        try:
            async with asyncio.timeout(_STOP_TIMEOUT_S):
                await process.wait()
        except TimeoutError:
            process.kill()
            await process.wait()
    assert process.returncode is not None
    return process.returncode


def tail(path: Path, size_bytes: int = 2000) -> str:
    """The end of a log, for a message."""
    return path.read_bytes()[-size_bytes:].decode(errors="replace").strip() or "(no output)"


class Watcher:
    """Follows the status keys: tells every change, and lets one wait for a state of things."""

    def __init__(
        self, store: Store, on_change: Callable[[Status | None, Status], None] | None = None
    ) -> None:
        self._store = store
        self._on_change = on_change
        self._latest: dict[str, Status] = {}
        self._changed = asyncio.Condition()

    async def run(self) -> None:
        """Follow until cancelled."""
        async for batch in self._store.watch_prefix(f"{PREFIX}/status/"):
            for event in batch.events:
                if isinstance(event, Put):
                    self._take(cast("dict[str, Any]", orjson.loads(event.kv.value)))
                else:
                    self._latest.pop(event.key.split("/")[-2], None)
            async with self._changed:
                self._changed.notify_all()

    def _take(self, status: dict[str, Any]) -> None:
        before = self._latest.get(status["model"])
        self._latest[status["model"]] = status
        if self._on_change is not None:
            self._on_change(before, status)

    async def until(
        self, model: str, holds: Callable[[Status], bool], *, what: str, timeout_s: float = 180
    ) -> Status:
        """Wait for a status for which ``holds``. Raises `StageFailed` saying ``what`` did not."""
        try:
            async with asyncio.timeout(timeout_s), self._changed:
                while not (model in self._latest and holds(self._latest[model])):
                    await self._changed.wait()
        except TimeoutError:
            last = orjson.dumps(self._latest.get(model)).decode()
            raise StageFailed(f"{what}: not within {timeout_s:g} s; status: {last}") from None
        return self._latest[model]

    async def until_gone(self, model: str, *, timeout_s: float = 60) -> None:
        """Wait until no node has the model any more. Raises `StageFailed`."""
        try:
            async with asyncio.timeout(timeout_s), self._changed:
                while model in self._latest:
                    await self._changed.wait()
        except TimeoutError:
            raise StageFailed(f"{model} is still there after {timeout_s:g} s") from None


async def put_document(store: Store, model: str, text: str) -> Revision:
    """What ``etcdctl put`` does: the text as it is, under the model's key."""
    return await store.put(f"{PREFIX}/configs/models/{model}", text.encode())


async def delete_document(store: Store, model: str) -> None:
    """What ``etcdctl del`` does."""
    await store.delete(f"{PREFIX}/configs/models/{model}")
