"""How a canary's steps are taken, held and ended."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paddlewheel.rollout.canary_plan import TELL_AFTER_S, advance, news, promotes, wake_s
from paddlewheel.rollout.plan import next_record
from paddlewheel.rollout.world import NodeSeen, World
from registry.canary import NOT_YET, canary_stand, plan_id
from registry.events import EventType
from registry.names import Digest, ModelName, NodeId, Revision, Version
from registry.records import ModelStatus, Quarantine
from registry.rollouts import CanaryProgress, Order, OrderKind, Phase, RolloutRecord
from registry.samples import MirrorSamples, NodeSamples, RouteSamples, bucket_of
from registry.spec import ModelDocument, parse_model

M = ModelName("m")
AT = datetime(2024, 5, 21, 8, 0, 0, tzinfo=UTC)
STEPS = "steps: [{percent: 5, hold_s: 10}, {percent: 25, hold_s: 20}]"


def document(canary: str = STEPS, *, limits: str = "{}") -> ModelDocument:
    text = f"""\
apiVersion: paddlewheel/v1
kind: Model
metadata: {{name: m}}
spec:
  live: "1"
  versions: [{{version: "1", source: /m/1}}, {{version: "2", source: /m/2}}]
  canary: {{version: "2", {canary}}}
  limits: {limits}
"""
    return parse_model(text, name=M)


def node(name: str = "n1", canary: str | None = "2", applied: int = 7) -> NodeSeen:
    status = ModelStatus(
        model=M,
        node=NodeId(name),
        revision=Revision(7),
        applied_revision=Revision(applied),
        canary=None if canary is None else Version(canary),
    )
    return NodeSeen(NodeId(name), status=status)


def route(requests: int, errors: int = 0, ms: float = 10.0) -> RouteSamples:
    buckets = [0] * 80
    buckets[bucket_of(ms / 1e3)] = requests - errors
    return RouteSamples(requests=requests, errors=errors, buckets=tuple(buckets))


GOOD = (route(1000), route(200))
BAD = (route(1000), route(200, 200))
FEW = (route(1000), route(20))


class Stage:
    """A committed document whose canary goes on as the plan says."""

    def __init__(self, canary: str = STEPS) -> None:
        self.record = RolloutRecord(model=M, revision=Revision(7), phase=Phase.COMMITTED, since=AT)
        self.world = World(
            model=M,
            document=document(canary),
            revision=Revision(7),
            created=Revision(7),
            now=AT,
            nodes=(node(),),
            record=self.record,
        )
        self.events: list[EventType] = []

    @property
    def canary(self) -> CanaryProgress:
        assert self.record.canary is not None
        return self.record.canary

    def count(
        self, routes: tuple[RouteSamples, RouteSamples], mirror: MirrorSamples | None = None
    ) -> None:
        """Two nodes counted that each, in this step."""
        self.world = replace(
            self.world,
            samples={
                NodeId(name): NodeSamples(
                    model=M,
                    node=NodeId(name),
                    version=Version("2"),
                    since=self.canary.since,
                    stable=routes[0],
                    canary=routes[1],
                    mirror=mirror or MirrorSamples(),
                ).to_json()
                for name in ("n1", "n2")
            },
        )

    def turn(self, after_s: float = 0.0, **world: Any) -> CanaryProgress | None:
        """``after_s`` later: what the plan says, taken as written."""
        self.world = replace(
            self.world,
            now=self.world.now + timedelta(seconds=after_s),
            canary_waited_s=self.world.canary_waited_s + after_s,
            record=self.record,
            **world,
        )
        obeyed = next_record(self.world)
        if obeyed is not None and obeyed.paused != self.record.paused:
            self.record = obeyed
            self.world = replace(self.world, record=obeyed)
        said = advance(self.world, self.record)
        if said is not None:
            event = news(self.record.canary, said)
            if event is not None:
                self.events.append(event)
            if self.record.canary is None or said.since != self.record.canary.since:
                self.world = replace(self.world, canary_waited_s=0.0, samples={})
            self.record = RolloutRecord.from_json(
                self.record.model_copy(update={"canary": said}).to_json()
            )
        return said


def started(canary: str = STEPS) -> Stage:
    stage = Stage(canary)
    stage.turn()
    return stage


def test_nothing_happens_while_no_node_serves_it() -> None:
    for nodes in ((), (node(canary=None),), (node(applied=6),)):
        stage = Stage()
        assert stage.turn(nodes=nodes) is None


def test_a_good_canary_goes_through_its_steps_and_is_promoted() -> None:
    stage = started()
    assert (stage.canary.step, stage.canary.percent, stage.canary.phase) == (0, 5.0, "stepping")
    stage.count(GOOD)
    stage.turn(9.9)
    assert stage.canary.step == 0, "not before hold_s"
    assert wake_s(stage.world, stage.record) == pytest.approx(0.1)
    stage.turn(0.2)
    assert (stage.canary.step, stage.canary.percent) == (1, 25.0)
    assert not promotes(stage.world, stage.record)
    stage.turn(25)
    assert stage.canary.step == 1, "nothing is counted in this step yet"
    stage.count(GOOD)
    stage.turn(0)
    assert stage.canary.phase == "done"
    assert stage.canary.percent == 25.0, "until the document says otherwise"
    assert promotes(stage.world, stage.record)
    assert stage.turn(100) is None
    assert stage.events == [
        EventType.CANARY_STEP,
        EventType.CANARY_STEP,
        EventType.CANARY_PASSED,
    ]


def test_too_little_traffic_holds_for_ever() -> None:
    stage = started()
    stage.count(FEW)
    stage.turn(10_000)
    assert (stage.canary.step, stage.canary.verdict) == (0, "inconclusive")
    assert "canary 40 of at least 100" in (stage.canary.detail or "")
    assert wake_s(stage.world, stage.record) is None


def test_a_bad_one_goes_to_nothing_at_once_and_stays_there() -> None:
    stage = started()
    stage.count(BAD)
    stage.turn(0.5)
    assert (stage.canary.phase, stage.canary.percent) == ("failed", 0.0)
    assert "errors: canary 400 of 400" in (stage.canary.detail or "")
    assert stage.events[-1] is EventType.CANARY_FAILED
    stage.count(GOOD)
    assert stage.turn(1000) is None
    assert not promotes(stage.world, stage.record)
    assert canary_stand(stage.world.document.spec, stage.canary).is_failed


def test_samples_of_another_step_or_version_or_torn_ones_do_not_count() -> None:
    stage = started()
    mine = NodeSamples(
        model=M, node=NodeId("n1"), version=Version("2"), since=stage.canary.since,
        stable=BAD[0], canary=BAD[1],
    )  # fmt: skip
    for raw in (
        mine.model_copy(update={"since": AT - timedelta(hours=1)}).to_json(),
        mine.model_copy(update={"since": None}).to_json(),
        mine.model_copy(update={"version": Version("1")}).to_json(),
        mine.to_json()[:-20],
        b'{"requests": -1}',
        b"\xff",
    ):
        stage.turn(6, samples={NodeId("n1"): raw})
        assert (stage.canary.phase, stage.canary.verdict) == ("stepping", "inconclusive")


def test_manual_waits_and_is_still_judged() -> None:
    stage = started("promote: manual, steps: [{percent: 50, hold_s: 5}]")
    stage.count(GOOD)
    stage.turn(6)
    stage.turn(6)
    assert (stage.canary.phase, stage.canary.verdict) == ("stepping", "pass")
    assert (stage.canary.detail or "").startswith("waits for paddlewheel promote m; ")
    assert not promotes(stage.world, stage.record)
    stage.count(BAD)
    stage.turn()
    assert stage.canary.phase == "failed"


def order(kind: OrderKind, revision: int = 7) -> Order:
    return Order(order=kind, revision=Revision(revision), at=AT, by="ann@host")


def test_paused_it_holds_and_is_still_judged() -> None:
    stage = started()
    stage.count(GOOD)
    stage.turn(60, order=order(OrderKind.PAUSE))
    assert (stage.canary.step, stage.canary.verdict) == (0, "pass")
    assert (stage.canary.detail or "").startswith("paused; ")
    stage.turn(order=order(OrderKind.RESUME))
    assert stage.canary.step == 1
    stage.count(BAD)
    stage.turn(order=order(OrderKind.PAUSE))
    assert stage.canary.phase == "failed"


def test_an_order_for_another_document_is_not_obeyed() -> None:
    stage = started()
    stage.turn(order=order(OrderKind.ABORT, revision=6))
    assert stage.canary.phase == "stepping"
    stage.turn(order=order(OrderKind.ABORT))
    assert (stage.canary.phase, stage.canary.detail) == ("failed", "aborted by ann@host")


def test_a_quarantine_of_its_version_fails_it() -> None:
    stage = started()
    stage.count(GOOD)
    other = Quarantine(reason="code 700", code=700, at=AT)
    stage.turn(quarantines={Version("1"): other})
    assert stage.canary.phase == "stepping"
    elsewhere = other.model_copy(update={"digest": Digest("sha256:" + "0" * 64)})
    stage.turn(quarantines={Version("2"): elsewhere})
    assert stage.canary.phase == "stepping", "about other bytes"
    stage.turn(quarantines={Version("2"): other})
    assert (stage.canary.phase, stage.canary.detail) == ("failed", "2 is quarantined: code 700")


def test_numbers_are_written_down_now_and_then_verdicts_at_once() -> None:
    stage = started()
    stage.count(FEW)
    assert stage.turn(1) is not None
    stage.count((route(1000), route(21)))
    assert stage.turn(TELL_AFTER_S - 0.5) is None
    assert stage.turn(0.5) is not None
    stage.count(GOOD)
    assert stage.turn(0) is not None
    assert stage.canary.verdict == "pass"


def test_only_mirroring_it_is_judged_by_agreement_and_never_promoted() -> None:
    stage = started("mirror: {percent: 10}, gates: {agreement: 0.99}")
    assert (stage.canary.percent, stage.canary.phase) == (0.0, "stepping")
    stage.count(BAD, MirrorSamples(agreed=500))
    stage.turn(100)
    assert (stage.canary.verdict, stage.canary.phase) == ("pass", "stepping")
    stage.count(GOOD, MirrorSamples(agreed=500, differed=300))
    stage.turn(1)
    assert stage.canary.phase == "failed"


def test_a_canary_without_steps_or_agreement_is_nobodys_business() -> None:
    assert Stage("rules: [{percent: 5}]").turn() is None
    assert Stage("mirror: {percent: 5}").turn() is None


# --- from one document to the next ----------------------------------------------------------------


def follow_up(stage: Stage, newer: ModelDocument) -> RolloutRecord:
    """The record of a newer, ungated document."""
    stage.world = replace(stage.world, document=newer, revision=Revision(9), record=stage.record)
    record = next_record(stage.world)
    assert record is not None
    assert record.revision == 9
    stage.record = record
    stage.world = replace(stage.world, nodes=(node(applied=9),))
    return record


def test_an_edit_of_something_else_goes_on_where_the_canary_is() -> None:
    stage = started()
    stage.count(GOOD)
    stage.turn(11)
    before = stage.canary
    newer = document(limits="{queue: 7}")
    assert follow_up(stage, newer).canary == before
    assert canary_stand(newer.spec, before).percent == 25.0
    stage.count(GOOD)
    stage.turn(21)
    assert stage.canary.phase == "done"


def test_a_failure_outlasts_an_edit_of_something_else_but_not_another_canary() -> None:
    stage = started()
    stage.count(BAD)
    stage.turn()
    follow_up(stage, document(limits="{queue: 7}"))
    assert stage.turn(100) is None
    again = document(STEPS + ", gates: {error_rate: 0.9}")
    stage.world = replace(stage.world, document=again, record=stage.record)
    assert canary_stand(again.spec, stage.canary) == NOT_YET
    stage.turn()
    assert (stage.canary.step, stage.canary.phase, stage.canary.percent) == (0, "stepping", 5.0)


def test_what_one_canary_passed_promotes_no_other() -> None:
    stage = started("steps: [{percent: 50, hold_s: 5}]")
    stage.count(GOOD)
    stage.turn(6)
    assert promotes(stage.world, stage.record)
    follow_up(stage, document("steps: [{percent: 60, hold_s: 5}]"))
    stage.world = replace(stage.world, record=stage.record, nodes=())
    assert stage.canary.phase == "done"
    assert not promotes(stage.world, stage.record)


def test_the_word_on_another_canary_gives_no_traffic() -> None:
    spec = document().spec
    progress = CanaryProgress(version=Version("2"), plan="of another", percent=50, since=AT)
    assert canary_stand(spec, None) == NOT_YET
    assert canary_stand(spec, progress) == NOT_YET
    mine = progress.model_copy(update={"plan": plan_id(spec)})
    assert canary_stand(spec, mine).percent == 50
    assert canary_stand(spec, mine.model_copy(update={"step": 9})).percent == 0


moves = st.lists(
    st.tuples(
        st.sampled_from(["good", "bad", "few", "none"]),
        st.sampled_from([0.0, 1.0, 9.0, 30.0]),
        st.sampled_from([None, OrderKind.PAUSE, OrderKind.RESUME, OrderKind.ABORT]),
    ),
    max_size=25,
)


@given(moves)
def test_whatever_happens_shares_only_grow_until_they_are_nothing(
    played: list[tuple[str, float, OrderKind | None]],
) -> None:
    """A share is only ever given by a step of the document, in order, after a pass."""
    stage = Stage()
    shares: list[float] = []
    for counted, after_s, kind in played:
        if stage.record.canary is not None and counted != "none":
            stage.count({"good": GOOD, "bad": BAD, "few": FEW}[counted])
        before = stage.record.canary
        stage.turn(after_s, order=None if kind is None else order(kind))
        now = stage.record.canary
        if now is not None:
            shares.append(now.percent)
        if before is not None and now is not None and now.step > before.step:
            assert counted == "good" or stage.world.samples == {}
            assert kind is not OrderKind.PAUSE
        if before is not None and before.phase != "stepping":
            assert now == before
        if promotes(stage.world, stage.record):
            assert shares[-1] == 25.0
    risen = [share for share in shares if share]
    assert risen == sorted(risen)
    assert set(shares) <= {0.0, 5.0, 25.0}
    assert 0.0 not in shares or shares.index(0.0) + shares.count(0.0) == len(shares)
