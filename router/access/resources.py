"""What of us a request wants to use (pure). Whatever is not listed here needs a credential."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from router.fleet.paths import model_path


class Area(Enum):
    OPEN = "open"
    """Probes: for whoever reaches us, and without a name in them."""
    MODEL = "model"
    LISTING = "listing"
    """What there is; everybody sees what they may use."""
    ADMIN = "admin"
    OTHER = "other"
    """Nothing about a model, or no such endpoint: whoever has a credential may know."""


@dataclass(frozen=True, slots=True)
class Resource:
    area: Area
    model: str = ""


_OPEN = frozenset(
    (
        ("livez",), ("healthz",), ("readyz",), ("startupz",),
        ("v2", "health", "live"), ("v2", "health", "ready"),
    )
)  # fmt: skip
_LISTINGS = frozenset(
    (("v1", "models"), ("v1", "pipelines"), ("v1", "pipelines"), ("v2", "repository", "index"))
)
_ADMIN = frozenset(("admin", "metrics"))


OPEN_AND_ADMIN = frozenset((Area.OPEN, Area.ADMIN))
READINESS = frozenset((("readyz",), ("v2", "health", "ready")))
"""Probes that may list checks, and with them names."""


def resource_of(segments: tuple[str, ...]) -> Resource:
    """Say what a path's segments are about: those that the endpoints are matched by."""
    if segments in _OPEN:
        return Resource(Area.OPEN)
    if segments[0] in _ADMIN:
        return Resource(Area.ADMIN)
    if segments in _LISTINGS:
        return Resource(Area.LISTING)
    if segments[:2] == ("v2", "repository"):
        return Resource(Area.ADMIN)
    path = model_path(segments)
    if path is not None:
        return Resource(Area.MODEL, path.model)
    if segments[:2] == ("v1", "pipelines") and len(segments) > 2:
        return Resource(Area.MODEL, segments[2])
    return Resource(Area.OTHER)
