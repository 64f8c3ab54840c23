"""Health as the probes and the Open Inference Protocol show it (pure)."""

from __future__ import annotations

from typing import Any

from router.ports import Health


def live(health: Health) -> tuple[int, dict[str, Any]]:
    """``/livez``, ``/healthz``, ``/v2/health/live``: 200 or 503, nothing else."""
    return (200 if health.live else 503), {"live": health.live}


def ready(health: Health, *, verbose: bool = False) -> tuple[int, dict[str, Any]]:
    """``/readyz`` and ``/v2/health/ready``; ``verbose`` lists the checks."""
    body: dict[str, Any] = {"ready": health.ready, "live": health.live}
    if verbose:
        body["checks"] = [
            {"name": check.name, "ok": check.ok, "detail": check.detail} for check in health.checks
        ]
    return (200 if health.ready else 503), body


def started(health: Health) -> tuple[int, dict[str, Any]]:
    """``/startupz``: the first good version is up, or was."""
    return (200 if health.started else 503), {"started": health.started}
