"""How one version is to be made ready: all of the document that decides it, as one value."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import orjson

from registry.names import ModelName, Version


@dataclass(frozen=True, slots=True)
class Recipe:
    """Two recipes that are equal make the same servable of the same bytes."""

    model: ModelName
    version: Version
    source: str
    """fsspec URL or path of a folder."""
    sha256: Mapping[str, str] = field(default_factory=dict[str, str])
    """File name to the hex digest that it must have."""
    device: str = "cpu"
    replicas: int = 1
    memory_mb: int | None = None
    """Per replica; ``None``: estimated from the files."""
    priority: str = "normal"
    threads: int = 1
    precision: str = "fp32"
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])
    warmup_requests: int = 3
    warmup_shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict[str, tuple[int, ...]])
    golden: str | None = None
    rtol: float = 1e-3
    atol: float = 1e-5

    def key(self) -> str:
        """A short stable hash of what shapes and admits the predictor, not where it comes from.

        ``source`` and ``sha256`` are left out: the digest of the bytes stands for them.
        """
        shaping = {
            "device": self.device, "replicas": self.replicas, "threads": self.threads,
            "precision": self.precision, "options": dict(self.options),
            "shapes": dict(self.warmup_shapes), "golden": self.golden,
            "tolerance": [self.rtol, self.atol],
        }  # fmt: skip
        text = orjson.dumps(shaping, option=orjson.OPT_SORT_KEYS)
        return hashlib.sha256(text).hexdigest()[:12]
