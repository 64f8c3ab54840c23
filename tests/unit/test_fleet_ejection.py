"""Nodes that fail in a row, and how long they are out."""

from __future__ import annotations

from registry.names import NodeId
from router.fleet.ejection import BASE_S, FAILURES, Ejections

A, B, C, D = (NodeId(node) for node in "abcd")


def fail(kept: Ejections, node: NodeId, now_s: float, *, nodes: int = 4) -> float | None:
    """Five times; what the last one says."""
    for _ in range(FAILURES - 1):
        assert kept.failed(node, nodes=nodes, now_s=now_s) is None
    return kept.failed(node, nodes=nodes, now_s=now_s)


def test_five_in_a_row() -> None:
    kept = Ejections()
    assert fail(kept, A, 0.0) == BASE_S
    assert kept.ejected(BASE_S - 0.1) == {A}
    assert kept.next_end_s == BASE_S
    assert kept.ejected(BASE_S) == frozenset()


def test_one_success_starts_the_count_again() -> None:
    kept = Ejections()
    for _ in range(FAILURES - 1):
        kept.failed(A, nodes=4, now_s=0.0)
    kept.succeeded(A)
    assert kept.failed(A, nodes=4, now_s=0.0) is None


def test_each_time_it_is_longer_and_good_times_are_forgiven() -> None:
    kept = Ejections()
    assert fail(kept, A, 0.0) == BASE_S
    assert fail(kept, A, BASE_S) == 2 * BASE_S
    assert fail(kept, A, 3 * BASE_S) == 3 * BASE_S
    assert fail(kept, A, 6 * BASE_S + 2.5 * BASE_S) == 2 * BASE_S
    assert fail(kept, A, 1000 * BASE_S) == BASE_S


def test_at_most_half_are_out() -> None:
    kept = Ejections()
    assert fail(kept, A, 0.0) is not None
    assert fail(kept, B, 0.0) is not None
    assert fail(kept, C, 0.0) is None
    assert kept.ejected(0.0) == {A, B}
    assert kept.failed(C, nodes=4, now_s=BASE_S) == BASE_S  # its turn, once they are back


def test_never_the_last_one() -> None:
    assert fail(Ejections(), A, 0.0, nodes=1) is None
    assert fail(Ejections(), A, 0.0, nodes=0) is None
    kept = Ejections()
    assert fail(kept, A, 0.0, nodes=2) is not None
    assert fail(kept, B, 0.0, nodes=2) is None


def test_a_new_process_has_no_record() -> None:
    kept = Ejections()
    fail(kept, A, 0.0)
    kept.pardon(A)
    assert kept.ejected(0.0) == frozenset()
    assert fail(kept, A, 0.0) == BASE_S
