"""The fleet folded from nodes' keys and status keys."""

from __future__ import annotations

from itertools import permutations

from registry.names import ModelName, NodeId, Revision, Version
from registry.store import Batch, KeyValue, Put
from router.fleet.members import Fleet
from tests.fleets import (
    KEYS,
    M,
    fleet_of,
    fold,
    node_gone,
    node_record,
    put,
    status,
    status_gone,
)

A = NodeId("a")


def test_a_node_and_what_it_serves() -> None:
    fleet = fleet_of("a", "b")
    assert fleet.members.keys() == {"a", "b"}
    assert fleet.reports[M][A].live == "1"
    assert fleet.reports[M][A].serves_default


def test_only_loaded_versions_with_a_worker_alive_serve() -> None:
    states = {"1": "LIVE", "2": "CANARY", "3": "READY", "4": "WARMING", "5": "FAILED",
              "6": "DRAINING", "7": "QUARANTINED"}  # fmt: skip
    report = fold([put(status("a", "1", states=states, canary=Version("2")))]).reports[M][A]
    assert report.loaded.keys() == {"1", "2", "3"}
    assert report.canary == "2"
    assert report.unavailable == {"5": "FAILED: digest differs", "7": "QUARANTINED: None"}
    dead = fold([put(status("a", "1", alive=False))]).reports[M][A]
    assert not dead.loaded
    assert not dead.serves_default


def test_a_standby_serves_where_nothing_is_live() -> None:
    said = status("a", None, states={"1": "STANDBY"}, standby=Version("1"))
    assert fold([put(said)]).reports[M][A].serves_default


def test_a_lease_that_ends_takes_nothing_away_whichever_key_is_seen_first() -> None:
    start = fleet_of("a")
    for events in permutations([node_gone("a", 7), status_gone("a", 7)]):
        fleet = fold(events, start)
        member, report = fleet.members[A], fleet.reports[M][A]
        assert not member.is_registered
        assert fleet.is_lost(report, member)


def test_a_status_taken_back_is_not_lost_with_the_lease() -> None:
    fleet = fold([status_gone("a", 5), node_gone("a", 9)], fleet_of("a"))
    assert not fleet.is_lost(fleet.reports[M][A], fleet.members[A])
    still_there = fold([status_gone("a", 5)], fleet_of("a"))
    assert not still_there.is_lost(still_there.reports[M][A], still_there.members[A])


def test_a_node_that_registers_again_is_whole_again() -> None:
    gone = fold([node_gone("a", 7), status_gone("a", 7)], fleet_of("a"))
    fleet = fold([put(node_record("a"), 8), put(status("a"), 8)], gone)
    assert fleet.members[A].is_registered
    assert fleet.reports[M][A].gone_at is None


def test_what_cannot_be_read_changes_nothing_and_is_told() -> None:
    start = fleet_of("a")
    bad = Batch(
        Revision(2),
        (
            Put(KeyValue(KEYS.node(A), b"{", Revision(2))),
            Put(KeyValue(KEYS.status(M, A), b"[]", Revision(2))),
            Put(KeyValue("/elsewhere", b"x", Revision(2))),
        ),
    )
    fleet, ignored = start.apply(bad, KEYS)
    assert fleet == start
    assert [record.key for record in ignored] == [KEYS.node(A), KEYS.status(M, A)]


def test_what_no_event_touched_is_the_same_object() -> None:
    start = fleet_of("a")
    other = put(status("a", model=ModelName("other")))
    fleet = fold([other], start)
    assert fleet.members is start.members
    assert fleet.reports[M] is start.reports[M]


def test_forgetting() -> None:
    fleet = fleet_of("a", "b")
    assert fleet.without_node(A) == fleet_of("b")
    assert fleet.without_node(A).without_node(NodeId("b")) == Fleet()
    assert fleet.without_model(M).reports == {}
