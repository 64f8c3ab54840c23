"""Loads that give way to requests: the rule, and who is stopped when."""

from __future__ import annotations

import asyncio

import pytest

from loader.courtesy import PAUSE_MAX_S, RUN_MIN_S, TICK_S, Courtesy, is_to_pause
from tests.eventually import eventually


class Loading:
    """A worker that is made ready, as far as `Courtesy` sees it."""

    def __init__(self) -> None:
        self.is_paused = False
        self.pauses = 0

    def pause(self) -> None:
        self.is_paused = True
        self.pauses += 1

    def resume(self) -> None:
        self.is_paused = False


@pytest.mark.parametrize(
    ("is_paused", "is_waited", "for_s", "wanted"),
    [
        (False, False, 1.0, False),
        (False, True, RUN_MIN_S / 2, False),
        (False, True, RUN_MIN_S, True),
        (True, True, PAUSE_MAX_S / 2, True),
        (True, True, PAUSE_MAX_S, False),
        (True, False, 0.0, False),
    ],
)
def test_the_rule(is_paused: bool, is_waited: bool, for_s: float, wanted: bool) -> None:
    assert is_to_pause(is_paused=is_paused, is_waited=is_waited, for_s=for_s) is wanted


async def test_it_stands_still_while_requests_wait_and_runs_when_none_does() -> None:
    waited = True
    courtesy, worker = Courtesy(lambda: waited), Loading()
    with courtesy.of(worker):
        await eventually(lambda: worker.is_paused, within_s=1, what="a pause")
        waited = False
        await eventually(lambda: not worker.is_paused, within_s=1, what="its end")


async def test_whoever_waits_a_load_gets_on() -> None:
    courtesy, worker = Courtesy(lambda: True), Loading()
    with courtesy.of(worker):
        await eventually(lambda: worker.pauses >= 3, within_s=2, what="three pauses")
    assert not worker.is_paused


async def test_a_second_load_joins_a_pause_and_no_timer_is_left() -> None:
    asked = 0

    def is_waited() -> bool:
        nonlocal asked
        asked += 1
        return True

    courtesy, first, second = Courtesy(is_waited), Loading(), Loading()
    with courtesy.of(first):
        await eventually(lambda: first.is_paused, within_s=1, what="a pause")
        with courtesy.of(second):
            assert second.is_paused
        assert not second.is_paused
    assert not first.is_paused
    before = asked
    await asyncio.sleep(5 * TICK_S)
    assert asked == before
