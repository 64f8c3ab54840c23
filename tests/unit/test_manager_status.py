"""What a node says at each moment: readiness, status, last-good versions, limits in force."""

from __future__ import annotations

from pathlib import Path

import pytest

from loader.errors import LoadFailed, NotAdmitted
from registry.events import EventType
from registry.names import ModelName, Version
from tests.unit.manager_harness import (
    MODEL,
    ManagedNode,
    digest_of,
    document,
    managed,
    quarantine,
    sticky,
)

pytestmark = pytest.mark.looptime

CUT = NotAdmitted("params", "cut short")
BAD_2 = quarantine(digest_of("/models/2"))


def good(node: ManagedNode) -> list[tuple[str, int]]:
    return [(id.version, revision) for id, revision in node.told.good]


# --- readiness --------------------------------------------------------------------------------


@pytest.mark.parametrize("broken", ["1", "2"])
async def test_a_node_can_serve_while_one_of_live_and_standby_can(
    tmp_path: Path, broken: str
) -> None:
    async def refused() -> None:
        raise LoadFailed("no")

    async with managed(tmp_path) as node:
        await node.put_and_settle(document("1"), 5)
        await node.put_and_settle(document("2", "1"), 6)
        node.world.spawn = refused
        for worker in node.world.alive():
            if worker.content == f"/models/{broken}":
                worker.die("SIGSEGV")
        await node.passes(3)
        view = node.manager.view(MODEL)
        assert view is not None
        assert view.can_serve


# --- the document in force --------------------------------------------------------------------


async def test_limits_of_a_document_that_is_not_in_force_do_not_hold(tmp_path: Path) -> None:
    """A queue of one would refuse what the version in force could well answer."""
    async with managed(tmp_path) as node:
        await node.put_and_settle(document("1"), 5)
        node.world.fails("2", "check", CUT)
        await node.put_and_settle(document("2", "1", limits={"queue": 1, "timeout_s": 1}), 6)
        assert node.route.limits.timeout_s == 10
        node.world.run_s = 2
        served = await node.infer(), await node.infer()  # hang_s of the new one is 0.5
        assert {each.choice.servable.version for each in served} == {"1"}


async def test_limits_of_the_document_in_force_hold_for_every_version(tmp_path: Path) -> None:
    async with managed(tmp_path) as node:
        await node.put_and_settle(document("1"), 5)
        await node.put_and_settle(document("2", "1", limits={"timeout_s": 1}), 6)
        assert node.route.limits.timeout_s == 1
        assert node.states == "1 STANDBY, 2 LIVE"


async def test_the_revision_that_answers_is_the_applied_one(tmp_path: Path) -> None:
    async with managed(tmp_path) as node:
        await node.put_and_settle(document("1"), 5)
        node.world.takes("2", "load", 5)
        await node.put_and_settle(document("2", "1"), 6)
        status = node.status
        assert (node.route.revision, status.revision, status.applied_revision) == (5, 6, 5)
        assert status.reason == "2 is LOADING"
        await node.passes(6)
        assert (node.route.revision, node.status.applied_revision) == (6, 6)
        applied = [data["revision"] for event, _, data in node.told.events if _is_applied(event)]
        assert applied == [5, 6]


def _is_applied(event: EventType) -> bool:
    return event is EventType.CONFIG_APPLIED


# --- what is written without a step of the manager ----------------------------------------------


async def test_the_status_tells_of_a_worker_that_was_replaced(tmp_path: Path) -> None:
    async with managed(tmp_path) as node:
        await node.put_and_settle(document("1"), 5)
        node.world.alive()[0].die("SIGKILL")
        await node.passes(5)
        (servable,) = node.told.statuses[-1].servables
        (worker,) = servable.workers
        assert (worker.pid, worker.alive) == (node.world.alive()[0].pid, True)
        assert worker.restarts == 1


async def test_the_status_tells_of_faults_before_they_are_too_many(tmp_path: Path) -> None:
    async with managed(tmp_path) as node:
        await node.put_and_settle(document("1"), 5)
        await node.put_and_settle(document("2", "1"), 6)
        await node.fail("/models/2", times=2)
        errors = {s.version: dict(s.errors) for s in node.told.statuses[-1].servables}
        assert errors == {"1": {}, "2": {"700": 2}}


async def test_the_last_status_written_is_the_true_one(tmp_path: Path) -> None:
    async with managed(tmp_path) as node:
        await node.put_and_settle(document("1"), 5)
        await node.put_and_settle(document("2", canary="3"), 6)
        node.quarantine(v2=BAD_2)
        await node.passes(3)
        assert node.told.statuses[-1] == node.status


# --- last good --------------------------------------------------------------------------------


async def test_a_version_is_good_once_it_served_through_its_bake(tmp_path: Path) -> None:
    async with managed(tmp_path) as node:
        await node.put_and_settle(document("1", rollback={"bake_s": 10}), 5)
        await node.passes(9)
        assert good(node) == []
        await node.passes(3)
        assert good(node) == [("1", 5)]
        await node.put_and_settle(document("2", "1", rollback={"bake_s": 10}), 6)
        await node.passes(12)
        assert good(node) == [("1", 5), ("2", 6)]


async def test_without_a_bake_a_version_is_good_at_once(tmp_path: Path) -> None:
    async with managed(tmp_path) as node:
        await node.put_and_settle(document("1", rollback={"bake_s": 0}), 5)
        await node.passes(1)
        assert good(node) == [("1", 5)]


async def test_a_version_taken_out_in_its_bake_was_never_good(tmp_path: Path) -> None:
    async with managed(tmp_path) as node:
        await node.put_and_settle(document("1"), 5)
        await node.put_and_settle(document("2", "1"), 6)
        node.quarantine(v2=BAD_2)
        await node.passes(1000)
        assert [version for version, _ in good(node)] == ["1"]


async def test_a_version_that_fails_with_nothing_to_roll_back_to_is_not_good(
    tmp_path: Path,
) -> None:
    async with managed(tmp_path) as node:
        await node.put_and_settle(document("1", rollback={"bake_s": 10}), 5)
        node.world.always["/models/1"] = sticky
        await node.fail("/models/1", times=4)
        await node.passes(30)
        assert good(node) == []
        node.world.always.clear()
        await node.infer()
        await node.passes(3)
        assert good(node) == [("1", 5)]


async def test_models_without_a_document_are_not_waited_for(tmp_path: Path) -> None:
    """A quarantine record of a model that is not here makes no model of it."""
    async with managed(tmp_path) as node:
        node.manager.set_quarantined(ModelName("gone"), {Version("2"): BAD_2})
        await node.passes(3)
        assert all(view.aspired is None for view in node.manager.views())
        assert not node.told.routes.serving.table.models
