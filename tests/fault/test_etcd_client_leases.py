"""Leases and logins on real etcd: gone, forgotten, expired, and back in time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator

import pytest

from registry.etcd import EtcdStore
from registry.session import Session
from registry.store import LeaseNotFound, PermissionDenied, StoreError
from tests.etcd import EtcdCluster, etcd_cluster
from tests.eventually import eventually
from tests.integration.store_contract import until_seen, watching, words

TTL_S = 3
NODE, STATUS = "/p/nodes/n1", "/p/status/m/n1"


@pytest.fixture(scope="module")
def cluster() -> Iterator[EtcdCluster]:
    with etcd_cluster(1) as cluster:
        yield cluster


@pytest.fixture
async def store(cluster: EtcdCluster) -> AsyncIterator[EtcdStore]:
    store = EtcdStore.connect(cluster.settings())
    try:
        yield store
        await store.delete_prefix("")
    finally:
        await store.close()


async def keys(store: EtcdStore) -> set[str]:
    try:
        return {kv.key for kv in (await store.list_prefix("/p/")).kvs}
    except StoreError:
        return set()


async def registered(store: EtcdStore) -> bool:
    return await keys(store) == {NODE, STATUS}


async def session_on(store: EtcdStore) -> Session:
    session = Session(store, TTL_S)
    session.set(NODE, b"node")
    session.set(STATUS, b"status")
    await session.start()
    assert await session.settled(5)
    return session


@pytest.mark.parametrize("harm", ["revoked", "key deleted"])
async def test_registration_is_back_within_ttl_and_two_seconds(store: EtcdStore, harm: str) -> None:
    session = await session_on(store)
    if harm == "revoked":
        await store.lease_revoke(session.lease)
        assert await keys(store) == set()
    else:
        await store.delete(NODE)
    await eventually(lambda: registered(store), within_s=TTL_S + 2)
    assert session.has_lease
    await session.stop()
    assert await keys(store) == set()


async def test_etcd_away_for_longer_than_the_ttl(cluster: EtcdCluster, store: EtcdStore) -> None:
    session = await session_on(store)
    member = cluster.members[0]
    member.kill()
    await eventually(lambda: not session.has_lease, within_s=TTL_S + 0.5)
    session.set(STATUS, b"newer")
    member.start()
    await asyncio.to_thread(cluster.wait_healthy)

    async def renewed() -> bool:
        kv = await store.get(STATUS)
        return kv is not None and kv.value == b"newer" and kv.lease == session.lease != 0

    await eventually(renewed, within_s=2)
    await session.stop()
    assert await keys(store) == set()


async def test_a_frozen_etcd_takes_the_lease_by_our_clock(
    cluster: EtcdCluster, store: EtcdStore
) -> None:
    session = await session_on(store)
    member = cluster.members[0]
    member.freeze()
    await eventually(lambda: not session.has_lease, within_s=TTL_S + 0.5)
    member.thaw()
    await eventually(lambda: session.has_lease, within_s=4)
    await eventually(lambda: registered(store), within_s=4)
    loop = asyncio.get_running_loop()
    member.freeze()
    started_s = loop.time()
    await session.stop(timeout_s=1)
    assert loop.time() - started_s < 1.5
    member.thaw()


# --- logins -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def guarded() -> Iterator[EtcdCluster]:
    """Passwords on, tokens that are forgotten after a second without use."""
    with etcd_cluster(1, extra=("--auth-token-ttl=1",)) as cluster:
        cluster.enable_auth("root", "secret")
        yield cluster


async def until_forgotten() -> None:
    """Until etcd, which looks for old tokens once a second, has dropped those of a second's age."""
    for _ in range(22):
        await asyncio.sleep(0.1)


async def test_one_login_serves_many_calls_and_so_does_the_next(guarded: EtcdCluster) -> None:
    store = EtcdStore.connect(guarded.settings())
    try:
        await asyncio.gather(*(store.get(f"/k/{n}") for n in range(20)))
        assert store.counters.logins == 1
        await until_forgotten()
        await asyncio.gather(*(store.get(f"/k/{n}") for n in range(20)))
        assert store.counters.logins == 2
    finally:
        await store.close()


async def test_writes_watches_and_leases_outlive_their_tokens(guarded: EtcdCluster) -> None:
    store = EtcdStore.connect(guarded.settings())
    idle = EtcdStore.connect(guarded.settings())
    try:
        lease = await store.lease_grant(30)
        async with watching(store, "/w/") as seen, watching(idle, "/w/") as seen_idle:
            await until_seen(seen, 1)
            await until_seen(seen_idle, 1)
            await asyncio.sleep(0.1)
            for n in range(2):
                await until_forgotten()
                await store.put("/w/k", b"%d" % n)
                assert await store.lease_keepalive(lease) > 0
                store.leave_member()
                idle.leave_member()
            await until_seen(seen, 3)
            await until_seen(seen_idle, 3)
        wanted = [("+/w/k=0",), ("+/w/k=1",)]
        assert [words(batch) for batch in seen[1:]] == wanted
        assert [words(batch) for batch in seen_idle[1:]] == wanted
        assert store.counters.logins >= 3
        await store.lease_revoke(lease)
        with pytest.raises(LeaseNotFound):
            await store.lease_keepalive(lease)
    finally:
        await store.close()
        await idle.close()


@pytest.mark.parametrize(
    "who",
    [
        {"password": "wrong"},
        {"user": "nobody", "password": "secret"},
        {"user": None, "password": None},
    ],
    ids=["wrong password", "unknown user", "no user"],
)
async def test_who_may_not_is_told_at_once(
    guarded: EtcdCluster, who: dict[str, str | None]
) -> None:
    store = EtcdStore.connect(guarded.settings(**who))
    loop = asyncio.get_running_loop()
    started_s = loop.time()
    try:
        with pytest.raises(PermissionDenied):
            await store.get("/k")
        with pytest.raises(PermissionDenied):
            await store.put("/k", b"")
        with pytest.raises(PermissionDenied):
            async for _ in store.watch_prefix("/k"):
                pass
        assert loop.time() - started_s < 3
    finally:
        await store.close()


async def test_a_role_without_the_right_is_refused(guarded: EtcdCluster) -> None:
    guarded.etcdctl("role", "add", "reader")
    guarded.etcdctl("role", "grant-permission", "reader", "read", "--prefix=true", "/p/configs/")
    guarded.etcdctl("user", "add", "reader:reader")
    guarded.etcdctl("user", "grant-role", "reader", "reader")
    store = EtcdStore.connect(guarded.settings(user="reader", password="reader"))
    try:
        assert await store.get("/p/configs/models/m") is None
        with pytest.raises(PermissionDenied):
            await store.put("/p/configs/models/m", b"")
        with pytest.raises(PermissionDenied):
            await store.list_prefix("/p/")
        known = await store.list_prefix("/p/configs/")
        with pytest.raises(PermissionDenied):
            async for _ in store.watch_prefix("/p/", known=known):
                pass
        async with watching(store, "/p/configs/") as seen:
            await until_seen(seen, 1)
    finally:
        await store.close()


async def test_a_user_where_passwords_are_off_is_no_problem(
    cluster: EtcdCluster,
) -> None:
    store = EtcdStore.connect(cluster.settings(user="somebody", password="else"))
    try:
        assert await store.get("/k") is None
    finally:
        await store.close()
