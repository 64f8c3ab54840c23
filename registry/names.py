"""The names everything else is about. They are told apart by type, never by habit."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NewType

ModelName = NewType("ModelName", str)
Version = NewType("Version", str)
"""A model's own version: a semver or a date, as its author wrote it. Never ordered by us."""

Revision = NewType("Revision", int)
"""etcd's mod_revision: the config version of a document. Not a model's version."""

NodeId = NewType("NodeId", str)
Digest = NewType("Digest", str)
"""``sha256:<hex>`` over program and params together."""

VERSION_PATTERN = r"[A-Za-z0-9][A-Za-z0-9._+-]{0,63}"
MODEL_NAME_PATTERN = r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}"
_VERSION = re.compile(VERSION_PATTERN)
_MODEL_NAME = re.compile(MODEL_NAME_PATTERN)


def is_version(text: str) -> bool:
    """Whether ``text`` may name a version (SPEC section 8)."""
    return _VERSION.fullmatch(text) is not None


def is_model_name(text: str) -> bool:
    """Whether ``text`` may name a model: it becomes one path segment of a key and of a URL."""
    return _MODEL_NAME.fullmatch(text) is not None


@dataclass(frozen=True, slots=True, order=True)
class ServableId:
    """One version of one model with these very bytes, loaded in this very way.

    Two servables may share a version: the same version text with other bytes, or with other
    predictor settings, is loaded beside the old one and swapped like any other.
    """

    model: ModelName
    version: Version
    digest: Digest
    recipe: str = ""
    """A short hash of what else decides how it is loaded (device, replicas, predictor, warm-up)."""

    def __str__(self) -> str:
        return f"{self.model}:{self.version}@{self.digest[7:19]}"
