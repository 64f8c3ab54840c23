"""What a node holds: proportional memory, open files and processes, its workers' included."""

from __future__ import annotations

from dataclasses import dataclass

import psutil


@dataclass(frozen=True, slots=True)
class Footprint:
    """Sums over a process and all below it."""

    pss_mb: float
    """Proportional set size: a page shared by n processes counts as 1/n in each of them."""
    open_files: int
    processes: int


def footprint(pid: int) -> Footprint:
    """Look at a process and its descendants now. Raises `psutil.Error` when it is gone."""
    root = psutil.Process(pid)
    pss = files = count = 0
    for process in [root, *root.children(recursive=True)]:
        try:
            pss += process.memory_full_info().pss
            files += process.num_fds()
            count += 1
        except psutil.Error:
            continue  # a worker that ended just now
    return Footprint(pss / 2**20, files, count)


def pss_mb(pid: int) -> float:
    """Of one process alone. Raises `psutil.Error`."""
    return float(psutil.Process(pid).memory_full_info().pss) / 2**20
