"""The fleet in use: what changes when something is learnt."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from registry.names import ModelName, NodeId, Revision, Version
from router.errors import UnknownModel
from router.fleet.ejection import BASE_S, FAILURES
from router.fleet.probes import Vitals
from router.fleet.selection import ANY, Want
from router.rotation import Rotation
from tests.fleets import M, fleet_of, fold, node_record, put, status
from tests.gateways import document

A, B, C = (NodeId(node) for node in "abc")
REVISION = Revision(10)
SILENT = Vitals(answers=False, serves=False)
FINE = Vitals(answers=True, serves=True)


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def rotation(clock: Clock) -> Rotation:
    made = Rotation(clock=clock)
    made.publish(fleet_of("a", "b", "c"), {M: {REVISION: document()}})
    return made


def nodes(rotation: Rotation, want: Want = ANY) -> str:
    return "".join(rotation.candidates(M, want).nodes)


def test_a_document_that_comes_after_the_nodes() -> None:
    """In a dict that its owner goes on changing."""
    rotation, documents = Rotation(), {}
    rotation.publish(fleet_of("a"), documents)
    with pytest.raises(UnknownModel):
        rotation.table.route(M)
    documents[M] = {REVISION: document(limits={"timeout_s": 3})}
    rotation.publish(rotation.fleet, documents)
    assert rotation.table.route(M).live is not None
    assert rotation.table.route(M).limits.timeout_s == 3
    del documents[M]
    rotation.publish(rotation.fleet, documents)
    with pytest.raises(UnknownModel):
        rotation.table.route(M)


def test_probes_count_at_once(rotation: Rotation) -> None:
    rotation.observe(A, SILENT)
    assert nodes(rotation) == "bc"
    rotation.observe(A, FINE)
    assert nodes(rotation) == "abc"
    rotation.observe(NodeId("stranger"), SILENT)
    assert "stranger" not in rotation.vitals


def test_ejection_and_its_end(rotation: Rotation, clock: Clock) -> None:
    for _ in range(FAILURES):
        rotation.report(M, A, failed=True)
    assert nodes(rotation) == "bc"
    assert rotation.ejected(A) == [M]
    clock.now_s += BASE_S
    assert nodes(rotation) == "abc"


def test_a_node_that_was_silent_comes_back_without_its_record(rotation: Rotation) -> None:
    for _ in range(FAILURES):
        rotation.report(M, A, failed=True)
    rotation.observe(A, SILENT)
    rotation.observe(A, FINE)
    assert nodes(rotation) == "abc"


def test_another_process_under_the_name_starts_clean(rotation: Rotation) -> None:
    before = rotation.upstreams[A]
    rotation.observe(A, SILENT)
    again = node_record("a", started_at=datetime(2024, 5, 22, tzinfo=UTC))
    rotation.publish(fold([put(again)], rotation.fleet), {M: {REVISION: document()}})
    assert nodes(rotation) == "abc"
    assert rotation.upstreams[A] is not before
    assert rotation.upstreams[B] is not before


def test_a_node_that_is_forgotten(rotation: Rotation) -> None:
    rotation.observe(A, SILENT)
    rotation.publish(rotation.fleet.without_node(A), {M: {REVISION: document()}})
    assert nodes(rotation) == "bc"
    assert A not in rotation.upstreams
    assert A not in rotation.vitals


def test_an_address_that_is_none(rotation: Rotation) -> None:
    bad = put(node_record("a", http="ftp://a", started_at=datetime(2024, 5, 22, tzinfo=UTC)))
    rotation.publish(fold([bad], rotation.fleet), {M: {REVISION: document()}})
    picked = {rotation.pick(M, ANY) for _ in range(50)}
    assert picked == {rotation.upstreams[B], rotation.upstreams[C]}


def test_the_second_attempt_goes_elsewhere_or_nowhere(rotation: Rotation) -> None:
    for _ in range(30):
        other = rotation.pick(M, ANY, [A])
        assert other is not None
        assert other.id != A
    rotation.publish(fleet_of("a"), {M: {REVISION: document()}})
    assert rotation.pick(M, ANY, [A]) is None
    assert rotation.pick(ModelName("nobody"), ANY) is None


def test_what_nobody_has_is_asked_of_anybody(rotation: Rotation) -> None:
    assert rotation.pick(M, Want("pinned", Version("9"))) is not None


def test_the_least_busy_wins(rotation: Rotation) -> None:
    rotation.upstreams[A].in_flight = rotation.upstreams[B].in_flight = 9
    picked = [rotation.pick(M, ANY) for _ in range(300)]
    share = sum(1 for upstream in picked if upstream is rotation.upstreams[C]) / len(picked)
    assert share > 0.55  # two of three pairs have it


def test_rules_say_what_is_wanted() -> None:
    rules = [
        {"header": {"name": "X-C", "equals": "1"}},
        {"percent": 100},
    ]
    canary = status("b", "1", applied=11, states={"1": "LIVE", "2": "CANARY"}, canary=Version("2"))
    rotation = Rotation()
    rotation.publish(
        fold([put(canary)], fleet_of("a", "b")),
        {M: {Revision(11): document(canary={"version": "2", "rules": rules})}},
    )
    route = rotation.table.route(M)
    assert rotation.want(route, None, None, {"x-c": "1"}) == Want("canary", Version("2"))
    assert rotation.want(route, "1", None, {}) == Want("pinned", Version("1"))
    assert rotation.want(route, "9", None, {}) == ANY
    assert rotation.want(route, None, "stable", {}) == ANY
