"""Streams are cut, silenced, compacted away and rewound between us and one healthy member."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass

import pytest

from registry.etcd import EtcdSettings, EtcdStore
from registry.store import Ambiguous, Batch, PutOp, Unavailable
from tests.etcd import EtcdCluster, etcd_cluster
from tests.eventually import eventually
from tests.fault.etcd_history import PREFIX, end_writing, history
from tests.integration.store_contract import until_seen, watching, words
from tests.tcp_proxy import TcpProxy, tcp_proxy


@pytest.fixture(scope="module")
def cluster() -> Iterator[EtcdCluster]:
    with etcd_cluster(1) as cluster:
        yield cluster


@dataclass
class Path:
    """The way under test, through a proxy, and a straight one beside it."""

    proxy: TcpProxy
    store: EtcdStore
    straight: EtcdStore


@pytest.fixture
async def path(cluster: EtcdCluster) -> AsyncIterator[Path]:
    async with tcp_proxy(cluster.members[0].client_port) as proxy:
        straight = EtcdStore.connect(cluster.settings())
        endpoint = f"127.0.0.1:{proxy.port}"
        store = EtcdStore.connect(cluster.settings(endpoints=(endpoint,), timeout_s=1.5))
        try:
            yield Path(proxy, store, straight)
            await straight.delete_prefix("")
        finally:
            await store.close()
            await straight.close()


async def test_every_connection_is_cut_every_tenth_of_a_second(path: Path) -> None:
    async with history(path.straight, path.store, path.store) as record:
        for _ in range(20):
            await asyncio.sleep(0.1)
            path.proxy.cut()
        await record.until_written(10, within_s=10)
        await end_writing(record)
        await record.check(path.straight)
    assert path.store.counters.watch_restarts["broken"] >= 10


async def test_the_writer_is_cut_too(path: Path) -> None:
    """Answers are lost; reading back finds out what happened, so nothing is written twice."""
    async with history(path.store, path.straight) as record:
        for _ in range(20):
            await asyncio.sleep(0.1)
            path.proxy.cut()
        await record.until_written(10, within_s=10)
        await end_writing(record)
        await record.check(path.straight)
    assert path.store.counters.ambiguous > 0


async def test_streams_are_cut_during_catch_up(path: Path) -> None:
    """Each connection carries a part of what is missing: every one makes progress, none repeats."""
    known = await path.straight.list_prefix("/w/")
    for n in range(60):
        await path.straight.txn([], [PutOp(f"/w/{m}", b"%d" % (n % 10) * 30_000) for m in (1, 2)])
    path.proxy.down_limit_bytes = 1_500_000
    async with watching(path.store, "/w/", known) as seen:
        # etcd sends up to 2 MB at once; the limit grows until that fits, as it does on a real
        # line that is bad but not dead.
        for limit_bytes in (1_500_000, 2_500_000, 4_000_000):
            path.proxy.down_limit_bytes = limit_bytes
            path.proxy.cut()
            await asyncio.sleep(0.1)
        path.proxy.down_limit_bytes = None
        await until_seen(seen, 60)
    assert [batch.revision for batch in seen] == [known.revision + n for n in range(1, 61)]
    assert all(len(batch.events) == 2 for batch in seen)
    assert path.proxy.connections > 1


async def test_a_silent_network_is_noticed(path: Path) -> None:
    """Packets vanish, nothing is closed: gRPC's keepalive finds out, within 6 + 3 s."""
    async with watching(path.store, "/w/") as seen:
        await until_seen(seen, 1)
        path.proxy.passes.clear()
        await path.straight.put("/w/a", b"1")
        await eventually(
            lambda: path.store.counters.watch_restarts.get("broken", 0) > 0, within_s=12
        )
        path.proxy.passes.set()
        await until_seen(seen, 2)
    assert [words(batch) for batch in seen[1:]] == [("+/w/a=1",)]


async def test_calls_into_silence_end_in_time_and_say_what_is_known(path: Path) -> None:
    await path.store.put("/k", b"0")
    path.proxy.passes.clear()
    loop = asyncio.get_running_loop()
    started_s = loop.time()
    with pytest.raises(Unavailable):
        await path.store.get("/k")
    with pytest.raises(Ambiguous):
        await path.store.put("/k", b"1")
    assert loop.time() - started_s < 2 * 1.5 + 0.5


async def test_a_write_to_a_member_that_is_down_surely_did_not_happen(path: Path) -> None:
    path.proxy.refuse()
    await eventually(lambda: _fails(path.store), within_s=5)
    with pytest.raises(Unavailable):
        await path.store.put("/never", b"")
    path.proxy.is_open = True
    assert await path.store.get("/never") is None


async def _fails(store: EtcdStore) -> bool:
    try:
        await store.get("/k")
    except Unavailable:
        return True
    return False


async def test_a_slow_line_still_connects(path: Path) -> None:
    """More than a second to the first byte, as on a far line or a machine busy loading."""
    path.proxy.up_delay_s = 1.2
    store = EtcdStore.connect(
        EtcdSettings(endpoints=(f"127.0.0.1:{path.proxy.port}",), timeout_s=5)
    )
    assert await store.get("/k") is None
    await store.close()


async def test_compaction_while_cut_off_delivers_the_difference_once(path: Path) -> None:
    straight = path.straight
    for n in range(10):
        await straight.put(f"/w/{n}", b"old")
    async with watching(path.store, "/w/") as seen:
        await until_seen(seen, 1)
        path.proxy.refuse()
        for n in range(0, 10, 2):
            await straight.put(f"/w/{n}", b"newer")
            await straight.put(f"/w/{n}", b"newest")
        await straight.delete("/w/1")
        await straight.put("/w/fleeting", b"")
        await straight.delete("/w/fleeting")
        head = await straight.put("/w/born", b"1")
        await straight.compact(head)
        path.proxy.is_open = True
        await until_seen(seen, 2)
        await straight.put("/w/after", b"1")
        await until_seen(seen, 3)
    changed = tuple(f"+/w/{n}=newest" for n in range(0, 10, 2))
    assert words(seen[1]) == ("-/w/1", *changed, "+/w/born=1")
    assert words(seen[2]) == ("+/w/after=1",)
    assert path.store.counters.watch_restarts["compacted"] == 1


async def test_compaction_under_a_cut_stream_while_writing(path: Path) -> None:
    """Whatever was skipped, the keys as told equal the keys as they are, and order is kept."""
    told: dict[str, bytes] = {}
    async with history(path.straight, path.straight) as record:
        async with watching(path.store, PREFIX) as seen:
            await until_seen(seen, 1)
            for _ in range(3):
                path.proxy.refuse()
                await record.until_written(5, within_s=10)
                head = record.confirmed[-1][0]
                await path.straight.compact(head)
                path.proxy.is_open = True
                await eventually(lambda h=head: seen[-1].revision >= h, within_s=10)  # type: ignore[misc]
            await end_writing(record)
            head = record.confirmed[-1][0]
            await eventually(lambda: seen[-1].revision >= head, within_s=10)
        revisions = [batch.revision for batch in seen]
        assert revisions == sorted(set(revisions))
        for batch in seen:
            _apply(told, batch)
    listing = await path.straight.list_prefix(PREFIX)
    assert told == {kv.key: kv.value for kv in listing.kvs}
    assert path.store.counters.watch_restarts["compacted"] == 3


def _apply(told: dict[str, bytes], batch: Batch) -> None:
    for word in words(batch):
        key, _, value = word[1:].partition("=")
        if word[0] == "+":
            told[key] = value.encode()
        else:
            told.pop(key, None)


async def test_an_etcd_that_lost_its_data_is_believed() -> None:
    """A wiped folder behind the same address: revisions begin again, the truth is what is there."""
    with etcd_cluster(1) as cluster:
        member = cluster.members[0]
        store = EtcdStore.connect(cluster.settings())
        try:
            for n in range(20):
                await store.put("/w/a", b"%d" % n)
            await store.put("/w/b", b"kept")
            async with watching(store, "/w/") as seen:
                await until_seen(seen, 1)
                before = seen[0].revision
                member.kill()
                await asyncio.to_thread(shutil.rmtree, cluster.folder / member.name)
                member.start()
                await asyncio.to_thread(cluster.wait_healthy)
                fresh = EtcdStore.connect(cluster.settings())
                await fresh.put("/w/b", b"new")
                await fresh.close()
                told: dict[str, bytes] = {}
                delivered = 0

                def is_right() -> bool:
                    nonlocal delivered
                    for batch in seen[delivered:]:
                        _apply(told, batch)
                    delivered = len(seen)
                    return told == {"/w/b": b"new"}

                await eventually(is_right, within_s=10)
            assert seen[1].revision < before
        finally:
            await store.close()


async def test_a_closed_store_ends_its_watches(cluster: EtcdCluster) -> None:
    store = EtcdStore.connect(cluster.settings())

    async def follow() -> int:
        return len([batch async for batch in store.watch_prefix("/w/")])

    task = asyncio.create_task(follow())
    await asyncio.sleep(0.1)
    await store.close()
    assert await asyncio.wait_for(task, 5) <= 1
