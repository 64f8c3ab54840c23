"""Compare-and-swap writes whose answers are lost."""

from __future__ import annotations

import pytest

from registry.cas import Conflict, create_if_absent, put_if
from registry.memory_store import MemoryStore
from registry.names import Revision
from registry.store import Ambiguous, PutOp, Unavailable

pytestmark = pytest.mark.looptime


@pytest.mark.parametrize("fates", [["applied"], ["lost"], ["lost", "applied"], ["lost"] * 5])
async def test_a_lost_answer_ends_in_exactly_one_write(fates: list[str]) -> None:
    store = MemoryStore()
    store.faults.ambiguous.extend(fates)  # type: ignore[arg-type]
    assert await create_if_absent(store, "/k", b"mine")
    kv = store.cluster.get("/k")
    assert kv is not None
    assert (kv.value, kv.version) == (b"mine", 1)


async def test_a_lost_answer_and_a_faster_writer_is_a_conflict() -> None:
    store = MemoryStore()
    store.faults.ambiguous.append("lost")

    async def faster(call: str) -> None:
        if store.cluster.get("/k") is None and not store.faults.ambiguous:
            store.cluster.apply([PutOp("/k", b"theirs")])

    store.faults.before = faster
    done = await put_if(store, "/k", b"mine", Revision(0))
    assert isinstance(done, Conflict)
    assert done.current is not None
    assert done.current.value == b"theirs"


async def test_the_same_bytes_of_another_are_no_success_without_a_lost_answer() -> None:
    store = MemoryStore()
    await store.put("/k", b"same")
    assert not await create_if_absent(store, "/k", b"same")


async def test_a_store_that_stays_away_is_unavailable() -> None:
    store = MemoryStore()
    store.cut_off()
    with pytest.raises(Unavailable):
        await create_if_absent(store, "/k", b"mine", retry_s=2)


async def test_a_store_that_goes_away_after_a_lost_answer_leaves_it_ambiguous() -> None:
    store = MemoryStore()
    store.faults.ambiguous.append("applied")

    async def away(call: str) -> None:
        store.faults.unavailable = not store.faults.ambiguous

    store.faults.before = away
    with pytest.raises(Ambiguous):
        await create_if_absent(store, "/k", b"mine", retry_s=2)
