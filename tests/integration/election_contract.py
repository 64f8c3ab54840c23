"""What an election promises, on any store (test_election.py)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field

import pytest

from registry.cas import Conflict
from registry.election import Deposed, Leadership, leadership
from registry.names import Revision
from registry.store import CreateRevisionIs, GetOp, ModRevisionIs, PutOp, Store, ValueIs
from tests.eventually import eventually
from tests.integration.store_contract import World

KEY = "/p/leader"
TTL_S = 2


@dataclass
class Candidate:
    """Leads until told to stop, or until it lost."""

    store: Store
    name: str
    led: list[Leadership] = field(default_factory=list[Leadership])
    stop: asyncio.Event = field(default_factory=asyncio.Event)

    async def run(self) -> None:
        async with leadership(self.store, KEY, self.name.encode, ttl_s=TTL_S) as led:
            self.led.append(led)
            stop, lost = asyncio.create_task(self.stop.wait()), asyncio.create_task(led.lost.wait())
            await asyncio.wait({stop, lost}, return_when=asyncio.FIRST_COMPLETED)
            stop.cancel()
            lost.cancel()

    @property
    def leads(self) -> bool:
        return bool(self.led) and self.led[-1].is_held and not self.stop.is_set()


@asynccontextmanager
async def running(*candidates: Candidate) -> AsyncGenerator[list[asyncio.Task[None]]]:
    tasks = [asyncio.create_task(each.run()) for each in candidates]
    try:
        yield tasks
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def until_one_leads(candidates: list[Candidate], within_s: float = 10.0) -> Candidate:
    await eventually(lambda: sum(each.leads for each in candidates) == 1, within_s=within_s)
    return next(each for each in candidates if each.leads)


class ElectionContract:
    """Subclasses give the fixture ``world``; every test has an empty store."""

    async def test_one_of_many_leads_and_the_key_says_who(self, world: World) -> None:
        candidates = [Candidate(world.client(), f"c{at}") for at in range(5)]
        async with running(*candidates):
            leader = await until_one_leads(candidates)
            await asyncio.sleep(0.1)
            assert [each.leads for each in candidates].count(True) == 1
            kv = await world.store.get(KEY)
            assert kv is not None
            assert (kv.value.decode(), kv.create_revision) == (leader.name, leader.led[0].fence)
            assert kv.lease != 0

    async def test_one_that_resigns_is_followed_at_once(self, world: World) -> None:
        first, second = Candidate(world.client(), "a"), Candidate(world.client(), "b")
        async with running(first):
            await until_one_leads([first])
            async with running(second):
                await asyncio.sleep(0.1)
                assert not second.led
                first.stop.set()
                await eventually(lambda: second.leads, within_s=TTL_S / 2)
                assert second.led[0].fence > first.led[0].fence

    async def test_a_leader_keeps_leading_past_its_ttl(self, world: World) -> None:
        one = Candidate(world.client(), "a")
        async with running(one):
            await until_one_leads([one])
            await asyncio.sleep(TTL_S * 1.5)
            assert one.leads
            assert len(one.led) == 1

    async def test_writes_of_the_leader_are_compare_and_swap(self, world: World) -> None:
        one = Candidate(world.client(), "a")
        async with running(one):
            led = (await until_one_leads([one])).led[0]
            first = await led.put("/k", b"1", Revision(0))
            assert not isinstance(first, Conflict)
            refused = await led.put("/k", b"2", Revision(0))
            assert isinstance(refused, Conflict)
            assert refused.current is not None
            assert refused.current.value == b"1"
            assert isinstance(await led.put("/k", b"2", first, ValueIs("/k", b"x")), Conflict)
            await world.store.put("/more", b"")
            assert not isinstance(await led.delete("/k", first, and_delete=["/more"]), Conflict)
            assert await world.store.get("/k") is None
            assert await world.store.get("/more") is None

    async def test_a_deposed_leaders_write_fails(self, world: World) -> None:
        """Its clock still says that it leads: only the fence knows."""
        store = world.client()
        async with AsyncExitStack() as stack:
            ghost = await stack.enter_async_context(leadership(store, KEY, lambda: b"a", ttl_s=60))
            await world.store.delete(KEY)  # as the store does when the lease is over
            assert ghost.is_held
            second = Candidate(world.client(), "b")
            async with running(second):
                await until_one_leads([second])
                with pytest.raises(Deposed):
                    await ghost.put("/k", b"ghost", Revision(0))
                assert await world.store.get("/k") is None
                assert not ghost.is_held
                assert ghost.lost.is_set()
                done = await second.led[0].put("/k", b"b", Revision(0))
                assert not isinstance(done, Conflict)

    async def test_a_leader_whose_key_is_deleted_notices(self, world: World) -> None:
        one = Candidate(world.client(), "a")
        async with running(one) as tasks:
            await until_one_leads([one])
            await world.store.delete(KEY)
            await eventually(lambda: tasks[0].done(), within_s=TTL_S)
            assert one.led[0].lost.is_set()

    async def test_at_most_one_of_many_writes_under_each_fence(self, world: World) -> None:
        """Leaders come and go; every write carries its fence, and fences never go back."""
        candidates = [Candidate(world.client(), f"c{at}") for at in range(3)]
        written: list[tuple[Revision, Revision]] = []

        async def writing(candidate: Candidate) -> None:
            while True:
                await candidate.run()
                candidate.stop.clear()

        async def appending(candidate: Candidate) -> None:
            while True:
                await asyncio.sleep(0.01)
                if not candidate.led:
                    continue
                led = candidate.led[-1]  # a ghost, perhaps: it tries all the same
                kv = await world.store.get("/log")
                known = Revision(0) if kv is None else kv.mod_revision
                fence = CreateRevisionIs(KEY, led.fence)
                done = await candidate.store.txn(
                    [fence, ModRevisionIs("/log", known)],
                    [PutOp("/log", str(led.fence).encode())],
                    [GetOp("/log")],
                )
                if done.succeeded:
                    written.append((done.revision, led.fence))

        tasks = [asyncio.create_task(part(c)) for c in candidates for part in (writing, appending)]
        try:
            for _ in range(6):
                leader = await until_one_leads(candidates)
                count = len(written)
                await eventually(lambda count=count: len(written) > count, within_s=5)  # type: ignore[misc]
                leader.stop.set()
                await eventually(lambda leader=leader: not leader.leads, within_s=5)  # type: ignore[misc]
        finally:
            for task in tasks:
                task.cancel()
            with suppress(asyncio.CancelledError):
                await asyncio.gather(*tasks, return_exceptions=True)
        fences = [fence for _, fence in sorted(written)]
        assert fences == sorted(fences)
        assert len(set(fences)) >= 6
