"""Transform processes with an installed package whose functions do what they should not."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator

import numpy as np
import psutil
import pytest
import pytest_asyncio

from paddlewheel.transforms.pool import TransformPool, installed
from registry.inference import Array, BadInput, DeadlineExceeded
from router.pipeline.errors import TransformFailed
from tests import transforms_package
from tests.eventually import eventually

pytestmark = pytest.mark.asyncio(loop_scope="module")

FOREVER, CRASH, RAISE, OTHER_DTYPE, ALL_GOOD_BUT_PID, SLOW, PRINT = range(1, 8)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def pool(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[TransformPool]:
    """Two processes."""
    site = transforms_package.write_package(tmp_path_factory.mktemp("site"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(site))
        patch.syspath_prepend(str(site))
        pool = TransformPool(2)
        await pool.prepare()
        try:
            yield pool
        finally:
            alive = pids(pool)
            await pool.close()
        assert not any(psutil.pid_exists(pid) for pid in alive)


def pids(pool: TransformPool) -> set[int]:
    return {process.pid for process in pool._all}


async def both_rest(pool: TransformPool) -> None:
    await eventually(lambda: len(pool._idle) == 2, within_s=30)


def row(first: float = 0.0, rows: int = 1) -> dict[str, Array]:
    x = np.zeros((rows, 64), np.float32)
    x[:, 0] = first
    return {"x": x}


async def run(
    pool: TransformPool, feeds: dict[str, Array], name: str = "naughty", within_s: float = 10.0
) -> dict[str, Array]:
    deadline_s = asyncio.get_running_loop().time() + within_s
    return dict(await pool.run(name, feeds, deadline_s=deadline_s))


async def pid(pool: TransformPool) -> int:
    return int((await run(pool, row()))["pid"])


async def test_what_is_installed_is_known_with_its_reasons(pool: TransformPool) -> None:
    assert set(pool.signatures) == transforms_package.USABLE
    assert set(installed()) >= transforms_package.USABLE | {"broken-import"}
    assert pool.missing("double") is None
    assert "SystemExit" in str(pool.missing("broken-import"))
    assert "no registry.transforms.Transform" in str(pool.missing("not-declared"))
    assert "missing" in str(pool.missing("not-there"))
    nowhere = str(pool.missing("nowhere"))
    assert "nowhere" in nowhere
    assert "keep-positive" in nowhere, "what is installed is named"


async def test_tensors_come_back_as_they_are(pool: TransformPool) -> None:
    x = np.random.default_rng(1).standard_normal((7, 64), dtype=np.float32)
    assert np.array_equal((await run(pool, {"x": x}, "double"))["x"], x * 2)
    none = (await run(pool, {"x": -np.abs(x)}, "keep-positive"))["x"]
    assert none.shape == (0, 64)
    assert none.dtype == np.float32
    raw = np.empty(1, object)
    raw[0] = x.tobytes()
    assert np.array_equal((await run(pool, {"raw": raw}, "decode"))["x"], x)
    texts = (await run(pool, {"y": np.ones((2, 3), np.float32)}, "tag"))["texts"]
    assert texts.tolist() == [b"tag 1", b"tag 1"]


async def test_a_value_error_is_the_requests_fault(pool: TransformPool) -> None:
    raw = np.empty(1, object)
    raw[0] = b"short"
    with pytest.raises(BadInput, match="rows of 256 bytes, got 5"):
        await run(pool, {"raw": raw}, "decode")
    with pytest.raises(BadInput, match="float32"):
        await run(pool, {"x": np.zeros((1, 64))}, "double")


@pytest.mark.parametrize(
    ("what", "said"),
    [
        (RAISE, "RuntimeError: it went wrong"),
        (OTHER_DTYPE, "want float32, got float64"),
        (ALL_GOOD_BUT_PID, "did not return 'pid'"),
    ],
)
async def test_a_failing_call_costs_no_process(pool: TransformPool, what: int, said: str) -> None:
    await both_rest(pool)
    before = pids(pool)
    with pytest.raises(TransformFailed, match=said):
        await run(pool, row(what))
    assert pids(pool) == before


async def test_what_it_prints_is_no_answer(pool: TransformPool) -> None:
    assert (await run(pool, row(PRINT)))["x"][0, 0] == PRINT


async def test_a_dying_process_is_replaced(pool: TransformPool) -> None:
    with pytest.raises(TransformFailed, match=r"SIGSEGV.*twice"):
        await run(pool, row(CRASH), within_s=30)
    await run(pool, row(), within_s=30)


async def test_a_call_survives_the_death_of_an_idle_process(pool: TransformPool) -> None:
    os.kill(await pid(pool), signal.SIGKILL)
    await run(pool, row(), within_s=30)


async def test_what_hangs_is_ended_at_its_deadline_and_others_go_on(pool: TransformPool) -> None:
    await both_rest(pool)
    began_s = time.monotonic()
    hung = asyncio.create_task(run(pool, row(FOREVER), within_s=0.6))
    await asyncio.sleep(0.05)
    beside = 0
    while not hung.done():
        await run(pool, row(), within_s=5)
        beside += 1
    with pytest.raises(DeadlineExceeded, match="its process was ended"):
        await hung
    assert time.monotonic() - began_s < 3
    assert beside > 5, "the other process served meanwhile"


async def test_a_caller_that_goes_away_costs_no_process(pool: TransformPool) -> None:
    async def both() -> set[int]:
        return {int(r["pid"]) for r in await asyncio.gather(*(run(pool, row(SLOW)) for _ in "ab"))}

    await both_rest(pool)
    before = await both()
    gone = [asyncio.create_task(run(pool, row(SLOW))) for _ in "abc"]
    await asyncio.sleep(0.05)
    for task in gone:
        task.cancel()
    await asyncio.gather(*gone, return_exceptions=True)
    assert await both() == before


async def test_the_event_loop_is_not_held_up(pool: TransformPool) -> None:
    """Two processes busy with Python, and the loop's turns stay short."""
    await both_rest(pool)
    loop = asyncio.get_running_loop()
    busy = [asyncio.create_task(run(pool, row(FOREVER), within_s=0.8)) for _ in "ab"]
    longest_s, last_s = 0.0, loop.time()
    while not all(task.done() for task in busy):
        await asyncio.sleep(0.005)
        longest_s, last_s = max(longest_s, loop.time() - last_s), loop.time()
    await asyncio.gather(*busy, return_exceptions=True)
    assert longest_s < 0.5
