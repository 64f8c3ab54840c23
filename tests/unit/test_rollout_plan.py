"""What the coordinator says next: tables of worlds."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from paddlewheel.rollout.plan import next_record, waits_for_nobody, wake_s
from paddlewheel.rollout.reading import Answer, answer
from paddlewheel.rollout.world import NodeSeen, World
from registry.names import Digest, NodeId, Revision, Version
from registry.records import ModelStatus, Quarantine, ServableStatus
from registry.rollouts import Order, OrderKind, Phase, RolloutRecord
from tests.rollouts import AT, M, document

R, BEFORE = Revision(9), Revision(7)
BARRIER = "strategy: barrier, timeout_s: 60"
WAVES = "strategy: waves, timeout_s: 60, waves: [{percent: 25, bake_s: 10}, {labels: {zone: a}}]"
DIGEST = Digest("sha256:" + "0" * 64)


def node(id_: str, word: str) -> NodeSeen:
    """``word``: as it would be said of a node, ``+zone`` and ``+draining`` after it."""
    word, *more = word.split("+")
    fields: dict[str, Any] = {"applied_revision": BEFORE, "prepared_revision": BEFORE}
    servables: tuple[ServableStatus, ...] = ()

    def servable(state: str) -> tuple[ServableStatus, ...]:
        entry = ServableStatus(
            model=M, version=Version("2"), state=state, reason="why", digest=DIGEST
        )
        return (entry,)

    match word:
        case "silent":
            fields["revision"] = BEFORE
        case "refused":
            fields |= {"revision": R, "accepted": False, "error": "no"}
        case "accepted":
            fields |= {"revision": R}
            servables = servable("LOADING")
        case "failed":
            fields |= {"revision": R}
            servables = servable("FAILED")
        case "failing":  # not for long enough to be believed
            fields |= {"revision": R}
            servables = servable("FAILED")
        case "quarantined":
            fields |= {"revision": R, "applied_revision": R, "prepared_revision": R}
            servables = servable("QUARANTINED")
        case "ready":
            fields |= {"revision": R, "prepared_revision": R}
            servables = servable("READY")
        case "applied":
            fields |= {"revision": R, "prepared_revision": R, "applied_revision": R}
            servables = servable("LIVE")
        case "ahead":  # it saw a broken document after ours, which it has ready
            fields |= {"revision": 11, "accepted": False, "error": "x", "prepared_revision": R}
        case _:
            assert word == "nothing", word
    status = ModelStatus(model=M, node=NodeId(id_), servables=servables, **fields)
    return NodeSeen(
        id=NodeId(id_),
        labels={"zone": "a"} if "zone" in more else {},
        is_draining="draining" in more,
        status=None if word == "nothing" else status,
        failing_s=0.1 if word == "failing" else 1.0,
    )


def world(rollout: str, words: str, record: RolloutRecord | None = None, **fields: Any) -> World:
    nodes = tuple(node(f"n{at}", word) for at, word in enumerate(words.split(), start=1))
    made = World(
        model=M, document=document("2", rollout), revision=R, created=Revision(1), now=AT,
        coordinator="c", record=record, nodes=nodes,
    )  # fmt: skip
    return replace(made, **fields)


def preparing(strategy: str, **fields: Any) -> RolloutRecord:
    base: dict[str, Any] = {
        "model": M, "revision": R, "previous": BEFORE, "strategy": strategy,
        "phase": Phase.PREPARING, "since": AT,
    }  # fmt: skip
    return RolloutRecord(**(base | fields))


def show(record: RolloutRecord | None) -> str:
    """``phase``, then the wave, who has it, who is blamed."""
    if record is None:
        return "-"
    parts = [record.phase.value]
    if record.phase is Phase.WAVING:
        parts.append(f"{record.wave}{'~' if record.is_baking else ''}")
    if record.released:
        parts.append("+".join(record.released))
    if record.refused:
        parts.append("not " + ",".join(each.node for each in record.refused))
    return " ".join(parts)


BARRIERS: dict[str, tuple[str, str, str]] = {
    # rollout, nodes -> next
    "all ready": (BARRIER, "ready ready ready", "committed"),
    "one loading": (BARRIER, "ready accepted ready", "-"),
    "one has said nothing": (BARRIER, "ready nothing ready", "-"),
    "one has not seen it": (BARRIER, "ready silent ready", "-"),
    "one refused": (BARRIER, "ready accepted refused", "aborted not n3"),
    "one failed": (BARRIER, "accepted failed accepted", "aborted not n2"),
    "one failed, perhaps": (BARRIER, "ready failing ready", "-"),
    "one leaves": (BARRIER, "ready silent+draining ready", "committed"),
    "nobody": (BARRIER, "", "-"),
    "only one that leaves": (BARRIER, "ready+draining", "-"),
    "ready, behind a broken document": (BARRIER, "ready ahead", "committed"),
    "two of three, one refused": (
        f"{BARRIER}, require_ack: 60",
        "ready refused ready",
        "committed not n2",
    ),
    "two of three, one failed, one loading": (
        f"{BARRIER}, require_ack: 60",
        "ready failed accepted",
        "-",
    ),
    "two of three, two failed": (
        f"{BARRIER}, require_ack: 60",
        "ready failed refused",
        "aborted not n2,n3",
    ),
    "none asked for, none can": (
        f"{BARRIER}, require_ack: 0",
        "failed failed",
        "aborted not n1,n2",
    ),
    "none asked for, one can": (f"{BARRIER}, require_ack: 0", "failed ready", "committed not n1"),
    "acknowledged by all": ("require_ack: 100", "accepted ready failed", "committed"),
    "acknowledged by some": ("require_ack: 100", "accepted silent accepted", "-"),
    "acknowledged by enough": ("require_ack: 50", "accepted silent accepted nothing", "committed"),
    "not acknowledged": (
        "require_ack: 50",
        "accepted refused refused refused",
        "aborted not n2,n3,n4",
    ),
    "acknowledged by enough, but one": (
        "require_ack: 50",
        "accepted refused ready silent",
        "committed not n2",
    ),
}


@pytest.mark.parametrize("case", BARRIERS)
def test_preparing(case: str) -> None:
    rollout, words, wanted = BARRIERS[case]
    strategy = "barrier" if "barrier" in rollout else "immediate"
    assert show(next_record(world(rollout, words, preparing(strategy)))) == wanted


def waving(wave: int, *released: str, **fields: Any) -> RolloutRecord:
    ids = tuple(NodeId(each) for each in released)
    return preparing("waves", phase=Phase.WAVING, wave=wave, released=ids, **fields)


BAKING = {"is_baking": True}
STEPS: dict[str, tuple[RolloutRecord, str, float, str]] = {
    # record, nodes, seconds waited -> next
    "the first is ready": (preparing("waves"), "ready accepted silent nothing", 0, "waving 0 n1"),
    "the first is not": (preparing("waves"), "accepted ready ready ready", 0, "-"),
    "one refuses": (preparing("waves"), "ready refused silent silent", 0, "aborted not n2"),
    "one of a later wave failed": (
        preparing("waves"),
        "ready ready ready failed",
        0,
        "aborted not n4",
    ),
    "released, not there yet": (waving(0, "n1"), "ready ready ready ready", 0, "-"),
    "released, there": (waving(0, "n1"), "applied ready ready ready", 5, "waving 0~ n1"),
    "baking": (waving(0, "n1", **BAKING), "applied ready ready ready+zone", 9.9, "-"),
    "baked": (waving(0, "n1", **BAKING), "applied ready ready ready+zone", 10, "waving 1 n1+n4"),
    "baked, the next not ready": (
        waving(0, "n1", **BAKING),
        "applied ready ready accepted+zone",
        10,
        "-",
    ),
    "baked, nobody in the next": (
        waving(0, "n1", **BAKING),
        "applied ready ready ready",
        10,
        "waving 2 n1+n2+n3+n4",
    ),
    "failed while baking": (
        waving(0, "n1", **BAKING),
        "quarantined ready ready ready",
        3,
        "aborted not n1",
    ),
    "came back while baking": (waving(0, "n1", **BAKING), "accepted ready ready ready", 30, "-"),
    "gone while baking": (waving(0, "n0", **BAKING), "ready ready ready ready", 30, "-"),
    "the last wave, not there yet": (waving(2, "n1", "n2"), "applied ready", 0, "-"),
    "the last wave, there": (waving(2, "n1", "n2"), "applied applied", 0, "committed n1+n2"),
    "the last wave, one joins": (
        waving(2, "n1", "n2"),
        "applied applied silent",
        0,
        "committed n1+n2",
    ),
    "not ready in time": (preparing("waves"), "accepted ready", 60, "aborted not n1"),
    "not applied in time": (waving(0, "n1"), "ready ready", 60, "aborted not n1"),
    "the next wave not ready in time": (
        waving(0, "n1", **BAKING),
        "applied ready ready accepted+zone",
        70,
        "aborted not n2,n3,n4",
    ),
}


@pytest.mark.parametrize("case", STEPS)
def test_waves(case: str) -> None:
    record, words, waited_s, wanted = STEPS[case]
    assert show(next_record(world(WAVES, words, record, waited_s=waited_s))) == wanted


@pytest.mark.parametrize(
    ("percent", "count", "first"), [(25, 4, 1), (26, 4, 2), (1, 3, 1), (100, 3, 3)]
)
def test_a_share_of_the_nodes_is_rounded_up(percent: int, count: int, first: int) -> None:
    rollout = f"strategy: waves, waves: [{{percent: {percent}}}]"
    found = next_record(world(rollout, "ready " * count, preparing("waves")))
    assert found is not None
    assert found.released == tuple(f"n{at}" for at in range(1, first + 1))


def given(kind: OrderKind, revision: Revision = R) -> Order:
    return Order(order=kind, revision=revision, at=AT, by="me")


ORDERS: dict[str, tuple[OrderKind, RolloutRecord, str, str]] = {
    "pause": (OrderKind.PAUSE, preparing("waves"), "ready ready", "preparing (paused)"),
    "paused is paused": (OrderKind.PAUSE, preparing("waves", paused=True), "ready ready", "-"),
    "paused, nothing is taken back": (
        OrderKind.PAUSE,
        waving(0, "n1", paused=True),
        "failed refused",
        "-",
    ),
    "resume": (OrderKind.RESUME, waving(0, "n1", paused=True), "failed ready", "waving 0 n1"),
    "resume what goes on": (OrderKind.RESUME, waving(0, "n1"), "ready ready", "-"),
    "abort": (OrderKind.ABORT, waving(0, "n1"), "applied ready", "aborted"),
    "abort what is paused": (
        OrderKind.ABORT,
        waving(0, "n1", paused=True),
        "applied ready",
        "aborted",
    ),
    "promote": (
        OrderKind.PROMOTE,
        waving(0, "n1", **BAKING),
        "applied ready ready",
        "waving 2 n1+n2+n3",
    ),
    "promote at the start": (
        OrderKind.PROMOTE,
        preparing("waves"),
        "ready ready",
        "waving 2 n1+n2",
    ),
    "promote, one not ready": (OrderKind.PROMOTE, waving(0, "n1"), "applied ready accepted", "-"),
    "promoted, there": (
        OrderKind.PROMOTE,
        waving(2, "n1", "n2"),
        "applied applied",
        "committed n1+n2",
    ),
    "promoted, one joins": (
        OrderKind.PROMOTE,
        waving(2, "n1", "n2"),
        "applied applied silent",
        "committed n1+n2",
    ),
    "too late": (OrderKind.ABORT, preparing("waves", phase=Phase.COMMITTED), "applied", "-"),
    "again": (OrderKind.RESUME, preparing("waves", phase=Phase.ABORTED), "ready ready", "-"),
}


@pytest.mark.parametrize("case", ORDERS)
def test_orders(case: str) -> None:
    kind, record, words, wanted = ORDERS[case]
    seen = world(WAVES, words, record, order=given(kind), waited_s=1)
    found = next_record(seen)
    paused = " (paused)" if found is not None and found.paused else ""
    assert show(found) + paused == wanted
    stale = next_record(replace(seen, order=given(kind, BEFORE)))
    assert stale == next_record(replace(seen, order=None))


def test_a_barrier_is_not_committed_while_paused() -> None:
    record = preparing("barrier", paused=True)
    seen = world(BARRIER, "ready ready", record, order=given(OrderKind.PAUSE), waited_s=1e6)
    assert next_record(seen) is None
    assert wake_s(seen) is None


def test_reasons_name_the_node_and_say_its_own() -> None:
    def reason(words: str, **fields: Any) -> str | None:
        found = next_record(world(BARRIER, words, preparing("barrier"), **fields))
        assert found is not None
        assert found.phase is Phase.ABORTED
        return found.reason

    assert reason("ready refused failed") == "2 of 3 nodes can't take it: n2: no"
    assert reason("ready failed") == "1 of 2 nodes can't take it: n2: 2 is FAILED: why"
    assert reason("ready accepted silent nothing silent accepted", waited_s=60.0) == (
        "not ready within 60 s: n2 (loading), n3 (no word yet), n4 (no word yet) and 2 more"
    )
    held = {Version("2"): Quarantine(reason="code 700", code=700, at=AT)}
    assert reason("ready ready", quarantines=held) == "2 is quarantined: code 700"
    assert reason("ready", order=given(OrderKind.ABORT)) == "aborted by me"


def test_a_quarantine_of_other_bytes_is_about_them() -> None:
    def phase(digest: Digest) -> Phase:
        held = {Version("2"): Quarantine(reason="x", code=700, at=AT, digest=digest)}
        found = next_record(world(BARRIER, "ready ready", preparing("barrier"), quarantines=held))
        assert found is not None
        return found.phase

    assert phase(DIGEST) is Phase.ABORTED
    assert phase(Digest("sha256:" + "1" * 64)) is Phase.COMMITTED


def old(phase: Phase, revision: int = 8, **fields: Any) -> RolloutRecord:
    return preparing("barrier", phase=phase, revision=Revision(revision), **fields)


PREVIOUS: dict[str, tuple[RolloutRecord | None, str, int]] = {
    "no record, in force on the nodes": (None, "silent silent", 7),
    "no record, nobody has anything": (None, "nothing nothing", 0),
    "committed before": (old(Phase.COMMITTED), "silent", 8),
    "preparing before": (old(Phase.PREPARING), "silent", 7),
    "waving before": (old(Phase.WAVING, released=(NodeId("n1"),)), "silent", 7),
    "aborted before": (old(Phase.ABORTED), "silent", 7),
    "of a store that went back": (old(Phase.COMMITTED, 20), "silent", 7),
    "of a model deleted since": (old(Phase.COMMITTED), "silent", 0),
}


@pytest.mark.parametrize("case", PREVIOUS)
def test_what_was_in_force_before(case: str) -> None:
    record, words, previous = PREVIOUS[case]
    created = Revision(9 if "deleted" in case else 1)
    found = next_record(world(BARRIER, words, record, created=created))
    assert found is not None
    assert (found.revision, found.previous, found.phase) == (R, previous, Phase.PREPARING)
    assert (found.strategy, found.paused, found.released) == ("barrier", False, ())


def test_a_document_that_waits_for_nobody_has_a_record_only_where_there_was_one() -> None:
    assert next_record(world("", "silent", None)) is None
    found = next_record(world("", "silent", old(Phase.ABORTED)))
    assert found is not None
    assert (found.phase, found.revision, found.previous) == (Phase.COMMITTED, R, 7)


def test_with_nobody_to_wait_for_no_time_counts() -> None:
    for words in ("", "ready+draining"):
        seen = world(BARRIER, words, preparing("barrier"), waited_s=1000.0)
        assert waits_for_nobody(seen)
        assert next_record(seen) is None
        assert wake_s(seen) is None


WAKES: dict[str, tuple[World, float | None]] = {
    "until the timeout": (world(BARRIER, "ready accepted", preparing("barrier"), waited_s=12), 48),
    "until a failure is believed": (world(BARRIER, "ready failing", preparing("barrier")), 0.4),
    "until it is baked": (world(WAVES, "applied ready", waving(0, "n1", **BAKING), waited_s=4), 6),
    "not when it has ended": (
        world(BARRIER, "ready", preparing("barrier", phase=Phase.ABORTED)),
        None,
    ),
    "not without a record": (world("", "ready"), None),
}


@pytest.mark.parametrize("case", WAKES)
def test_when_to_look_again(case: str) -> None:
    seen, wanted = WAKES[case]
    assert next_record(seen) is None
    assert wake_s(seen) == (None if wanted is None else pytest.approx(wanted))


ANSWERS = {
    "nothing": Answer.SILENT, "silent": Answer.SILENT, "refused": Answer.REFUSED,
    "accepted": Answer.LOADING, "failed": Answer.FAILED, "failing": Answer.LOADING,
    "quarantined": Answer.FAILED, "ready": Answer.PREPARED, "applied": Answer.APPLIED,
    "ahead": Answer.PREPARED,
}  # fmt: skip


@pytest.mark.parametrize("word", ANSWERS)
def test_where_a_node_stands(word: str) -> None:
    seen = world(BARRIER, word)
    assert answer(seen, seen.nodes[0]) is ANSWERS[word]
