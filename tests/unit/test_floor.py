"""Requests that wait for the document they ask for, and what a gateway makes of answers."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import orjson
import pytest

from registry.names import ModelName, NodeId, Revision, Version
from registry.rollouts import Phase, RolloutRecord
from registry.spec import ModelDocument, parse_model
from router import floor as floor_module
from router.errors import BadRequest
from router.fleet.floor import floor_of, raises_floor
from router.fleet.selection import ANY, Want
from router.floor import Behind, FloorGate, parse_floor
from router.rotation import Rotation
from router.table import PINNED, Route, RouteTable
from tests.fleets import M, fold, node_record, put, status

# --- a node's gate ----------------------------------------------------------------------------


class Node:
    def __init__(self, revision: int) -> None:
        self.table = RouteTable()
        self.gate = FloorGate(lambda: self.table)
        self.publish(revision)

    def publish(self, revision: int) -> None:
        self.table = self.table.with_route(Route(M, None, revision=Revision(revision)))
        self.gate.table_changed()

    def wait(self, floor: int, within_s: float = 10.0) -> asyncio.Task[None]:
        return asyncio.create_task(self.gate.reach(M, Revision(floor), within_s=within_s))


@pytest.mark.looptime
async def test_a_request_waits_for_its_document() -> None:
    node = Node(10)
    await node.wait(10)
    waiting = [node.wait(11), node.wait(12)]
    await asyncio.sleep(0.5)
    node.publish(11)
    await waiting[0]
    await asyncio.sleep(0)
    assert not waiting[1].done()
    node.publish(13)
    await waiting[1]


@pytest.mark.looptime
@pytest.mark.parametrize(("given_s", "waited_s"), [(0.25, 0.25), (1.0, 1.0), (600.0, 1.0)])
async def test_it_waits_no_longer_than_a_second_or_its_deadline(
    given_s: float, waited_s: float
) -> None:
    node, loop = Node(10), asyncio.get_running_loop()
    began_s = loop.time()
    with pytest.raises(Behind, match="revision 10 is in force here, 11 is wanted") as refused:
        await node.wait(11, given_s)
    assert loop.time() - began_s == pytest.approx(waited_s, abs=0.01)
    assert refused.value.revision == 10


@pytest.mark.looptime
async def test_tables_of_other_models_end_no_wait() -> None:
    node = Node(10)
    waiting = node.wait(11)
    for _ in range(50):
        await asyncio.sleep(0.01)
        node.publish(10)
    assert not waiting.done()
    with pytest.raises(Behind):
        await waiting


@pytest.mark.looptime
async def test_not_everybody_can_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(floor_module, "WAITING_MAX", 3)
    node = Node(10)
    waiting = [node.wait(11) for _ in range(3)]
    await asyncio.sleep(0.1)
    with pytest.raises(Behind):
        await asyncio.wait_for(node.wait(11), 0.01)
    node.publish(11)
    await asyncio.gather(*waiting)
    await node.wait(11)


@pytest.mark.looptime
async def test_a_client_that_goes_away_waits_no_more() -> None:
    node = Node(10)
    waiting, other = node.wait(11), node.wait(11)
    await asyncio.sleep(0.1)
    waiting.cancel()
    await asyncio.sleep(0.1)
    node.publish(11)
    await other


async def test_an_unknown_model_is_not_waited_for() -> None:
    await Node(10).gate.reach("other", Revision(99), within_s=10)


@pytest.mark.parametrize("text", ["", "-1", "+1", "1.0", "1e3", "0x10", "x", "1 2", "٣", "9" * 20])
def test_a_floor_that_is_none(text: str) -> None:
    with pytest.raises(BadRequest, match="X-Min-Config-Revision"):
        parse_floor(text)


def test_a_floor() -> None:
    assert parse_floor(" 17 ") == 17


# --- a gateway's floors -------------------------------------------------------------------------


def document(strategy: str | None) -> ModelDocument:
    rollout: Mapping[str, Any] = {"strategy": strategy} if strategy else {}
    if strategy == "waves":
        rollout = {"strategy": "waves", "waves": [{"percent": 50}]}
    text = orjson.dumps(
        {
            "apiVersion": "paddlewheel/v1", "kind": "Model", "metadata": {"name": M},
            "spec": {
                "live": "1", "versions": [{"version": "1", "source": "/m/1"}], "rollout": rollout,
            },
        }
    )  # fmt: skip
    return parse_model(text, name=M)


def record(phase: str, *, strategy: str = "barrier", revision: int = 12) -> RolloutRecord:
    return RolloutRecord.model_validate(
        {
            "model": M, "revision": revision, "previous": 10, "strategy": strategy,
            "phase": phase, "since": datetime.now(UTC),
        }
    )  # fmt: skip


@pytest.mark.parametrize(
    ("phase", "strategy", "floor"),
    [
        ("committed", "barrier", 12),
        ("preparing", "barrier", 0),
        ("aborted", "barrier", 0),
        ("committed", "waves", 0),
        ("committed", "immediate", 0),
    ],
)
def test_the_coordinators_word(phase: str, strategy: str, floor: int) -> None:
    assert floor_of(record(phase, strategy=strategy)) == floor


@pytest.mark.parametrize(
    ("known", "revision", "raises"),
    [
        ({10: "barrier"}, 10, True),
        ({10: "immediate", 12: "barrier"}, 10, False),
        ({10: "barrier", 12: "waves"}, 12, False),
        ({10: "barrier"}, 12, False),  # not heard of yet: the answer says what it is
        ({10: None}, 12, False),
        ({}, 12, False),
    ],
)
def test_which_documents_raise_it(
    known: Mapping[int, str | None], revision: int, raises: bool
) -> None:
    documents = {Revision(r): document(strategy) for r, strategy in known.items()}
    assert raises_floor(documents, Revision(revision)) is raises
    assert Phase.COMMITTED


class Gateway:
    """applied and prepared revisions of each node."""

    def __init__(self, *, strategy: str = "barrier", **nodes: tuple[int, int]) -> None:
        self.rotation = Rotation()
        self.documents = {M: {Revision(10): document(strategy), Revision(12): document(strategy)}}
        self.say(**nodes)

    def say(self, rollout: RolloutRecord | None = None, /, **nodes: tuple[int, int]) -> None:
        fleet = fold(
            (
                event
                for node, (applied, prepared) in nodes.items()
                for event in (
                    put(node_record(node)),
                    put(status(node, applied=applied, prepared_revision=Revision(prepared))),
                )
            ),
            self.rotation.fleet,
        )
        rollouts = {M: rollout} if rollout is not None else {}
        self.rotation.publish(fleet, self.documents, rollouts)

    def answers(
        self, node: str, revision: int, floor: int = 0, *, is_barrier: bool = False
    ) -> bool:
        return self.rotation.answered_from(
            M, NodeId(node), str(revision), floor=Revision(floor), is_barrier=is_barrier
        )

    def shown(self) -> tuple[tuple[str, ...], int, bool]:
        found = self.rotation.default_candidates(M)
        assert self.rotation.floor(M, ANY) == found.floor
        return found.nodes, found.floor, found.is_panic


def test_an_answer_raises_the_floor_and_leaves_out_who_is_under_it() -> None:
    gateway = Gateway(a=(10, 12), b=(10, 12), c=(10, 10))
    assert gateway.shown() == (("a", "b", "c"), 0, False)
    gateway.answers("a", 12)
    assert gateway.shown() == (("a", "b"), 12, False)
    gateway.answers("b", 10)  # sent before that
    assert gateway.shown() == (("a", "b"), 12, False)
    gateway.say(c=(12, 12))
    assert gateway.shown() == (("a", "b", "c"), 12, False)


def test_the_word_raises_it_before_any_answer() -> None:
    gateway = Gateway(a=(10, 12), b=(10, 10))
    gateway.say(record("committed"))
    assert gateway.shown() == (("a",), 12, False)


def test_a_node_found_under_it_is_out_until_it_says_something_new() -> None:
    gateway = Gateway(a=(10, 12), b=(12, 12))
    gateway.answers("b", 12)
    assert gateway.answers("a", 10, floor=12)
    assert gateway.shown() == (("b",), 12, False)
    assert gateway.rotation.is_behind(M, NodeId("a"))
    gateway.say(a=(12, 12))
    assert gateway.shown() == (("a", "b"), 12, False)


def test_where_nobody_reaches_it_an_older_answer_is_better_than_none() -> None:
    gateway = Gateway(a=(10, 10), b=(10, 10))
    gateway.say(record("committed"))
    assert gateway.shown() == (("a", "b"), 0, True)
    gateway.say(record("committed"), a=(12, 12))
    assert gateway.shown() == (("a",), 12, False)


def test_who_has_answered_from_it_has_it_whatever_it_said_before() -> None:
    """etcd tells of the document first, and of the nodes' new statuses later."""
    gateway = Gateway(a=(10, 10), b=(10, 10))
    gateway.answers("a", 12)
    assert gateway.shown() == (("a",), 12, False)
    gateway.say(record("committed"))
    assert gateway.shown() == (("a",), 12, False)


def test_a_gateway_cut_off_from_etcd_goes_by_what_nodes_answer() -> None:
    """What they last said of themselves is older than the document: they are asked."""
    gateway = Gateway(strategy="immediate", a=(10, 10), b=(10, 10), c=(10, 10))
    gateway.answers("a", 15)
    assert gateway.shown() == (("a", "b", "c"), 0, False)
    gateway.answers("a", 15, is_barrier=True)
    gateway.answers("a", 16, is_barrier=True)
    assert gateway.shown() == (("a", "b", "c"), 16, False)
    assert gateway.answers("b", 10, floor=16)
    assert gateway.shown() == (("a", "c"), 16, False)
    assert gateway.answers("c", 10, floor=16)
    assert gateway.answers("a", 10, floor=16)
    assert gateway.shown() == (("a", "b", "c"), 0, True)
    gateway.answers("b", 16, is_barrier=True)
    assert gateway.shown() == (("b",), 16, False)


def test_other_strategies_have_none() -> None:
    gateway = Gateway(strategy="waves", a=(10, 12), b=(12, 12))
    gateway.answers("b", 12)
    gateway.say(record("committed", strategy="waves"))
    assert gateway.shown() == (("a", "b"), 0, False)


def test_a_pinned_version_has_none() -> None:
    gateway = Gateway(a=(12, 12), b=(10, 10))
    gateway.answers("a", 12)
    found = gateway.rotation.candidates(M, Want(PINNED, Version("1")))
    assert (found.nodes, found.floor) == (("a", "b"), 0)


def test_a_floor_goes_with_its_document() -> None:
    gateway = Gateway(a=(12, 12), b=(10, 10))
    gateway.answers("a", 12)
    documents, gateway.documents = gateway.documents, {}
    gateway.say()
    gateway.documents = documents
    gateway.say()
    assert gateway.shown() == (("a", "b"), 0, False)


@pytest.mark.parametrize("text", ["", "x", "-5", "1" * 25, "٣"])
def test_a_revision_that_is_none_changes_nothing(text: str) -> None:
    gateway = Gateway(a=(10, 12), b=(10, 12))
    assert not gateway.rotation.answered_from(M, NodeId("a"), text, floor=Revision(10))
    assert gateway.rotation.floor(ModelName("m"), ANY) == 0
