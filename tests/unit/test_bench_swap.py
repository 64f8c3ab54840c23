"""What `bench swap` makes of samples: which requests met a swap, and what is allowed of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest

from paddlewheel.bench.criteria import Criterion, is_kept
from paddlewheel.bench.footprint import Footprint
from paddlewheel.bench.judges import version_answers
from paddlewheel.bench.samples import Result, Sample
from paddlewheel.bench.subjects import VERSIONS, Subject, TooAlike, mlp_subject
from paddlewheel.bench.swap import requests_for, step
from paddlewheel.bench.swap_figures import WINDOW_AFTER_S, Swap, criteria, figures, split
from registry.inference import Array
from registry.names import ModelName
from registry.spec import parse_model

SMALL = Footprint(pss_mb=400.0, own_mb=100.0, open_files=50, processes=3)
SWAPS = [Swap("live", 10.0, 10.2), Swap("canary", 12.0, 12.1)]


def sample(due_s: float, latency_s: float = 0.002, failure: str | None = None) -> Sample:
    return Sample("json", due_s, latency_s, 200, "1", "stable", failure)


def result(*samples: Sample) -> Result:
    return Result(sorted(samples, key=lambda s: s.done_s), 9.0, 14.0)


@pytest.mark.parametrize(
    ("due_s", "latency_s", "met"),
    [
        (9.0, 0.5, "steady"),
        (9.9, 0.2, "live"),  # was under way when the document was put
        (10.1, 0.001, "live"),
        (10.2 + WINDOW_AFTER_S - 0.001, 0.001, "live"),
        (10.2 + WINDOW_AFTER_S + 0.001, 0.001, "steady"),
        (11.9, 0.2, "canary"),
        (13.0, 0.001, "steady"),
    ],
)
def test_a_request_meets_a_swap_with_any_part_of_it(
    due_s: float, latency_s: float, met: str
) -> None:
    steady, by_kind = split(result(sample(due_s, latency_s)), SWAPS)
    seen = {"steady": len(steady), **{kind: len(part) for kind, part in by_kind.items()}}
    assert seen == {"steady": 0, "live": 0, "canary": 0} | {met: 1}


def run_of(*samples: Sample, after: Footprint = SMALL) -> dict[str, Any]:
    steady = [sample(9 + n / 1000) for n in range(900)] + [
        sample(13 + n / 1000) for n in range(900)
    ]
    met = [sample(10 + n / 100) for n in range(20)] + [sample(12 + n / 100) for n in range(10)]
    run = figures(result(*steady, *met, *samples), SWAPS, SMALL, after, [40.0, 60.0])
    orjson.dumps(run)  # it goes out as JSON
    return run


def broken(run: dict[str, Any]) -> set[str]:
    return {criterion.what for criterion in criteria(run) if not criterion.holds}


def test_a_good_run_breaks_nothing() -> None:
    run = run_of()
    assert broken(run) == set()
    assert is_kept(criteria(run))
    assert run["p99_allowed_ms"] == pytest.approx(32.0)  # 2 ms and 30 more
    assert run["by_kind"]["live"]["to_in_force"]["p50_ms"] == pytest.approx(200.0)


def test_lost_and_mixed_answers_break_promises() -> None:
    run = run_of(sample(10.05, failure="status 503: ..."))
    assert broken(run) == {"failed requests"}
    assert not is_kept(criteria(run))
    run = run_of(sample(10.05, failure="header says version 2, the numbers are those of 1"))
    assert broken(run) == {"failed requests", "answers mixing versions"}


def test_slow_answers_count_for_the_kind_of_swap_they_met() -> None:
    late = [sample(12.0 + n / 1000, 0.040) for n in range(5)]
    assert broken(run_of(*late)) == {"p99 while canary changes"}
    assert broken(run_of(sample(10.1, 0.300))) == {
        "p99 while live changes", "latest answer while live changes",
    }  # fmt: skip
    # The same answers while nothing is swapped are the machine's.
    assert broken(run_of(*(sample(13.5 + n / 1000, 0.040) for n in range(5)))) == set()


def test_growth_is_seen() -> None:
    assert broken(run_of(after=Footprint(400.0, 106.0, 51, 4))) == {
        "allocated memory (PSS) after", "open files after", "processes after",
    }  # fmt: skip
    assert broken(run_of(after=Footprint(900.0, 104.0, 50, 3))) == set()


def test_every_step_asks_for_a_version_that_is_not_loaded() -> None:
    loaded: set[str | None] = {"1"}
    kinds: list[str] = []
    before: tuple[str | None, str | None] = ("1", None)
    for index in range(40):
        live, canary, kind = step(index)
        changed = live if kind == "live" else canary
        assert changed not in loaded
        kept = (live == before[0], canary == before[1])
        if index:  # exactly one of the two changes
            assert kept == (kind != "live", kind != "canary")
        before = (live, canary)
        loaded = {live, canary}
        kinds.append(kind)
    assert kinds == ["live", "canary"] * 20


def test_a_promise_is_told_from_an_aim() -> None:
    aim = Criterion("fast", "2", "< 1", holds=False)
    promise = Criterion("nothing lost", "1", "0", holds=False, is_promise=True)
    assert is_kept([aim])
    assert not is_kept([aim, promise])


def test_the_judge_tells_versions_apart(tmp_path: Path) -> None:
    subject = mlp_subject(tmp_path / "models")
    subject.save_expected(tmp_path / "expected.npz")
    judge = version_answers(str(tmp_path / "expected.npz"), rtol=subject.rtol, atol=subject.atol)

    def answer(numbers_of: str) -> bytes:
        values = subject.expected[numbers_of]["fetch_name_0"]
        output = {"name": "fetch_name_0", "datatype": "FP32", "shape": list(values.shape),
                  "data": values.ravel().tolist()}  # fmt: skip
        return orjson.dumps({"outputs": [output]})

    assert judge(200, {"x-model-version": "2"}, answer("2")) is None
    assert "numbers are those of 1" in (judge(200, {"x-model-version": "2"}, answer("1")) or "")
    assert "'9'" in (judge(200, {"x-model-version": "9"}, answer("1")) or "")


def test_versions_that_answer_alike_are_refused(tmp_path: Path) -> None:
    outputs: dict[str, Array] = {"y": np.ones((1, 3), np.float32)}
    nearly: dict[str, Array] = {"y": outputs["y"] + np.float32(1e-4)}
    with pytest.raises(TooAlike, match="1 and 2"):
        Subject({}, {}, {"1": outputs, "2": nearly})


def test_the_documents_are_good_ones(tmp_path: Path) -> None:
    subject = mlp_subject(tmp_path)
    document = parse_model(subject.document("2", "3"), name=ModelName("bench"))
    assert document.spec.live == "2"
    assert document.spec.canary is not None
    assert document.spec.canary.version == "3"
    assert document.spec.rollback.bake_s == 0
    assert [version.version for version in document.spec.versions] == list(VERSIONS)


def test_the_traffic_is_a_mix(tmp_path: Path) -> None:
    subject = mlp_subject(tmp_path)
    weights = {r.name: r.weight for r in requests_for(subject, tmp_path / "expected.npz")}
    assert weights == {"json": 2, "json+canary": 1, "binary": 2, "binary+canary": 1}
