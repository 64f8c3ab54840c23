"""How much a worker process costs: round trips against bare predictor runs, interleaved.

    python bench/tensor_path.py [--rounds N] [--json]

For each size, blocks of runs of the same predictor settings on the same input, in turns: bare (in
a process that does nothing else), through `Worker.run`, and through `WorkerPool.infer`. Reports
p50 and p99 in us, the overhead (time in the front less the time inside the predictor) and the
ratio of the medians. Trust the ratios: the machine's noise hits all alike.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import uvloop

from loader.pool import WorkerPool
from loader.recipe import Recipe
from loader.worker import Worker
from loader.zygote import Zygote
from paddlewheel.models.small import make_mlp
from registry.inference import Array, Inference
from registry.names import Digest, ModelName, ServableId, Version

SIZES = {"4 KB": (16, 64), "600 KB": (2400, 64)}
OPTIONS = {"onednn": False}
BLOCK = 100


def bare(folder: Path, pipe: Connection) -> None:
    """A predictor in a process of its own: times the blocks that it is told to run."""
    from loader.worker_main import Predictor
    from loader.worker_options import settings_of

    recipe = recipe_of(folder)
    predictor = Predictor(folder, settings_of(recipe), pipe.recv())
    pipe.send("ready")
    while (order := pipe.recv()) is not None:
        shape, count = order
        x = rows(shape)
        times: list[float] = []
        for _ in range(count):
            started_s = time.perf_counter()
            predictor.run({"x": x})
            times.append(time.perf_counter() - started_s)
        pipe.send(times)


def recipe_of(folder: Path) -> Recipe:
    return Recipe(ModelName("mlp"), Version("1"), str(folder), options=OPTIONS)


def rows(shape: tuple[int, int]) -> Array:
    return np.random.default_rng(0).standard_normal(shape, dtype=np.float32)


async def timed(
    run: Callable[[], Awaitable[Inference]], count: int, times: list[float], overheads: list[float]
) -> None:
    for _ in range(count):
        started_s = time.perf_counter()
        answer = await run()
        took_s = time.perf_counter() - started_s
        times.append(took_s)
        overheads.append(took_s - answer.run_s)


async def measure(rounds: int) -> dict[str, Any]:
    folder = make_mlp(Path(tempfile.mkdtemp(prefix="tensor-path-")))
    zygote = Zygote()
    worker: Worker = await zygote.spawn()
    loaded = await worker.load(folder, recipe_of(folder))
    await worker.serve()
    second = await zygote.spawn()
    await second.load(folder, recipe_of(folder))
    await second.serve()
    id = ServableId(ModelName("mlp"), Version("1"), Digest("sha256:" + "0" * 64))
    pool = WorkerPool(id, loaded.signature, [second], make_worker=zygote.spawn)
    context = multiprocessing.get_context("spawn")
    pipe, theirs = context.Pipe()
    process = context.Process(target=bare, args=(folder, theirs), daemon=True)
    process.start()
    pipe.send(loaded.signature)
    pipe.recv()
    loop = asyncio.get_running_loop()
    results: dict[str, Any] = {}
    for size, shape in SIZES.items():
        x = rows(shape)
        times: dict[str, list[float]] = {"bare": [], "worker": [], "pool": []}
        overheads: dict[str, list[float]] = {"worker": [], "pool": []}
        for turn in range(rounds + 1):
            if turn == 1:  # the first one warms up
                for kept in (*times.values(), *overheads.values()):
                    kept.clear()
            pipe.send((shape, BLOCK))
            times["bare"] += await loop.run_in_executor(None, pipe.recv)
            await timed(
                lambda x=x: worker.run({"x": x}, timeout_s=10),
                BLOCK, times["worker"], overheads["worker"],
            )  # fmt: skip
            await timed(
                lambda x=x: pool.infer({"x": x}, deadline_s=loop.time() + 10),
                BLOCK, times["pool"], overheads["pool"],
            )  # fmt: skip
        results[size] = {name: quantiles(values) for name, values in times.items()}
        for name, values in overheads.items():
            results[size][f"{name} overhead"] = quantiles(values)
            results[size][f"{name} ratio"] = round(
                float(np.median(times[name]) / np.median(times["bare"])), 2
            )
    pipe.send(None)
    await pool.close()
    await zygote.close()
    process.join()
    return results


def quantiles(values: list[float]) -> dict[str, float]:
    p50, p99 = np.percentile(values, [50, 99]) * 1e6
    return {"p50_us": round(float(p50), 1), "p99_us": round(float(p99), 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=30, help=f"blocks of {BLOCK} runs each")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    results = uvloop.run(measure(options.rounds))
    if options.json:
        print(json.dumps(results, indent=2))
        return
    for size, rows_of in results.items():
        print(size)
        for name, value in rows_of.items():
            if isinstance(value, dict):
                print(f"  {name:16} p50 {value['p50_us']:8.1f} us   p99 {value['p99_us']:8.1f} us")
            else:
                print(f"  {name:16} {value:.2f} x")


if __name__ == "__main__":
    sys.exit(main())
