"""`paddlewheel bench swap` as a user runs it, short: real etcd, node, traffic and verdict."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest


@pytest.mark.timeout(180)
def test_swaps_lose_nothing_and_leave_nothing(tmp_path: Path) -> None:
    results, scratch = tmp_path / "results", tmp_path / "scratch"
    scratch.mkdir()
    done = subprocess.run(
        [sys.executable, "-m", "paddlewheel", "bench", "swap", "--n", "4", "--pause", "0.3",
         "--rate", "100", "--json", "--save", str(results)],
        env={**os.environ, "TMPDIR": str(scratch)},
        capture_output=True,
        text=True,
        timeout=170,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    run = json.loads(done.stdout)
    assert run["failed"] == run["mixed"] == 0
    assert run["requests"] > 200
    assert len(run["versions"]) >= 3  # live and canary both moved, and traffic with them
    assert {kind: seen["swaps"] for kind, seen in run["by_kind"].items()} == {
        "live": 2,
        "canary": 2,
    }
    assert run["processes"]["after"] == run["processes"]["before"] == 3
    assert json.loads((results / "swap-mlp.json").read_text()) == run
    assert not list(scratch.iterdir())
    assert not [p for p in psutil.process_iter() if _was_given(p, str(scratch))]


def _was_given(process: psutil.Process, folder: str) -> bool:
    try:
        return process.environ().get("TMPDIR") == folder
    except psutil.Error:
        return False
