"""What does not work at once: tried again, fallen back from, never for ever in between."""

from __future__ import annotations

from pathlib import Path

import pytest

from loader.errors import FetchFailed, LoadFailed, NotAdmitted, SourceGone, WorkerDied
from loader.lifecycle import UNDERWAY
from loader.model import ModelView
from loader.zygote import ZygoteFailed
from registry.names import Revision, Version
from tests.unit.manager_harness import ManagedNode, document, managed

pytestmark = pytest.mark.looptime

CUT = NotAdmitted("params", "cut short")


def fall_back_on_1(node: ManagedNode) -> None:
    """Version 1, of the document of revision 3, was the last good one."""
    node.manager.set_fallback(document("1"), Version("1"), Revision(3))


@pytest.mark.parametrize("error", [ValueError("odd"), KeyError("odd"), MemoryError(), CUT])
@pytest.mark.parametrize(("what", "phase"), [("/models/2", "fetch"), ("2", "load")])
async def test_whatever_is_raised_the_servable_failed(
    tmp_path: Path, error: Exception, what: str, phase: str
) -> None:
    async with managed(tmp_path) as node:
        await node.put_and_settle(document("1"), 5)
        node.world.fails(what, phase, error)
        await node.put_and_settle(document("2", "1"), 6)
        assert node.states == "1 LIVE, 2 FAILED"
        await node.put_and_settle(document("3", "1"), 7)
        assert node.live == "3"


@pytest.mark.parametrize(
    ("what", "phase", "error"),
    [
        ("/models/2", "fetch", FetchFailed("no answer")),
        ("/models/2", "fetch", OSError("reset by peer")),
        ("2", "load", WorkerDied("SIGKILL")),
        ("2", "check", ZygoteFailed("ended")),
    ],
    ids=["source away", "network", "worker killed", "zygote gone"],
)
async def test_what_may_heal_is_tried_again(
    tmp_path: Path, what: str, phase: str, error: Exception
) -> None:
    async with managed(tmp_path) as node:
        await node.put_and_settle(document("1"), 5)
        node.world.fails(what, phase, error)
        await node.put_and_settle(document("2", "1"), 6)
        await node.passes(12)
        assert "2 FAILED" in node.states
        del node.world.steps[what, phase]
        await node.passes(30)
        assert node.live == "2"


async def test_what_cannot_heal_is_not_tried_again(tmp_path: Path) -> None:
    async with managed(tmp_path) as node:
        await node.put_and_settle(document("1"), 5)
        node.world.fails("2", "check", CUT)
        await node.put_and_settle(document("2", "1"), 6)
        workers = len(node.world.workers)
        await node.passes(1000)
        assert (node.states, len(node.world.workers)) == ("1 LIVE, 2 FAILED", workers)


@pytest.mark.parametrize(
    ("what", "phase", "within_s"),
    [("/models/2", "fetch", 60), ("file:///g.npz", "golden", 60), ("2", "load", 30)],
)
async def test_what_hangs_has_a_deadline(
    tmp_path: Path, what: str, phase: str, within_s: float
) -> None:
    async with managed(tmp_path, fetch_timeout_s=60, load_timeout_s=30) as node:
        await node.put_and_settle(document("1"), 5)
        node.world.waits(what, phase)
        node.put(document("2", "1", warmup={"golden": "file:///g.npz"}), 6)
        await node.passes(within_s + 1)
        assert node.states == "1 LIVE, 2 FAILED"


async def test_a_source_that_appears_later_is_looked_for_again(tmp_path: Path) -> None:
    """At a start the file system that it is on may not be mounted yet."""
    async with managed(tmp_path) as node:
        node.world.fails("/models/1", "fetch", SourceGone("/models/1 does not exist"))
        await node.put_and_settle(document("1"), 5)
        await node.passes(20)
        assert node.states == "1 FAILED"
        del node.world.steps["/models/1", "fetch"]
        await node.passes(61)
        assert node.live == "1"


async def test_the_fallback_is_not_given_up_for_each_new_try(tmp_path: Path) -> None:
    """It takes longer to load than the pause between two tries of the aspired version."""
    async with managed(tmp_path) as node:
        node.world.fails("/models/2", "fetch", FetchFailed("no answer"))
        node.world.takes("1", "load", 100)
        fall_back_on_1(node)
        node.put(document("2", "1"), 6)
        await node.passes(110)
        assert node.live == "1"
        assert len(node.world.workers) == 1


async def test_the_fallback_is_tried_again_after_a_new_document(tmp_path: Path) -> None:
    async with managed(tmp_path) as node:
        node.world.fails("/models/2", "fetch", FetchFailed("gone", retryable=False))
        node.world.fails("/models/1", "fetch", FetchFailed("no answer"))
        node.put(document("2", "1"), 6)
        fall_back_on_1(node)
        await node.passes(1)
        assert node.states == "1 FAILED, 2 FAILED"
        await node.put_and_settle(document("2", "1", limits={"queue": 3}), 7)
        del node.world.steps["/models/1", "fetch"]
        await node.passes(60)
        assert node.live == "1"


async def test_a_fallback_known_before_the_first_document_is_kept(tmp_path: Path) -> None:
    async with managed(tmp_path) as node:
        fall_back_on_1(node)
        await node.passes(5)
        node.world.fails("2", "check", CUT)
        await node.put_and_settle(document("2"), 6)
        assert node.live == "1"
        assert node.route.revision == node.status.applied_revision == 3
        assert node.status.reason == "2 failed: params: cut short"


async def test_what_was_fallen_back_on_serves_until_a_document_succeeds(tmp_path: Path) -> None:
    async with managed(tmp_path) as node:
        node.world.fails("2", "check", CUT)
        node.put(document("2", "1"), 6)
        fall_back_on_1(node)
        await node.settle()
        assert node.live == "1"
        fall_back_on_1(node)  # said again
        await node.settle()
        assert node.live == "1"
        await node.put_and_settle(document("1"), 7)
        assert (node.states, node.status.applied_revision) == ("1 LIVE", 7)


async def test_a_canary_that_is_fallen_back_on_is_the_canary_no_more(tmp_path: Path) -> None:
    async with managed(tmp_path) as node:
        await node.put_and_settle(document("2", canary="1"), 5)
        fall_back_on_1(node)
        await node.fail("/models/2")
        await node.passes(1)
        assert (node.live, node.route.canary) == ("1", None)


async def test_a_bug_met_by_one_model_leaves_the_others_alone(tmp_path: Path) -> None:
    def odd(view: ModelView) -> None:
        if view.name == "odd" and any(s.state not in UNDERWAY for s in view.servables):
            raise ZeroDivisionError

    async with managed(tmp_path) as node:
        node.told.faulty = odd
        await node.put_and_settle(document("1", model="odd"), 5)
        await node.put_and_settle(document("1"), 6)
        assert node.live == "1"


async def test_a_worker_that_cannot_be_replaced_is_asked_for_again(tmp_path: Path) -> None:
    async def refused() -> None:
        raise LoadFailed("no")

    async with managed(tmp_path) as node:
        await node.put_and_settle(document("1"), 5)
        node.world.spawn = refused
        node.world.alive()[0].die("SIGSEGV")
        await node.passes(5)
        view = node.manager.view(node.route.model)
        assert view is not None
        assert not view.can_serve
        node.world.spawn = None
        await node.passes(30)
        assert (await node.infer()).choice.servable == node.route.live
