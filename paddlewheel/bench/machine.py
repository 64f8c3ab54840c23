"""On what a figure was measured: enough to judge it, nothing that names a machine."""

from __future__ import annotations

import os
import platform
from datetime import UTC, datetime
from importlib import metadata
from typing import Any


def machine(*, load_before: float) -> dict[str, Any]:
    """Date, cores and versions.

    load_before: the load average (1 minute) before the measurement began: above a small fraction
        of the cores, somebody else used the machine too.
    """
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "cores": len(os.sched_getaffinity(0)),
        "architecture": platform.machine(),
        "python": platform.python_version(),
        "paddle": _version("paddlepaddle") or _version("paddlepaddle-gpu"),
        "aiohttp": _version("aiohttp"),
        "load_average_before": round(load_before, 2),
    }


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None
