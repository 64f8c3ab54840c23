"""What a gateway keeps of etcd's word, and when it uses it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from paddlewheel.gateway_memory import FILE, PATIENCE_S, REFUSED_RETRY_S, GatewayMemory, News
from registry.memory_store import MemoryCluster, MemoryStore
from registry.store import Batch, Listing, PermissionDenied, Put
from tests.eventually import eventually

PREFIX = "/paddlewheel/nodes/"
ETCD = ("127.0.0.1:2379", "127.0.0.1:2381")


class Etcd(MemoryStore):
    """Answers nothing while it is away; refuses watches while it is told to."""

    def __init__(self, cluster: MemoryCluster) -> None:
        super().__init__(cluster)
        self.cluster = cluster
        self.there = asyncio.Event()
        self.there.set()
        self.refusals = 0

    async def list_prefix(self, prefix: str) -> Listing:
        await self.there.wait()
        return await super().list_prefix(prefix)

    async def watch_prefix(
        self, prefix: str, *, known: Listing | None = None
    ) -> AsyncIterator[Batch]:
        await self.there.wait()
        if self.refusals:
            self.refusals -= 1
            raise PermissionDenied("watch: permission denied")
        async for batch in super().watch_prefix(prefix, known=known):
            yield batch


def memory(
    store: MemoryStore,
    folder: Path | None,
    prefix: str = "/paddlewheel",
    etcd: Sequence[str] = ETCD,
) -> GatewayMemory:
    return GatewayMemory(store, folder, prefix=prefix, endpoints=etcd)


async def remember(store: Etcd, folder: Path) -> None:
    """One gateway's life: it hears what there is now, and keeps it."""
    first = memory(store, folder)
    await first.restore()
    saving = asyncio.create_task(first.run())
    await anext(first.follow(PREFIX))
    await eventually((folder / FILE).exists, within_s=5)
    saving.cancel()


def keys(news: News) -> list[str]:
    return [
        event.kv.key if isinstance(event, Put) else f"-{event.key}" for event in news.batch.events
    ]


@pytest.fixture
async def store() -> Etcd:
    return Etcd(MemoryCluster())


@pytest.mark.looptime
async def test_etcd_is_away_at_the_start(store: Etcd, tmp_path: Path) -> None:
    await store.put(f"{PREFIX}a", b"\xff one")
    await store.put(f"{PREFIX}b", b"two")
    await remember(store, tmp_path)
    store.there.clear()
    again = memory(store, tmp_path)
    await again.restore()
    began_s = asyncio.get_running_loop().time()
    following = again.follow(PREFIX)
    first = await anext(following)
    assert asyncio.get_running_loop().time() - began_s == pytest.approx(PATIENCE_S)
    assert keys(first) == [f"{PREFIX}a", f"{PREFIX}b"]
    assert first.whole is not None
    assert first.whole.kvs[0].value == b"\xff one"

    await store.delete(f"{PREFIX}a")  # while nobody of us listened
    await store.put(f"{PREFIX}c", b"three")
    store.there.set()
    heard = [await anext(following), await anext(following)]
    assert [keys(news) for news in heard] == [[f"-{PREFIX}a"], [f"{PREFIX}c"]]


@pytest.mark.looptime
async def test_etcd_forgot_what_happened_meanwhile(store: Etcd, tmp_path: Path) -> None:
    await store.put(f"{PREFIX}a", b"one")
    await remember(store, tmp_path)
    store.there.clear()
    again = memory(store, tmp_path)
    await again.restore()
    following = again.follow(PREFIX)
    await anext(following)
    await store.delete(f"{PREFIX}a")
    await store.put(f"{PREFIX}b", b"two")
    store.cluster.compact(store.cluster.revision)
    store.there.set()
    (news,) = [await anext(following)]
    assert keys(news) == [f"-{PREFIX}a", f"{PREFIX}b"]


@pytest.mark.looptime
async def test_what_etcd_says_counts_more_than_the_disk(store: Etcd, tmp_path: Path) -> None:
    await store.put(f"{PREFIX}a", b"old")
    await remember(store, tmp_path)
    await store.delete(f"{PREFIX}a")
    await store.put(f"{PREFIX}b", b"new")
    again = memory(store, tmp_path)
    await again.restore()
    assert keys(await anext(again.follow(PREFIX))) == [f"{PREFIX}b"]


@pytest.mark.looptime
async def test_a_store_that_refuses_is_asked_again(store: Etcd, tmp_path: Path) -> None:
    """A password in the middle of its rotation must not end a gateway."""
    await store.put(f"{PREFIX}a", b"one")
    following = memory(store, None).follow(PREFIX)
    store.refusals = 2
    await anext(following)
    await store.put(f"{PREFIX}b", b"two")
    began_s = asyncio.get_running_loop().time()
    assert keys(await anext(following)) == [f"{PREFIX}b"]
    assert asyncio.get_running_loop().time() - began_s == pytest.approx(2 * REFUSED_RETRY_S)


@pytest.mark.parametrize(
    ("what", "told"),
    [
        ("another prefix", {"prefix": "/elsewhere"}),
        ("another etcd", {"etcd": ("10.0.0.1:2379",)}),
    ],
)
@pytest.mark.looptime
async def test_another_fleets_file(
    what: str, told: dict[str, Any], store: Etcd, tmp_path: Path
) -> None:
    await store.put(f"{PREFIX}a", b"one")
    await remember(store, tmp_path)
    store.there.clear()
    again = memory(store, tmp_path, **told)
    await again.restore()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(10 * PATIENCE_S):
            await anext(again.follow(PREFIX))


@pytest.mark.looptime
async def test_one_member_of_the_same_etcd_is_enough(store: Etcd, tmp_path: Path) -> None:
    await store.put(f"{PREFIX}a", b"one")
    await remember(store, tmp_path)
    store.there.clear()
    again = memory(store, tmp_path, etcd=(ETCD[1], "127.0.0.1:9999"))
    await again.restore()
    assert keys(await anext(again.follow(PREFIX))) == [f"{PREFIX}a"]


@pytest.mark.parametrize("damage", ["cut", "empty", "foreign", "flipped", "folder"])
@pytest.mark.looptime
async def test_a_file_that_cannot_be_trusted(damage: str, store: Etcd, tmp_path: Path) -> None:
    await store.put(f"{PREFIX}a", b"one")
    await remember(store, tmp_path)
    path = tmp_path / FILE
    whole = path.read_bytes()
    match damage:
        case "cut":
            path.write_bytes(whole[:-3])
        case "empty":
            path.write_bytes(b"")
        case "foreign":
            path.write_bytes(b"{}")
        case "flipped":
            path.write_bytes(whole[:-5] + b"#" + whole[-4:])
        case _:
            path.unlink()
            path.mkdir()
    again = memory(store, tmp_path)
    await again.restore()
    assert keys(await anext(again.follow(PREFIX))) == [f"{PREFIX}a"]


@pytest.mark.looptime
async def test_a_disk_that_takes_nothing(store: Etcd, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    kept = memory(store, tmp_path / "file")
    saving = asyncio.create_task(kept.run())
    following = kept.follow(PREFIX)
    await anext(following)
    await store.put(f"{PREFIX}a", b"one")
    await asyncio.sleep(5)  # of virtual time
    assert keys(await anext(following)) == [f"{PREFIX}a"]
    assert not saving.done()
    saving.cancel()
