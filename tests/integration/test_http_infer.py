"""Inference over HTTP: routing, headers, limits, second runs, clients that go away."""

from __future__ import annotations

import asyncio
import gzip
import json
import time
import tracemalloc
import zlib
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import numpy as np
import pytest

from registry.inference import (
    BadInput,
    DeadlineExceeded,
    InferenceError,
    Overloaded,
    Poisonous,
    ServableFailed,
)
from registry.names import ModelName, Revision
from registry.spec import HeaderRule, Limits
from router import http_body
from router.app import App
from router.errors import BodyTooLarge
from router.rules import compile_rules
from router.serving import Serving
from router.table import Route
from tests.integration.test_http_support import (
    ONE,
    NumpyPredictor,
    eventually,
    one_model,
    running,
    servable,
    serving,
)

INFER = "/v2/models/one/infer"
BODY = {"inputs": [{"name": "x", "shape": [1, 3], "datatype": "FP32", "data": [1, 2, 3]}]}
TEXT = json.dumps(BODY).encode()


@pytest.fixture
async def http() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(auto_decompress=False) as session:
        yield session


class Trio:
    """A model with a live version, a standby and a canary."""

    def __init__(self, **limits: Any) -> None:
        self.old, self.live, self.canary = (
            NumpyPredictor(servable("one", version), ONE, factor)
            for version, factor in (("1", 1.0), ("2", 2.0), ("3", 3.0))
        )
        behind = (self.old, self.live, self.canary)
        self.route = Route(
            ModelName("one"),
            live=self.live.id,
            standby=self.old.id,
            canary=self.canary.id,
            rules=compile_rules(ModelName("one"), [HeaderRule(name="X-Canary", equals="1")]),
            revision=Revision(42),
            pinned={predictor.id.version: predictor.id for predictor in behind},
            limits=Limits(**limits),
        )
        self.serving: Serving = serving((self.route, behind))


async def post(
    http: aiohttp.ClientSession, url: str, body: Any = TEXT, **headers: str
) -> tuple[int, Any, Any]:
    shown = {name.replace("_", "-"): value for name, value in headers.items()}
    async with http.post(url, data=body, headers=shown) as answer:
        return answer.status, await answer.json(content_type=None), answer.headers


def failed(code: str = "700", fault_class: str = "sticky") -> ServableFailed:
    return ServableFailed(f"error {code}", code=code, fault_class=fault_class)


async def test_every_route_says_which_it_was(http: aiohttp.ClientSession) -> None:
    async with running(Trio().serving) as (_, url):
        for path, headers, wanted in (
            (INFER, {}, ("2", "stable")),
            (INFER, {"x_canary": "1"}, ("3", "canary; rule=header")),
            (INFER, {"x_canary": "0"}, ("2", "stable")),
            (INFER, {"X_Model_Version": "1"}, ("1", "pinned")),
            ("/v2/models/one/versions/3/infer", {}, ("3", "pinned")),
            ("/v2/models/one/versions/3/infer", {"X_Model_Version": "1"}, ("3", "pinned")),
        ):
            status, body, shown = await post(http, url + path, **headers)
            assert status == 200
            assert (shown["X-Model-Version"], shown["X-Model-Route"]) == wanted
            assert shown["X-Model-Name"] == "one"
            assert shown["X-Config-Revision"] == "42"
            assert "infer;dur=" in shown["Server-Timing"]
            # The version that is named is the one whose weights answered.
            factor = float(wanted[0])
            assert body["outputs"][0]["data"] == [factor, 2 * factor, 3 * factor]
            assert body["model_version"] == wanted[0]


async def test_v1_paths_and_labels(http: aiohttp.ClientSession) -> None:
    rows = json.dumps({"instances": [[1, 2, 3]]})
    async with running(Trio().serving) as (_, url):
        for path, wanted in (
            ("one:predict", ("2", "stable")),
            ("one/versions/1:predict", ("1", "pinned")),
            ("one/labels/stable:predict", ("2", "stable; rule=label")),
            ("one/labels/canary:predict", ("3", "canary; rule=label")),
        ):
            status, body, shown = await post(http, f"{url}/v1/models/{path}", rows)
            assert (status, shown["X-Model-Version"], shown["X-Model-Route"]) == (200, *wanted)
            assert body["predictions"][0][0] == float(wanted[0])
        status, body, _ = await post(http, f"{url}/v1/models/one/predict", "[[1, 2, 3]]")
        assert (status, body["version"]) == (200, "2")
        for path in ("one/labels/beta:predict", "one/versions/9:predict", "nope:predict"):
            status, body, _ = await post(http, f"{url}/v1/models/{path}", rows)
            assert status == 404
            assert set(body) == {"error"}


async def test_request_ids_are_echoed_or_made(http: aiohttp.ClientSession) -> None:
    async with running(Trio().serving) as (_, url):
        assert (await post(http, url + INFER, X_Request_Id="abc"))[2]["X-Request-Id"] == "abc"
        made = {(await post(http, url + INFER))[2]["X-Request-Id"] for _ in range(3)}
        assert len(made) == 3
        long = (await post(http, url + INFER, X_Request_Id="a" * 500))[2]["X-Request-Id"]
        assert len(long) < 100


async def test_a_name_in_the_path_may_be_percent_encoded(http: aiohttp.ClientSession) -> None:
    async with running(serving(one_model("ocr-rec.v4", "1+gpu", ONE))) as (_, url):
        path = "/v2/models/ocr%2Drec%2Ev4/versions/1%2Bgpu/infer"
        async with http.post(aiohttp.client.URL(url + path, encoded=True), data=TEXT) as answer:
            assert answer.status == 200
        path = "/v2/models/ocr%2F..%2Frec/infer"
        async with http.post(aiohttp.client.URL(url + path, encoded=True), data=TEXT) as answer:
            assert answer.status == 404


async def test_a_request_keeps_the_table_it_read(http: aiohttp.ClientSession) -> None:
    """A swap while a request runs changes nothing for it, and everything for the next one."""
    trio = Trio()
    trio.live.holding = asyncio.Event()
    async with running(trio.serving) as (app, url):
        pending = asyncio.create_task(post(http, url + INFER))
        await eventually(lambda: trio.live.calls == 1)
        app.publish(serving(one_model("one", "9", ONE, 9.0)))
        assert (await post(http, url + INFER))[1]["model_version"] == "9"
        trio.live.holding.set()
        status, body, shown = await pending
        assert (status, body["model_version"], shown["X-Config-Revision"]) == (200, "2", "42")


async def test_a_swap_during_an_upload_is_seen_by_the_request(
    http: aiohttp.ClientSession,
) -> None:
    """A slow client must not be answered by a version that was unloaded while it sent."""
    trio = Trio()
    half = asyncio.Event()

    async def slowly() -> AsyncIterator[bytes]:
        yield TEXT[:10]
        await half.wait()
        yield TEXT[10:]

    async with running(trio.serving) as (app, url):
        pending = asyncio.create_task(post(http, url + INFER, slowly()))
        await asyncio.sleep(0.05)
        app.publish(serving(one_model("one", "9", ONE, 9.0)))
        half.set()
        assert (await pending)[1]["model_version"] == "9"
        assert trio.live.calls == 0


# --- second runs ------------------------------------------------------------------------------


async def test_a_failed_run_is_run_again_on_the_standby(http: aiohttp.ClientSession) -> None:
    trio = Trio()
    trio.live.failing = lambda _: failed()
    async with running(trio.serving) as (app, url):
        status, body, shown = await post(http, url + INFER)
        assert (status, body["model_version"]) == (200, "1")
        assert (shown["X-Model-Version"], shown["X-Model-Route"]) == ("1", "standby")
        assert 'paddlewheel_reruns_total{model="one"} 1.0' in app.metrics.render("")[0].decode()


async def test_a_failed_canary_is_answered_by_what_it_would_replace(
    http: aiohttp.ClientSession,
) -> None:
    trio = Trio()
    trio.canary.failing = lambda _: failed()
    async with running(trio.serving) as (_, url):
        status, body, shown = await post(http, url + INFER, X_Canary="1")
        assert (status, body["model_version"]) == (200, "2")
        assert shown["X-Model-Route"].startswith("stable")


async def test_an_answer_given_for_an_unmanned_version_names_who_gave_it(
    http: aiohttp.ClientSession,
) -> None:
    trio = Trio()
    trio.live.is_manned = trio.canary.is_manned = False
    async with running(trio.serving) as (_, url):
        for headers in ({}, {"X_Canary": "1"}):
            status, body, shown = await post(http, url + INFER, **headers)
            # The canary's first substitute has no worker either: it waits for its own.
            factor = 3.0 if headers else 1.0
            assert (status, body["model_version"]) == (200, f"{factor:g}")
            assert shown["X-Model-Version"] == body["model_version"]
            assert body["outputs"][0]["data"] == [factor, 2 * factor, 3 * factor]


async def test_a_pinned_request_stays_with_its_version(http: aiohttp.ClientSession) -> None:
    trio = Trio()
    trio.live.failing = lambda call: failed() if call == 1 else None
    async with running(trio.serving) as (_, url):
        status, body, _ = await post(http, url + INFER, X_Model_Version="2")
        assert (status, body["model_version"]) == (200, "2")
        assert (trio.live.calls, trio.old.calls) == (2, 0)


async def test_without_a_standby_it_is_run_once_more_on_the_same(
    http: aiohttp.ClientSession,
) -> None:
    route, (predictor,) = one_model("one", "1", ONE)
    predictor.failing = lambda call: failed("SIGSEGV", "crash") if call == 1 else None
    async with running(serving((route, [predictor]))) as (_, url):
        assert (await post(http, url + INFER))[0] == 200
        assert predictor.calls == 2


async def test_it_ends_two_workers_at_most(http: aiohttp.ClientSession) -> None:
    trio = Trio()
    trio.live.failing = trio.old.failing = lambda _: failed("SIGSEGV", "crash")
    async with running(trio.serving) as (_, url):
        status, body, shown = await post(http, url + INFER)
        assert status == 503
        assert "failed on this request" in body["error"]
        assert int(shown["Retry-After"]) >= 1
        assert (trio.live.calls, trio.old.calls, trio.canary.calls) == (1, 1, 0)


async def test_a_standby_of_another_signature_is_not_asked(http: aiohttp.ClientSession) -> None:
    trio = Trio()
    trio.old.signature = type(ONE)(ONE.inputs, ())
    trio.live.failing = lambda call: failed() if call == 1 else None
    async with running(trio.serving) as (_, url):
        assert (await post(http, url + INFER))[1]["model_version"] == "2"


# --- errors and limits ------------------------------------------------------------------------

RAISED: dict[str, tuple[InferenceError, int, str]] = {
    "bad input found by the worker": (BadInput("wrong"), 400, "client_error"),
    "a poisonous input": (Poisonous("refused"), 422, "client_error"),
    "a full queue": (Overloaded("full", retry_after_s=2.5), 503, "unavailable"),
    "a deadline": (DeadlineExceeded("late"), 504, "deadline"),
    "anything else": (InferenceError("odd"), 500, "failed"),
}


@pytest.mark.parametrize("case", RAISED)
async def test_errors_have_one_status_each(case: str, http: aiohttp.ClientSession) -> None:
    error, wanted, outcome = RAISED[case]
    route, (predictor,) = one_model("one", "1", ONE)
    predictor.failing = lambda _: error
    async with running(serving((route, [predictor]))) as (app, url):
        status, body, shown = await post(http, url + INFER)
        assert (status, body) == (wanted, {"error": str(error)})
        assert shown["X-Model-Version"] == "1"
        if wanted == 503:
            assert shown["Retry-After"] == "3"
        text = app.metrics.render("")[0].decode()
        assert f'outcome="{outcome}",route="stable",version="1"}} 1.0' in text
        assert predictor.calls == 1


async def test_a_bug_is_a_500_that_tells_nothing(http: aiohttp.ClientSession) -> None:
    route, (predictor,) = one_model("one", "1", ONE)

    def bug(_call: int) -> InferenceError | None:
        raise KeyError("a secret path")

    predictor.failing = bug
    async with running(serving((route, [predictor]))) as (_, url):
        status, body, _ = await post(http, url + INFER)
        assert (status, body) == (500, {"error": "internal error"})


async def test_problem_json_is_sent_when_asked_for(http: aiohttp.ClientSession) -> None:
    async with running(Trio().serving) as (_, url):
        status, body, shown = await post(
            http, url + "/v2/models/one/versions/9/infer", Accept="application/problem+json"
        )
        assert status == 404
        assert shown["Content-Type"] == "application/problem+json"
        assert (body["status"], body["title"], body["code"]) == (404, "Not Found", "UnknownVersion")
        assert body["loaded_versions"] == ["1", "2", "3"]
        assert body["error"] == body["detail"]


async def test_the_deadline_is_the_shorter_of_the_models_and_the_clients(
    http: aiohttp.ClientSession,
) -> None:
    trio = Trio(timeout_s=0.05)
    trio.live.holding = asyncio.Event()
    async with running(trio.serving) as (_, url):
        assert (await post(http, url + INFER))[0] == 504
    trio = Trio(timeout_s=30)
    trio.live.holding = asyncio.Event()
    async with running(trio.serving) as (_, url):
        body = json.dumps(BODY | {"parameters": {"timeout": 50_000}})
        assert (await post(http, url + INFER, body))[0] == 504


async def test_no_second_run_after_the_deadline(http: aiohttp.ClientSession) -> None:
    trio = Trio(timeout_s=0.001)

    def late(_call: int) -> InferenceError | None:
        time.sleep(0.01)
        return failed()

    trio.live.failing = late
    async with running(trio.serving) as (_, url):
        assert (await post(http, url + INFER))[0] == 504
        assert trio.old.calls == 0


async def test_bodies_over_the_limit(http: aiohttp.ClientSession) -> None:
    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(30):
            yield bytes(100_000)

    bomb = gzip.compress(bytes(50_000_000))
    async with running(Trio(max_body_mb=1).serving) as (_, url):
        assert (await post(http, url + INFER, bytes(1_000_001)))[0] == 413
        assert (await post(http, url + INFER, chunks()))[0] == 413
        status, body, _ = await post(http, url + INFER, bomb, Content_Encoding="gzip")
        assert status == 413
        assert "max_body_mb" in body["error"]
        bomb = zlib.compress(bytes(50_000_000))
        assert (await post(http, url + INFER, bomb, Content_Encoding="deflate"))[0] == 413
        assert (await post(http, url + INFER))[0] == 200


@pytest.mark.parametrize("coding", ["gzip", "deflate"])
def test_a_bomb_takes_no_more_memory_than_the_limit(coding: str) -> None:
    window = zlib.MAX_WBITS | 16 if coding == "gzip" else zlib.MAX_WBITS
    bomb = zlib.compress(bytes(50_000_000), wbits=window)
    tracemalloc.start()
    try:
        with pytest.raises(BodyTooLarge):
            http_body.unpack(bomb, coding, 1_000_000)
        assert tracemalloc.get_traced_memory()[1] < 5_000_000
    finally:
        tracemalloc.stop()


async def test_a_declared_length_is_refused_before_it_arrives() -> None:
    async with running(Trio(max_body_mb=1).serving) as (_, url):
        reader, writer = await connect(url)
        writer.write(
            f"POST {INFER} HTTP/1.1\r\nHost: a\r\nContent-Length: 99000000\r\n"
            "Expect: 100-continue\r\n\r\n".encode()
        )
        assert b" 413 " in await reader.readline()
        writer.close()


async def connect(url: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    host, port = url.removeprefix("http://").split(":")
    return await asyncio.open_connection(host, int(port))


async def test_expect_continue_is_answered() -> None:
    async with running(Trio().serving) as (_, url):
        reader, writer = await connect(url)
        head = f"POST {INFER} HTTP/1.1\r\nHost: a\r\nContent-Length: {len(TEXT)}\r\n"
        writer.write(f"{head}Expect: 100-continue\r\n\r\n".encode())
        async with asyncio.timeout(5):
            assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
            writer.write(TEXT)
            assert b" 200 " in await reader.readline()
        writer.close()


ENCODED: dict[str, tuple[str, bytes, int]] = {
    "gzip": ("gzip", gzip.compress(TEXT), 200),
    "gzip in two members": ("gzip", gzip.compress(TEXT[:9]) + gzip.compress(TEXT[9:]), 200),
    "gzip in 40 000 members": ("gzip", gzip.compress(b"") * 40_000, 400),
    "deflate": ("deflate", zlib.compress(TEXT), 200),
    "deflate without its wrapping": ("deflate", zlib.compress(TEXT)[2:-4], 200),
    "identity": ("identity", TEXT, 200),
    "an encoding in capitals": ("GZIP", gzip.compress(TEXT), 200),
    "brotli": ("br", TEXT, 415),
    "two at once": ("gzip, deflate", TEXT, 415),
    "not gzip at all": ("gzip", TEXT, 400),
    "cut gzip": ("gzip", gzip.compress(TEXT)[:-9], 400),
    "not deflate at all": ("deflate", b"\xff" * 40, 400),
    "nothing": ("gzip", b"", 400),
}


@pytest.mark.parametrize("case", ENCODED)
async def test_content_encodings(case: str, http: aiohttp.ClientSession) -> None:
    encoding, body, wanted = ENCODED[case]
    async with running(Trio().serving) as (_, url):
        status, _, _ = await post(http, url + INFER, body, Content_Encoding=encoding)
        assert status == wanted


async def test_answers_are_packed_only_when_one_coding_is_asked_for(
    http: aiohttp.ClientSession,
) -> None:
    array = np.zeros((1000, 3), np.float32)
    body = json.dumps({"inputs": array.tolist()})
    async with running(Trio().serving) as (_, url):
        for asked, wanted in (
            ("gzip", "gzip"), ("deflate", "deflate"), ("gzip, deflate, br", None),
            ("gzip;q=0", None), ("br", None), ("", None),
        ):  # fmt: skip
            async with http.post(
                url + "/v1/models/one/predict", data=body, headers={"Accept-Encoding": asked}
            ) as answer:
                raw = await answer.read()
                assert answer.headers.get("Content-Encoding") == wanted
            if wanted is not None:
                raw = gzip.decompress(raw) if wanted == "gzip" else zlib.decompress(raw)
            assert json.loads(raw)["version"] == "2"


async def test_an_upload_that_stalls_is_given_up(
    http: aiohttp.ClientSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_body, "UPLOAD_TIMEOUT_S", 0.05)
    async with running(Trio().serving) as (_, url):
        reader, writer = await connect(url)
        writer.write(f"POST {INFER} HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n\r\n{{".encode())
        async with asyncio.timeout(5):
            assert b" 408 " in await reader.readline()
        writer.close()


async def test_a_client_that_goes_away_frees_its_place() -> None:
    trio = Trio()
    trio.live.holding = asyncio.Event()
    async with running(trio.serving) as (app, url):
        _, writer = await connect(url)
        head = f"POST {INFER} HTTP/1.1\r\nHost: a\r\nContent-Length: {len(TEXT)}\r\n\r\n"
        writer.write(head.encode() + TEXT)
        await eventually(lambda: trio.live.calls == 1)
        assert in_flight(app) == 1
        writer.close()
        await eventually(lambda: trio.live.cancelled == 1)
        await eventually(lambda: in_flight(app) == 0)
        assert 'outcome="cancelled"' in app.metrics.render("")[0].decode()


def in_flight(app: App) -> float:
    return app.metrics.registry.get_sample_value("paddlewheel_in_flight", {"model": "one"}) or 0.0


async def test_no_answer_mixes_versions_while_tables_are_swapped(
    http: aiohttp.ClientSession,
) -> None:
    """The header, the document and the numbers always tell of the same version."""
    worlds = [serving(one_model("one", str(n), ONE, float(n))) for n in range(1, 6)]
    stop = asyncio.Event()
    seen: set[str] = set()

    async def ask(url: str) -> int:
        asked = 0
        while not stop.is_set():
            status, body, shown = await post(http, url + INFER)
            version = body["model_version"]
            assert status == 200
            assert shown["X-Model-Version"] == version
            assert body["outputs"][0]["data"] == [float(version) * n for n in (1, 2, 3)]
            seen.add(version)
            asked += 1
        return asked

    async with running(worlds[0]) as (app, url):
        clients = [asyncio.create_task(ask(url)) for _ in range(4)]
        for number in range(200):
            app.publish(worlds[number % len(worlds)])
            await asyncio.sleep(0.001)
        stop.set()
        assert sum(await asyncio.gather(*clients)) > 20
    assert len(seen) == len(worlds)
