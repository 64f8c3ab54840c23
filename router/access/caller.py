"""A client as it proved itself to be (pure)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from registry.gateway_spec import Models
from registry.names import ModelName


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks, and what they may."""

    id: str
    """For rate limits and logs: ``key:team-a``, ``sub:alice``, ``address:10.0.0.7``."""
    models: Models
    """``None``: all."""
    is_admin: bool
    name: str | None = None
    """The API key's id or the token's subject: what ``limits.clients`` is looked up by."""
    claims: Mapping[str, Any] | None = None
    """Of a verified token; ``None`` for other credentials."""

    def may_use(self, model: str) -> bool:
        return self.models is None or ModelName(model) in self.models
