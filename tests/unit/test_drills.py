"""Which runs a drill makes fail, and how what is asked for is read."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from loader.drills import ARMED_MAX, KINDS, BadDrill, Drill, DrillBox, Order, error_for
from loader.faults import FaultClass, classify
from paddlewheel.cli import drill as command
from registry.names import ModelName, Version

M, V1, V2 = ModelName("m"), Version("1"), Version("2")


def arm(box: DrillBox, **document: Any) -> Drill:
    return box.arm({"model": "m", "code": 700, **document}, live=V2)


def orders(box: DrillBox, version: Version = V2, runs: int = 10) -> int:
    return sum(box.order_for(M, version) is not None for _ in range(runs))


def test_as_many_runs_fail_as_were_asked_for() -> None:
    box = DrillBox()
    arm(box, count=3)
    assert orders(box) == 3
    assert box.armed() == ()


def test_without_a_count_one_run_fails() -> None:
    box = DrillBox()
    arm(box)
    assert orders(box) == 1


def test_only_the_version_that_is_named_fails() -> None:
    box = DrillBox()
    assert arm(box, version="1", count=5).version == V1
    assert arm(box, count=2).version == V2, "the live one when none is named"
    assert box.order_for(ModelName("other"), V1) is None
    assert (orders(box, V1), orders(box, V2)) == (5, 2)


def test_two_drills_of_a_version_follow_each_other() -> None:
    box = DrillBox()
    arm(box, count=2)
    arm(box, kind="crash", code="SIGSEGV", count=1)
    kinds = [order.kind for _ in range(5) if (order := box.order_for(M, V2)) is not None]
    assert kinds == ["code", "code", "crash"]


def test_a_share_of_the_runs_by_chance() -> None:
    dice = iter([0.1, 0.9, 0.29, 0.3, 0.0])
    box = DrillBox(chance=lambda: next(dice))
    arm(box, share=0.3, count=100)
    assert [box.order_for(M, V2) is not None for _ in range(5)] == [True, False, True, False, True]
    (left,) = box.armed()
    assert left.left == 97


def test_a_disarmed_drill_does_nothing_more() -> None:
    box = DrillBox()
    first, second = arm(box, count=5), arm(box, count=1)
    assert box.disarm(first.id)
    assert not box.disarm(first.id)
    assert [drill.id for drill in box.armed()] == [second.id]
    assert orders(box) == 1


def test_ids_are_never_given_twice() -> None:
    box = DrillBox()
    ids = Counter(arm(box).id for _ in range(ARMED_MAX))
    assert max(ids.values()) == 1
    with pytest.raises(BadDrill, match="are armed already"):
        arm(box)
    orders(box, runs=ARMED_MAX)
    assert arm(box).id not in ids


READ: dict[str, tuple[dict[str, Any], Order]] = {
    "a number": ({"code": 700}, Order("code", "700", 0)),
    "a number as text": ({"code": "-101"}, Order("code", "-101", 0)),
    "a library's number": ({"code": "CUDNN:8"}, Order("code", "CUDNN:8", 0)),
    "a signal is a crash": ({"code": "SIGKILL"}, Order("crash", "SIGKILL", 0)),
    "an exit is a crash": ({"code": "EXIT:3"}, Order("crash", "EXIT:3", 0)),
    "a crash by itself": ({"code": None, "kind": "crash"}, Order("crash", "SIGSEGV", 0)),
    "SIGSTOP is a hang": ({"code": "SIGSTOP"}, Order("hang", "SIGSTOP", 0)),
    "HANG is a hang": ({"code": "HANG"}, Order("hang", "HANG", 0)),
    "NAN spoils outputs": ({"code": "NAN"}, Order("nan", "NAN", 0)),
    "out of memory": ({"code": None, "kind": "oom"}, Order("oom", "-101", 0)),
    "of a device": ({"code": -102, "kind": "oom"}, Order("oom", "-102", 0)),
    "slow": ({"code": None, "kind": "slow", "delay_ms": 50}, Order("slow", "", 50)),
    "late and failing": ({"code": 719, "delay_ms": 50}, Order("code", "719", 50)),
}


@pytest.mark.parametrize("case", READ)
def test_what_is_asked_for(case: str) -> None:
    document, wanted = READ[case]
    assert arm(DrillBox(), **document).order == wanted


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no model": ({"model": ""}, "model: want"),
    "no code": ({"code": None}, "code: want"),
    "a truth value": ({"code": True}, "code: want a number or text"),
    "a code of nothing": ({"code": "MELTED"}, "no error carries 'MELTED'"),
    "another kind": ({"kind": "melt"}, "kind: want one of code, crash"),
    "no such signal": ({"kind": "crash", "code": "SIGWINCH"}, "code: want SIGSEGV"),
    "none at all": ({"count": 0}, "count: want an integer in 1.."),
    "half a run": ({"count": 1.5}, "count: want an integer"),
    "no share": ({"share": 0}, "share: want a number above 0"),
    "more than all": ({"share": 1.01}, "share: want a number above 0"),
    "before it began": ({"delay_ms": -1}, "delay_ms: want an integer in 0.."),
    "slow by nothing": ({"code": None, "kind": "slow"}, "delay_ms: want how much slower"),
    "a typo": ({"cuont": 3}, "unknown fields: cuont"),
    "a version that is no text": ({"version": 2}, "version: want text"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_makes_no_sense_is_refused_by_name(case: str) -> None:
    document, why = REFUSED[case]
    box = DrillBox()
    with pytest.raises(BadDrill, match=why):
        arm(box, **document)
    assert not box


def test_without_a_live_version_one_must_be_named() -> None:
    with pytest.raises(BadDrill, match="none is live"):
        DrillBox().arm({"model": "m", "code": 700}, live=None)


CODES = ("2", "214", "700", "719", "46", "209", "-101", "-102", "-204", "CUDNN:8", "NotFound")


@pytest.mark.parametrize("code", CODES)
def test_what_is_raised_is_understood_as_the_code_asked_for(code: str) -> None:
    """A drill goes through the same classification as the real thing."""
    exception, text = error_for(code)
    fault = classify(exception.__name__, text)
    assert fault.code == code
    assert fault.fault_class is not FaultClass.REQUEST


def test_the_command_knows_the_kinds() -> None:
    assert command.KINDS == KINDS


def test_the_command_asks_for_what_was_said() -> None:
    assert command.order("m", "700", None, 3, None, 1.0, 0) == {
        "model": "m", "code": "700", "count": 3, "share": 1.0,
    }  # fmt: skip
    slow = command.order("m", None, None, 1, "2", 0.5, 200)
    assert slow == {
        "model": "m", "version": "2", "kind": "slow", "count": 1, "share": 0.5, "delay_ms": 200,
    }  # fmt: skip
    for document in (slow, command.order("m", "SIGSTOP", "hang", 2, None, 1.0, 5)):
        DrillBox().arm(document, live=V1)
