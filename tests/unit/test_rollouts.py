"""A node's rule, and the records it reads."""

from __future__ import annotations

import json
from typing import Any

import pytest

from registry.names import NodeId, Revision
from registry.records import BadRecord
from registry.rollouts import (
    CoordinatorRecord,
    Order,
    OrderKind,
    Phase,
    Refusal,
    RolloutRecord,
    Stand,
    is_gated,
    standing,
)
from tests.rollouts import AT, M, document

N = NodeId("n1")
GATED, PLAIN = document("2", "strategy: barrier"), document("2")


def record(revision: int = 9, phase: Phase = Phase.PREPARING, **fields: Any) -> RolloutRecord:
    return RolloutRecord(
        model=M, revision=Revision(revision), previous=Revision(7), phase=phase, since=AT, **fields
    )


STANDINGS: dict[str, tuple[RolloutRecord | None, Stand, int]] = {
    "no record": (None, Stand.HOLD, 0),
    "about an older document, committed": (record(8, Phase.COMMITTED), Stand.HOLD, 8),
    "about an older document, unfinished": (record(8), Stand.HOLD, 7),
    "about an older document, aborted": (record(8, Phase.ABORTED), Stand.HOLD, 7),
    "preparing": (record(), Stand.HOLD, 7),
    "preparing, released before": (record(released=(N,)), Stand.HOLD, 7),
    "waving, not yet here": (record(phase=Phase.WAVING, released=(NodeId("n2"),)), Stand.HOLD, 7),
    "waving, here too": (record(phase=Phase.WAVING, released=(N,)), Stand.APPLY, 0),
    "committed": (record(phase=Phase.COMMITTED), Stand.APPLY, 0),
    "committed, though refused here": (
        record(phase=Phase.COMMITTED, refused=(Refusal(node=N, reason="x"),)), Stand.APPLY, 0,
    ),
    "aborted": (record(phase=Phase.ABORTED, reason="x"), Stand.REVERT, 7),
    "aborted, released before": (record(phase=Phase.ABORTED, released=(N,)), Stand.REVERT, 7),
    "about a newer document": (record(10, Phase.COMMITTED), Stand.HOLD, 7),
}  # fmt: skip


@pytest.mark.parametrize("case", STANDINGS)
def test_what_a_node_does_about_a_document(case: str) -> None:
    seen, stand, base = STANDINGS[case]
    found = standing(GATED, Revision(9), seen, N)
    assert (found.stand, found.base) == (stand, base)
    assert (found.reason is None) is (stand is Stand.APPLY)
    assert standing(PLAIN, Revision(9), seen, N).stand is Stand.APPLY


GATES = {
    "": False,
    "strategy: immediate": False,
    "require_ack: 0": False,
    "require_ack: 1": True,
    "strategy: barrier": True,
    "strategy: barrier, require_ack: 0": True,
    "strategy: waves, waves: [{percent: 5}]": True,
}


@pytest.mark.parametrize("rollout", GATES)
def test_which_documents_wait_for_the_fleet(rollout: str) -> None:
    assert is_gated(document("1", rollout)) is GATES[rollout]


def test_records_are_read_back_and_have_the_contracts_names() -> None:
    one = record(wave=1, released=(N,), refused=(Refusal(node=N, reason="r"),), coordinator="c")
    assert RolloutRecord.from_json(one.to_json()) == one
    assert json.loads(one.to_json()) == {
        "model": "m", "revision": 9, "previous": 7, "strategy": "immediate",
        "phase": "preparing", "paused": False, "wave": 1, "is_baking": False, "released": ["n1"],
        "reason": None, "refused": [{"node": "n1", "reason": "r"}],
        "since": "2024-05-21T08:00:00.000Z", "canary": None, "coordinator": "c",
    }  # fmt: skip
    order = Order(order=OrderKind.PAUSE, revision=Revision(9), at=AT, by="me")
    assert Order.from_json(order.to_json()) == order
    led = CoordinatorRecord(id="n1", at=AT)
    assert CoordinatorRecord.from_json(led.to_json()) == led


@pytest.mark.parametrize(
    "raw", [b"", b"[]", b"{}", b'{"model":"m","revision":1,"phase":"half","since":"x"}']
)
def test_what_is_no_record(raw: bytes) -> None:
    with pytest.raises(BadRecord):
        RolloutRecord.from_json(raw)
