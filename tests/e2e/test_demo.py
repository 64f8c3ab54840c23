"""The demo as a user runs it: ends by itself, says that all went well, leaves nothing behind."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import psutil
import pytest


@pytest.mark.timeout(300)
def test_the_demo_loses_no_request_and_leaves_nothing(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "paddlewheel.demo"],
        env={**os.environ, "TMPDIR": str(tmp_path), "COLUMNS": "160"},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    assert "No request failed and every text was right." in said
    assert re.search(r"failed\s+│ 0 ", said), said
    # The story: shadow first, then live; a canary; two refusals with their reasons.
    for line in (
        "ocr-cls 2 is LIVE", "ocr-cls 1 is STANDBY", "ocr-rec 2 is CANARY", "ocr-rec 2 is LIVE",
        "line 9, spec.warmpu", "ocr-rec 3 is FAILED: params:",
    ):  # fmt: skip
        assert line in said
    for text in ("direction 1", "direction 2", "recognition 1", "recognition 2"):
        requests, right, wrong = map(
            int, re.findall(rf"{text}\s+│\s+(\d+)\s+│\s+(\d+)\s+│\s+(\d+)", said)[0]
        )
        assert requests == right > 0
        assert wrong == 0
    assert not list(tmp_path.iterdir())
    assert not processes_of(tmp_path)


def processes_of(folder: Path) -> list[psutil.Process]:
    """Processes that were told about ``folder``, on the command line or by TMPDIR."""
    found: list[psutil.Process] = []
    for process in psutil.process_iter():
        try:
            told = " ".join([*process.cmdline(), process.environ().get("TMPDIR", "")])
        except psutil.Error:
            continue
        if str(folder) in told:
            found.append(process)
    return found
