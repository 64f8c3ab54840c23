"""What a node's processes and disks do, played: bytes, workers, the front door's sockets.

Where the product makes something of its own that reaches outside, one of these is made instead
(`tests.sim.stage`). They take virtual time and fail as the version's `Nature` says.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from loader.errors import NotAdmitted, PredictorFault, WorkerDied
from loader.recipe import Recipe
from loader.repository import Fetched
from loader.wire import Loaded, Warmed
from loader.worker import OnDone, Outcome
from registry.inference import Inference, Signature, TensorSpec
from registry.names import Digest, NodeId
from router.floor import FloorGate
from router.ports import Check
from router.serving import Serving

SIGNATURE = Signature((TensorSpec("x", "float32", (-1, 2)),), (TensorSpec("y", "float32", (-1,)),))
FEEDS = {"x": np.zeros((1, 2), "float32")}
_ANSWER = {"y": np.zeros(1, "float32")}
SIZE_BYTES = 4 << 20
RUN_S = 0.002


@dataclass(frozen=True, slots=True)
class Nature:
    """How the bytes at one source behave."""

    load_s: float = 0.5
    breaks_on: float = 0.0
    """Share of the nodes that cannot make them ready, ever."""
    stumbles: float = 0.0
    """Share of the attempts that fail and may go well the next time."""
    faulty_on: float = 0.0
    """Share of the nodes on which every run poisons the device."""


def draws(*what: object) -> float:
    """A number in [0, 1) that is always the same for the same things."""
    text = "|".join(map(str, what)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=6).digest()) / 2**48


class Hardware:
    """One node's machine: what its zygote, repository and workers ask."""

    def __init__(
        self,
        node: NodeId,
        folder: Path,
        nature: Callable[[str], Nature],
        chance: Callable[[], float],
    ) -> None:
        self.node = node
        self.folder = folder
        self.nature = nature
        self.chance = chance
        self.pids = itertools.count(1)


class PlayedWorker:
    """A worker without a process."""

    depth = 1

    def __init__(self, hardware: Hardware) -> None:
        self._hardware = hardware
        self._loop = asyncio.get_running_loop()
        self.pid = next(hardware.pids)
        self.died: asyncio.Future[str] = self._loop.create_future()
        self._runs: deque[OnDone] = deque()
        self._nature = Nature()
        self._is_faulty = False

    @property
    def in_flight(self) -> int:
        return len(self._runs)

    @property
    def is_alive(self) -> bool:
        return not self.died.done()

    def pause(self) -> None:
        pass

    def resume(self) -> None:
        pass

    async def check(self, _folder: Path, recipe: Recipe, **_: Any) -> Signature | None:
        hardware = self._hardware
        self._nature = nature = hardware.nature(recipe.source)
        self._is_faulty = draws("faulty", hardware.node, recipe.source) < nature.faulty_on
        if draws("breaks", hardware.node, recipe.source) < nature.breaks_on:
            await asyncio.sleep(nature.load_s * 0.2)
            raise NotAdmitted("golden", "golden output y differs by 0.7", may_heal=False)
        return SIGNATURE

    async def load(self, _folder: Path, recipe: Recipe, **_: Any) -> Loaded:
        self._nature = nature = self._hardware.nature(recipe.source)
        self._is_faulty = draws("faulty", self._hardware.node, recipe.source) < nature.faulty_on
        await asyncio.sleep(nature.load_s * (0.5 + self._hardware.chance()))
        if nature.stumbles and self._hardware.chance() < nature.stumbles:
            self.kill()
            raise WorkerDied("SIGKILL")
        return Loaded(SIGNATURE, recipe.device, 0.0, 0)

    async def warm(self, _recipe: Recipe, _golden: Path | None, **_: Any) -> Warmed:
        return Warmed(0.0, 1)

    async def serve(self, **_: Any) -> None:
        pass

    def submit(self, _feeds: object, on_done: OnDone, **_: object) -> None:
        self._runs.append(on_done)
        self._loop.call_later(RUN_S, self._finish)

    def _finish(self) -> None:
        if self._runs:
            self._runs.popleft()(self._outcome())

    def _outcome(self) -> Outcome:
        if self._is_faulty:
            text = "CUDA error(700), an illegal memory access was encountered."
            return PredictorFault(text, code="700", fault_class="sticky")
        return Inference(_ANSWER, 0.0, RUN_S)

    def kill(self, code: str = "SIGKILL") -> None:
        if not self.died.done():
            self.died.set_result(code)
            while self._runs:
                self._runs.popleft()(WorkerDied(code))

    async def close(self, timeout_s: float = 5.0) -> None:
        self.kill("EXIT:0")


class PlayedZygote:
    def __init__(self, hardware: Hardware) -> None:
        self._hardware = hardware

    async def start(self) -> None:
        await asyncio.get_running_loop().create_future()

    async def spawn(self) -> PlayedWorker:
        return PlayedWorker(self._hardware)

    async def close(self) -> None:
        pass


class PlayedRepository:
    """Every source is there at once, under the digest of its name."""

    def __init__(self, hardware: Hardware) -> None:
        self._hardware = hardware

    async def fetch(self, source: str, *, sha256: Mapping[str, str] | None = None) -> Fetched:
        await asyncio.sleep(0.01)
        digest = Digest("sha256:" + hashlib.sha256(source.encode()).hexdigest())
        return Fetched(self._hardware.folder, digest, SIZE_BYTES)

    def has(self, _digest: Digest) -> bool:
        return True

    def lease(self, digest: Digest) -> None:
        pass

    def release(self, digest: Digest) -> None:
        pass


class PlayedApp:
    """The front door without a socket: what it would serve by, and who is told."""

    def __init__(self, address: str, on_publish: Callable[[Serving], None]) -> None:
        self._address = address
        self._on_publish = on_publish
        self.serving = Serving()
        self.is_listening = False
        self.floors = FloorGate(lambda: self.serving.table)

    async def start(self, *_: object, **__: object) -> str:
        self.is_listening = True
        return self._address

    async def stop(self, **_: object) -> None:
        self.is_listening = False

    def __getattr__(self, _name: str) -> Quiet:
        """What is told to the rest of the door (metrics, pipelines, limits) goes nowhere."""
        return Quiet()

    def publish(self, serving: Serving) -> None:
        self.serving = serving
        self.floors.table_changed()
        self._on_publish(serving)


class PlayedGpus:
    """No driver."""

    readings = ()

    async def start(self) -> bool:
        return False

    async def events(self) -> AsyncIterator[Any]:
        return
        yield

    async def close(self) -> None:
        pass


class PlayedAccess:
    """Everybody may use everything."""

    report = None

    def check(self) -> Check:
        return Check("access", True, "")

    def remarks(self) -> list[Check]:
        return []

    def restore(self) -> None:
        pass

    async def run(self) -> None:
        await asyncio.get_running_loop().create_future()


class Quiet:
    """Stands for a part that is left out: every call does nothing, every wait lasts."""

    async def run(self) -> None:
        await asyncio.get_running_loop().create_future()

    async def start(self) -> None:
        pass

    async def stop(self) -> None:
        pass

    async def close(self) -> None:
        pass

    def __getattr__(self, _name: str) -> Callable[..., None]:
        return _nothing


def _nothing(*_: object, **__: object) -> None:
    pass
