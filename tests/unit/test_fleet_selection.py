"""Which nodes may answer, and which one does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from registry.names import NodeId, Version
from router.fleet.members import Fleet
from router.fleet.probes import Vitals
from router.fleet.selection import ANY, SPILL, Want, candidates, choose
from tests.fleets import M, fleet_of, fold, node_gone, node_record, put, status, status_gone

SILENT = Vitals(answers=False, serves=False)
DRAINING = Vitals(answers=True, serves=False)
FAILING = Vitals(answers=True, serves=True, failing=frozenset({M}))
FINE = Vitals(answers=True, serves=True)


def chosen(
    fleet: Fleet,
    *,
    want: Want = ANY,
    ejected: str = "",
    zone: Mapping[str, str] | None = None,
    **vitals: Vitals,
) -> str:
    """``near|far`` as text, with ``!`` for panic."""
    seen = {NodeId(node): value for node, value in vitals.items()}
    out = frozenset(NodeId(node) for node in ejected)
    found = candidates(fleet, M, want, seen, out, zone or {})
    text = "".join(found.near) + ("|" + "".join(found.far) if found.far else "")
    return text + ("!" if found.is_panic else "")


def without(*nodes: str, of: Fleet) -> Fleet:
    return fold([e for n in nodes for e in (node_gone(n, 9), status_gone(n, 9))], of)


THREE = fleet_of("a", "b", "c")
MOVED = fold([status_gone(n, 5) for n in "ab"], THREE)
"""The model is placed on c alone now."""
LEAVING = fold([put(node_record("a", draining=True))], THREE)
CASES: dict[str, tuple[str, str]] = {
    "all": (chosen(THREE), "abc"),
    "a silent one is out": (chosen(THREE, a=SILENT), "bc"),
    "one that fails this model is out": (chosen(THREE, a=FAILING), "bc"),
    "one that drains by its probe is out": (chosen(THREE, a=DRAINING), "bc"),
    "one that drains by its key is out": (chosen(LEAVING), "bc"),
    "an ejected one is out": (chosen(THREE, ejected="a"), "bc"),
    "a deregistered one is out": (chosen(without("a", of=THREE)), "bc"),
    "two silent of three are no panic": (chosen(THREE, a=SILENT, b=SILENT), "c"),
    "two ejected of three are": (chosen(THREE, ejected="ab"), "abc!"),
    "two leases lost of three too": (chosen(without("a", "b", of=THREE)), "abc!"),
    "not when they went": (chosen(without("a", "b", of=THREE), a=SILENT, b=SILENT), "c"),
    "every lease lost": (chosen(without("a", "b", "c", of=THREE)), "abc!"),
    "every lease lost, one silent": (chosen(without("a", "b", "c", of=THREE), a=SILENT), "bc!"),
    "every lease lost, one drains": (chosen(without("a", "b", "c", of=THREE), a=DRAINING), "bc!"),
    "half seen: status gone, nodes not yet": (
        chosen(fold([status_gone(n, 9) for n in "abc"], THREE)), "abc!"),
    "a model that moved is not asked for where it was": (chosen(MOVED), "c"),
    "nobody answers: try all": (chosen(THREE, a=SILENT, b=SILENT, c=SILENT), "abc!"),
    "the last one leaves, and still takes requests": (chosen(fleet_of("a", draining=True)), "a!"),
    "the last one has left": (chosen(fleet_of("a", draining=True), a=SILENT), ""),
    "one of two is enough": (chosen(fleet_of("a", "b"), ejected="a"), "b"),
    "nobody": (chosen(Fleet()), ""),
}  # fmt: skip


@pytest.mark.parametrize(("got", "wanted"), CASES.values(), ids=CASES)
def test_candidates(got: str, wanted: str) -> None:
    assert got == wanted


def test_a_pinned_version_is_asked_for_where_it_is_loaded() -> None:
    states = {"1": "LIVE", "2": "READY"}
    fleet = fold([put(status("b", "1", states=states))], THREE)
    assert chosen(fleet, want=Want("pinned", Version("2"))) == "b"
    assert chosen(fleet, want=Want("pinned", Version("1"))) == "abc"
    assert chosen(fleet, want=Want("pinned", Version("9"))) == ""


def test_a_canary_is_asked_for_where_it_is_the_canary() -> None:
    states = {"1": "LIVE", "2": "CANARY"}
    fleet = fold([put(status("b", "1", states=states, canary=Version("2")))], THREE)
    fleet = fold([put(status("c", "1", states={"1": "LIVE", "2": "READY"}))], fleet)
    assert chosen(fleet, want=Want("canary", Version("2"))) == "b"


def test_nodes_of_the_own_zone_come_first() -> None:
    zoned: list[Any] = []
    for node, zone in (("a", "x"), ("b", "y"), ("c", "x")):
        zoned += [put(node_record(node, labels={"zone": zone})), put(status(node))]
    fleet = fold(zoned)
    assert chosen(fleet, zone={"zone": "x"}) == "ac|b"
    assert chosen(fleet, zone={"zone": "y"}) == "b|ac"
    assert chosen(fleet, zone={"zone": "z"}) == "abc"
    assert chosen(fleet) == "abc"


@pytest.mark.parametrize(
    ("near", "far", "chances", "place"),
    [
        ([3], [], (0.9, 0.9), 0),
        ([3, 1], [], (0.0, 0.0), 1),
        ([3, 1], [], (0.9, 0.0), 1),
        ([1, 1, 1], [], (0.5, 0.0), 1),  # equal: the first drawn
        ([0, 9, 5], [], (0.4, 0.0), 2),  # drawn 1 and 2, not 0
        ([], [2, 1], (0.0, 0.0), 1),
        ([SPILL - 1], [0], (0.0, 0.0), 0),
        ([SPILL], [0], (0.0, 0.0), 1),
        ([SPILL], [1], (0.0, 0.0), 0),
    ],
)
def test_the_less_busy_of_two(
    near: list[int], far: list[int], chances: tuple[float, float], place: int
) -> None:
    assert choose(near, far, chances) == place
