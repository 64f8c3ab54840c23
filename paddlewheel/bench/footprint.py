"""What a node holds: proportional memory, open files and processes, its workers' included."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import psutil


@dataclass(frozen=True, slots=True)
class Footprint:
    """Sums over a process and all below it."""

    pss_mb: float
    """Proportional set size: a page shared by n processes counts as 1/n in each of them."""
    own_mb: float
    """Of that what was allocated: anonymous and shared memory. The rest is mapped files, whose
    share grows when a process that has nothing to do with us (another node, another Paddle) ends
    and leaves Paddle's library to the others."""
    open_files: int
    processes: int


def footprint(pid: int) -> Footprint:
    """Look at a process and its descendants now. Raises `psutil.Error` when it is gone."""
    root = psutil.Process(pid)
    pss = own = 0.0
    files = count = 0
    for process in [root, *root.children(recursive=True)]:
        try:
            memory = _rollup_mb(process.pid)
            files += process.num_fds()
        except (psutil.Error, OSError):
            continue  # a worker that ended just now
        pss += memory["Pss"]
        own += memory["Pss_Anon"] + memory["Pss_Shmem"]
        count += 1
    return Footprint(pss, own, files, count)


def pss_mb(pid: int) -> float:
    """Of one process alone. Raises `OSError`."""
    return _rollup_mb(pid)["Pss"]


def _rollup_mb(pid: int) -> dict[str, float]:
    """The fields of ``/proc/<pid>/smaps_rollup`` (Linux 5.9 and newer has the three we use)."""
    found: dict[str, float] = {}
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]:
        name, size_kb, *_ = line.replace(":", " ").split()
        found[name] = int(size_kb) / 1024
    return found
