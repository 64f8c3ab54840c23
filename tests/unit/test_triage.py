"""What one model's faults amount to."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from loader.blame import Blame
from loader.counting import Rule
from loader.faults import DEFAULT_CODES, Fault, from_code
from loader.triage import RECORD_MAX, Limits, Ruling, Triage
from registry.names import Digest, ModelName, ServableId, Version

LIMITS = Limits(tuple(DEFAULT_CODES), 3, 30.0)
LIVE, STANDBY, OTHER = (
    ServableId(ModelName("m"), Version(version), Digest(f"sha256:{version}"))
    for version in ("2", "1", "3")
)


class Model:
    """A live version and its standby, with a clock of its own."""

    def __init__(self, limits: Limits = LIMITS, control: ServableId | None = STANDBY) -> None:
        self.triage = Triage(limits)
        self.control = control
        self.now_s = 100.0
        self.answers = 0

    def fault(self, fault: Fault | str | int, id: ServableId = LIVE, **more: Any) -> Ruling:
        self.now_s += 0.1
        fault = fault if isinstance(fault, Fault) else from_code(fault)
        control = self.control if id == LIVE else LIVE
        return self.triage.fault(
            self.now_s,
            id,
            fault,
            control=control,
            device="cpu",
            answers=self.answers,
            answers_of_all=self.answers,
            **more,
        )

    def tripped(self, *codes: str | int) -> list[bool]:
        return [self.fault(code).tripped is not None for code in codes]


def test_three_in_a_row_are_enough_and_each_one_after() -> None:
    assert Model().tripped(700, 700, 700, 700) == [False, False, True, True]


def test_different_codes_count_together() -> None:
    assert Model().tripped(700, -101, 719) == [False, False, True]


def test_an_answer_between_ends_the_row_but_not_the_window() -> None:
    model = Model(replace(LIMITS, window_s=0.15))
    rulings: list[Ruling] = []
    for _ in range(4):
        rulings.append(model.fault(700))
        model.answers += 1
    assert not any(ruling.tripped for ruling in rulings)
    wide = Model()
    for _ in range(2):
        wide.fault(700)
        wide.answers += 1
    tripped = wide.fault(700).tripped
    assert tripped is not None
    assert tripped.rule is Rule.WINDOW


def test_an_answer_of_another_version_ends_no_row() -> None:
    """``answers`` are the failing servable's own; those of all only say who is to blame."""
    model = Model(replace(LIMITS, window_s=0.15))
    for number in range(2):
        ruling = model.triage.fault(
            100 + number, LIVE, from_code(700), control=STANDBY, device="cpu",
            answers=0, answers_of_all=number * 50,
        )  # fmt: skip
        assert ruling.tripped is None
    assert model.fault(700).tripped is not None


def test_the_clients_errors_never_count() -> None:
    model = Model(replace(LIMITS, codes=("InvalidArgument", "request", *DEFAULT_CODES)))
    assert not any(model.tripped(*["InvalidArgument"] * 1000))
    assert model.triage.errors(LIVE) == {"InvalidArgument": 1000}
    # Nor do they end a row.
    assert model.tripped(700, "InvalidArgument", 700, "InvalidArgument", 700)[-1]


def test_codes_left_out_do_not_count() -> None:
    model = Model(replace(LIMITS, codes=(700,)))
    assert model.tripped(719, -101, 719, 719, 719) == [False] * 5
    assert model.tripped(700, 700, 700) == [False, False, True]


def test_a_dead_worker_is_one_fault_however_many_waited_on_it() -> None:
    model = Model()
    for _ in range(50):
        assert model.fault("SIGSEGV", incident=(7, "SIGSEGV")).tripped is None
    assert model.triage.errors(LIVE) == {"SIGSEGV": 1}
    model.fault("SIGSEGV", incident=(8, "SIGSEGV"))
    assert model.fault("SIGSEGV", incident=(9, "SIGSEGV")).tripped is not None


def test_an_unknown_error_counts_once_another_version_answered_the_request() -> None:
    model = Model()
    assert not any(model.tripped(*["NotFound"] * 10))
    rulings = [model.fault("NotFound", proven=True) for _ in range(3)]
    assert [ruling.tripped is not None for ruling in rulings] == [False, False, True]


def test_servables_are_counted_apart() -> None:
    model = Model()
    model.tripped(700, 700)
    assert model.fault(700, OTHER).tripped is None
    assert model.fault(700).tripped is not None


def test_the_same_code_on_the_standby_makes_it_the_device() -> None:
    model = Model()
    ruling = model.fault(700, input_digest="a")
    for digest in "abcdef":
        model.fault(700, STANDBY, input_digest=digest)
        ruling = model.fault(700, input_digest=digest)
    assert ruling.tripped is not None
    assert ruling.verdict is not None
    assert ruling.verdict.blame is Blame.DEVICE


def test_an_input_that_ended_a_worker_of_each_is_found_before_the_count_is_full() -> None:
    model = Model()
    model.answers = 500
    assert model.fault("SIGSEGV", input_digest="killer", incident=(1, "SIGSEGV")).verdict is None
    ruling = model.fault("SIGSEGV", STANDBY, input_digest="killer", incident=(2, "SIGSEGV"))
    assert ruling.tripped is None
    assert ruling.verdict is not None
    assert (ruling.verdict.blame, ruling.verdict.inputs) == (Blame.INPUT, {"killer"})


def test_what_is_forgotten_starts_anew() -> None:
    model = Model()
    model.tripped(700, 700)
    model.triage.forget([LIVE])
    assert model.triage.errors(LIVE) == {}
    assert model.tripped(700, 700, 700) == [False, False, True]


def test_forgetting_one_keeps_the_others() -> None:
    model = Model()
    model.fault(700, STANDBY)
    model.tripped(700, 700)
    model.triage.forget([STANDBY])
    assert model.fault(700).tripped is not None


@pytest.mark.parametrize("consecutive", [1, 2, 5])
def test_new_limits_hold_from_the_next_fault_on(consecutive: int) -> None:
    model = Model()
    model.tripped(700, 700)
    model.triage.configure(replace(LIMITS, consecutive=consecutive))
    expected = [False] * (consecutive - 1) + [True]
    assert model.tripped(*[700] * consecutive) == expected


def test_the_same_limits_again_forget_nothing() -> None:
    model = Model()
    model.tripped(700, 700)
    model.triage.configure(replace(LIMITS))
    assert model.fault(700).tripped is not None


def test_the_record_does_not_grow_for_ever() -> None:
    model = Model()
    for _ in range(10 * RECORD_MAX):
        model.fault(700, input_digest="a")
    assert len(model.triage._record) == RECORD_MAX


def test_an_input_that_was_answered_after_a_crash_killed_nobody() -> None:
    """Two workers killed from outside while every client sends the same input."""
    model = Model()
    model.fault("SIGKILL", input_digest="same", incident=(1, "SIGKILL"))
    model.triage.exonerate("same")
    ruling = model.fault("SIGKILL", STANDBY, input_digest="same", incident=(2, "SIGKILL"))
    assert ruling.verdict is None
    guilty = Model()
    guilty.fault("SIGKILL", input_digest="same", incident=(1, "SIGKILL"))
    verdict = guilty.fault("SIGKILL", STANDBY, input_digest="same", incident=(2, "SIGKILL")).verdict
    assert verdict is not None
    assert verdict.blame is Blame.INPUT


def test_a_worker_that_died_idle_accuses_no_input() -> None:
    model = Model()
    model.fault("SIGKILL", STANDBY, incident=(1, "SIGKILL"))
    ruling = model.fault("SIGKILL", input_digest="innocent", incident=(2, "SIGKILL"))
    assert ruling.verdict is None
