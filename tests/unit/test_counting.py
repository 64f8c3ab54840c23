"""n in a row, or n within the window; one dead worker is one fault."""

from __future__ import annotations

import timeit

import pytest

from loader.counting import FaultCounter, Rule
from loader.faults import classify, classify_exit, from_code

CASES: dict[str, tuple[str, int | None]] = {
    # ``x`` a counted fault, ``.`` a success, ``r`` a request's own error, one a second;
    # the position of the fault that trips
    "three in a row": ("x x x", 2),
    "a success between": ("x x . x", 3),
    "a success between, out of the window": ("x _20 x . _20 x _20 x", None),
    "in a row, however long it takes": ("x _100 x _100 x", 4),
    "the client's errors neither add nor end the row": ("x r x r r x", 5),
    "the client's errors alone": ("r r r r r r r r", None),
    "within the window": ("x . x . . . x", 6),
    "the window moves": ("x . _25 x . _25 x . x", 8),
    "two are not three": ("x x . . .", None),
}


@pytest.mark.parametrize(("story", "wanted"), CASES.values(), ids=CASES)
def test_story(story: str, wanted: int | None) -> None:
    counter = FaultCounter(consecutive=3, window_s=30)
    now_s, tripped = 0.0, None
    for at, word in enumerate(story.split()):
        now_s += 1
        if word.startswith("_"):
            now_s += int(word[1:])
        elif word == ".":
            counter.success()
        else:
            fault = from_code(700 if word == "x" else "InvalidArgument")
            if counter.add(now_s, fault) is not None and tripped is None:
                tripped = at
    assert tripped == wanted


def test_what_tripped_is_told() -> None:
    counter = FaultCounter(consecutive=2)
    assert counter.add(1.0, from_code(700)) is None
    tripped = counter.add(3.5, from_code(719))
    assert tripped is not None
    assert (tripped.rule, tripped.count, tripped.within_s) == (Rule.CONSECUTIVE, 2, 2.5)
    assert str(tripped) == "code 719 (sticky): 2 faults in a row"
    counter.success()
    assert str(counter.add(4.0, from_code(2))) == "code 2 (memory): 2 faults within 0.5 s"


def test_one_dead_worker_is_one_fault_however_many_waited() -> None:
    counter = FaultCounter(consecutive=3)
    dead = classify_exit(-11)
    assert [counter.add(1.0, dead, incident=("pid", 4711)) for _ in range(50)] == [None] * 50
    assert counter.errors() == {"SIGSEGV": 1}
    assert counter.add(2.0, dead, incident=("pid", 4712)) is None
    assert counter.add(3.0, dead, incident=("pid", 4713)) is not None


def test_only_the_document_s_codes_count() -> None:
    counter = FaultCounter(codes=[719], consecutive=1)
    assert counter.add(0.0, from_code(700)) is None
    assert counter.add(0.0, classify_exit("HANG")) is not None
    assert counter.add(0.0, from_code(719)) is not None
    assert counter.errors() == {"700": 1, "HANG": 1, "719": 1}


def test_unknown_counts_when_proven() -> None:
    counter = FaultCounter(consecutive=1)
    odd = classify("RuntimeError", "std::exception")
    assert counter.add(0.0, odd) is None
    assert counter.add(0.0, odd, proven=True) is not None


def test_seen_keeps_first_last_and_message() -> None:
    counter = FaultCounter(consecutive=9)
    for now_s, message in ((1.0, "first"), (2.0, ""), (5.0, "last")):
        counter.add(now_s, from_code(700, message))
    seen = counter.seen["700"]
    assert (seen.count, seen.first_s, seen.last_s, seen.message) == (3, 1.0, 5.0, "last")


def test_reset_starts_over() -> None:
    counter = FaultCounter(consecutive=2)
    counter.add(0.0, from_code(700))
    counter.reset()
    assert counter.add(0.1, from_code(700)) is None
    assert counter.errors() == {"700": 2}


def test_a_count_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="consecutive"):
        FaultCounter(consecutive=0)


def test_success_costs_nothing_measurable() -> None:
    counter = FaultCounter()
    best_s = min(timeit.repeat(counter.success, number=10_000, repeat=5)) / 10_000
    assert best_s < 2e-6
