"""How a node ends, and what is left when one of its processes is killed: nothing, and no scar."""

from __future__ import annotations

import asyncio
import io
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import pytest

from paddlewheel.bench.checks import infer_body, read_outputs
from paddlewheel.models import make_resnet50
from registry.etcd import EtcdStore
from registry.names import ModelName
from tests.etcd import EtcdCluster, etcd_cluster
from tests.eventually import eventually
from tests.node import (
    OUTPUT,
    Models,
    Node,
    holders,
    http_get,
    memfds,
    node,
    registration,
    store_of,
    traffic,
    until_applied,
    until_registered,
)

DRAIN_S = 20
SLOW_ROWS = 4096
PATIENT = {"limits": {"timeout_s": 15, "hang_s": 10, "queue": 4000}}
"""Paddle's import from a cold disk is longer than the default limits."""


@pytest.fixture(scope="module")
def cluster() -> Iterator[EtcdCluster]:
    with etcd_cluster() as cluster:
        yield cluster


@pytest.fixture
async def store(cluster: EtcdCluster) -> AsyncIterator[EtcdStore]:
    async with store_of(cluster.endpoints) as store:
        yield store
        cluster.members[0].thaw()
        await asyncio.to_thread(cluster.wait_healthy)
        await store.delete_prefix("")


@pytest.fixture
def models(tmp_path: Path) -> Models:
    return Models(tmp_path / "models", spec=PATIENT)


@pytest.fixture
def slow(tmp_path: Path) -> Models:
    """`SLOW_ROWS` rows take it about a second."""
    sizes = {"hidden": 1024, "layers": 6}
    return Models(
        tmp_path / "models", ("3",), ModelName("slow"), spec=PATIENT, sizes=sizes
    )  # fmt: skip


# --- one of its processes is killed -----------------------------------------------------------


async def test_a_killed_worker_costs_no_request(
    cluster: EtcdCluster, store: EtcdStore, models: Models, tmp_path: Path
) -> None:
    """Alone first, then with the version before as standby."""
    async with node(cluster.endpoints, tmp_path) as started:
        await until_applied(store, await models.put(store, "1"))
        async with traffic(started, models, gap_max_s=10):
            await _kill_worker_of(started, "1")
            revision = await models.put(store, "2")
            await until_applied(store, revision)
            await _kill_worker_of(started, "2")
        status = await until_applied(store, revision)
        assert (status.live, status.standby) == ("2", "1")
        assert started.events("servable_fault")


async def test_a_killed_zygote_costs_no_request(
    cluster: EtcdCluster, store: EtcdStore, models: Models, tmp_path: Path
) -> None:
    """All workers die with it. That is nobody's fault, and new ones take up the requests."""
    async with node(cluster.endpoints, tmp_path) as started:
        await until_applied(store, await models.put(store, "1"))
        (zygote,) = started.named("pw-zygote")
        workers = started.named("pw-worker")
        assert workers
        async with traffic(started, models, gap_max_s=12, rate_per_s=50):
            os.kill(zygote.pid, signal.SIGKILL)
            await _until(lambda: not any(kin.is_alive for kin in (zygote, *workers)), within_s=3)
            await _until(lambda: bool(started.named("pw-worker")), within_s=30)
            # Another load works as before.
            revision = await models.put(store, "2")
            status = await until_applied(store, revision)
        assert status.live == "2"
        assert not started.events("servable_fault")
        assert len(started.named("pw-zygote")) == 1


async def test_a_killed_front_leaves_nothing_and_serves_again(
    cluster: EtcdCluster, store: EtcdStore, models: Models, tmp_path: Path
) -> None:
    named = set(os.listdir("/dev/shm"))
    async with node(cluster.endpoints, tmp_path) as first:
        revision = await models.put(store, "1")
        await until_applied(store, revision)
        async with traffic(first, models):
            pass  # its arenas have been used
        await _start_loading(store, first, tmp_path)
        arenas, kin = memfds(first.pid), first.kin()
        assert arenas
        assert {each.name for each in kin} >= {"pw-zygote", "pw-worker"}
        assert set(holders(arenas)) >= {first.pid}
        first.signal(signal.SIGKILL)
        assert await first.wait(5) == -signal.SIGKILL
        await _until(lambda: not any(each.is_alive for each in kin), within_s=5)
        await _until(lambda: not holders(arenas), within_s=2)
        assert not [name for name in set(os.listdir("/dev/shm")) - named if "paddle" in name]
        address = first.http.removeprefix("http://")
        await store.delete("/paddlewheel/configs/models/resnet")
    async with node(cluster.endpoints, tmp_path, listen=address) as again:
        assert again.http == first.http
        # The status that the first left behind says so too until its lease ends.
        await until_registered(store, again, within_s=10)
        assert (await until_applied(store, revision)).live == "1"
        async with traffic(again, models):
            pass


# --- it is told to end ------------------------------------------------------------------------


async def test_sigterm_loses_nothing_that_was_sent_while_it_listened(
    cluster: EtcdCluster, store: EtcdStore, models: Models, slow: Models, tmp_path: Path
) -> None:
    flags = ("--drain", str(DRAIN_S), "--drain-delay", "2")
    async with node(cluster.endpoints, tmp_path, *flags, lease_ttl_s=30) as started:
        await until_applied(store, await models.put(store, "1"))
        await until_applied(store, await slow.put(store, "3"), model=slow.name)
        await until_registered(store, started, within_s=5)
        async with traffic(started, models, gap_max_s=8) as steady:
            async with _slow_requests(started, slow, 3) as answers:
                kin = started.kin()
                started.signal(signal.SIGTERM)
                sent_s = _now_s()

                async def unready() -> bool:
                    return (await started.get("/readyz"))[0] == 503

                await _until(unready, within_s=1)
                assert (await started.get("/livez"))[0] == 200
                await _until(_keys_are_gone(store), within_s=1.5)
                # Only now a balancer has noticed; all that it sent until then is answered.
                await steady.stop()
                assert _now_s() - sent_s < 2, "too slow to say anything about the delay"
            assert all(answered_s > sent_s for answered_s in answers)
        assert await started.wait(DRAIN_S) == 0
        assert _now_s() - sent_s < DRAIN_S
        assert not any(each.is_alive for each in kin)


async def test_sigterm_again_changes_nothing(
    cluster: EtcdCluster, store: EtcdStore, slow: Models, tmp_path: Path
) -> None:
    async with node(cluster.endpoints, tmp_path, "--drain", str(DRAIN_S)) as started:
        await until_applied(store, await slow.put(store, "3"), model=slow.name)
        async with _slow_requests(started, slow, 3):
            kin = started.kin()
            started.signal(signal.SIGTERM)
            await _until(_is_refusing(started), within_s=3)
            started.signal(signal.SIGTERM)
            started.signal(signal.SIGINT)
        assert await started.wait(DRAIN_S) == 0
        assert not any(each.is_alive for each in kin)


async def test_the_drain_has_an_end(
    cluster: EtcdCluster, store: EtcdStore, slow: Models, tmp_path: Path
) -> None:
    """Requests that would take longer are cut off, and the node still ends well."""
    async with node(cluster.endpoints, tmp_path, "--drain", "1") as started:
        await until_applied(store, await slow.put(store, "3"), model=slow.name)
        sent_s = 0.0
        with pytest.raises(aiohttp.ClientError):
            async with _slow_requests(started, slow, 12):
                kin = started.kin()
                started.signal(signal.SIGTERM)
                sent_s = _now_s()
        assert await started.wait(10) == 0
        assert _now_s() - sent_s < 1 + 4
        await _until(lambda: not any(each.is_alive for each in kin), within_s=1)


async def test_ctrl_c_in_a_terminal_drains_like_sigterm(
    cluster: EtcdCluster, store: EtcdStore, slow: Models, tmp_path: Path
) -> None:
    """The terminal sends it to the whole process group."""
    async with node(cluster.endpoints, tmp_path, "--drain", str(DRAIN_S)) as started:
        await until_applied(store, await slow.put(store, "3"), model=slow.name)
        async with _slow_requests(started, slow, 2):
            kin = started.kin()
            os.killpg(started.pid, signal.SIGINT)
            os.killpg(started.pid, signal.SIGINT)
        assert await started.wait(DRAIN_S) == 0
        assert not any(each.is_alive for each in kin)
        assert "Traceback" not in started.log_path.read_text()


async def test_sigterm_during_a_load_ends_the_load(
    cluster: EtcdCluster, store: EtcdStore, tmp_path: Path
) -> None:
    async with node(cluster.endpoints, tmp_path, "--drain", str(DRAIN_S)) as started:
        await _start_loading(store, started, tmp_path)
        kin, arenas = started.kin(), memfds(started.pid)
        assert {each.name for each in kin} >= {"pw-zygote", "pw-worker"}
        started.signal(signal.SIGTERM)
        assert await started.wait(5) == 0
        assert not any(each.is_alive for each in kin)
        assert not holders(arenas)
        assert not started.events("servable_ready")


async def test_sigterm_while_paddle_is_still_imported(
    cluster: EtcdCluster, store: EtcdStore, tmp_path: Path
) -> None:
    async with node(cluster.endpoints, tmp_path) as started:
        await _until(lambda: bool(started.kin()), within_s=10)
        kin = started.kin()
        started.signal(signal.SIGTERM)
        assert await started.wait(5) == 0
        assert not any(each.is_alive for each in kin)


async def test_sigterm_while_etcd_is_frozen(
    cluster: EtcdCluster, store: EtcdStore, models: Models, tmp_path: Path
) -> None:
    """The lease is left to expire; nothing else waits for etcd."""
    async with node(cluster.endpoints, tmp_path, "--drain", "8") as started:
        await until_applied(store, await models.put(store, "1"))
        kin = started.kin()
        cluster.members[0].freeze()
        async with traffic(started, models) as steady:
            await steady.stop()
        started.signal(signal.SIGTERM)
        assert await started.wait(8) == 0
        assert not any(each.is_alive for each in kin)
        assert started.events("lease_left_to_expire") or started.events("lease_lost")
        cluster.members[0].thaw()
        await asyncio.to_thread(cluster.wait_healthy)
        await _until(_keys_are_gone(store), within_s=10)


# --- helpers ----------------------------------------------------------------------------------


async def _until(holds: Callable[[], bool | Awaitable[bool]], *, within_s: float) -> None:
    await eventually(holds, within_s=within_s)


def _now_s() -> float:
    return asyncio.get_running_loop().time()


def _keys_are_gone(store: EtcdStore) -> Callable[[], Awaitable[bool]]:
    async def gone() -> bool:
        return await registration(store) == (None, None)

    return gone


def _is_refusing(started: Node) -> Callable[[], Awaitable[bool]]:
    """Whether it has stopped to accept."""

    async def refuses() -> bool:
        try:
            await http_get(f"{started.http}/livez")
        except aiohttp.ClientError:
            return True
        return False

    return refuses


async def _servables(started: Node) -> list[dict[str, Any]]:
    _, answer = await started.get("/admin/servables")
    return list(answer["servables"])


async def _kill_worker_of(started: Node, version: str) -> None:
    """kill -9, and wait for its replacement."""

    async def worker() -> dict[str, Any]:
        servables = await _servables(started)
        (found,) = [s for s in servables if s["version"] == version]
        return dict(found["workers"][0])

    before = await worker()
    os.kill(before["pid"], signal.SIGKILL)

    async def replaced() -> bool:
        now = await worker()
        return now["alive"] and now["pid"] not in (0, before["pid"])

    await _until(replaced, within_s=30)


async def _start_loading(store: EtcdStore, started: Node, folder: Path) -> None:
    """Have a ResNet50 loading, which takes seconds."""
    resnet = Models(folder / "models", (), ModelName("resnet"))
    resnet.versions = ("9",)
    await asyncio.to_thread(make_resnet50, resnet.source("9"))
    await resnet.put(store, "9")

    async def loading() -> bool:
        return any(
            s["model"] == "resnet" and s["state"] == "LOADING" for s in await _servables(started)
        ) and bool(started.named("pw-worker"))

    await _until(loading, within_s=40)


class _slow_requests:  # noqa: N801 used as a function
    """``count`` slow requests under way in the block; all answered well when it is left.

    Gives the times of the answers (loop time), filled as they come.
    """

    def __init__(self, started: Node, slow: Models, count: int) -> None:
        self._url = f"{started.http}/v2/models/{slow.name}/infer"
        self._started = started
        self._count = count
        self._answered: list[float] = []
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> list[float]:
        x = np.ones((SLOW_ROWS, 64), np.float32)
        headers, body = infer_body({"x": x}, binary=True)
        self._tasks = [asyncio.create_task(self._ask(headers, body)) for _ in range(self._count)]

        async def under_way() -> bool:
            async with aiohttp.ClientSession() as session:
                async with session.get(f"{self._started.http}/metrics") as answer:
                    text = await answer.text()
            shown = [line for line in text.splitlines() if "in_flight{" in line and '"slow"' in line]
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
        async with (
            aiohttp.ClientSession() as session,
            session.post(self._url, data=io.BytesIO(body), headers=headers) as answer,
        ):
            content = await answer.read()
            assert answer.status == 200, content[:300]
        lower = {name.lower(): value for name, value in answer.headers.items()}
        outputs = read_outputs(lower, content)
        assert (outputs[OUTPUT][:, -1] == 3.0).all()
        self._answered.append(_now_s())
