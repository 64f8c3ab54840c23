"""Health as the probes and the Open Inference Protocol show it (pure)."""

from __future__ import annotations

from typing import Any

from router.ports import Check, Health


def live(health: Health) -> tuple[int, dict[str, Any]]:
    """``/livez``, ``/healthz``, ``/v2/health/live``: 200 or 503, nothing else."""
    return (200 if health.live else 503), {"live": health.live}


_NAMELESS = frozenset(
    ("draining", "configs_known", "fleet_known", "nodes", "access", "control_loop")
)
ABOUT_MODELS = "models"
"""The one check that stands for those of all models where no names may be shown."""


def ready(
    health: Health, *, verbose: bool = False, names: bool = True
) -> tuple[int, dict[str, Any]]:
    """``/readyz`` and ``/v2/health/ready``; ``verbose`` lists the checks.

    names: whether the asker may see models, devices and reasons. A gateway that may not still
    learns from the answer whether the node is out for the sake of its models alone.
    """
    body: dict[str, Any] = {"ready": health.ready, "live": health.live}
    if verbose and names:
        body["checks"] = [
            {"name": check.name, "ok": check.ok, "detail": check.detail} for check in health.checks
        ]
    elif verbose:
        models = all(check.ok for check in health.checks if check.name.startswith("model:"))
        body["checks"] = [
            {"name": check.name, "ok": check.ok, "detail": ""}
            for check in (*health.checks, Check(ABOUT_MODELS, models))
            if check.name in _NAMELESS or check.name == ABOUT_MODELS
        ]
    return (200 if health.ready else 503), body


def started(health: Health) -> tuple[int, dict[str, Any]]:
    """``/startupz``: the first good version is up, or was."""
    return (200 if health.started else 503), {"started": health.started}
