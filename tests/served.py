"""Models to be served, their documents, and steady traffic whose every answer is judged."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np

from paddlewheel.bench.checks import infer_body, outputs_of_version, read_outputs
from paddlewheel.bench.load import Verify, http_request
from paddlewheel.bench.load_process import LoadProcess, Plan, PlannedRequest
from paddlewheel.bench.samples import Result
from paddlewheel.models import make_mlp, reference
from registry.keys import Keys
from registry.names import ModelName, Revision
from registry.store import Store
from tests.eventually import eventually

KEYS = Keys()
MLP = ModelName("mlp")
OUTPUT = "fetch_name_0"
INPUTS = 500


@dataclass
class Models:
    """Versions of one MLP, told apart by the last column of every answer, and their document."""

    folder: Path
    versions: Sequence[str] = ("1", "2")
    name: ModelName = MLP
    spec: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """More of the document's ``spec``."""
    hidden: int = 128
    layers: int = 2

    def __post_init__(self) -> None:
        for version in self.versions:
            make_mlp(
                self.source(version), seed=int(version), tag=float(version),
                hidden=self.hidden, layers=self.layers,
            )  # fmt: skip

    def source(self, version: str) -> Path:
        return self.folder / self.name / version

    def document(self, live: str, **labels: str) -> bytes:
        return json.dumps(
            {
                "apiVersion": "paddlewheel/v1",
                "kind": "Model",
                "metadata": {"name": self.name, "labels": labels},
                "spec": {
                    "live": live,
                    "versions": [
                        {"version": v, "source": str(self.source(v))} for v in self.versions
                    ],
                    **self.spec,
                },
            }
        ).encode()

    async def put(self, store: Store, live: str, **labels: str) -> Revision:
        """What ``etcdctl put`` does."""
        return await store.put(KEYS.model(self.name), self.document(live, **labels))

    def requests(self) -> tuple[PlannedRequest, ...]:
        """Many inputs, as JSON and as raw bytes; any version may answer, but only as itself.

        Hardly ever twice the same input: one that is running whenever a worker is killed would
        rightly be taken for the reason.
        """
        rows = np.random.default_rng(7).standard_normal((2 * INPUTS, 64), dtype=np.float32)
        expected = {v: reference(self.source(v), rows) for v in self.versions}
        planned: list[PlannedRequest] = []
        for first in range(0, 2 * INPUTS, 2):
            kind = "json" if first % 4 else "binary"
            some = slice(first, first + 2)
            headers, body = infer_body({"x": rows[some]}, binary=kind == "binary")
            data = http_request("POST", f"/v2/models/{self.name}/infer", body, headers=headers)
            wanted = {v: expected[v][some].tolist() for v in self.versions}
            planned.append(
                PlannedRequest(
                    kind, data, judge="tests.served:judge", judge_args={"expected": wanted}
                )
            )
        return tuple(planned)


def judge(expected: Mapping[str, Any]) -> Verify:
    """Called in the load generator's process: the numbers of the version that the answer names."""
    return outputs_of_version(
        {v: {OUTPUT: np.asarray(rows, np.float32)} for v, rows in expected.items()}
    )


class Traffic:
    """Steady requests from another process; ``result`` is there once they ended."""

    def __init__(self, process: LoadProcess) -> None:
        self._process = process
        self.result: Result | None = None

    async def stop(self) -> Result:
        if self.result is None:
            self.result = await self._process.stop()
        return self.result


@asynccontextmanager
async def traffic(
    url: str,
    models: Models,
    *,
    rate_per_s: float = 80.0,
    gap_max_s: float = 1.5,
    timeout_s: float = 15.0,
) -> AsyncGenerator[Traffic]:
    """Requests from here to the end of the block, which fails when a single one did.

    gap_max_s: nor may there be so long a time without any answer.
    """
    host, _, port = url.removeprefix("http://").rpartition(":")
    ticked = asyncio.Event()
    plan = Plan(host, int(port), models.requests(), rate_per_s, 600.0, timeout_s=timeout_s)
    process = await LoadProcess.start(plan, on_tick=lambda _: ticked.set())
    try:
        running = Traffic(process)
        async with asyncio.timeout(20):
            await ticked.wait()
        yield running
        result = await running.stop()
    finally:
        await process.kill()
    assert not result.failed, result.summary()
    assert result.by(lambda sample: sample.name).keys() == {"json", "binary"}
    assert len(result) > rate_per_s / 2
    assert result.longest_gap_s() < gap_max_s, result.summary()


class SlowRequests:
    """``count`` requests of ``rows`` rows under way in the block; all answered well after it.

    For a model with one version. Gives the times of the answers (loop time) as they come.
    """

    def __init__(self, url: str, slow: Models, count: int, *, rows: int) -> None:
        self._url = url
        self._slow = slow
        self._count = count
        self._rows = rows
        self._answered: list[float] = []
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> list[float]:
        x = np.ones((self._rows, 64), np.float32)
        headers, body = infer_body({"x": x}, binary=True)
        self._tasks = [asyncio.create_task(self._ask(headers, body)) for _ in range(self._count)]

        async def under_way() -> bool:
            async with (
                aiohttp.ClientSession() as session,
                session.get(f"{self._url}/metrics") as answer,
            ):
                lines = (await answer.text()).splitlines()
            shown = [
                line for line in lines if "in_flight{" in line and f'"{self._slow.name}"' in line
            ]
            return sum(float(line.rpartition(" ")[2]) for line in shown) == self._count

        await eventually(under_way, within_s=5, what=f"{self._count} requests under way")
        return self._answered

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            for task in self._tasks:
                task.cancel()
        outcomes = await asyncio.gather(*self._tasks, return_exceptions=kind is not None)
        assert kind is not None or len(outcomes) == self._count

    async def _ask(self, headers: dict[str, str], body: bytes) -> None:
        url = f"{self._url}/v2/models/{self._slow.name}/infer"
        async with (
            aiohttp.ClientSession() as session,
            session.post(url, data=io.BytesIO(body), headers=headers) as answer,
        ):
            content = await answer.read()
            assert answer.status == 200, content[:300]
        lower = {name.lower(): value for name, value in answer.headers.items()}
        outputs = read_outputs(lower, content)
        (version,) = self._slow.versions
        assert (outputs[OUTPUT][:, -1] == float(version)).all()
        self._answered.append(asyncio.get_running_loop().time())
