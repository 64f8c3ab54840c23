"""Many nodes in one process, whole but for their predictors: to measure what a fleet costs.

Each is the node that ``paddlewheel node`` runs, with its own connections to etcd, its HTTP port,
its files and its reconcile loop. Only what would load a model is played: a worker is ready at
once and answers nothing.

``python -m paddlewheel.bench.light_nodes ETCD FOLDER FIRST COUNT`` runs the nodes numbered from
FIRST on until SIGTERM.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import cast

import uvloop

from loader.recipe import Recipe
from loader.wire import Loaded, Warmed
from loader.worker import OnDone, Worker
from loader.zygote import Zygote
from paddlewheel.bench.stage import PREFIX
from paddlewheel.logs import configure_logs
from paddlewheel.node import Node
from paddlewheel.settings import NodeSettings
from registry.etcd.settings import EtcdSettings
from registry.inference import Array, BadInput, Signature, TensorSpec
from registry.names import NodeId

SIGNATURE = Signature(
    (TensorSpec("x", "float32", (-1, 64)),), (TensorSpec("y", "float32", (-1, 10)),)
)
_pids = itertools.count(1)


class LightWorker:
    """A `loader.worker.Worker` without a process."""

    depth = 1
    in_flight = 0

    def __init__(self) -> None:
        self.pid = next(_pids)
        self.died: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    @property
    def is_alive(self) -> bool:
        return not self.died.done()

    async def check(self, _folder: Path, _recipe: Recipe) -> Signature:
        return SIGNATURE

    async def load(self, _folder: Path, recipe: Recipe) -> Loaded:
        return Loaded(SIGNATURE, recipe.device, 0.0, 0)

    async def warm(self, _recipe: Recipe, _golden: Path | None) -> Warmed:
        return Warmed(0.0, 1)

    async def serve(self) -> None:
        return

    def submit(self, _feeds: Mapping[str, Array], on_done: OnDone, **_options: object) -> None:
        on_done(BadInput("this node has no predictors"))

    def kill(self) -> None:
        if not self.died.done():
            self.died.set_result("SIGKILL")

    async def close(self, timeout_s: float = 5.0) -> None:
        self.kill()


class LightZygote(Zygote):
    """Has workers at once."""

    async def start(self) -> None:
        return

    async def spawn(self) -> Worker:
        return cast("Worker", LightWorker())


def node_id(number: int) -> NodeId:
    return NodeId(f"light-{number:03}")


async def serve(etcd: str, folder: Path, numbers: range) -> None:
    """Run these nodes until SIGTERM. They share a cache of models, as nodes of one machine do."""
    nodes = [
        Node(
            NodeSettings(
                id=node_id(number),
                etcd=EtcdSettings(endpoints=(etcd,)),
                prefix=PREFIX,
                port=0,
                devices=("cpu,memoryMB=1000",),
                cache=folder / "cache",
            ),
            zygote=LightZygote(),
        )
        for number in numbers
    ]

    def stop() -> None:
        for node in nodes:
            node.stop()

    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop)
    await asyncio.gather(*(node.run(with_signals=False) for node in nodes))


def main() -> None:
    etcd, folder, first, count = sys.argv[1:]
    configure_logs()
    # Their ready lines are nobody's business.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    uvloop.run(serve(etcd, Path(folder), range(int(first), int(first) + int(count))))


if __name__ == "__main__":
    main()
