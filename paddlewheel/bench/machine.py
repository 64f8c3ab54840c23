"""On what a figure was measured: enough to judge it, nothing that names a machine."""

from __future__ import annotations

import os
import platform
from datetime import UTC, datetime
from importlib import metadata
from typing import Any


def machine() -> dict[str, Any]:
    """Date, cores and versions."""
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "cores": len(os.sched_getaffinity(0)),
        "architecture": platform.machine(),
        "python": platform.python_version(),
        "paddle": _version("paddlepaddle") or _version("paddlepaddle-gpu"),
        "aiohttp": _version("aiohttp"),
        "load_average_1min": round(os.getloadavg()[0], 2),
    }


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None
