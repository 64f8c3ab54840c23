"""Who may be a node under an id, and who goes."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from paddlewheel.identity import PATIENCE_S, IdTaken, Lodging, claim, guard
from registry.keys import Keys
from registry.memory_store import MemoryCluster, MemoryStore
from registry.names import NodeId
from registry.records import NodeRecord
from registry.store import KeyValue, Unavailable

KEYS = Keys()
N = NodeId("n1")
AT = datetime(2026, 1, 1, tzinfo=UTC)
TTL_S = 10


def record(uid: str | None = "a", port: int = 1, age_s: float = 0) -> NodeRecord:
    return NodeRecord(
        id=N, http=f"http://10.0.0.1:{port}", started_at=AT - timedelta(seconds=age_s),
        lease_ttl_s=TTL_S, uid=uid,
    )  # fmt: skip


@pytest.fixture
async def store() -> MemoryStore:
    return MemoryStore(MemoryCluster())


async def held_by(store: MemoryStore, other: NodeRecord) -> int:
    lease = await store.lease_grant(TTL_S)
    await store.put(KEYS.node(N), other.to_json(), lease=lease)
    return lease


async def taken_s(store: MemoryStore, mine: NodeRecord) -> float:
    """How long claiming took."""
    loop = asyncio.get_running_loop()
    began_s = loop.time()
    await claim(store, KEYS, mine)
    return loop.time() - began_s


@pytest.mark.parametrize(
    ("what", "other"),
    [
        ("nobody", None),
        ("its own key of before a restart at another port", record("a", port=7)),
        ("its own address, from a machine whose disk is new", record("b", port=1)),
    ],
)
@pytest.mark.looptime
async def test_free_at_once(what: str, other: NodeRecord | None, store: MemoryStore) -> None:
    if other is not None:
        await held_by(store, other)
    assert await taken_s(store, record("a", port=1)) == 0, what


@pytest.mark.parametrize("uid", ["b", None])
@pytest.mark.looptime
async def test_another_node_that_lives(uid: str | None, store: MemoryStore) -> None:
    lease = await held_by(store, record(uid, port=7, age_s=60))

    async def lives() -> None:
        while True:
            await store.lease_keepalive(lease)
            await asyncio.sleep(TTL_S / 3)

    living = asyncio.create_task(lives())
    loop = asyncio.get_running_loop()
    began_s = loop.time()
    with pytest.raises(IdTaken, match=r"taken by http://10.0.0.1:7, started 2025-12-31T23:59:00"):
        await claim(store, KEYS, record("a", port=1))
    assert loop.time() - began_s < TTL_S + PATIENCE_S + 1
    living.cancel()


@pytest.mark.looptime
async def test_another_node_that_died(store: MemoryStore) -> None:
    await held_by(store, record("b", port=7))
    assert await taken_s(store, record("a", port=1)) == pytest.approx(TTL_S, abs=1)


class Shaky(MemoryStore):
    """Away from its second answer on, for as long as a lease lives."""

    asked = 0

    async def get(self, key: str) -> KeyValue | None:
        self.asked += 1
        if 2 <= self.asked < 20:
            raise Unavailable("away")
        return await super().get(key)


@pytest.mark.looptime
async def test_the_time_of_an_etcd_that_was_away_does_not_count(store: MemoryStore) -> None:
    """A restarted etcd gives every lease its whole time again."""
    cluster = MemoryCluster()
    shaky = Shaky(cluster)
    await shaky.put(KEYS.node(N), record("b", port=7).to_json())
    with pytest.raises(IdTaken):
        await claim(shaky, KEYS, record("a", port=1))
    assert asyncio.get_running_loop().time() > 20 * 0.5 + TTL_S


@pytest.mark.looptime
async def test_the_younger_one_goes(store: MemoryStore) -> None:
    await held_by(store, record("a", port=7, age_s=5))
    with pytest.raises(IdTaken, match="writes the same keys"):
        await guard(store, KEYS, record("a", port=1))


@pytest.mark.looptime
async def test_its_own_key_is_no_reason_to_go(store: MemoryStore) -> None:
    mine = NodeRecord(id=N, http="http://a:1", started_at=datetime.now(UTC), lease_ttl_s=TTL_S)
    await held_by(store, mine)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(TTL_S):
            await guard(store, KEYS, mine)


@pytest.mark.looptime
async def test_the_older_one_stays(store: MemoryStore) -> None:
    await held_by(store, record("b", port=7))
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(10 * TTL_S):
            await guard(store, KEYS, record("a", port=1, age_s=5))


@pytest.mark.parametrize("value", [b"", b"nonsense", b'{"id": "n1"}'])
@pytest.mark.looptime
async def test_what_is_no_record_holds_nothing(value: bytes, store: MemoryStore) -> None:
    await store.put(KEYS.node(N), value)
    assert await taken_s(store, record()) == 0


def test_a_folder_is_for_one_process(tmp_path: Path) -> None:
    first = Lodging(tmp_path, N)
    first.note(record(port=7))
    with pytest.raises(IdTaken, match=r"on this machine by http://10.0.0.1:7, started 2026"):
        Lodging(tmp_path, N)
    first.leave()
    again = Lodging(tmp_path, N)
    assert again.uid == first.uid
    again.leave()


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    one, other = (Lodging(tmp_path / "file" / "n1", N) for _ in range(2))
    assert one.uid != other.uid


@pytest.mark.parametrize("content", ["", "not a uid", "\udc80".encode("utf-8", "surrogateescape")])
def test_a_damaged_uid_is_made_anew(content: Any, tmp_path: Path) -> None:
    raw = content if isinstance(content, bytes) else content.encode()
    (tmp_path / "uid").write_bytes(raw)
    lodging = Lodging(tmp_path, N)
    lodging.leave()
    assert (tmp_path / "uid").read_text().strip() == lodging.uid
