"""How a load ends what it had started."""

from __future__ import annotations

import asyncio
from typing import cast

import pytest

from loader.loading import end
from loader.worker import Worker

pytestmark = pytest.mark.looptime


class Slow:
    """A process that takes its time to be gone."""

    def __init__(self) -> None:
        self.is_killed = False

    def kill(self) -> None:
        self.is_killed = True

    async def close(self, timeout_s: float) -> None:
        await asyncio.sleep(timeout_s)


async def test_no_replica_outlives_a_load_that_is_cancelled_while_it_ends() -> None:
    workers = [Slow(), Slow(), Slow()]
    ending = asyncio.create_task(end(cast("list[Worker]", workers)))
    await asyncio.sleep(1)
    ending.cancel()
    await asyncio.gather(ending, return_exceptions=True)
    assert all(worker.is_killed for worker in workers)
