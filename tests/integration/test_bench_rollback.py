"""One short run of ``paddlewheel bench rollback``, and what its figures are made of."""

from __future__ import annotations

import json
import subprocess
import sys

from paddlewheel.bench.rollback import Run, criteria, figures
from paddlewheel.bench.samples import Result, Sample


def sample(due_s: float, done_s: float, version: str, failure: str | None = None) -> Sample:
    return Sample("json", due_s, done_s - due_s, 200, version, "stable", failure)


def test_the_time_is_from_the_third_error_to_the_next_answer_by_the_standby() -> None:
    samples = [
        sample(9.90, 9.91, "2"),
        sample(9.99, 9.999, "1"),  # ran again after the second error
        sample(9.98, 10.004, "1"),  # met the third one
        sample(10.005, 10.006, "1"),
        sample(10.5, 10.9, "2", "status 503"),
    ]
    run = Run(9.0, (9.5, 9.9, 10.0), 10.0005, 0)
    seen = figures(Result(samples, 9.0, 11.0), [run])
    assert seen["error_to_answer_ms"]["p99"] == 4.0
    assert seen["error_to_flip_ms"]["p99"] == 0.5
    assert seen["slowest_request_ms"]["max"] == 24.0
    assert seen["first_to_last_error_ms"]["p50"] == 500.0
    kept = {c.what: (c.holds, c.is_promise) for c in criteria({**seen, "guards": None})}
    assert kept["requests failed"] == (False, True)
    assert kept["p99 from error 3 to the standby's first answer"] == (True, False)


def test_a_short_run() -> None:
    done = subprocess.run(
        [
            sys.executable, "-m", "paddlewheel", "bench", "rollback", "--n", "2",
            "--rate", "50", "--code", "-101", "--guard-rounds", "1", "--json",
        ],
        capture_output=True,
        timeout=100,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    run = json.loads(done.stdout)
    assert (run["rollbacks"], run["failed"], run["workers_left"]) == (2, 0, 0)
    assert run["versions"].keys() == {"1", "2"}
    assert run["guards"]["ratio"] > 0
