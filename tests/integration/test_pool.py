"""The pool over workers whose other end the test plays, and over real ones at the end."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import pytest_asyncio

from loader import pool as pool_module
from loader.oversight import FaultReport, Oversight
from loader.pool import WorkerPool
from loader.worker import ORPHAN, Worker
from loader.zygote import Zygote
from paddlewheel.models.small import make_mlp
from registry.inference import (
    Array,
    BadInput,
    DeadlineExceeded,
    Inference,
    Overloaded,
    ServableFailed,
    Signature,
    TensorSpec,
)
from registry.names import Digest, ModelName, ServableId, Version
from tests.eventually import eventually
from tests.integration.workers import Peer, open_fds, rows, serving

ID = ServableId(ModelName("m"), Version("1"), Digest("sha256:" + "0" * 64))
SIGNATURE = Signature((TensorSpec("x", "float32", (-1, 64)),), (TensorSpec("y", "float32", (-1,)),))


@dataclass
class Bench:
    """A pool with what it was given."""

    pool: WorkerPool
    peers: list[Peer]
    faults: list[tuple[str, str, str, int]]
    spare: list[Peer]
    on_fault: list[Callable[[], None]]
    """Called at each fault."""

    def infer(self, x: Array | None = None, *, within_s: float = 5.0) -> asyncio.Task[Inference]:
        x = rows(1) if x is None else x
        deadline_s = asyncio.get_running_loop().time() + within_s
        return asyncio.create_task(self.pool.infer({"x": x}, deadline_s=deadline_s))


MakeBench = Callable[..., Awaitable[Bench]]


def told(report: FaultReport) -> tuple[str, str, str, int]:
    return report.fault.code, report.fault.fault_class, report.fault.message, report.pid


@pytest_asyncio.fixture
async def bench() -> AsyncIterator[MakeBench]:
    made: list[Bench] = []

    async def make(replicas: int = 1, *, queue: int = 8, hang_s: float = 5.0) -> Bench:
        peers = [Peer() for _ in range(replicas)]
        faults: list[tuple[str, str, str, int]] = []
        spare: list[Peer] = []

        then: list[Callable[[], None]] = []

        def on_fault(report: FaultReport) -> bool:
            faults.append(told(report))
            for call in then:
                call()
            return False

        async def make_worker() -> Worker:
            if not spare:
                raise OSError("no spare worker")
            peers.append(spare.pop(0))
            return peers[-1].worker

        pool = WorkerPool(
            ID, SIGNATURE, [peer.worker for peer in peers], make_worker=make_worker,
            oversight=Oversight(on_fault=on_fault), queue=queue, hang_s=hang_s,
        )  # fmt: skip
        made.append(Bench(pool, peers, faults, spare, then))
        return made[-1]

    yield make
    for one in made:
        for peer in one.peers + one.spare:
            peer.close()
        await one.pool.close()


async def test_answers_in_order_of_arrival(bench: MakeBench):
    one = await bench()
    (peer,) = one.peers
    tasks = [one.infer(np.full((1, 64), n, np.float32)) for n in range(5)]
    for n in range(5):
        message = await peer.next()
        place = message["inputs"][0]
        assert place[:3] == ["x", "float32", [1, 64]]
        peer.answer(message, y=np.array([n], np.float32))
    for n, task in enumerate(tasks):
        assert (await task).outputs["y"] == n
    assert one.pool.stats.runs == 5
    assert one.pool.in_flight == 0


async def test_at_most_depth_reach_a_worker(bench: MakeBench):
    one = await bench()
    tasks = [one.infer() for _ in range(4)]
    await asyncio.sleep(0)
    assert one.peers[0].worker.in_flight == 2
    assert one.pool.stats.queued == 2
    assert one.pool.in_flight == 4
    for _ in tasks:
        one.peers[0].answer(await one.peers[0].next(), y=np.zeros(1))
    await asyncio.gather(*tasks)


async def test_an_idle_replica_comes_before_a_busy_one(bench: MakeBench):
    one = await bench(3)
    tasks = [one.infer() for _ in range(3)]
    await asyncio.sleep(0)
    assert [peer.worker.in_flight for peer in one.peers] == [1, 1, 1]
    for peer in one.peers:
        peer.answer(await peer.next(), y=np.zeros(1))
    await asyncio.gather(*tasks)


async def test_nothing_waits_behind_a_long_run_while_replicas_share_a_queue(bench: MakeBench):
    one = await bench(2)
    first = one.infer()
    one.peers[0].answer(await one.peers[0].next(), run_s=1.0, y=np.zeros(1))
    await first
    tasks = [one.infer() for _ in range(3)]
    await asyncio.sleep(0)
    assert [peer.worker.in_flight for peer in one.peers] == [1, 1]
    assert one.pool.stats.queued == 1
    for peer in (one.peers[1], one.peers[0], one.peers[1]):  # the first to be free takes it
        peer.answer(await peer.next(), y=np.zeros(1))
    await asyncio.gather(*tasks)


@pytest.mark.parametrize(
    "feeds",
    [
        {},
        {"x": rows(1, 63)},
        {"x": rows(1).astype(np.float64)},
        {"x": rows(1)[0]},
        {"x": rows(1), "z": rows(1)},
    ],
)
async def test_a_bad_request_reaches_no_worker(bench: MakeBench, feeds: dict[str, Array]):
    one = await bench()
    with pytest.raises(BadInput):
        await one.pool.infer(feeds, deadline_s=asyncio.get_running_loop().time() + 1)
    assert one.peers[0].worker.in_flight == 0
    assert not one.faults


# --- limits -------------------------------------------------------------------------------------


async def test_a_full_queue_refuses_and_says_when_to_come_back(bench: MakeBench):
    one = await bench(queue=3)
    tasks = [one.infer() for _ in range(5)]
    await asyncio.sleep(0)
    with pytest.raises(Overloaded) as caught:
        await one.infer()
    assert caught.value.retry_after_s > 0
    one.pool.configure(queue=4, hang_s=5.0)
    tasks.append(one.infer())
    await asyncio.sleep(0)
    for _ in tasks:
        one.peers[0].answer(await one.peers[0].next(), y=np.zeros(1))
    await asyncio.gather(*tasks)


async def test_a_deadline_in_the_queue_touches_no_worker(bench: MakeBench):
    one = await bench()
    running = [one.infer() for _ in range(2)]
    await asyncio.sleep(0)
    late = one.infer(within_s=0.05)
    with pytest.raises(DeadlineExceeded, match="queue"):
        await late
    assert one.pool.stats.queued == 0
    for task in running:
        one.peers[0].answer(await one.peers[0].next(), y=np.zeros(1))
        await task
    assert one.peers[0].worker.in_flight == 0
    with pytest.raises(DeadlineExceeded):
        await one.infer(within_s=-1)


async def test_a_deadline_while_running_frees_the_caller_not_the_slot(bench: MakeBench):
    one = await bench()
    (peer,) = one.peers
    with pytest.raises(DeadlineExceeded, match="running"):
        await one.infer(within_s=0.05)
    assert peer.worker.in_flight == 1
    assert one.pool.in_flight == 0
    peer.answer(await peer.next(), y=np.zeros(1))
    await eventually(lambda: peer.worker.in_flight == 0, within_s=2)
    assert not one.faults


async def test_a_client_that_goes_away_leaks_nothing(bench: MakeBench):
    one = await bench()
    (peer,) = one.peers
    tasks = [one.infer() for _ in range(4)]
    await asyncio.sleep(0)
    for task in tasks[1:]:
        task.cancel()
    await asyncio.wait(tasks[1:])
    assert one.pool.in_flight == 1
    assert one.pool.stats.queued == 0
    assert peer.worker.in_flight == 2  # the second one runs on, unheard
    for _ in range(2):
        peer.answer(await peer.next(), y=np.zeros(1))
    await tasks[0]
    after = one.infer()
    peer.answer(await peer.next(), y=np.ones(1))
    assert (await after).outputs["y"] == 1
    assert one.pool.idle.is_set()


# --- faults -------------------------------------------------------------------------------------


async def test_a_death_is_one_fault_told_before_anybody_learns_of_it(bench: MakeBench):
    one = await bench()
    one.spare.append(Peer())
    told: list[int] = []
    tasks = [one.infer() for _ in range(5)]
    for task in tasks:
        task.add_done_callback(lambda _: told.append(len(one.faults)))
    await one.peers[0].next()
    one.peers[0].die("SIGSEGV")
    # the one that ran is blamed; those behind it were never begun and run on the replacement
    with pytest.raises(ServableFailed) as caught:
        await tasks[0]
    assert (caught.value.code, caught.value.fault_class) == ("SIGSEGV", "crash")
    await eventually(lambda: len(one.peers) == 2, within_s=2)
    for task in tasks[1:]:
        one.peers[1].answer(await one.peers[1].next(), y=np.zeros(1))
        await task
    assert [fault[:2] for fault in one.faults] == [("SIGSEGV", "crash")]
    assert one.faults[0][3] == one.peers[0].worker.pid
    assert told == [1] * 5
    assert one.pool.workers()[0].restarts == 1


async def test_a_death_without_requests_is_a_fault_too(bench: MakeBench):
    one = await bench(2)
    one.peers[0].die("SIGKILL")
    await eventually(lambda: bool(one.faults), within_s=2)
    assert [view.alive for view in one.pool.workers()] == [False, True]
    task = one.infer()
    one.peers[1].answer(await one.peers[1].next(), y=np.zeros(1))
    await task


async def test_a_zygotes_death_is_nobodys_fault(bench: MakeBench):
    one = await bench()
    one.spare.append(Peer())
    tasks = [one.infer() for _ in range(3)]
    await one.peers[0].next()
    one.peers[0].die(ORPHAN)
    await eventually(lambda: len(one.peers) == 2, within_s=2)
    for task in tasks:
        one.peers[1].answer(await one.peers[1].next(), y=np.zeros(1))
        await task
    assert not one.faults


async def test_a_hanging_run_ends_its_worker(bench: MakeBench):
    one = await bench(hang_s=0.1)
    one.spare.append(Peer())
    tasks = [one.infer() for _ in range(2)]
    await eventually(lambda: one.peers[0].process.poll() is not None, within_s=2)
    one.peers[0].die("SIGKILL")
    with pytest.raises(ServableFailed) as caught:
        await tasks[0]
    assert caught.value.code == "HANG"
    await eventually(lambda: len(one.peers) == 2, within_s=2)
    one.peers[1].answer(await one.peers[1].next(), y=np.zeros(1))
    await tasks[1]
    assert [fault[0] for fault in one.faults] == ["HANG"]


async def test_a_long_wait_behind_another_run_is_no_hang(bench: MakeBench):
    one = await bench(hang_s=0.3)
    (peer,) = one.peers
    tasks = [one.infer() for _ in range(2)]
    for task in tasks:
        message = await peer.next()
        await asyncio.sleep(0.2)
        if task is tasks[1]:
            assert peer.process.poll() is None
        peer.answer(message, y=np.zeros(1))
        await task
    assert not one.faults


async def test_a_poisoned_device_context_replaces_the_worker(bench: MakeBench):
    one = await bench()
    one.spare.append(Peer())
    (first,) = one.peers
    tasks = [one.infer() for _ in range(3)]
    first.fail(await first.next(), "700", "sticky")
    with pytest.raises(ServableFailed) as caught:
        await tasks[0]
    assert (caught.value.code, caught.value.fault_class) == ("700", "sticky")
    await eventually(lambda: first.process.poll() is not None, within_s=2, what="killed")
    first.die("SIGKILL")
    await eventually(lambda: len(one.peers) == 2, within_s=2)
    for task in tasks[1:]:
        one.peers[1].answer(await one.peers[1].next(), y=np.zeros(1))
        await task
    assert [fault[0] for fault in one.faults] == ["700"]


@pytest.mark.parametrize("fault", [("2", "memory"), ("-204", "unsupported"), ("X", "unknown")])
async def test_other_faults_keep_the_worker(bench: MakeBench, fault: tuple[str, str]):
    one = await bench()
    (peer,) = one.peers
    task = one.infer()
    peer.fail(await peer.next(), *fault)
    with pytest.raises(ServableFailed) as caught:
        await task
    assert (caught.value.code, caught.value.fault_class) == fault
    assert [told[:2] for told in one.faults] == [fault]
    again = one.infer()
    peer.answer(await peer.next(), y=np.zeros(1))
    await again
    assert one.pool.stats.restarts == 0


async def test_the_requests_own_fault_is_not_told(bench: MakeBench):
    one = await bench()
    task = one.infer()
    one.peers[0].fail(await one.peers[0].next(), "InvalidArgument", "request")
    with pytest.raises(BadInput):
        await task
    assert not one.faults


async def test_replacing_is_tried_again_with_growing_pauses(
    bench: MakeBench, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(pool_module, "BACKOFF_FIRST_S", 0.02)
    one = await bench()
    one.peers[0].die("SIGKILL")
    await eventually(lambda: one.pool.stats.last_error is not None, within_s=2)
    waiting = one.infer()
    assert one.pool.workers()[0].pid == 0
    one.spare.append(Peer())
    await eventually(lambda: len(one.peers) == 2, within_s=2)
    one.peers[1].answer(await one.peers[1].next(), y=np.zeros(1))
    await waiting


# --- the end ------------------------------------------------------------------------------------


async def test_retiring_gives_back_what_waits_and_answers_what_runs(bench: MakeBench):
    one = await bench()
    idle: list[bool] = []
    tasks = [one.infer() for _ in range(4)]
    await asyncio.sleep(0)
    one.pool.on_idle(lambda: idle.append(True))
    one.pool.retire()
    one.pool.retire()
    for task in tasks[2:]:
        with pytest.raises(ServableFailed):
            await task
    with pytest.raises(ServableFailed):
        await one.infer()
    assert one.pool.in_flight == 2
    assert not idle
    for task in tasks[:2]:
        one.peers[0].answer(await one.peers[0].next(), y=np.zeros(1))
        await task
    assert one.pool.idle.is_set()
    assert idle == [True]
    assert not one.faults


async def test_a_fault_may_retire_the_pool(bench: MakeBench):
    one = await bench()
    one.on_fault.append(one.pool.retire)
    tasks = [one.infer() for _ in range(5)]
    await one.peers[0].next()
    one.peers[0].die("SIGABRT")
    for task in tasks:
        with pytest.raises(ServableFailed):
            await task
    assert one.pool.stats.queued == 0
    assert one.pool.idle.is_set()


# --- real workers -------------------------------------------------------------------------------


async def test_workers_killed_under_load_cost_only_what_they_ran(tmp_path: Path):
    folder = make_mlp(tmp_path / "mlp")
    zygote = Zygote()
    workers = [await serving(zygote, folder) for _ in range(2)]
    faults: list[tuple[str, str, str, int]] = []

    def on_fault(report: FaultReport) -> bool:
        faults.append(told(report))
        return False

    pool = WorkerPool(
        ID, SIGNATURE, workers, make_worker=lambda: serving(zygote, folder),
        oversight=Oversight(on_fault=on_fault), queue=64,
    )  # fmt: skip
    loop = asyncio.get_running_loop()
    answered = failed = 0

    inputs = [rows(8, seed=n) for n in range(6)]
    before = [await pool.infer({"x": x}, deadline_s=loop.time() + 20) for x in inputs]

    async def client(n: int) -> None:
        nonlocal answered, failed
        x, expected = inputs[n], before[n].outputs
        while len(faults) < 4:
            try:
                answer = await pool.infer({"x": x}, deadline_s=loop.time() + 20)
            except ServableFailed:
                failed += 1
            else:
                answered += 1
                assert np.array_equal(*(next(iter(a.values())) for a in (answer.outputs, expected)))

    async def killer() -> None:
        for number in (signal.SIGKILL, signal.SIGSEGV, signal.SIGABRT, signal.SIGKILL):
            seen, enough = len(faults), answered + 5
            await eventually(lambda enough=enough: answered >= enough, within_s=10)
            await eventually(lambda: any(v.alive for v in pool.workers()), within_s=10)
            os.kill(next(v.pid for v in pool.workers() if v.alive), number)
            await eventually(lambda seen=seen: len(faults) > seen, within_s=10)

    async with asyncio.timeout(60):
        await asyncio.gather(killer(), *(client(n) for n in range(6)))
    assert [fault[0] for fault in faults] == ["SIGKILL", "SIGSEGV", "SIGABRT", "SIGKILL"]
    assert failed <= 4
    await pool.close()
    await zygote.close()


async def test_opening_and_closing_pools_leaves_nothing(tmp_path: Path):
    folder = make_mlp(tmp_path / "mlp")
    zygote = Zygote()
    await zygote.start()
    counts: list[int] = []
    for _ in range(4):
        worker = await serving(zygote, folder)
        pool = WorkerPool(ID, SIGNATURE, [worker], make_worker=zygote.spawn)
        loop = asyncio.get_running_loop()
        await pool.infer({"x": rows(5000)}, deadline_s=loop.time() + 10)
        await pool.close()
        counts.append(open_fds())
    assert len(set(counts)) == 1
    await zygote.close()


async def test_it_is_backed_up_while_requests_wait_for_a_worker_that_is_there(bench: MakeBench):
    one = await bench()
    (peer,) = one.peers
    first = one.infer()
    await asyncio.sleep(0)
    assert not one.pool.is_backed_up
    second = one.infer()
    await asyncio.sleep(0)
    assert one.pool.is_backed_up
    for task in (first, second):
        peer.answer(await peer.next(), y=np.zeros(1))
        await task
    assert not one.pool.is_backed_up


async def test_held_it_is_in_flight_but_keeps_nobody_waiting(bench: MakeBench) -> None:
    b = await bench()
    told: list[str] = []
    with b.pool.held(), b.pool.held():
        assert b.pool.in_flight == 2
        assert not b.pool.is_backed_up
        b.pool.on_idle(lambda: told.append("idle"))
        await asyncio.sleep(0)
        assert not told
        assert not b.pool.idle.is_set()
    assert told == ["idle"]
    assert b.pool.in_flight == 0
    assert b.pool.idle.is_set()
