"""How a node ends, and what is left when one of its processes is killed: nothing, and no scar."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from paddlewheel.models import make_resnet50
from registry.etcd import EtcdStore
from registry.names import ModelName
from tests.etcd import EtcdCluster, etcd_cluster
from tests.eventually import eventually
from tests.node import (
    Node,
    http_get,
    node,
    registration,
    store_of,
    until_applied,
    until_registered,
)
from tests.processes import holders, memfds
from tests.served import KEYS, Models, SlowRequests, traffic

DRAIN_S = 20
CLOSING_S = 8
"""After a drain that ran out: a run under way has 5 s before its worker is killed."""
RESNET = ModelName("resnet")
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
    return Models(
        tmp_path / "models", ("3",), ModelName("slow"), spec=PATIENT, hidden=1024, layers=6
    )


# --- one of its processes is killed -----------------------------------------------------------


async def test_a_killed_worker_costs_no_request(
    cluster: EtcdCluster, store: EtcdStore, models: Models, tmp_path: Path
) -> None:
    """Alone first, then with the version before as standby."""
    async with node(cluster.endpoints, tmp_path) as started:
        await until_applied(store, await models.put(store, "1"))
        async with traffic(started.http, models, gap_max_s=10):
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
    """Its workers serve on; what is loaded or replaced later comes from a new one."""
    async with node(cluster.endpoints, tmp_path) as started:
        await until_applied(store, await models.put(store, "1"))
        (zygote,) = started.named("pw-zygote")
        (worker,) = started.named("pw-worker")
        async with traffic(started.http, models, gap_max_s=1, rate_per_s=50):
            os.kill(zygote.pid, signal.SIGKILL)
            await _until(lambda: not zygote.is_alive, within_s=3)
            revision = await models.put(store, "2")
            status = await until_applied(store, revision)
            assert status.live == "2"
            assert worker.is_alive
        assert not started.events("servable_fault")
        assert len(started.named("pw-zygote")) == 1
        assert len(started.named("pw-worker")) == 2


@pytest.mark.parametrize("gone", ["the whole cache", "a model's params"])
async def test_files_that_somebody_took_out_of_the_cache_are_fetched_again(
    cluster: EtcdCluster, store: EtcdStore, models: Models, tmp_path: Path, gone: str
) -> None:
    """For a worker's replacement, which Paddle would make without its params, and for a load."""
    async with node(cluster.endpoints, tmp_path) as started:
        await until_applied(store, await models.put(store, "1"))
        (worker,) = started.named("pw-worker")
        async with traffic(started.http, models, gap_max_s=10, rate_per_s=50):
            if gone == "the whole cache":
                shutil.rmtree(tmp_path / "cache")
            else:
                (params,) = (tmp_path / "cache" / "models").glob("*/*.pdiparams")
                params.unlink()
            os.kill(worker.pid, signal.SIGKILL)
            await until_applied(store, await models.put(store, "2"))
        assert len(started.named("pw-worker")) == 2


async def test_a_killed_front_leaves_nothing_and_serves_again(
    cluster: EtcdCluster, store: EtcdStore, models: Models, tmp_path: Path
) -> None:
    named = _named_memory()
    async with node(cluster.endpoints, tmp_path) as first:
        revision = await models.put(store, "1")
        await until_applied(store, revision)
        async with traffic(first.http, models):
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
        assert _named_memory() <= named
        address = first.http.removeprefix("http://")
        await store.delete(KEYS.model(RESNET))
    async with node(cluster.endpoints, tmp_path, listen=address) as again:
        assert again.http == first.http
        # The status that the first left behind says so too until its lease ends.
        await until_registered(store, again, within_s=10)
        assert (await until_applied(store, revision)).live == "1"
        async with traffic(again.http, models):
            pass


# --- it is told to end ------------------------------------------------------------------------


async def test_sigterm_loses_nothing_that_was_sent_while_it_listened(
    cluster: EtcdCluster, store: EtcdStore, models: Models, slow: Models, tmp_path: Path
) -> None:
    flags = ("--drain", str(DRAIN_S), "--drain-delay", "4")
    async with node(cluster.endpoints, tmp_path, *flags, lease_ttl_s=30) as started:
        await until_applied(store, await models.put(store, "1"))
        await until_applied(store, await slow.put(store, "3"), model=slow.name)
        await until_registered(store, started, within_s=5)
        async with traffic(started.http, models, gap_max_s=8) as steady:
            async with SlowRequests(started.http, slow, 3, rows=SLOW_ROWS) as answers:
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
                assert _now_s() - sent_s < 4, "too slow to say anything about the delay"
            assert all(answered_s > sent_s for answered_s in answers)
        assert await started.wait(DRAIN_S) == 0
        assert _now_s() - sent_s < DRAIN_S
        assert not any(each.is_alive for each in kin)


async def test_sigterm_again_changes_nothing(
    cluster: EtcdCluster, store: EtcdStore, slow: Models, tmp_path: Path
) -> None:
    async with node(cluster.endpoints, tmp_path, "--drain", str(DRAIN_S)) as started:
        await until_applied(store, await slow.put(store, "3"), model=slow.name)
        async with SlowRequests(started.http, slow, 3, rows=SLOW_ROWS):
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
        requests = SlowRequests(started.http, slow, 6, rows=4 * SLOW_ROWS)
        await requests.__aenter__()
        kin = started.kin()
        started.signal(signal.SIGTERM)
        sent_s = _now_s()
        assert await started.wait(10) == 0
        assert _now_s() - sent_s < 1 + CLOSING_S
        with pytest.raises(aiohttp.ClientError):
            await requests.__aexit__(None)
        await _until(lambda: not any(each.is_alive for each in kin), within_s=1)


async def test_ctrl_c_in_a_terminal_drains_like_sigterm(
    cluster: EtcdCluster, store: EtcdStore, slow: Models, tmp_path: Path
) -> None:
    """The terminal sends it to the whole process group."""
    async with node(cluster.endpoints, tmp_path, "--drain", str(DRAIN_S)) as started:
        await until_applied(store, await slow.put(store, "3"), model=slow.name)
        async with SlowRequests(started.http, slow, 2, rows=SLOW_ROWS):
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
    async with node(cluster.endpoints, tmp_path, "--drain", "6", lease_ttl_s=8) as started:
        await until_applied(store, await models.put(store, "1"))
        kin = started.kin()
        cluster.members[0].freeze()
        async with traffic(started.http, models) as steady:
            await steady.stop()
        started.signal(signal.SIGTERM)
        assert await started.wait(6) == 0
        assert not any(each.is_alive for each in kin)
        assert started.events("lease_left_to_expire")
        cluster.members[0].thaw()
        await asyncio.to_thread(cluster.wait_healthy)
        await _until(_keys_are_gone(store), within_s=8 + 4)


# --- helpers ----------------------------------------------------------------------------------


async def _until(holds: Callable[[], bool | Awaitable[bool]], *, within_s: float) -> None:
    await eventually(holds, within_s=within_s)


def _now_s() -> float:
    return asyncio.get_running_loop().time()


def _named_memory() -> set[str]:
    """Segments that look like ours or Paddle's; others run on this machine too."""
    return {
        entry.name
        for entry in Path("/dev/shm").iterdir()
        if "paddle" in entry.name or entry.name.startswith("pw-")
    }


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
    resnet = Models(folder / "models", (), RESNET)
    resnet.versions = ("9",)
    await asyncio.to_thread(make_resnet50, resnet.source("9"))
    await resnet.put(store, "9")

    async def loading() -> bool:
        return any(
            s["model"] == RESNET and s["state"] == "LOADING" for s in await _servables(started)
        ) and bool(started.named("pw-worker"))

    await _until(loading, within_s=40)
