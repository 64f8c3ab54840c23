"""A watched canary over HTTP: what is counted, and what a mirror may never do."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest

from registry.inference import BadInput, Overloaded, ServableFailed
from registry.names import ModelName, Version
from registry.spec import HeaderRule
from registry.spec_canary import Compare
from registry.spec_canary import Mirror as MirrorSpec
from router.canary_watch import CanaryWatch
from router.mirror import BESIDE_BYTES, Mirror, MirrorCounts
from router.rules import StepShare, compile_rules
from router.serving import Serving
from router.table import Route
from tests.integration.test_http_support import (
    ONE,
    NumpyPredictor,
    eventually,
    running,
    servable,
    serving,
)

MODEL = ModelName("m")
INFER = "/v2/models/m/infer"
BODY = {"inputs": [{"name": "x", "shape": [1, 3], "datatype": "FP32", "data": [1, 2, 3]}]}


@pytest.fixture
async def http() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession() as session:
        yield session


class Stage:
    """One model with a canary, watched."""

    def __init__(self, *, percent: float = 0.0, mirrored: float | None = None) -> None:
        self.live = NumpyPredictor(servable("m", "1"), ONE)
        self.canary = NumpyPredictor(servable("m", "2"), ONE)
        self.counts = MirrorCounts()
        mirror = None
        if mirrored is not None:
            spec = MirrorSpec(percent=mirrored, compare=Compare())
            mirror = Mirror(self.canary, ONE, spec, timeout_s=5, counts=(self.counts,))
        self.watch = CanaryWatch(mirror=mirror)
        rules = [HeaderRule(name="X-Canary", equals="1")]
        route = Route(
            model=MODEL,
            live=self.live.id,
            canary=self.canary.id,
            rules=compile_rules(MODEL, rules, StepShare(0, percent)),
            pinned={Version("1"): self.live.id, Version("2"): self.canary.id},
        )
        self.serving: Serving = serving(
            (route, [self.live, self.canary]), watches={MODEL: self.watch}
        )

    def seen(self) -> tuple[int, int, int, int]:
        stable, canary = self.watch.stable, self.watch.canary
        return stable.requests, stable.errors, canary.requests, canary.errors


async def post(
    http: aiohttp.ClientSession, url: str, path: str = INFER, body: Any = None, **headers: str
) -> int:
    sent = {name.replace("_", "-"): value for name, value in headers.items()}
    async with http.post(url + path, json=body or BODY, headers=sent) as response:
        await response.read()
        return response.status


def failed() -> ServableFailed:
    return ServableFailed("boom", code="700", fault_class="sticky")


async def test_requests_are_counted_by_the_route_chosen_for_them(
    http: aiohttp.ClientSession,
) -> None:
    stage = Stage()
    async with running(stage.serving) as (_, url):
        assert await post(http, url) == 200
        assert await post(http, url, X_Canary="1") == 200
        assert stage.seen() == (1, 0, 1, 0)
        stage.canary.failing = lambda _: failed()
        assert await post(http, url, X_Canary="1") == 200, "the live version answers"
        assert stage.seen() == (1, 0, 2, 1)
        stage.canary.failing = lambda _: Overloaded("full")
        assert await post(http, url, X_Canary="1") == 503
        assert stage.seen() == (1, 0, 3, 2)
    assert sum(stage.watch.stable.buckets) == 1
    assert sum(stage.watch.canary.buckets) == 1


async def test_what_says_nothing_of_a_version_is_not_counted(http: aiohttp.ClientSession) -> None:
    stage = Stage()
    async with running(stage.serving) as (_, url):
        assert await post(http, url, X_Model_Version="2") == 200
        assert await post(http, url, X_Model_Version="1") == 200
        labelled = "/v1/models/m/labels/canary:predict"
        assert await post(http, url, labelled, {"inputs": {"x": [[1, 2, 3]]}}) == 200
        assert await post(http, url, body={"inputs": []}) == 400
        stage.live.failing = lambda _: BadInput("no")
        assert await post(http, url) == 400
    assert stage.seen() == (0, 0, 0, 0)


async def test_a_step_takes_its_users_and_the_answer_says_so(http: aiohttp.ClientSession) -> None:
    stage = Stage(percent=100)
    async with (
        running(stage.serving) as (_, url),
        http.post(url + INFER, json=BODY, headers={"X-User-Id": "ann"}) as response,
    ):
        assert response.headers["X-Model-Route"] == "canary; rule=step"
        assert response.headers["X-Model-Version"] == "2"


async def test_copies_are_compared_and_dropped(http: aiohttp.ClientSession) -> None:
    stage = Stage(mirrored=100)
    async with running(stage.serving) as (app, url):
        for place in range(1, 6):
            assert await post(http, url) == 200
            await eventually(lambda place=place: stage.counts.agreed == place)
        stage.canary.factor = 1.5
        assert await post(http, url) == 200
        await eventually(lambda: stage.counts.differed == 1)
        text = app.metrics.render("")[0].decode()
    assert stage.counts == MirrorCounts(agreed=5, differed=1)
    assert stage.seen() == (6, 0, 0, 0)
    counted = [line for line in text.splitlines() if line.startswith("paddlewheel_requests_total")]
    assert len(counted) == 1
    assert 'version="1"' in counted[0]
    assert counted[0].endswith(" 6.0")
    assert 'version="2"' not in text, "copies are not users' requests"


async def test_requests_that_the_canary_answers_are_not_mirrored(
    http: aiohttp.ClientSession,
) -> None:
    stage = Stage(mirrored=100, percent=100)
    async with running(stage.serving) as (_, url):
        assert await post(http, url, X_User_Id="ann") == 200
    assert stage.canary.calls == 1
    assert stage.counts == MirrorCounts()


async def test_a_share_is_mirrored(http: aiohttp.ClientSession) -> None:
    stage = Stage()
    dice = iter([0.0, 0.1, 0.25, 0.5, 0.24])
    spec = MirrorSpec(percent=25)
    stage.watch.mirror = Mirror(
        stage.canary, ONE, spec, timeout_s=5, counts=(stage.counts,), chance=lambda: next(dice)
    )
    async with running(stage.serving) as (_, url):
        for agreed in (1, 2, 2, 2, 3):
            assert await post(http, url) == 200
            await eventually(lambda agreed=agreed: stage.counts.agreed == agreed)
    assert stage.counts == MirrorCounts(agreed=3)


async def test_a_canary_that_hangs_delays_nobody_and_takes_one_copy(
    http: aiohttp.ClientSession,
) -> None:
    stage = Stage(mirrored=100)
    stage.canary.holding = asyncio.Event()
    async with running(stage.serving) as (_, url):
        began_s = time.monotonic()
        for _ in range(20):
            assert await post(http, url) == 200
        assert time.monotonic() - began_s < 2
        assert stage.canary.calls == 1, "bounded: one copy at a time"
        assert stage.counts.dropped == 19
        stage.canary.holding.set()
        await eventually(lambda: stage.counts.agreed == 1)


async def test_users_of_the_canary_come_first(http: aiohttp.ClientSession) -> None:
    stage = Stage(mirrored=100)
    stage.canary.holding = asyncio.Event()
    async with running(stage.serving) as (_, url):
        user = asyncio.create_task(post(http, url, X_Canary="1"))
        await eventually(lambda: stage.canary.in_flight == 1)
        assert await post(http, url) == 200
        assert (stage.canary.calls, stage.counts.dropped) == (1, 1)
        stage.canary.holding.set()
        assert await user == 200


FAILURES = {
    "a fault": (failed(), "failed"),
    "a full queue": (Overloaded("full"), "dropped"),
    "other inputs": (BadInput("no x"), "failed"),
    "handed back": (ServableFailed("gone", code="RETIRED", fault_class="retired"), "dropped"),
}


@pytest.mark.parametrize(("error", "how"), FAILURES.values(), ids=FAILURES.keys())
async def test_a_copy_that_fails_fails_no_request(
    http: aiohttp.ClientSession, error: Exception, how: str
) -> None:
    stage = Stage(mirrored=100)
    stage.canary.failing = lambda _: error  # type: ignore[assignment, return-value]
    async with running(stage.serving) as (_, url):
        assert await post(http, url) == 200
        await eventually(lambda: getattr(stage.counts, how) == 1)
    assert stage.seen() == (1, 0, 0, 0)


async def test_large_answers_are_compared_beside_the_loop(http: aiohttp.ClientSession) -> None:
    stage = Stage(mirrored=100)
    rows = BESIDE_BYTES // 12 + 1
    data = [1.0, 2.0, 3.0] * rows
    body = {"inputs": [{"name": "x", "shape": [rows, 3], "datatype": "FP32", "data": data}]}
    async with running(stage.serving) as (_, url):
        assert await post(http, url, body=body) == 200
        await eventually(lambda: stage.counts.agreed == 1)
        stage.canary.factor = 2.0
        assert await post(http, url, body=body) == 200
        await eventually(lambda: stage.counts.differed == 1)


async def test_a_crash_in_the_comparison_is_a_failed_copy(http: aiohttp.ClientSession) -> None:
    stage = Stage(mirrored=100)
    stage.canary.failing = lambda _: ZeroDivisionError()  # type: ignore[assignment, return-value]
    async with running(stage.serving) as (_, url):
        assert await post(http, url) == 200
        await eventually(lambda: stage.counts.failed == 1)
        stage.canary.failing = lambda _: None
        assert await post(http, url) == 200
        await eventually(lambda: stage.counts.agreed == 1)
