"""A slice of the simulation, and the proof that it finds what it looks for (docs/simulation.md).

Each run is a process of its own, with the order of sets fixed, so that a seed that fails here is
the same seed by hand: ``python -m tests.sim --seeds N --nodes M``.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.timeout(300)
ROOT = Path(__file__).resolve().parents[2]


def simulate(*args: str) -> tuple[int, str]:
    """Exit status and output of ``python -m tests.sim``."""
    # Its own processor time is seconds; a machine that does much else may stretch it.
    done = subprocess.run(
        [sys.executable, "-m", "tests.sim", *args],
        cwd=ROOT, env={**os.environ, "PYTHONHASHSEED": "0"},
        capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr


def test_two_hundred_nodes_keep_every_promise() -> None:
    status, output = simulate("--seeds", "1", "--nodes", "200")
    assert status == 0, output


def test_a_few_nodes_keep_every_promise() -> None:
    status, output = simulate("--seeds", "100..115", "--nodes", "12")
    assert status == 0, output


@pytest.mark.parametrize(
    "mutation",
    [
        "skipped-revision", "lost-rollback", "double-coordinator", "early-commit",
        "unnoticed-loss",
    ],
)  # fmt: skip
def test_a_planted_bug_is_found(mutation: str) -> None:
    """Within so many seeds, and by the promise that it breaks."""
    seeds = "0..39" if mutation == "double-coordinator" else "0..9"
    status, output = simulate("--seeds", seeds, "--nodes", "12", "--find", mutation)
    assert status == 0, output


def test_a_seed_is_the_same_every_time() -> None:
    first, second = (
        re.search(r"entries, (\w+)", simulate("--seeds", "7", "--nodes", "12")[1]) for _ in "ab"
    )
    assert first is not None
    assert second is not None
    assert first[1] == second[1]
