"""Documents that wait for the fleet's word: ready beside what serves, then a change of pointer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from loader.errors import NotAdmitted
from registry.names import Revision, Version
from registry.spec import ModelDocument
from tests.unit.manager_harness import MODEL, ManagedNode, document, managed, quarantine

pytestmark = pytest.mark.looptime

ONE = document("1")
TWO = document("2", "1")
TWO_FIT: Mapping[str, int] = {"cpu": 450}


def prepare(node: ManagedNode, document: ModelDocument, revision: int) -> None:
    node.manager.prepare(document, Revision(revision))


async def test_the_word_is_a_change_of_pointer(tmp_path: Path) -> None:
    async with managed(tmp_path) as node:
        await node.put_and_settle(ONE, 5)
        prepare(node, TWO, 6)
        await node.settle()
        assert (node.states, node.route.revision) == ("1 LIVE, 2 READY", 5)
        assert (await node.infer()).choice.servable.version == "1"
        assert (node.status.applied_revision, node.status.prepared_revision) == (5, 6)
        loads, fetches = len(node.world.workers), node.repository.fetches.total()
        node.put(TWO, 6)
        await node.passes(0.001)
        assert (node.states, node.route.revision) == ("1 STANDBY, 2 LIVE", 6)
        assert node.status.prepared_revision == 6
        node.put(ONE, 5)  # and back
        await node.passes(0.001)
        assert (node.live, node.route.revision, node.status.applied_revision) == ("1", 5, 5)
        assert (len(node.world.workers), node.repository.fetches.total()) == (loads, fetches)


async def test_back_with_a_source_that_is_no_more(tmp_path: Path) -> None:
    """The servables of the document before are known: nobody has to read them again."""
    async with managed(tmp_path) as node:
        await node.put_and_settle(ONE, 5)
        await node.put_and_settle(TWO, 6)
        node.world.fails("/models/1", "fetch", NotAdmitted("params", "gone"))
        await node.put_and_settle(ONE, 5)
        assert (node.live, node.route.revision) == ("1", 5)


async def test_the_word_comes_while_it_loads(tmp_path: Path) -> None:
    async with managed(tmp_path) as node:
        await node.put_and_settle(ONE, 5)
        node.world.takes("2", "load", 10)
        prepare(node, TWO, 6)
        await node.passes(5)
        assert node.status.prepared_revision == 5
        node.put(TWO, 6)
        await node.passes(6)
        assert (node.live, len(node.world.workers)) == ("2", 2)


async def test_what_is_no_longer_prepared_goes(tmp_path: Path) -> None:
    async with managed(tmp_path) as node:
        await node.put_and_settle(ONE, 5)
        prepare(node, TWO, 6)
        await node.settle()
        node.manager.drop_prepared(MODEL)
        await node.passes(1)
        assert (node.states, len(node.leased())) == ("1 LIVE", 1)
        assert node.status.prepared_revision == 5


async def test_a_newer_document_takes_the_place_of_what_is_prepared(tmp_path: Path) -> None:
    async with managed(tmp_path) as node:
        await node.put_and_settle(ONE, 5)
        node.world.takes("2", "load", 60)
        prepare(node, TWO, 6)
        await node.passes(1)
        prepare(node, document("3", "1"), 7)
        await node.passes(1)
        assert node.states == "1 LIVE, 3 READY"
        node.put(document("1", "3", limits={"queue": 9}), 8)
        await node.passes(1)
        assert (node.states, node.route.revision) == ("1 LIVE", 8)


async def test_one_that_fails_to_get_ready_changes_nothing(tmp_path: Path) -> None:
    async with managed(tmp_path) as node:
        await node.put_and_settle(ONE, 5)
        node.world.fails("2", "check", NotAdmitted("params", "cut short"))
        prepare(node, TWO, 6)
        await node.settle()
        assert (node.states, node.route.revision) == ("1 LIVE, 2 FAILED", 5)
        assert node.status.reason == "2 failed: params: cut short"
        assert node.status.prepared_revision == 5


async def test_a_document_still_on_its_way_comes_first(tmp_path: Path) -> None:
    async with managed(tmp_path) as node:
        node.world.takes("1", "load", 3)
        node.put(ONE, 5)
        await node.passes(1)
        prepare(node, TWO, 6)
        await node.passes(1)
        assert node.states == "1 LOADING"
        await node.passes(5)
        assert (node.states, node.route.revision) == ("1 LIVE, 2 READY", 5)


async def test_a_first_document_waits_without_making_the_node_unready(tmp_path: Path) -> None:
    async with managed(tmp_path) as node:
        prepare(node, ONE, 5)
        await node.settle()
        assert (node.states, node.live, node.route.required) == ("1 READY", None, False)
        assert (node.status.applied_revision, node.status.prepared_revision) == (None, 5)
        node.put(ONE, 5)
        await node.passes(0.001)
        assert (node.states, node.route.required) == ("1 LIVE", True)


async def test_nothing_is_prepared_before_the_base_is_known(tmp_path: Path) -> None:
    async with managed(tmp_path) as node:
        node.manager.await_base(MODEL)
        prepare(node, TWO, 6)
        await node.passes(5)
        assert (node.states, node.route.required) == ("", True)
        node.put(ONE, 5)
        await node.settle()
        assert (node.states, node.route.revision) == ("1 LIVE, 2 READY", 5)


async def test_what_served_last_serves_until_the_base_is_known(tmp_path: Path) -> None:
    async with managed(tmp_path) as node:
        node.manager.set_fallback(ONE, Version("1"), Revision(5))
        node.manager.await_base(MODEL)
        prepare(node, TWO, 6)
        await node.settle()
        assert (node.states, node.route.revision) == ("1 LIVE, 2 READY", 5)
        loads = len(node.world.workers)
        await node.put_and_settle(ONE, 5)
        assert (node.states, len(node.world.workers)) == ("1 LIVE, 2 READY", loads)


async def test_a_standby_makes_room_for_what_is_prepared(tmp_path: Path) -> None:
    async with managed(tmp_path, quotas_mb=TWO_FIT) as node:
        await node.put_and_settle(ONE, 5)
        await node.put_and_settle(TWO, 6)
        prepare(node, document("3", "2"), 7)
        await node.passes(5)
        assert (node.states, node.route.revision) == ("2 LIVE, 3 READY", 6)


async def test_what_does_not_fit_beside_what_serves_says_so(tmp_path: Path) -> None:
    async with managed(tmp_path, quotas_mb={"cpu": 250}) as node:
        await node.put_and_settle(ONE, 5)
        prepare(node, TWO, 6)
        await node.passes(1)
        assert node.states == "1 LIVE, 2 FETCHING"
        assert "waiting for memory: cpu: 202 MB wanted, 48 MB free" in str(
            node.of_version("2").reason
        )


async def test_what_is_prepared_gives_its_memory_back_to_what_is_to_serve(tmp_path: Path) -> None:
    async with managed(tmp_path, quotas_mb=TWO_FIT) as node:
        await node.put_and_settle(ONE, 5)
        prepare(node, document("3", "1"), 7)
        await node.passes(1)
        node.manager.set_fallback(document("2", "1"), Version("2"), Revision(4))
        node.world.close_s = 30  # the failed one's workers take so long to end
        node.quarantine(v1=quarantine())
        await node.passes(40)
        assert node.states == "1 QUARANTINED, 2 LIVE, 3 READY"
        loads = [worker.recipe.version for worker in node.world.workers if worker.recipe]
        assert loads == ["1", "3", "2", "3"]


async def test_a_quarantine_of_what_is_prepared(tmp_path: Path) -> None:
    async with managed(tmp_path) as node:
        await node.put_and_settle(ONE, 5)
        prepare(node, TWO, 6)
        await node.settle()
        node.quarantine(v2=quarantine())
        await node.settle()
        assert (node.states, node.status.prepared_revision) == ("1 LIVE, 2 QUARANTINED", 5)


async def test_the_document_is_deleted_while_another_is_prepared(tmp_path: Path) -> None:
    async with managed(tmp_path) as node:
        await node.put_and_settle(ONE, 5)
        prepare(node, TWO, 6)
        await node.settle()
        node.delete()
        await node.passes(1)
        assert (node.leased(), node.reserved_mb(), node.manager.views()) == ({}, 0, ())
