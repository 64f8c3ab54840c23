"""Everything over HTTP that is no inference: probes, metadata, metrics, admin, hostile clients."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

import aiohttp
import pytest

from registry.names import ModelName, Version
from registry.spec import HeaderRule
from router.errors import BadRequest
from router.metrics import Reading
from router.ports import Check, Health
from router.rules import compile_rules
from router.table import Route
from tests.integration.test_http_support import (
    ONE,
    Node,
    NumpyPredictor,
    eventually,
    one_model,
    running,
    servable,
    serving,
)

BODY = b'{"inputs": [[1, 2, 3]]}'


@pytest.fixture
async def http() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession() as session:
        yield session


async def ask(
    http: aiohttp.ClientSession, url: str, method: str = "GET", **options: Any
) -> tuple[int, Any, Any]:
    async with http.request(method, url, allow_redirects=False, **options) as answer:
        raw = await answer.read()
        is_json = "json" in answer.headers.get("Content-Type", "") and raw
        return answer.status, json.loads(raw) if is_json else raw.decode(), answer.headers


def health(*, ready: bool = True, live: bool = True, started: bool = True) -> Health:
    return Health(ready, started, live, (Check("models", ready, "detail"),))


async def test_probes(http: aiohttp.ClientSession) -> None:
    node = Node()
    async with running(serving(), node) as (_, url):
        paths = ("/livez", "/healthz", "/readyz", "/startupz", "/v2/health/live",
                 "/v2/health/ready")  # fmt: skip
        for path in paths:
            assert (await ask(http, url + path))[0] == 200
            assert (await ask(http, url + path, "HEAD"))[:2] == (200, "")
        node.shown = health(ready=False)
        assert (await ask(http, url + "/livez"))[0] == 200
        for path in ("/readyz", "/v2/health/ready"):
            status, body, _ = await ask(http, url + path)
            assert (status, body["ready"]) == (503, False)
        body = (await ask(http, url + "/readyz?verbose"))[1]
        assert body["checks"] == [{"name": "models", "ok": False, "detail": "detail"}]
        node.shown = health(live=False, started=False)
        for path in ("/livez", "/healthz", "/v2/health/live", "/startupz"):
            assert (await ask(http, url + path))[0] == 503


async def test_model_ready_tells_unknown_from_unwell(http: aiohttp.ClientSession) -> None:
    route, behind = one_model("one", "1", ONE, unavailable={Version("2"): "QUARANTINED: code 700"})
    node = Node(listed=[{"model": "one", "version": "3", "state": "LOADING"}])
    async with running(serving((route, behind), (Route(ModelName("empty"), None), ())), node) as (
        _, url,
    ):  # fmt: skip
        for path, wanted in (
            ("one", 200), ("one/versions/1", 200), ("one/versions/2", 503),
            ("one/versions/3", 503), ("one/versions/9", 404), ("empty", 503), ("nope", 404),
        ):  # fmt: skip
            status, body, _ = await ask(http, f"{url}/v2/models/{path}/ready")
            assert status == wanted, path
            assert (wanted == 200) == (body.get("ready") is True)


async def test_tf_serving_status_and_metadata(http: aiohttp.ClientSession) -> None:
    node = Node(
        listed=[
            {"model": "one", "version": "1", "state": "LIVE", "reason": None},
            {"model": "one", "version": "2", "state": "FAILED", "reason": "digest: differs"},
            {"model": "two", "version": "1", "state": "LIVE", "reason": None},
        ]
    )
    async with running(serving(one_model("one", "1", ONE)), node) as (_, url):
        status, body, _ = await ask(http, url + "/v1/models/one")
        assert status == 200
        assert (body["name"], body["ready"]) == ("one", True)
        assert [entry["state"] for entry in body["model_version_status"]] == ["AVAILABLE", "END"]
        for path in ("versions/2", "labels/stable"):
            status, body, _ = await ask(http, f"{url}/v1/models/one/{path}")
            assert (status, len(body["model_version_status"])) == (200, 1)
        assert (await ask(http, url + "/v1/models/one/versions/9"))[0] == 404
        assert (await ask(http, url + "/v1/models/one/labels/canary"))[0] == 404
        assert (await ask(http, url + "/v1/models/nope"))[0] == 404
        assert (await ask(http, url + "/v1/models"))[1] == {"models": ["one"]}
        for path in ("one/metadata", "one/versions/1/metadata"):
            shown = (await ask(http, f"{url}/v1/models/{path}"))[1]
            definition = shown["metadata"]["signature_def"]["signature_def"]["serving_default"]
            assert definition["inputs"]["x"]["dtype"] == "DT_FLOAT"


async def test_repository_index_takes_an_empty_body(http: aiohttp.ClientSession) -> None:
    node = Node(
        listed=[
            {"model": "one", "version": "1", "state": "LIVE", "reason": None},
            {"model": "one", "version": "2", "state": "FAILED", "reason": "why"},
        ]
    )
    async with running(serving(), node) as (_, url):
        index = url + "/v2/repository/index"
        assert len((await ask(http, index, "POST"))[1]) == 2
        assert len((await ask(http, index, "POST", data=b'{"ready": true}'))[1]) == 1
        assert (await ask(http, index, "POST", data=b'{"ready": 1}'))[0] == 400
        assert (await ask(http, index, "POST", data=b"[]"))[0] == 400
        assert (await ask(http, index))[0] == 405
        status, body, _ = await ask(http, url + "/v2/repository/models/one/load", "POST")
        assert status == 400
        assert "managed by config" in body["error"]


async def test_methods_and_unknown_paths(http: aiohttp.ClientSession) -> None:
    async with running(serving(one_model("one", "1", ONE))) as (_, url):
        for method, path, wanted, allow in (
            ("OPTIONS", "/v2/models/one/infer", 204, "POST, OPTIONS"),
            ("GET", "/v2/models/one/infer", 405, "POST, OPTIONS"),
            ("GET", "/v1/models/one:predict", 405, "POST, OPTIONS"),
            ("OPTIONS", "/livez", 204, "GET, HEAD, OPTIONS"),
            ("POST", "/livez", 405, "GET, HEAD, OPTIONS"),
            ("DELETE", "/admin/routes", 405, "GET, HEAD, OPTIONS"),
            ("GET", "/v2/", 200, None),
            ("GET", "/", 404, None),
            ("GET", "/v3", 404, None),
            ("POST", "/v2/models/one/generate", 404, None),
            ("GET", "/v2/models/one/versions/1/infer/x", 404, None),
            ("GET", "/../../etc/passwd", 404, None),
        ):
            target = aiohttp.client.URL(url + path, encoded=True)
            status, _, shown = await ask(http, str(target), method)
            assert (status, shown.get("Allow")) == (wanted, allow), (method, path)
            assert shown["Server"] == "paddlewheel"


async def test_metrics_in_both_formats(http: aiohttp.ClientSession) -> None:
    async with running(serving(one_model("one", "1", ONE))) as (app, url):
        gauges = (
            ({"model": "one", "version": "1", "state": "LIVE"}, 1.0),
            ({"model": "one", "version": "2", "state": "FAILED"}, 1.0),
        )
        app.metrics.add(lambda: [Reading("servable_state", "States.", gauges)])
        app.metrics.add(lambda: [Reading("watch_restarts", "W.", (({}, 3.0),), is_counter=True)])
        for _ in range(3):
            assert (await ask(http, url + "/v1/models/one/predict", "POST", data=BODY))[0] == 200
        assert (await ask(http, url + "/v1/models/nope/predict", "POST", data=BODY))[0] == 404
        assert (await ask(http, url + "/v1/models/one/predict", "POST", data=b"{"))[0] == 400
        status, text, shown = await ask(http, url + "/metrics")
        assert status == 200
        assert shown["Content-Type"].startswith("text/plain")
        one = 'model="one",outcome="{}",route="stable",version="1"'
        for line in (
            f"paddlewheel_requests_total{{{one.format('ok')}}} 3.0",
            f"paddlewheel_requests_total{{{one.format('client_error')}}} 1.0",
            'paddlewheel_refused_total{code="404"} 1.0',
            "paddlewheel_request_duration_seconds_count"
            '{model="one",route="stable",version="1"} 3.0',
            'paddlewheel_queue_seconds_count{model="one"} 3.0',
            'paddlewheel_in_flight{model="one"} 0.0',
            'paddlewheel_servable_state{model="one",state="FAILED",version="2"} 1.0',
            "paddlewheel_watch_restarts_total 3.0",
        ):
            assert line in text.splitlines(), line
        accept = {"Accept": "application/openmetrics-text; version=1.0.0"}
        _, text, shown = await ask(http, url + "/metrics", headers=accept)
        assert shown["Content-Type"].startswith("application/openmetrics-text")
        assert text.endswith("# EOF\n")


async def test_series_of_versions_long_gone_are_forgotten(http: aiohttp.ClientSession) -> None:
    async with running(serving()) as (app, _):
        for number in range(2000):
            app.metrics.series("one", str(number), "stable").count("ok")
        text = app.metrics.render("")[0].decode()
        assert text.count("paddlewheel_requests_total{") < 600
        assert 'version="1999"' in text


async def test_admin_shows_routes_servables_and_reasons(http: aiohttp.ClientSession) -> None:
    live, canary = (NumpyPredictor(servable("one", version), ONE) for version in ("1", "2"))
    route = Route(
        ModelName("one"),
        live=live.id,
        canary=canary.id,
        rules=compile_rules(ModelName("one"), [HeaderRule(name="X-Canary", equals="1")]),
        pinned={p.id.version: p.id for p in (live, canary)},
    )
    node = Node(listed=[{"model": "one", "version": "1", "state": "LIVE"}])
    async with running(serving((route, [live, canary])), node) as (_, url):
        shown = (await ask(http, url + "/admin/routes"))[1]
        assert shown["models"]["one"]["canary"]["rules"] == [
            {"header": {"name": "X-Canary", "equals": "1"}}
        ]
        shown = (await ask(http, url + "/admin/servables"))[1]
        assert shown == {"node": "node-1", "servables": list(node.listed)}
        explain = url + "/admin/explain?model=one"
        shown = (await ask(http, explain + "&header=x-canary:%201&header=A:b"))[1]
        assert (shown["version"], shown["route"]) == ("2", "canary")
        assert shown["rule"]["kind"] == "header"
        assert (await ask(http, explain))[1]["route"] == "stable"
        for query, wanted in (
            ("", 400), ("?model=", 400), ("?model=nope", 404), ("?model=one&header=x", 400),
            ("?model=one&version=9", 404), ("?model=one&color=red", 400),
        ):  # fmt: skip
            status, body, head = await ask(http, url + "/admin/explain" + query)
            assert status == wanted, query
            assert head["Content-Type"] == "application/problem+json"
            assert body["status"] == wanted


class OneDrill:
    """Drills of a node that knows one kind."""

    def __init__(self) -> None:
        self.drills: list[Mapping[str, Any]] = []

    async def arm(self, document: Mapping[str, Any]) -> Mapping[str, Any]:
        if document.get("kind") != "code":
            raise BadRequest("kind: want code")
        self.drills.append({"id": "d1", **document})
        return {"id": "d1", "armed": True}

    async def armed(self) -> Sequence[Mapping[str, Any]]:
        return self.drills

    async def disarm(self, drill_id: str) -> bool:
        return any(drill["id"] == drill_id for drill in self.drills)


async def test_drills_only_where_they_are_switched_on(http: aiohttp.ClientSession) -> None:
    async with running(serving()) as (_, url):
        for method in ("GET", "POST"):
            status, body, head = await ask(http, url + "/admin/drill", method, data=b"{}")
            assert (status, body["code"]) == (403, "Forbidden")
            assert head["Content-Type"] == "application/problem+json"
    async with running(serving(), drills=OneDrill()) as (_, url):
        drill = url + "/admin/drill"
        armed = await ask(http, drill, "POST", data=b'{"kind": "code", "code": 700}')
        assert armed[:2] == (200, {"id": "d1", "armed": True})
        assert (await ask(http, drill))[1]["drills"][0]["code"] == 700
        assert (await ask(http, drill, "POST", data=b'{"kind": "?"}'))[0] == 400
        assert (await ask(http, drill, "POST", data=b"nonsense"))[0] == 400
        assert (await ask(http, drill + "/d1", "DELETE"))[0] == 200
        assert (await ask(http, drill + "/d2", "DELETE"))[0] == 404
        assert (await ask(http, drill + "/d1"))[0] == 405


# --- hostile clients and the end ----------------------------------------------------------------


async def raw(url: str, sent: bytes) -> bytes:
    host, port = url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(sent)
    async with asyncio.timeout(5):
        got = await reader.read(65536)
    writer.close()
    return got


async def test_what_is_not_http_is_answered_and_closed(http: aiohttp.ClientSession) -> None:
    async with running(serving()) as (_, url):
        for sent in (
            b"nonsense\r\n\r\n",
            b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
            b"GET /livez HTTP/1.1\r\nHost: a\r\nX: " + b"a" * 40_000 + b"\r\n\r\n",
            b"GET /" + b"a" * 40_000 + b" HTTP/1.1\r\nHost: a\r\n\r\n",
            b"POST /v2 HTTP/1.1\r\nHost: a\r\nContent-Length: -1\r\n\r\n",
            b"POST /v2 HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n",
        ):
            got = await raw(url, sent)
            status = b" 431 " if len(sent) > 40_000 else b" 400 "
            assert status in got.split(b"\r\n", 1)[0], sent[:40]
            head, _, body = got.partition(b"\r\n\r\n")
            assert b"application/json" in head
            assert "error" in json.loads(body)
        assert (await ask(http, url + "/livez"))[0] == 200


async def test_the_absolute_form_of_a_target_is_understood() -> None:
    async with running(serving()) as (_, url):
        got = await raw(url, b"GET http://other:1/livez HTTP/1.1\r\nHost: a\r\n\r\n")
        assert got.startswith(b"HTTP/1.1 200")


async def test_a_connection_that_never_asks_is_closed() -> None:
    async with running(serving()) as (app, url):
        app.limits.head_timeout_s = 0.05
        assert await raw(url, b"GET /livez HT") == b""


async def test_half_a_second_head_is_given_up_too() -> None:
    async with running(serving()) as (app, url):
        app.limits.head_timeout_s = 0.05
        host, port = url.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        async with asyncio.timeout(5):
            writer.write(b"GET /livez HTTP/1.1\r\nHost: a\r\n\r\n")
            assert (await reader.readuntil(b"}")).startswith(b"HTTP/1.1 200")
            await asyncio.sleep(0.1)  # idle is no offence
            writer.write(b"GET /livez HTTP/1.1\r\nHos")
            assert await reader.read() == b""
        writer.close()


async def test_stop_answers_what_is_under_way(http: aiohttp.ClientSession) -> None:
    route, (predictor,) = one_model("one", "1", ONE)
    predictor.holding = asyncio.Event()
    async with running(serving((route, [predictor]))) as (app, url):
        pending = asyncio.create_task(ask(http, url + "/v1/models/one/predict", "POST", data=BODY))
        await eventually(lambda: predictor.calls)
        stopping = asyncio.create_task(app.stop(drain_s=5))
        await asyncio.sleep(0.05)
        with pytest.raises(aiohttp.ClientConnectionError):
            await ask(http, url + "/livez")
        predictor.holding.set()
        assert (await pending)[0] == 200
        await stopping


async def test_stop_gives_up_in_time(http: aiohttp.ClientSession) -> None:
    route, (predictor,) = one_model("one", "1", ONE)
    predictor.holding = asyncio.Event()
    async with running(serving((route, [predictor]))) as (app, url):
        pending = asyncio.create_task(ask(http, url + "/v1/models/one/predict", "POST", data=BODY))
        await eventually(lambda: predictor.calls)
        async with asyncio.timeout(3):
            await app.stop(drain_s=0.1)
        with pytest.raises(aiohttp.ClientError):
            await pending
