"""Judged requests in the background of a test: not one may fail, whatever happens meanwhile."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np

from paddlewheel.bench import load
from paddlewheel.bench.checks import infer_body, outputs_of_version
from paddlewheel.bench.samples import Result, Sample
from paddlewheel.models import reference
from registry.inference import Array
from tests.e2e.running import OUTPUT, RunningNode
from tests.eventually import eventually


class Traffic:
    """Steady judged requests in the background of a test."""

    def __init__(self) -> None:
        self.samples: list[Sample] = []
        self.stop = asyncio.Event()

    @property
    def failures(self) -> Mapping[str, int]:
        return Result(self.samples).failures()

    async def goes_on(self, answers: int = 4) -> set[str]:
        """Nothing failed so far, and so many requests sent from now on are answered well.

        Returns the versions that answered those.
        """
        since_s = time.monotonic()

        def recent() -> list[Sample]:
            return [sample for sample in self.samples[-200:] if sample.due_s >= since_s]

        await eventually(
            lambda: len(recent()) >= answers or bool(self.failures),
            within_s=20,
            what=f"{answers} more answers",
        )
        assert not self.failures, self.failures
        return {sample.version for sample in recent()}

    def versions(self) -> Mapping[str, int]:
        return Result(self.samples).by(lambda sample: sample.version)


@asynccontextmanager
async def traffic_to(
    node: RunningNode,
    requests: Sequence[load.Request],
    *,
    rate_per_s: float = 40,
    timeout_s: float = 20,
) -> AsyncIterator[Traffic]:
    """Open-loop traffic until the end of the block; then not one request may have failed."""
    traffic = Traffic()
    host, _, port = node.host_port.rpartition(":")
    task = asyncio.create_task(
        load.run(
            host, int(port), requests,
            rate_per_s=rate_per_s, duration_s=3600, timeout_s=timeout_s,
            connections_max=32, stop=traffic.stop, on_sample=traffic.samples.append,
        )
    )  # fmt: skip
    try:
        yield traffic
    finally:
        traffic.stop.set()
        await task
    assert traffic.samples
    assert not traffic.failures, traffic.failures


def mlp_requests(
    model: str,
    folders: Mapping[str, Path],
    *,
    headers: Mapping[str, str] | None = None,
    seed: int = 7,
    allowed: Callable[[str], bool] = lambda version: True,
) -> list[load.Request]:
    """JSON and binary requests to an MLP, judged by numpy: the answer must be that of the version
    which the header names, and that one of ``folders``.
    """
    x = rows(3, seed=seed)
    expected = {version: {OUTPUT: reference(folder, x)} for version, folder in folders.items()}
    requests: list[load.Request] = []
    for binary in (True, False):
        own, body = infer_body({"x": x}, binary=binary)
        requests.append(
            load.Request(
                "binary" if binary else "json",
                load.http_request(
                    "POST", f"/v2/models/{model}/infer", body, headers={**own, **(headers or {})}
                ),
                outputs_of_version(expected, allowed=allowed),
            )
        )
    return requests


def rows(n: int, width: int = 64, seed: int = 0) -> Array:
    """float32 ``(n, width)``"""
    return np.random.default_rng(seed).standard_normal((n, width), dtype=np.float32)
