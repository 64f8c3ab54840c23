"""What a node is compared with, each as a process: ``python -m paddlewheel.bench.front_servers``.

``echo``: aiohttp that answers a body with itself. ``naive``: aiohttp with the predictor in its
handler, as tutorials show it. ``bare``: no HTTP at all, the predictor in a loop.

The servers use what the node's front uses (uvloop, orjson, no access log), so that the comparison
is of designs and not of libraries.
"""

from __future__ import annotations

import asyncio
import signal
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import orjson
import uvloop
from aiohttp import web

from registry.inference import Array

Handler = Callable[[web.Request], Awaitable[web.Response]]


async def echo(request: web.Request) -> web.Response:
    return web.Response(body=await request.read(), content_type="application/json")


def naive(predictor: Any) -> Handler:
    """A handler that runs the predictor right where it stands, on the loop."""

    async def infer(request: web.Request) -> web.Response:
        document = cast("dict[str, Any]", orjson.loads(await request.read()))
        feeds: dict[str, Array] = {
            tensor["name"]: np.array(tensor["data"], np.float32).reshape(tensor["shape"])
            for tensor in document["inputs"]
        }
        outputs = [
            {"name": name, "datatype": "FP32", "shape": array.shape, "data": array.reshape(-1)}
            for name, array in predictor.run(feeds).items()
        ]
        body = orjson.dumps(
            {"model_name": "bench", "model_version": "1", "outputs": outputs},
            option=orjson.OPT_SERIALIZE_NUMPY,
        )
        return web.Response(body=body, content_type="application/json")

    return infer


async def serve(handler: Handler) -> None:
    """Serve on a free port of loopback, printed as JSON, until SIGTERM."""
    app = web.Application()
    app.router.add_post("/{tail:.*}", handler)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    print(orjson.dumps({"port": runner.addresses[0][1]}).decode(), flush=True)
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    await stop.wait()
    await runner.cleanup()


def loop_bare(predictor: Any, feeds: dict[str, Array]) -> None:
    """For each number of seconds on standard input, run so long and print runs per second."""
    print(orjson.dumps({"port": 0}).decode(), flush=True)
    for line in sys.stdin:
        began_s = now_s = time.perf_counter()
        end_s = began_s + float(line)
        runs = 0
        while now_s < end_s:
            predictor.run(feeds)
            runs += 1
            now_s = time.perf_counter()
        print(orjson.dumps({"per_s": runs / (now_s - began_s)}).decode(), flush=True)


def _predictor(folder: Path) -> Any:
    from loader.model_files import choose_in
    from loader.program import read_program
    from loader.recipe import Recipe
    from loader.worker_main import Predictor
    from loader.worker_options import settings_of
    from registry.names import ModelName, Version

    settings = settings_of(Recipe(ModelName("bench"), Version("1"), str(folder)))
    signature = read_program(folder / choose_in(folder).program).signature
    return Predictor(folder, settings, signature)


def main(kind: str, folder: Path) -> None:
    if kind == "echo":
        uvloop.run(serve(echo))
        return
    predictor = _predictor(folder)
    feeds: dict[str, Array] = {"x": np.zeros((1, 64), np.float32)}
    for _ in range(100):
        predictor.run(feeds)
    if kind == "naive":
        uvloop.run(serve(naive(predictor)))
    else:
        loop_bare(predictor, feeds)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
