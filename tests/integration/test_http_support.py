"""A node's HTTP side over deterministic numpy predictors: the seam's double, nothing else's."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from registry.inference import (
    Array,
    DeadlineExceeded,
    Inference,
    InferenceError,
    ServableFailed,
    Signature,
    TensorSpec,
)
from registry.names import Digest, ModelName, Revision, ServableId, Version
from router.app import App
from router.canary_watch import CanaryWatch
from router.ports import Check, Drills, Health
from router.serving import Serving
from router.table import Route, RouteTable

SIMPLE = Signature(
    inputs=(TensorSpec("x", "float32", (-1, 4)), TensorSpec("n", "int64", (-1,))),
    outputs=(TensorSpec("sum", "float32", (-1,)), TensorSpec("scaled", "float32", (-1, 4))),
)
ONE = Signature(
    inputs=(TensorSpec("x", "float32", (-1, 3)),), outputs=(TensorSpec("y", "float32", (-1, 3)),)
)
TYPES = ("bool", "uint8", "int8", "int16", "int32", "int64", "float16", "float32", "float64",
         "bfloat16", "bytes")  # fmt: skip


def echo_signature(dtype: str) -> Signature:
    return Signature(
        inputs=(TensorSpec("x", dtype, (-1, -1)),), outputs=(TensorSpec("y", dtype, (-1, -1)),)
    )


def servable(model: str, version: str) -> ServableId:
    return ServableId(ModelName(model), Version(version), Digest("sha256:" + "ab" * 32))


def compute(signature: Signature, feeds: Mapping[str, Array], factor: float) -> dict[str, Array]:
    """What every version computes; ``factor`` tells the versions apart."""
    if signature is SIMPLE:
        scaled = feeds["x"] * np.float32(factor)
        return {"sum": feeds["x"].sum(axis=1) + feeds["n"].astype(np.float32), "scaled": scaled}
    if signature is ONE:
        return {"y": feeds["x"] * np.float32(factor)}
    return {"y": np.array(feeds["x"])}


@dataclass
class NumpyPredictor:
    """Answers at once, or as ``failing`` and ``holding`` say."""

    id: ServableId
    signature: Signature
    factor: float = 1.0
    failing: Callable[[int], InferenceError | None] = lambda _call: None
    holding: asyncio.Event | None = None
    calls: int = 0
    cancelled: int = 0
    is_manned: bool = True
    in_flight: int = 0

    def answered_after(self, failure: ServableFailed, *, by_other: bool) -> None:
        """Nothing is judged here."""

    @contextlib.contextmanager
    def held(self) -> Generator[None]:
        self.in_flight += 1
        try:
            yield
        finally:
            self.in_flight -= 1

    async def infer(self, feeds: Mapping[str, Array], *, deadline_s: float) -> Inference:
        self.calls += 1
        self.in_flight += 1
        try:
            return await self._infer(feeds, deadline_s)
        finally:
            self.in_flight -= 1

    async def _infer(self, feeds: Mapping[str, Array], deadline_s: float) -> Inference:
        error = self.failing(self.calls)
        if error is not None:
            raise error
        if self.holding is not None:
            try:
                async with asyncio.timeout_at(deadline_s):
                    await self.holding.wait()
            except TimeoutError as exc:
                raise DeadlineExceeded("no answer in time") from exc
            except asyncio.CancelledError:
                self.cancelled += 1
                raise
        return Inference(compute(self.signature, feeds, self.factor), queue_s=0.0005, run_s=0.001)


@dataclass
class Node:
    """A node view whose answers a test sets."""

    node_id: str = "node-1"
    listed: Sequence[Mapping[str, Any]] = ()
    shown: Health = field(
        default_factory=lambda: Health(
            ready=True, started=True, live=True, checks=(Check("models", ok=True),)
        )
    )

    def health(self) -> Health:
        return self.shown

    def servables(self) -> Sequence[Mapping[str, Any]]:
        return self.listed


def serving(
    *routes: tuple[Route, Sequence[NumpyPredictor]],
    watches: Mapping[ModelName, CanaryWatch] | None = None,
) -> Serving:
    table = RouteTable()
    predictors: dict[ServableId, Any] = {}
    for route, behind in routes:
        table = table.with_route(route)
        predictors |= {predictor.id: predictor for predictor in behind}
    return Serving(table, predictors, watches or {})


def one_model(
    name: str, version: str, signature: Signature, factor: float = 1.0, **route: Any
) -> tuple[Route, list[NumpyPredictor]]:
    predictor = NumpyPredictor(servable(name, version), signature, factor)
    found = Route(
        model=ModelName(name),
        live=predictor.id,
        pinned={predictor.id.version: predictor.id},
        revision=Revision(7),
        **route,
    )
    return found, [predictor]


@contextlib.asynccontextmanager
async def running(
    published: Serving, node: Node | None = None, drills: Drills | None = None
) -> AsyncIterator[tuple[App, str]]:
    app = App(node or Node(), product_version="1.2.3", drills=drills)
    app.publish(published)
    url = await app.start()
    try:
        yield app, url
    finally:
        await app.stop(drain_s=1.0)


async def eventually(holds: Callable[[], Any], deadline_s: float = 5.0) -> None:
    """Return once ``holds()``. Raises `TimeoutError` at the deadline."""
    async with asyncio.timeout(deadline_s):
        while not holds():  # noqa: ASYNC110 - what is waited for happens in code under test
            await asyncio.sleep(0.005)
