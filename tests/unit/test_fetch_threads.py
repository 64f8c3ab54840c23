from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial

import pytest

from loader.fetch_threads import FetchThreads
from tests.eventually import eventually

NEVER_S = 60.0


@pytest.fixture
def release() -> Iterator[threading.Event]:
    event = threading.Event()
    yield event
    event.set()


async def test_results_and_errors() -> None:
    threads = FetchThreads()
    assert await threads.run(lambda: 7) == 7
    with pytest.raises(ZeroDivisionError):
        await threads.run(lambda: 1 // 0)


async def test_a_few_at_once(release: threading.Event) -> None:
    threads = FetchThreads(2, patience_s=NEVER_S)
    running: list[int] = []

    def work(number: int) -> int:
        running.append(number)
        release.wait(5)
        return number

    tasks = [asyncio.create_task(threads.run(partial(work, number))) for number in range(5)]
    await eventually(lambda: len(running) == 2, within_s=2)
    await asyncio.sleep(0.05)
    assert running == [0, 1]
    release.set()
    assert await asyncio.gather(*tasks) == [0, 1, 2, 3, 4]


async def test_nobody_waits_for_long_behind_those_that_hang(release: threading.Event) -> None:
    threads = FetchThreads(2, patience_s=0.05)
    stuck = [asyncio.create_task(threads.run(release.wait)) for _ in range(4)]
    assert await asyncio.wait_for(threads.run(lambda: "done"), 2) == "done"
    assert not any(task.done() for task in stuck)
    # Nor does what was given up keep a place.
    for task in stuck:
        task.cancel()
    await asyncio.gather(*stuck, return_exceptions=True)
    patient = FetchThreads(1, patience_s=NEVER_S)
    given_up = asyncio.create_task(patient.run(release.wait))
    await asyncio.sleep(0.02)
    given_up.cancel()
    assert await asyncio.wait_for(patient.run(lambda: "done"), 2) == "done"


def test_a_process_ends_beside_one_that_hangs() -> None:
    script = """
import asyncio, threading
from loader.fetch_threads import FetchThreads

async def main():
    threads = FetchThreads()
    task = asyncio.create_task(threads.run(threading.Event().wait))
    await asyncio.sleep(0.05)
    task.cancel()

asyncio.run(main())
"""
    assert subprocess.run([sys.executable, "-c", script], timeout=10).returncode == 0
