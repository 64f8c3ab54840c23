"""Verdicts and the disk: a slow one delays nobody, and is heard in the end."""

from __future__ import annotations

import asyncio
import threading
import time
from pathlib import Path

import pytest

from registry.memory_store import MemoryStore
from registry.store import Unavailable
from tests.unit.manager_harness import managed
from tests.unit.test_verdicts import running, took_out


class Away(MemoryStore):
    async def get(self, key: str) -> None:
        raise Unavailable(key)


async def test_a_verdict_never_waits_for_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The request that led to it is waiting to be run on the standby."""
    synced = threading.Event()

    def slow_fsync(_descriptor: int) -> None:
        time.sleep(0.5)
        synced.set()

    async with managed(tmp_path) as node, running(node, Away(), tmp_path) as verdicts:
        monkeypatch.setattr("paddlewheel.verdicts.os.fsync", slow_fsync)
        slowest_s, before_s = 0.0, time.perf_counter()
        took_out(verdicts)
        async with asyncio.timeout(10):
            while not synced.is_set():
                await asyncio.sleep(0.005)
                now_s = time.perf_counter()
                slowest_s, before_s = max(slowest_s, now_s - before_s), now_s
        assert slowest_s < 0.4
    assert (tmp_path / "quarantines.json").exists()


async def test_what_was_not_saved_yet_is_saved_at_the_end(tmp_path: Path) -> None:
    async with managed(tmp_path) as node, running(node, Away(), tmp_path) as verdicts:
        await asyncio.sleep(0)
        took_out(verdicts)
        await asyncio.sleep(0)
    assert (tmp_path / "quarantines.json").exists()
