"""`paddlewheel up` as a user runs it: everything on one machine, kept running, ended whole."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp

from registry.store import Store, StoreError
from tests.eventually import eventually
from tests.node import SERVES_WITHIN_S, Command, http_get, store_of
from tests.processes import Kin
from tests.served import KEYS, MLP, Models, traffic


class Up(Command):
    """`up`; its nodes' ready lines are in its own."""

    @property
    def etcd(self) -> str:
        (address,) = self.ready["etcd"]
        return str(address)

    @property
    def urls(self) -> list[str]:
        return [line["http"] for line in self.ready["nodes"]]

    def child(self, name: str) -> Kin:
        (found,) = [kin for kin in self.kin() if kin.name == name]
        return found


@asynccontextmanager
async def up(folder: Path, *flags: str) -> AsyncGenerator[Up]:
    """Its temporary folders are made in ``folder/tmp``."""
    (folder / "tmp").mkdir(exist_ok=True)
    started = await Up.start(
        (
            "up", "--listen", "127.0.0.1:0", "--cache", str(folder / "cache"),
            "--lease-ttl", "2", "--drain", "10", *flags,
        ),
        folder,
        environment={"TMPDIR": str(folder / "tmp")},
    )  # fmt: skip
    try:
        yield started
    finally:
        await started.end()


async def until_live(url: str, version: str, *, within_s: float = SERVES_WITHIN_S) -> None:
    async def live() -> bool:
        with contextlib.suppress(aiohttp.ClientError):
            status, routes = await http_get(f"{url}/admin/routes")
            model = routes["models"].get(MLP)
            return status == 200 and model is not None and model["live"] == version
        return False

    await eventually(live, within_s=within_s, what=f"{url} serves version {version}")


async def until_registered(store: Store, count: int, *, within_s: float = 10) -> None:
    async def all_are() -> bool:
        return len((await store.list_prefix(KEYS.nodes_prefix)).kvs) == count

    await eventually(all_are, within_s=within_s, what=f"{count} nodes registered")


async def test_two_nodes_follow_a_folder_and_end_whole(tmp_path: Path) -> None:
    models = Models(tmp_path / "models")
    configs = tmp_path / "configs"
    configs.mkdir()
    (configs / "mlp.json").write_bytes(models.document("1"))
    flags = ("--ephemeral", "--nodes", "2", "--config-dir", str(configs))
    async with up(tmp_path, *flags) as started:
        assert started.ready["event"] == "ready"
        assert started.ready["pid"] == started.pid
        assert started.ready["gateway"] is None
        assert [line["node"] for line in started.ready["nodes"]] == ["node-1", "node-2"]
        assert len(set(started.urls)) == 2
        assert started.http == started.urls[0]
        for url in started.urls:
            await until_live(url, "1")
        assert list((tmp_path / "tmp").iterdir()), "the data of an ephemeral etcd"
        async with store_of([started.etcd]) as store, traffic(started.http, models):
            await until_registered(store, 2)
            (configs / "mlp.json").write_bytes(models.document("2"))
            for url in started.urls:
                await until_live(url, "2", within_s=15)
        kin = started.kin()
        assert sum(each.name == "pw-zygote" for each in kin) == 2
        assert await started.stop() == 0
        assert not any(each.is_alive for each in kin)
        assert not list((tmp_path / "tmp").iterdir())
        assert not list((tmp_path / "state").rglob("*.json"))


async def test_a_killed_etcd_comes_back_at_its_address_with_its_data(tmp_path: Path) -> None:
    models = Models(tmp_path / "models")
    async with up(tmp_path, "--ephemeral") as started, store_of([started.etcd]) as store:
        await models.put(store, "1")
        await until_live(started.http, "1")
        async with traffic(started.http, models):
            for live in ("2", "1"):
                killed = started.child("etcd")
                os.kill(killed.pid, signal.SIGKILL)
                await eventually(
                    lambda killed=killed: any(  # type: ignore[misc]
                        kin.name == "etcd" and kin != killed for kin in started.kin()
                    ),
                    within_s=10,
                    what="another etcd",
                )
                kv = await _patiently(store)
                assert kv is not None, "its data"
                await until_registered(store, 1)
                await models.put(store, live)
                await until_live(started.http, live, within_s=15)
        kin = started.kin()
        assert await started.stop() == 0
        assert not any(each.is_alive for each in kin)
        assert not list((tmp_path / "tmp").iterdir())


async def _patiently(store: Store) -> bytes | None:
    """The MLP's document, once etcd answers."""
    async with asyncio.timeout(20):
        while True:
            with contextlib.suppress(StoreError):
                kv = await store.get(KEYS.model(MLP))
                return None if kv is None else kv.value
            await asyncio.sleep(0.05)


async def test_a_killed_node_comes_back_at_its_address(tmp_path: Path) -> None:
    models = Models(tmp_path / "models")
    async with (
        up(tmp_path, "--ephemeral", "--nodes", "2") as started,
        store_of([started.etcd]) as store,
    ):
        await models.put(store, "1")
        for url in started.urls:
            await until_live(url, "1")
        async with traffic(started.http, models):  # on the first one; the second is killed
            os.kill(started.ready["nodes"][1]["pid"], signal.SIGKILL)
            await eventually(lambda: bool(started.events("node_restarted")), within_s=30)
            await until_live(started.urls[1], "1")
        assert [event["node"] for event in started.events("node_ended")] == ["node-2"]
        await until_registered(store, 2)
        kin = started.kin()
        os.killpg(started.pid, signal.SIGINT)  # as Ctrl-C in a terminal does
        assert await started.wait(15) == 0
        assert not any(each.is_alive for each in kin)


async def test_a_killed_up_takes_all_with_it(tmp_path: Path) -> None:
    """kill -9: the nodes drain and etcd ends; only the data folder cannot be swept."""
    models = Models(tmp_path / "models")
    async with up(tmp_path, "--ephemeral") as started:
        async with store_of([started.etcd]) as store:
            await models.put(store, "1")
            await until_live(started.http, "1")
        kin = started.kin()
        assert {each.name for each in kin} >= {"etcd", "pw-zygote", "pw-worker"}
        started.signal(signal.SIGKILL)
        await started.wait(5)
        await eventually(lambda: not any(each.is_alive for each in kin), within_s=15)


async def test_data_kept_by_default_is_there_again(tmp_path: Path) -> None:
    models = Models(tmp_path / "models")
    async with up(tmp_path) as first:
        async with store_of([first.etcd]) as store:
            await models.put(store, "2")
        await until_live(first.http, "2")
        assert await first.stop() == 0
    async with up(tmp_path) as again:
        await until_live(again.http, "2")
        async with traffic(again.http, models):
            pass
