"""Whatever happens to a fleet, the promises about who is asked hold."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from registry.names import NodeId
from registry.store import Event
from router.fleet.ejection import SHARE_MAX, Ejections
from router.fleet.members import Fleet
from router.fleet.probes import Vitals
from router.fleet.selection import ANY, candidates, choose
from tests.fleets import M, fold, node_gone, node_record, put, status, status_gone

NODES = "abcde"
node_ids = st.sampled_from(NODES)
vitals = st.builds(
    Vitals, st.booleans(), st.booleans(), st.sampled_from((frozenset(), frozenset({M})))
)


@st.composite
def events(draw: st.DrawFn) -> Event:
    node, revision = draw(node_ids), draw(st.integers(1, 4))
    kind = draw(st.sampled_from(("node", "drain", "status", "nothing", "node gone", "gone")))
    match kind:
        case "node" | "drain":
            return put(node_record(node, draining=kind == "drain"))
        case "status":
            return put(status(node))
        case "nothing":
            return put(status(node, None))
        case "node gone":
            return node_gone(node, revision)
        case _:
            return status_gone(node, revision)


fleets = st.lists(events(), max_size=25).map(fold)


@given(fleets, st.dictionaries(node_ids, vitals), st.frozensets(node_ids))
def test_who_is_asked(fleet: Fleet, seen: dict[str, Vitals], out: frozenset[str]) -> None:
    by_node = {NodeId(node): value for node, value in seen.items()}
    ejected = frozenset(NodeId(node) for node in out)
    found = candidates(fleet, M, ANY, by_node, ejected, {})
    reports = fleet.reports.get(M, {})
    served_once = {node for node, report in reports.items() if report.serves_default}
    assert set(found.nodes) <= served_once & fleet.members.keys()
    assert len(set(found.nodes)) == len(found.nodes)
    staying = {
        n for n in served_once & fleet.members.keys() if not fleet.members[n].record.draining
    }
    assert bool(found.nodes) >= bool(staying), "somebody is left to try, and nobody is tried"
    good = {
        node
        for node in staying
        if fleet.members[node].is_registered
        and reports[node].gone_at is None
        and node not in ejected
        and by_node.get(node, Vitals(True, True)).serves_model(M)
    }
    assert good <= set(found.nodes), "a node that is well gets nothing"
    if not found.is_panic:
        assert set(found.nodes) == good


@given(fleets, fleets)
def test_the_fleet_is_what_was_said_last(first: Fleet, second: Fleet) -> None:
    """Putting all keys again after anything at all gives the same as putting them first."""
    again = [put(node_record(node)) for node in NODES] + [put(status(node)) for node in NODES]
    assert fold(again, first) == fold(again, second) == fold(again)


@given(
    st.lists(st.tuples(node_ids, st.booleans(), st.floats(0, 40)), max_size=150),
    st.integers(1, 5),
)
def test_ejection_leaves_half_and_one(steps: list[tuple[str, bool, float]], count: int) -> None:
    kept, now_s = Ejections(), 0.0
    there = NODES[:count]
    in_a_row: Counter[str] = Counter()
    for node, is_failure, later_s in steps:
        if node not in there:
            continue
        now_s += later_s
        if not is_failure:
            in_a_row[node] = 0
            kept.succeeded(NodeId(node))
            continue
        in_a_row[node] += 1
        if kept.failed(NodeId(node), nodes=count, now_s=now_s) is not None:
            assert in_a_row[node] >= 5
        out = kept.ejected(now_s)
        assert len(out) <= count * SHARE_MAX
        assert len(out) < count


@given(
    st.lists(st.integers(0, 50), max_size=8),
    st.lists(st.integers(0, 50), max_size=8),
    st.floats(0, 1, exclude_max=True),
    st.floats(0, 1, exclude_max=True),
)
def test_a_choice_is_never_the_busiest_of_many(
    near: list[int], far: list[int], first: float, second: float
) -> None:
    if not near and not far:
        return
    loads = near + far
    place = choose(near, far, (first, second))
    assert 0 <= place < len(loads)
    group = near if place < len(near) else far
    if len(group) > 1 and loads[place] == max(group):
        assert group.count(max(group)) > 1
