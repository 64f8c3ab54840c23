"""What a node's status says about a document."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest

from paddlewheel.cli.fleet_view import Fleet
from paddlewheel.cli.verdict import BAD, judge, view
from registry.keys import Keys
from registry.names import ModelName, NodeId, Revision, Version
from registry.records import Intent, ModelStatus, NodeRecord, Quarantine
from registry.store import Delete, KeyValue, Put

M, N = ModelName("m"), NodeId("n")
DOCUMENT = b"""\
apiVersion: paddlewheel/v1
kind: Model
metadata: {name: m}
spec:
  live: "2"
  versions: [{version: "1", source: /m/1}, {version: "2", source: /m/2}]
  placement: {labels: {zone: a}}
"""
AT = datetime(2024, 5, 21, tzinfo=UTC)


def servable(version: str, state: str, reason: str | None = None) -> dict[str, Any]:
    return {"model": M, "version": version, "state": state, "reason": reason}


CASES: dict[str, tuple[dict[str, Any] | None, str]] = {
    "no status": (None, "unseen: has seen nothing, not 9"),
    "an older document": ({"revision": 8, "applied_revision": 8}, "unseen: has seen 8, not 9"),
    "refused, one line": (
        {"revision": 9, "accepted": False, "error": "memory: want 5 MB"},
        "refused: memory: want 5 MB",
    ),
    "refused, with all errors": (
        {
            "revision": 9,
            "accepted": False,
            "error": "x",
            "errors": [
                {"path": "spec.live", "line": 5, "message": "no"},
                {"path": "", "message": "bad"},
            ],
        },
        "refused: spec.live (line 5): no; document: bad",
    ),
    "loading": (
        {
            "revision": 9,
            "applied_revision": 8,
            "live": "1",
            "servables": [servable("1", "LIVE"), servable("2", "WARMING")],
        },
        "loading: 2 WARMING",
    ),
    "failed": (
        {
            "revision": 9,
            "applied_revision": 8,
            "servables": [servable("2", "FAILED", "params: cut short")],
        },
        "failed: 2 FAILED: params: cut short",
    ),
    "an old servable failed, the new bytes of that version load": (
        {
            "revision": 9,
            "servables": [servable("2", "FAILED", "old"), servable("2", "LOADING")],
        },
        "loading: 2 FAILED, 2 LOADING",
    ),
    "the new bytes of the version that serves failed": (
        {
            "revision": 9,
            "applied_revision": 8,
            "live": "2",
            "servables": [servable("2", "LIVE"), servable("2", "FAILED", "digest")],
        },
        "failed: 2 FAILED: digest",
    ),
    "a version nobody asks for failed": (
        {"revision": 9, "applied_revision": 9, "live": "2", "servables": [servable("1", "FAILED")]},
        "converged",
    ),
    "ready, held by a rollout": (
        {
            "revision": 9,
            "applied_revision": 8,
            "prepared_revision": 9,
            "live": "1",
            "reason": "rollout: waiting for the commit",
            "servables": [servable("1", "LIVE"), servable("2", "READY")],
        },
        "held: rollout: waiting for the commit",
    ),
    "loading, held by a rollout": (
        {
            "revision": 9,
            "applied_revision": 8,
            "prepared_revision": 8,
            "live": "1",
            "reason": "rollout: waiting for the commit",
            "servables": [servable("1", "LIVE"), servable("2", "LOADING")],
        },
        "loading: 2 LOADING",
    ),
    "its rollout aborted": (
        {
            "revision": 9,
            "applied_revision": 8,
            "live": "1",
            "reason": "rollout aborted: 1 of 3 nodes can't take it",
            "servables": [servable("1", "LIVE")],
        },
        "aborted: serves 1: rollout aborted: 1 of 3 nodes can't take it",
    ),
    "its rollout aborted, by this node": (
        {
            "revision": 9,
            "applied_revision": 8,
            "reason": "rollout aborted: x",
            "servables": [servable("2", "FAILED", "params: cut short")],
        },
        "failed: 2 FAILED: params: cut short",
    ),
    "in force": ({"revision": 9, "applied_revision": 9, "live": "2"}, "converged"),
    "in force, rolled back": (
        {"revision": 9, "applied_revision": 9, "live": "1", "reason": "quarantined: code 700"},
        "deviates: serves 1: quarantined: code 700",
    ),
    "in force, rolled back, the servable still there": (
        {
            "revision": 9,
            "applied_revision": 9,
            "live": "1",
            "servables": [servable("1", "LIVE"), servable("2", "QUARANTINED", "code 700")],
        },
        "deviates: serves 1: 2 QUARANTINED: code 700",
    ),
    "a reason while it loads is no refusal": (
        {
            "revision": 9,
            "applied_revision": 9,
            "live": "1",
            "reason": "2 is LOADING",
            "servables": [servable("1", "LIVE"), servable("2", "LOADING")],
        },
        "loading: 2 LOADING",
    ),
    "in force but for a version that failed": (
        {
            "revision": 9,
            "applied_revision": 9,
            "live": "1",
            "reason": "2 failed: x",
            "servables": [servable("1", "LIVE"), servable("2", "FAILED", "x")],
        },
        "failed: 2 FAILED: x",
    ),
    "in force, not switched yet": (
        {"revision": 9, "applied_revision": 9, "live": "1"},
        "loading: serves 1",
    ),
    "a canary that should be gone": (
        {"revision": 9, "applied_revision": 9, "live": "2", "canary": "3"},
        "loading: serves 2 and canary 3",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_judge(case: str) -> None:
    fields, wanted = CASES[case]
    status = None if fields is None else ModelStatus(model=M, node=N, **fields)
    assert str(judge(status, Revision(9), Intent(live=Version("2")))) == wanted


def fleet_with(*nodes: NodeRecord, **status: Any) -> Fleet:
    fleet = Fleet(Keys())
    fleet.take(Put(KeyValue(fleet.keys.model(M), DOCUMENT, Revision(9))))
    for node in nodes:
        fleet.take(Put(KeyValue(fleet.keys.node(node.id), node.to_json(), Revision(1))))
        record = ModelStatus(model=M, node=node.id, **status)
        fleet.take(Put(KeyValue(fleet.keys.status(M, node.id), record.to_json(), Revision(10))))
    return fleet


def node(name: str, *, draining: bool = False, zone: str = "a") -> NodeRecord:
    return NodeRecord(
        id=NodeId(name), http="http://h", started_at=AT, draining=draining, labels={"zone": zone}
    )


DONE: dict[str, Any] = {"revision": 9, "applied_revision": 9, "live": "2"}
NOT_YET: dict[str, Any] = {"revision": 9, "applied_revision": 8, "live": "1"}


def test_converged_when_every_node_is_there() -> None:
    assert view(fleet_with(node("a"), node("b"), **DONE), M).converged
    assert not view(fleet_with(node("a"), node("b"), **NOT_YET), M).converged


def test_nothing_has_converged_without_a_node() -> None:
    assert not view(fleet_with(), M).converged


def test_a_draining_node_and_one_elsewhere_are_not_waited_for() -> None:
    fleet = fleet_with(node("b", draining=True), node("c", zone="b"), **NOT_YET)
    assert view(fleet, M).verdicts == {}
    assert len(view(fleet, M).statuses) == 2


def test_a_node_without_a_status_is_waited_for() -> None:
    fleet = fleet_with(node("a"), **DONE)
    fleet.take(Put(KeyValue(fleet.keys.node(NodeId("b")), node("b").to_json(), Revision(11))))
    assert not view(fleet, M).converged


def test_json_shape() -> None:
    fleet = fleet_with(node("a"), **DONE)
    held = Quarantine(reason="code 700", code=700, nodes=(N,), at=AT)
    fleet.take(Put(KeyValue(fleet.keys.quarantine(M, Version("3")), held.to_json(), Revision(12))))
    shape = view(fleet, M).as_json()
    assert shape["document_revision"] == 9
    assert shape["intent"] == {"live": "2", "canary": None}
    assert shape["nodes"][0]["node"] == "a"
    assert shape["quarantine"][0]["version"] == "3"
    assert shape["converged"] is True


def test_a_refused_document_leaves_the_one_in_force_intended() -> None:
    fleet = fleet_with(node("a"), **DONE, intent=Intent(live=Version("2")))
    fleet.take(Put(KeyValue(fleet.keys.model(M), b"nonsense", Revision(13))))
    shown = view(fleet, M)
    assert shown.problem
    assert shown.as_json()["intent"] == {"live": "2", "canary": None}


def test_a_deleted_document_is_shown_until_nodes_are_done() -> None:
    fleet = fleet_with(node("a"), **DONE)
    fleet.take(Delete(fleet.keys.model(M), Revision(13)))
    assert fleet.models() == [M]
    assert view(fleet, M).revision is None
    assert not view(fleet, M).converged
    fleet.take(Delete(fleet.keys.status(M, NodeId("a")), Revision(14)))
    assert fleet.models() == []


def test_records_that_cannot_be_read_count_as_absent() -> None:
    fleet = fleet_with(node("a"), **DONE)
    fleet.take(Put(KeyValue(fleet.keys.node(NodeId("a")), b"\xff{", Revision(15))))
    fleet.take(Put(KeyValue("/paddlewheel/else", b"?", Revision(16))))
    assert fleet.nodes == {}


def test_a_broken_document_says_why() -> None:
    fleet = fleet_with(node("a"), **DONE)
    fleet.take(Put(KeyValue(fleet.keys.model(M), b"a: [", Revision(17))))
    seen = view(fleet, M)
    assert seen.problem
    assert not seen.converged
    assert {verdict.standing for verdict in seen.verdicts.values()}.isdisjoint(BAD)
