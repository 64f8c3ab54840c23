"""The gateway's front door over nodes' front doors, and over servers that misbehave."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import io
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import replace
from typing import Any

import aiohttp
import numpy as np
import pytest

from paddlewheel.bench.checks import infer_body
from registry.inference import Overloaded
from registry.names import NodeId, Version
from router.fleet.ejection import FAILURES
from router.fleet.probes import Vitals
from router.proxy import ANSWER_MAX_BYTES
from router.upstream import REPLAY_MAX_BYTES
from tests.eventually import eventually
from tests.fleets import M
from tests.gateways import (
    Gateway,
    answer,
    gateway,
    raw_node,
    read_request_body,
    reset,
    silence,
)
from tests.integration.test_http_support import ONE, echo_signature, one_model, running, serving

INFER = "/v2/models/m/infer"
X = {"x": np.ones((2, 3), np.float32)}
JSON_HEADERS, JSON_BODY = infer_body(X, binary=False)
BINARY_HEADERS, BINARY_BODY = infer_body(X, binary=True)
GONE = "http://127.0.0.1:9"
"""Nobody listens there."""


@pytest.fixture
async def client() -> AsyncIterator[aiohttp.ClientSession]:
    timeout = aiohttp.ClientTimeout(total=20)
    async with aiohttp.ClientSession(timeout=timeout, auto_decompress=False) as session:
        yield session


@contextlib.asynccontextmanager
async def two_nodes(**spec: Any) -> AsyncGenerator[Gateway]:
    """a serves version 1; b too, and has version 2 loaded."""
    route, behind = one_model("m", "1", ONE)
    _, second = one_model("m", "2", ONE, 2.0)
    both, behind_b = one_model("m", "1", ONE)
    pinned = {**both.pinned, second[0].id.version: second[0].id}
    both = replace(both, pinned=pinned)
    said = {"b": {"states": {"1": "LIVE", "2": "READY"}}}
    async with (
        running(serving((route, behind))) as (_, a),
        running(serving((both, [*behind_b, *second]))) as (_, b),
        gateway({"a": a, "b": b}, said=said, **spec) as front,
    ):
        yield front


async def post(
    client: aiohttp.ClientSession, front: Gateway, path: str = INFER, **given: Any
) -> tuple[int, dict[str, str], bytes]:
    given = {"data": JSON_BODY, "headers": JSON_HEADERS} | given
    if isinstance(given["data"], bytes):
        given["data"] = io.BytesIO(given["data"])
    async with client.post(front.url + path, **given) as got:
        return got.status, {k.lower(): v for k, v in got.headers.items()}, await got.read()


# --- what passes ------------------------------------------------------------------------------


async def test_an_answer_is_the_nodes_own(client: aiohttp.ClientSession) -> None:
    async with two_nodes() as front:
        headers = {**JSON_HEADERS, "X-Request-Id": "r-1"}
        status, shown, body = await post(client, front, headers=headers)
        direct = front.rotation.fleet.members[NodeId(shown["x-node"])].record.http
        async with client.post(direct + INFER, data=JSON_BODY, headers=headers) as got:
            assert (status, body) == (got.status, await got.read())
        assert status == 200
        assert shown["x-model-version"] == "1"
        assert shown["x-model-route"] == "stable"
        assert shown["x-config-revision"] == "7"
        assert shown["x-request-id"] == "r-1"
        assert shown["server"] == "paddlewheel"


async def test_binary_tensors_pass_untouched(client: aiohttp.ClientSession) -> None:
    async with two_nodes() as front:
        status, shown, body = await post(client, front, data=BINARY_BODY, headers=BINARY_HEADERS)
        assert status == 200
        length = int(shown["inference-header-content-length"])
        assert np.frombuffer(body[length:], np.float32).tolist() == [1.0] * 6


async def test_requests_are_shared_out(client: aiohttp.ClientSession) -> None:
    async with two_nodes() as front:
        nodes = {(await post(client, front))[1]["x-node"] for _ in range(40)}
        assert nodes == {"a", "b"}


@pytest.mark.parametrize("size", [0, 1000, ANSWER_MAX_BYTES - 100, 3 * ANSWER_MAX_BYTES])
async def test_answers_of_any_size(client: aiohttp.ClientSession, size: int) -> None:
    content = np.random.default_rng(1).bytes(size)
    async with raw_node(answer(body=content)) as node, gateway({"a": node.url}) as front:
        for _ in range(3):
            status, _, body = await post(client, front)
            assert (status, body) == (200, content)
        assert node.connections == 1, "the connection is kept"


async def test_a_chunked_answer_streams(client: aiohttp.ClientSession) -> None:
    async def script(
        head: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        await read_request_body(head, reader)
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nfirst\r\n")
        await seen.wait()
        writer.write(b"4\r\nlast\r\n0\r\n\r\n")

    seen = asyncio.Event()
    async with raw_node(script) as node, gateway({"a": node.url}) as front:
        async with client.post(front.url + INFER, data=JSON_BODY) as got:
            assert await got.content.readany() == b"first"
            seen.set()
            assert await got.read() == b"last"
        await eventually(lambda: front.rotation.upstreams[NodeId("a")].idle == 1, within_s=2)


@pytest.mark.parametrize("size", [REPLAY_MAX_BYTES, REPLAY_MAX_BYTES + 1, 3 * REPLAY_MAX_BYTES])
@pytest.mark.parametrize("is_chunked", [False, True])
async def test_bodies_of_any_size(
    client: aiohttp.ClientSession, size: int, is_chunked: bool
) -> None:
    route, behind = one_model("m", "1", echo_signature("float32"))
    x = np.random.default_rng(1).standard_normal((1, size // 4), dtype=np.float32)
    headers, body = infer_body({"x": x}, binary=True)

    async def pieces() -> AsyncIterator[bytes]:
        for start in range(0, len(body), 1 << 20):
            yield body[start : start + (1 << 20)]

    async with running(serving((route, behind))) as (_, a), gateway({"a": a}) as front:
        data: Any = pieces() if is_chunked else body
        status, shown, got = await post(client, front, data=data, headers=headers)
        assert status == 200, got[:200]
        start = int(shown["inference-header-content-length"])
        assert got[start:] == x.tobytes()


async def test_a_packed_body_is_the_nodes_to_unpack(client: aiohttp.ClientSession) -> None:
    async with two_nodes() as front:
        headers = {**JSON_HEADERS, "Content-Encoding": "gzip", "Accept-Encoding": "gzip"}
        status, _, _ = await post(client, front, data=gzip.compress(JSON_BODY), headers=headers)
        assert status == 200


async def test_expect_is_answered_here(client: aiohttp.ClientSession) -> None:
    async with two_nodes() as front:
        assert (await post(client, front, expect100=True))[0] == 200


async def test_the_deadline_goes_along_and_shrinks(client: aiohttp.ClientSession) -> None:
    async with (
        raw_node(answer()) as node,
        gateway({"a": node.url}, limits={"timeout_s": 4}) as front,
    ):
        await post(client, front)
        await post(client, front, headers={**JSON_HEADERS, "X-Request-Timeout-Ms": "300"})
        await post(client, front, headers={**JSON_HEADERS, "X-Request-Timeout-Ms": "60000"})
    sent = [
        int(line.partition(b":")[2])
        for head in node.heads
        for line in head.split(b"\r\n")
        if line.lower().startswith(b"x-request-timeout-ms")
    ]
    assert len(sent) == 3
    assert 3900 < sent[0] <= 4000
    assert 200 < sent[1] <= 300
    assert 3900 < sent[2] <= 4000


async def test_a_node_keeps_the_deadline(client: aiohttp.ClientSession) -> None:
    route, behind = one_model("m", "1", ONE)
    behind[0].holding = asyncio.Event()
    async with running(serving((route, behind))) as (_, a), gateway({"a": a}) as front:
        headers = {**JSON_HEADERS, "X-Request-Timeout-Ms": "200"}
        status, shown, _ = await post(client, front, headers=headers)
        assert status == 504
        assert shown["x-node"] == "a", "the node's own answer"
        headers["X-Request-Timeout-Ms"] = "soon"
        assert (await post(client, front, headers=headers))[0] == 400


# --- which node -------------------------------------------------------------------------------


async def test_a_pinned_version_goes_where_it_is(client: aiohttp.ClientSession) -> None:
    async with two_nodes() as front:
        for _ in range(8):
            for path, headers in (
                (INFER, {**JSON_HEADERS, "X-Model-Version": "2"}),
                ("/v2/models/m/versions/2/infer", JSON_HEADERS),
            ):
                status, shown, _ = await post(client, front, path, headers=headers)
                assert (status, shown["x-node"]) == (200, "b")
                assert shown["x-model-route"] == "pinned"


async def test_a_version_that_is_nowhere_is_the_nodes_to_refuse(
    client: aiohttp.ClientSession,
) -> None:
    async with two_nodes() as front:
        status, _, body = await post(
            client, front, headers={**JSON_HEADERS, "X-Model-Version": "9"}
        )
        assert status == 404
        assert b"loaded versions: 1" in body


async def test_a_version_that_is_gone_meanwhile_is_asked_for_elsewhere(
    client: aiohttp.ClientSession,
) -> None:
    """The gateway believes that a has it too."""
    async with two_nodes() as front:
        urls = {n: m.record.http for n, m in front.rotation.fleet.members.items()}
        states = {"1": "LIVE", "2": "READY"}
        said = {"a": {"states": states}, "b": {"states": states}}
        async with gateway(urls, said=said) as other:
            for _ in range(10):
                headers = {**JSON_HEADERS, "X-Model-Version": "2"}
                status, shown, _ = await post(client, other, headers=headers)
                assert (status, shown["x-node"]) == (200, "b")


async def test_users_of_the_canary_go_where_it_is(client: aiohttp.ClientSession) -> None:
    rules = [{"header": {"name": "X-Canary", "equals": "1"}}]
    canary = {"states": {"1": "LIVE", "2": "CANARY"}, "canary": Version("2"), "applied": 11}
    async with (
        raw_node(answer()) as a,
        raw_node(answer()) as b,
        gateway(
            {"a": a.url, "b": b.url}, said={"b": canary}, canary={"version": "2", "rules": rules}
        ) as front,
    ):
        for _ in range(10):
            await post(client, front, headers={**JSON_HEADERS, "X-Canary": "1"})
        assert (len(a.heads), len(b.heads)) == (0, 10)
        for _ in range(40):
            await post(client, front)
        assert a.heads, "the others go to both"


# --- nodes that fail --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "script",
    [reset, answer("503 Service Unavailable", b"{}", Retry_After="1"), answer("404 Not Found")],
    ids=["reset", "503", "404"],
)
async def test_another_node_answers(client: aiohttp.ClientSession, script: Any) -> None:
    async with (
        raw_node(script) as bad,
        raw_node(answer(body=b"good")) as good,
        gateway({"bad": bad.url, "good": good.url}) as front,
    ):
        for _ in range(10):
            status, shown, body = await post(client, front)
            assert (status, shown["x-node"], body) == (200, "good", b"good")
        assert bad.heads
        async with client.get(f"{front.url}/metrics") as got:
            assert "paddlewheel_gateway_retries_total" in await got.text()


async def test_a_refused_connection(client: aiohttp.ClientSession) -> None:
    async with (
        raw_node(answer()) as good,
        gateway({"bad": GONE, "good": good.url}) as front,
    ):
        for _ in range(10):
            assert (await post(client, front))[0] == 200
        assert set(front.suspected) == {"bad"}


async def test_an_answer_that_breaks_before_it_was_passed_on(
    client: aiohttp.ClientSession,
) -> None:
    async def script(
        head: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        await read_request_body(head, reader)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf")
        writer.close()

    async with (
        raw_node(script) as bad,
        raw_node(answer()) as good,
        gateway({"bad": bad.url, "good": good.url}) as front,
    ):
        for _ in range(10):
            assert (await post(client, front))[0] == 200


async def test_an_answer_that_breaks_while_it_is_passed_on_is_not_made_whole(
    client: aiohttp.ClientSession,
) -> None:
    async def script(
        head: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        await read_request_body(head, reader)
        length = 2 * ANSWER_MAX_BYTES
        writer.write(f"HTTP/1.1 200 OK\r\nContent-Length: {length}\r\n\r\n".encode() + bytes(1000))
        await writer.drain()
        writer.close()

    async with raw_node(script) as bad, gateway({"bad": bad.url}) as front:
        with pytest.raises(aiohttp.ClientError):
            await post(client, front)


async def test_an_idle_connection_that_was_closed_costs_no_attempt(
    client: aiohttp.ClientSession,
) -> None:
    """Each second request on a connection finds it closed; there is no other node to ask."""
    served: set[asyncio.StreamWriter] = set()

    async def script(
        head: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        if writer in served:
            writer.transport.abort()
            return
        served.add(writer)
        await answer()(head, reader, writer)

    async with raw_node(script) as node, gateway({"a": node.url}) as front:
        for _ in range(6):
            assert (await post(client, front))[0] == 200
        assert not front.suspected


async def test_all_nodes_fail(client: aiohttp.ClientSession) -> None:
    async with raw_node(reset) as bad, gateway({"bad": bad.url, "gone": GONE}) as front:
        status, shown, body = await post(client, front)
        assert status == 503
        assert shown["retry-after"] == "1"
        assert b"error" in body
        assert len(bad.heads) == 1


async def test_no_room_anywhere_is_said_as_the_node_says_it(client: aiohttp.ClientSession) -> None:
    route, behind = one_model("m", "1", ONE)
    behind[0].failing = lambda _call: Overloaded("the queue is full", retry_after_s=7)
    async with (
        running(serving((route, behind))) as (_, a),
        gateway({"a": a, "gone": GONE}) as front,
    ):
        for _ in range(4):
            status, shown, body = await post(client, front)
            assert (status, shown["retry-after"]) == (503, "7")
            assert b"the queue is full" in body


async def test_a_silent_node_costs_its_deadline_at_most(client: aiohttp.ClientSession) -> None:
    async with raw_node(silence) as node, gateway({"a": node.url}) as front:
        loop = asyncio.get_running_loop()
        began_s = loop.time()
        headers = {**JSON_HEADERS, "X-Request-Timeout-Ms": "300"}
        assert (await post(client, front, headers=headers))[0] == 504
        assert 0.25 < loop.time() - began_s < 2


async def test_what_waits_on_a_node_found_silent_is_run_elsewhere(
    client: aiohttp.ClientSession,
) -> None:
    async with (
        raw_node(silence) as bad,
        raw_node(answer()) as good,
        gateway({"bad": bad.url, "good": good.url}) as front,
    ):
        loop = asyncio.get_running_loop()
        front.rotation.observe(NodeId("good"), Vitals(True, True, timeouts=1))
        waiting = [asyncio.create_task(post(client, front)) for _ in range(20)]
        await eventually(lambda: len(bad.heads) > 0, within_s=2)
        began_s = loop.time()
        front.rotation.observe(NodeId("bad"), Vitals(answers=False, serves=False))
        for status, shown, _ in await asyncio.gather(*waiting):
            assert (status, shown["x-node"]) == (200, "good")
        assert loop.time() - began_s < 2


async def test_a_node_that_answers_500_is_ejected(client: aiohttp.ClientSession) -> None:
    async with (
        raw_node(answer("500 Internal Server Error")) as bad,
        raw_node(answer()) as good,
        gateway({"bad": bad.url, "good": good.url}) as front,
    ):
        statuses = [(await post(client, front))[0] for _ in range(100)]
        assert statuses.count(500) == FAILURES
        assert front.rotation.ejected(NodeId("bad")) == [M]
        assert front.rotation.default_candidates(M).nodes == ("good",)


async def test_a_body_that_is_on_its_way_is_not_sent_twice(client: aiohttp.ClientSession) -> None:
    async with raw_node(reset) as bad, gateway({"bad": bad.url, "gone": GONE}) as front:
        size = REPLAY_MAX_BYTES + 1
        status, _, _ = await post(client, front, data=bytes(size))
        assert status == 503


# --- limits -----------------------------------------------------------------------------------


async def test_too_large(client: aiohttp.ClientSession) -> None:
    async with (
        raw_node(answer()) as node,
        gateway({"a": node.url}, limits={"max_body_mb": 1}) as front,
    ):
        assert (await post(client, front, data=bytes(1_000_001)))[0] == 413

        async def pieces() -> AsyncIterator[bytes]:
            for _ in range(11):
                yield bytes(100_000)

        assert (await post(client, front, data=pieces()))[0] == 413
        assert (await post(client, front, data=bytes(1_000_000)))[0] == 200


async def test_a_client_that_goes_away_frees_its_place(client: aiohttp.ClientSession) -> None:
    route, behind = one_model("m", "1", ONE)
    behind[0].holding = asyncio.Event()
    async with running(serving((route, behind))) as (_, a), gateway({"a": a}) as front:
        task = asyncio.create_task(post(client, front))
        await eventually(lambda: behind[0].calls == 1, within_s=2)
        task.cancel()
        await eventually(lambda: behind[0].cancelled == 1, within_s=2)
        await eventually(lambda: front.rotation.upstreams[NodeId("a")].in_flight == 0, within_s=2)


# --- what is no inference ---------------------------------------------------------------------


async def get(client: aiohttp.ClientSession, front: Gateway, path: str) -> tuple[int, Any]:
    async with client.get(front.url + path) as got:
        return got.status, await got.json(content_type=None)


async def test_reading(client: aiohttp.ClientSession) -> None:
    async with two_nodes() as front:
        assert (await get(client, front, "/v2/models/m"))[1]["name"] == "m"
        assert (await get(client, front, "/v2/models/m/ready"))[0] == 200
        assert (await get(client, front, "/v2/models/m/versions/2/ready"))[0] == 200
        assert (await get(client, front, "/v1/models/m"))[0] == 200
        assert (await get(client, front, "/v1/models"))[1] == {"models": ["m"]}
        assert (await get(client, front, "/v2"))[1]["version"] == "1.2.3"
        for path in ("/livez", "/readyz", "/startupz", "/v2/health/live", "/v2/health/ready"):
            assert (await get(client, front, path))[0] == 200
        status, body = await get(client, front, "/v2/models/nobody")
        assert status == 404
        assert "nobody" in body["error"]
        assert (await get(client, front, "/v2/models/m/nothing"))[0] == 404
        assert (await get(client, front, "/nothing"))[0] == 404


async def test_head_and_options_and_other_methods(client: aiohttp.ClientSession) -> None:
    async with two_nodes() as front:
        async with client.head(front.url + "/v2/models/m") as got:
            assert got.status == 200
            assert int(got.headers["Content-Length"]) > 10
        async with client.options(front.url + INFER) as got:
            assert got.status == 204
        async with client.get(front.url + INFER) as got:
            assert got.status == 405
        async with client.delete(front.url + "/metrics") as got:
            assert got.status == 405
            assert "GET" in got.headers["Allow"]


async def test_the_repository_is_that_of_all_nodes(client: aiohttp.ClientSession) -> None:
    async with two_nodes() as front:
        async with client.post(f"{front.url}/v2/repository/index", data=b"{}") as got:
            listed = {(e["version"], e["state"]) for e in await got.json(content_type=None)}
        assert listed == {("1", "READY"), ("2", "READY")}
        async with client.post(f"{front.url}/v2/repository/models/m/load") as got:
            assert got.status == 400


async def test_admin(client: aiohttp.ClientSession) -> None:
    async with two_nodes() as front:
        _, routes = await get(client, front, "/admin/routes")
        assert routes["models"]["m"]["live"] == "1"
        assert routes["models"]["m"]["nodes"] == ["a", "b"]
        _, shown = await get(client, front, "/admin/explain?model=m&header=X-Model-Version:2")
        assert (shown["route"], shown["version"], shown["nodes"]) == ("pinned", "2", ["b"])
        _, nodes = await get(client, front, "/admin/nodes")
        assert [(n["id"], n["answers"], n["in_flight"]) for n in nodes["nodes"]] == [
            ("a", True, 0), ("b", True, 0),
        ]  # fmt: skip
        status, problem = await get(client, front, "/admin/explain")
        assert (status, problem["title"]) == (400, "Bad Request")


async def test_a_model_that_nobody_serves_yet(client: aiohttp.ClientSession) -> None:
    async with gateway({}) as front:
        status, shown, _ = await post(client, front)
        assert (status, shown["retry-after"]) == (503, "1")


async def test_it_speaks_to_many_at_once(client: aiohttp.ClientSession) -> None:
    async with two_nodes() as front:
        got = await asyncio.gather(*(post(client, front) for _ in range(300)))
        assert {status for status, _, _ in got} == {200}
