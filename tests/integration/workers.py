"""What the worker and pool tests share: recipes, models, and a worker whose peer a test plays."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
from pathlib import Path
from typing import Any

import numpy as np

from loader import wire
from loader.arena import Slot
from loader.recipe import Recipe
from loader.worker import Worker
from loader.zygote import Zygote
from registry.inference import Array
from registry.names import ModelName, Version


def recipe_of(folder: Path, **fields: Any) -> Recipe:
    return Recipe(ModelName("m"), Version("1"), str(folder), **fields)


async def serving(zygote: Zygote, folder: Path, **fields: Any) -> Worker:
    """A worker that went through all the phases."""
    recipe = recipe_of(folder, **fields)
    worker = await zygote.spawn()
    await worker.check(folder, recipe)
    await worker.load(folder, recipe)
    await worker.warm(recipe, None)
    await worker.serve()
    return worker


class Peer:
    """The other end of a real `Worker`, spoken by the test, with a real process to be killed."""

    def __init__(self, *, depth: int = 2) -> None:
        ours, self.sock = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        self.sock.setblocking(False)
        self.process = subprocess.Popen(["sleep", "60"])
        slots = [Slot.create("test") for _ in range(depth)]
        self.slots = Slot.attach([os.dup(fd) for slot in slots for fd in slot.fds])
        self.cause: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        pidfd = os.pidfd_open(self.process.pid)
        self.worker = Worker(self.process.pid, pidfd, ours, slots, self.cause)
        self._received: list[dict[str, Any]] = []

    async def next(self) -> dict[str, Any]:
        loop = asyncio.get_running_loop()
        if not self._received:
            packet = await asyncio.wait_for(loop.sock_recv(self.sock, 1 << 18), 5)
            self._received += wire.messages_of(packet)
        return self._received.pop(0)

    def answer(self, message: dict[str, Any], *, run_s: float = 0.001, **arrays: Array) -> None:
        """Answer a run as a worker does."""
        output = self.slots[message["slot"]].output
        places = output.write(arrays.items())
        body = {
            "outputs": wire.placed_json(places), "run_s": run_s, "arena_bytes": output.size_bytes,
        }  # fmt: skip
        self.sock.send(wire.packed({"id": message["id"], "ok": body}))

    def fail(self, message: dict[str, Any], code: str, fault_class: str) -> None:
        failure = wire.Failure("fault", code, fault_class, f"error {code}")
        self.sock.send(wire.failure_message(message["id"], failure))

    def die(self, code: str) -> None:
        self.cause.set_result(code)
        self.close()

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.sock.close()
        if not self.cause.done():
            self.cause.set_result("SIGKILL")
        for slot in self.slots:
            slot.close()


def rows(n: int = 4, width: int = 64, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal((n, width), dtype=np.float32)


def open_fds() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def is_running(pid: int) -> bool:
    """Whether the process exists and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
