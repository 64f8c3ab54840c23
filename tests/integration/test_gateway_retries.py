"""How often a request is run again when several nodes fail at once."""

from __future__ import annotations

from contextlib import AsyncExitStack

import aiohttp
import pytest

from paddlewheel.embedded_etcd import free_ports
from tests.fleets import M
from tests.gateways import Script, answer, gateway, raw_node, reset

GOOD = answer()
FULL = answer("503 Service Unavailable", b'{"error": "full"}')


async def asked(*scripts: Script | None, **tuning: bool) -> tuple[int, list[int]]:
    """The status, and how often each node was asked. ``None``: nobody listens there."""
    async with AsyncExitStack() as stack:
        nodes = [
            None if script is None else await stack.enter_async_context(raw_node(script))
            for script in scripts
        ]
        gone = iter(free_ports(*[0 for node in nodes if node is None]))
        urls = {
            f"n{number}": f"http://127.0.0.1:{next(gone)}" if node is None else node.url
            for number, node in enumerate(nodes)
        }
        gw = await stack.enter_async_context(gateway(urls))
        for name, value in tuning.items():
            setattr(gw.rotation.tuning, name, value)
        session = await stack.enter_async_context(aiohttp.ClientSession())
        async with session.post(f"{gw.url}/v2/models/{M}/infer", json={}) as reply:
            await reply.read()
            return reply.status, [0 if node is None else len(node.heads) for node in nodes]


@pytest.mark.parametrize("dead", range(1, 6))
async def test_any_number_of_dead_nodes(dead: int) -> None:
    """A refused connection was seen by nobody."""
    for _ in range(4):  # in whatever order they are drawn
        status, counts = await asked(*[None] * dead, GOOD)
        assert (status, counts[-1]) == (200, 1)


async def test_two_take_it_and_die() -> None:
    for _ in range(6):
        status, counts = await asked(reset, reset, None, GOOD)
        assert (status, counts[-1]) == (200, 1)


async def test_what_ends_every_node_stops() -> None:
    status, counts = await asked(*[reset] * 6)
    assert (status, sum(counts)) == (503, 3)


async def test_an_answer_is_asked_for_once_more_only() -> None:
    status, counts = await asked(*[FULL] * 6)
    assert (status, sum(counts)) == (503, 2)


async def test_no_retries_where_none_are_wanted() -> None:
    status, counts = await asked(reset, reset, retries=False)
    assert (status, sum(counts)) == (503, 1)
