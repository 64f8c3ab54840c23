"""The clever counter against a slow one that remembers everything."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from loader.counting import FaultCounter
from loader.faults import counts, from_code

CODES = ["700", "2", "SIGSEGV", "InvalidArgument", "999", "46"]
STEP = st.tuples(st.sampled_from(["success", *CODES]), st.floats(0, 20, allow_nan=False))


@given(st.lists(STEP, max_size=60), st.integers(1, 5), st.floats(0, 60))
def test_trips_exactly_when_the_model_does(
    steps: list[tuple[str, float]], n: int, window_s: float
) -> None:
    counter = FaultCounter(consecutive=n, window_s=window_s)
    now_s, row, times = 0.0, 0, list[float]()
    for what, after_s in steps:
        now_s += after_s
        if what == "success":
            counter.success()
            row = 0
            continue
        tripped = counter.add(now_s, from_code(what)) is not None
        if not counts(from_code(what)):
            assert not tripped
            continue
        row += 1
        times.append(now_s)
        in_window = len(times) >= n and times[-1] - times[-n] <= window_s
        assert tripped == (row >= n or in_window)
