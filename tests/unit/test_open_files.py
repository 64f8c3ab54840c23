from __future__ import annotations

import subprocess
import sys

import pytest

SCRIPT = """
import resource
from paddlewheel.open_files import raise_limit
resource.setrlimit(resource.RLIMIT_NOFILE, ({soft}, {hard}))
raise_limit()
print(*resource.getrlimit(resource.RLIMIT_NOFILE))
"""


@pytest.mark.parametrize(
    ("soft", "hard", "wanted"),
    [(256, 512, "512 512"), (512, 512, "512 512")],
    ids=["raised to the hard limit", "nothing to raise"],
)
def test_the_limit_is_raised_as_far_as_it_goes(soft: int, hard: int, wanted: str) -> None:
    """In a process of its own: a hard limit cannot be raised again."""
    script = SCRIPT.format(soft=soft, hard=hard)
    ended = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=10, check=True
    )
    assert ended.stdout.strip() == wanted
