"""Servables' states in the words of other servers: Triton's index, TensorFlow Serving's status."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

_TRITON: Mapping[str, str] = {
    "NEW": "LOADING", "FETCHING": "LOADING", "LOADING": "LOADING", "WARMING": "LOADING",
    "READY": "READY", "CANARY": "READY", "LIVE": "READY", "STANDBY": "READY",
    "DRAINING": "UNLOADING", "GONE": "UNAVAILABLE", "FAILED": "UNAVAILABLE",
    "QUARANTINED": "UNAVAILABLE",
}  # fmt: skip
_TF_SERVING: Mapping[str, str] = {
    "NEW": "START", "FETCHING": "LOADING", "LOADING": "LOADING", "WARMING": "LOADING",
    "READY": "AVAILABLE", "CANARY": "AVAILABLE", "LIVE": "AVAILABLE", "STANDBY": "AVAILABLE",
    "DRAINING": "UNLOADING", "GONE": "END", "FAILED": "END", "QUARANTINED": "END",
}  # fmt: skip
_ORDER = ("READY", "LOADING", "UNLOADING", "UNAVAILABLE", "UNKNOWN")


def repository_index(
    servables: Iterable[Mapping[str, Any]], *, ready_only: bool = False
) -> list[dict[str, str]]:
    """Return Triton's repository index, one entry for each version text.

    Where two servables share a version (other bytes), the one nearest to ready speaks for it.
    """
    best: dict[tuple[str, str], dict[str, str]] = {}
    for servable in servables:
        state = _TRITON.get(str(servable["state"]), "UNKNOWN")
        key = (str(servable["model"]), str(servable["version"]))
        known = best.get(key)
        if known is None or _ORDER.index(state) < _ORDER.index(known["state"]):
            reason = servable.get("reason") or ("" if state == "READY" else servable["state"])
            best[key] = {"name": key[0], "version": key[1], "state": state, "reason": str(reason)}
    return [entry for entry in best.values() if not ready_only or entry["state"] == "READY"]


def version_status(servables: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return TensorFlow Serving's ``model_version_status`` of one model's servables."""
    listed: list[dict[str, Any]] = []
    for servable in servables:
        reason = servable.get("reason") or ""
        is_failed = servable["state"] in ("FAILED", "QUARANTINED")
        listed.append(
            {
                "version": servable["version"],
                "state": _TF_SERVING.get(str(servable["state"]), "UNKNOWN"),
                "status": {
                    "error_code": "ABORTED" if is_failed else "OK",
                    "error_message": str(reason),
                },
            }
        )
    return listed
