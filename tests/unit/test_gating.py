"""What one node does about a document, a line a case; what may become the last good version."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from paddlewheel.gating import Shadow, Step, may_be_last_good, next_step
from registry.names import NodeId, Revision
from registry.rollouts import Phase, RolloutRecord
from tests.rollouts import M, document

BARRIER = "strategy: barrier"
NODE = NodeId("n1")
AT = datetime(2024, 5, 21, tzinfo=UTC)


def record(text: str) -> RolloutRecord | None:
    """``12 preparing after 10``; ``12 waving after 10 to n1``; empty: none."""
    if not text:
        return None
    revision, phase, _, previous, *rest = text.split()
    return RolloutRecord(
        model=M, revision=Revision(int(revision)), previous=Revision(int(previous)),
        phase=Phase(phase), released=tuple(NodeId(n) for n in rest[1:]), since=AT,
    )  # fmt: skip


PREPARE, KEEP, DROP = Shadow.PREPARE, Shadow.KEEP, Shadow.DROP

CASES: dict[str, tuple[str, int | None, tuple[int | None, Shadow]]] = {
    # record, revision the node works towards now: what to have in force, and the shadow
    "nobody has said anything": ("", 10, (None, PREPARE)),
    "a start before anybody has": ("", None, (None, PREPARE)),
    "the word is on the document before": ("10 committed after 8", 10, (10, PREPARE)),
    "being prepared": ("12 preparing after 10", 10, (10, PREPARE)),
    "a start while it is": ("12 preparing after 10", None, (10, PREPARE)),
    "the first of its model": ("12 preparing after 0", None, (None, PREPARE)),
    "released to others": ("12 waving after 10 to n0", 10, (10, PREPARE)),
    "released to us": ("12 waving after 10 to n0 n1", 10, (12, DROP)),
    "committed": ("12 committed after 10", 10, (12, DROP)),
    "aborted": ("12 aborted after 10", 12, (10, DROP)),
    "aborted with nothing before": ("12 aborted after 0", 12, (None, DROP)),
    "overtaken": ("14 preparing after 12", 12, (12, KEEP)),
    "overtaken before its commit": ("14 preparing after 10", 12, (10, KEEP)),
    "in force and its record lost": ("", 12, (None, KEEP)),
    "in force and begun again": ("12 preparing after 10", 12, (None, KEEP)),
}


@pytest.mark.parametrize("name", CASES)
def test_next_step(name: str) -> None:
    said, aspired, wanted = CASES[name]
    step = next_step(
        document(rollout=BARRIER), Revision(12), record(said), NODE,
        aspired=None if aspired is None else Revision(aspired),
    )  # fmt: skip
    assert (step.aspire, step.shadow) == wanted


def test_a_document_that_waits_for_nobody() -> None:
    given = record("14 preparing after 10")
    assert next_step(document(), Revision(12), given, NODE, aspired=None) == Step(
        Revision(12), Shadow.DROP
    )


def test_a_model_that_moves_away_is_not_prepared() -> None:
    given = record("12 preparing after 10")
    step = next_step(
        document(rollout=BARRIER), Revision(12), given, NODE,
        aspired=Revision(10), is_placed_here=False,
    )  # fmt: skip
    assert (step.aspire, step.shadow) == (10, Shadow.KEEP)


@pytest.mark.parametrize(
    ("said", "may_be"),
    [
        ("", True),
        ("10 committed after 8", True),
        ("12 preparing after 10", None),
        ("12 waving after 10 to n1", None),
        ("12 committed after 10", True),
        ("12 aborted after 10", False),
        ("14 preparing after 12", True),
        ("14 preparing after 10", False),
        ("14 committed after 0", False),
    ],
)
def test_what_may_become_the_last_good_version(said: str, may_be: bool | None) -> None:
    assert may_be_last_good(Revision(12), record(said)) is may_be
