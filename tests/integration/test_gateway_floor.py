"""The floor on the wire: what a gateway asks of nodes, and what it makes of their answers."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import aiohttp
import pytest

from registry.names import Revision
from router.serving import Serving
from router.table import Route
from tests.eventually import eventually
from tests.fleets import M
from tests.gateways import RawNode, Script, answer, gateway, raw_node
from tests.integration.test_http_support import ONE, NumpyPredictor, running, servable, serving

BARRIER: Mapping[str, Any] = {"strategy": "barrier"}
OLD: Mapping[str, Any] = {"X_Config_Revision": "9"}
NEW: Mapping[str, Any] = {"X_Config_Revision": "10"}


def behind_or(script: Script) -> Script:
    """503 for who asks for revision 10, as a node that has not got so far; else ``script``."""
    refusal = answer("503 Service Unavailable", b'{"error": "behind"}', **OLD)

    async def choose(head: bytes, reader: Any, writer: Any) -> None:
        asked = b"X-Min-Config-Revision: 10" in head
        await (refusal if asked else script)(head, reader, writer)

    return choose


async def ask(url: str, path: str = f"/v2/models/{M}/infer", **headers: str) -> tuple[int, str]:
    async with (
        aiohttp.ClientSession() as session,
        session.post(f"{url}{path}", data=b"{}", headers=headers) as reply,
    ):
        return reply.status, reply.headers.get("X-Config-Revision", "")


def floors(node: RawNode) -> list[bytes]:
    """What each request that came asked for."""
    name = b"x-min-config-revision"
    asked = list[bytes]()
    for head in node.heads:
        lines = (line.partition(b":") for line in head.split(b"\r\n"))
        named = {key.lower(): value.strip() for key, _, value in lines}
        asked.append(named.get(name, b""))
    return asked


async def test_after_the_first_new_answer_nothing_older_is_asked_for() -> None:
    async with (
        raw_node(answer(**NEW)) as node,
        gateway({"a": node.url}, rollout=BARRIER) as front,
    ):
        for _ in range(3):
            assert await ask(front.url) == (200, "10")
        assert floors(node) == [b"", b"10", b"10"]


async def test_a_document_that_only_its_node_has_heard_of() -> None:
    async with (
        raw_node(answer(X_Config_Revision="12", X_Config_Rollout="barrier")) as node,
        gateway({"a": node.url}) as front,
    ):
        assert await ask(front.url) == (200, "12")
        assert await ask(front.url) == (200, "12")
        assert floors(node) == [b"", b"12"]


async def test_a_clients_own_floor_is_not_passed_on() -> None:
    async with (
        raw_node(answer(**NEW)) as node,
        gateway({"a": node.url}) as front,
    ):
        await ask(front.url, **{"x-min-config-REVISION": "99999"})
        assert floors(node) == [b""]


@pytest.mark.parametrize(
    ("path", "headers"),
    [
        (f"/v2/models/{M}/versions/1/infer", {}),
        (f"/v2/models/{M}/infer", {"X-Model-Version": "1"}),
        (f"/v1/models/{M}/labels/stable:predict", {}),
        (f"/v2/models/{M}/ready", {}),
    ],
)
async def test_what_pins_a_version_or_is_no_inference_has_none(
    path: str, headers: Mapping[str, str]
) -> None:
    async with (
        raw_node(answer(**NEW)) as node,
        gateway({"a": node.url}, rollout=BARRIER) as front,
    ):
        await ask(front.url)
        await ask(front.url, path, **headers)
        assert floors(node) == [b"", b""]


async def test_a_node_under_the_floor_is_replaced_by_another_and_left_out() -> None:
    async with (
        raw_node(behind_or(answer(**OLD))) as late,
        raw_node(answer(**NEW)) as other,
        gateway({"late": late.url, "other": other.url}, rollout=BARRIER) as front,
    ):
        seen = list[str]()
        for _ in range(20):
            status, revision = await ask(front.url)
            assert status == 200
            seen.append(revision)
        assert seen == sorted(seen, key=int), "new, then old"
        assert floors(late).count(b"10") == 1, "asked again, though it had said no"


async def test_where_nobody_reaches_it_the_client_gets_an_answer_all_the_same() -> None:
    async with (
        raw_node(answer(**NEW)) as node,
        gateway({"a": node.url}, rollout=BARRIER) as front,
    ):
        assert await ask(front.url) == (200, "10")
        node.script = behind_or(answer(**OLD))
        assert await ask(front.url) == (200, "9")
        async with (
            aiohttp.ClientSession() as session,
            session.get(f"{front.url}/admin/routes") as reply,
        ):
            route = (await reply.json())["models"][M]
        assert (route["panic"], route["floor"]) == (True, 0)


# --- the node's side ----------------------------------------------------------------------------


def at_revision(revision: int, *, is_barrier: bool = False) -> Serving:
    predictor = NumpyPredictor(servable("one", "1"), ONE, 1.0)
    pinned = {predictor.id.version: predictor.id}
    route = Route(
        predictor.id.model,
        live=predictor.id,
        revision=Revision(revision),
        is_barrier=is_barrier,
        pinned=pinned,
    )
    return serving((route, (predictor,)))


async def infer(url: str, path: str = "/v2/models/one/infer", **headers: str) -> tuple[int, Any]:
    tensor = {"name": "x", "shape": [1, 3], "datatype": "FP32", "data": [1, 2, 3]}
    shown = {name.replace("_", "-"): value for name, value in headers.items()}
    async with (
        aiohttp.ClientSession() as session,
        session.post(f"{url}{path}", json={"inputs": [tensor]}, headers=shown) as reply,
    ):
        return reply.status, reply.headers


async def test_a_node_makes_a_request_wait_for_its_document() -> None:
    async with running(at_revision(10)) as (app, url):
        assert (await infer(url, X_Min_Config_Revision="10"))[0] == 200
        waiting = asyncio.create_task(infer(url, X_Min_Config_Revision="11"))
        await eventually(lambda: app.floors.waiting == 1, within_s=2)
        app.publish(at_revision(11, is_barrier=True))
        status, headers = await waiting
        assert (status, headers["X-Config-Revision"]) == (200, "11")
        assert headers["X-Config-Rollout"] == "barrier"
        app.publish(at_revision(12))
        assert "X-Config-Rollout" not in (await infer(url))[1]


async def test_a_node_that_does_not_get_so_far_says_so() -> None:
    async with running(at_revision(10)) as (app, url):
        within = {"X_Request_Timeout_Ms": "60"}
        status, headers = await infer(url, X_Min_Config_Revision="11", **within)
        assert (status, headers["X-Config-Revision"], headers["Retry-After"]) == (503, "10", "1")
        # Who names a version, or something that is not here, waits for nothing.
        pinned = "/v2/models/one/versions/1/infer"
        assert (await infer(url, pinned, X_Min_Config_Revision="99"))[0] == 200
        unknown = "/v2/models/two/infer"
        assert (await infer(url, unknown, X_Min_Config_Revision="99"))[0] == 404
        for nonsense in ("x", "-1", "1" * 40):
            assert (await infer(url, X_Min_Config_Revision=nonsense))[0] == 400
        assert app.floors.waiting == 0
