"""Why a request is refused before, or instead of, an inference. `http_errors` gives the status."""

from __future__ import annotations

from collections.abc import Sequence

from registry.errors import PaddlewheelError
from registry.names import ModelName, Version


class RouterError(PaddlewheelError):
    """Base of this package's errors."""


class UnknownModel(RouterError):
    """No document names this model here."""

    def __init__(self, model: str) -> None:
        super().__init__(f"unknown model {model[:128]!r}")
        self.model = model


class UnknownVersion(RouterError):
    """This version cannot answer here; ``loaded`` are those that can."""

    def __init__(
        self, model: ModelName, version: str, *, loaded: Sequence[Version], reason: str | None
    ) -> None:
        why = f": {reason}" if reason else ""
        there = ", ".join(loaded) or "none"
        super().__init__(
            f"version {version[:64]!r} of model {model!r} is not served here{why}; "
            f"loaded versions: {there}"
        )
        self.model = model
        self.version = version
        self.loaded = tuple(loaded)
        self.reason = reason


class NothingServes(RouterError):
    """The model is known, but none of its versions can answer yet (or any more)."""

    def __init__(self, model: ModelName, reason: str | None = None) -> None:
        super().__init__(
            f"no version of model {model!r} can serve now" + (f": {reason}" if reason else "")
        )
        self.model = model


class BadRequest(RouterError):
    """The request cannot be understood. Never counted against a model."""


class BodyTooLarge(RouterError):
    """The body, or what it decompresses to, is over ``limits.max_body_mb``."""


class UnsupportedEncoding(RouterError):
    """A ``Content-Encoding`` other than identity, gzip and deflate."""


class SlowUpload(RouterError):
    """The body did not arrive in time."""


class NotFound(RouterError):
    """No such endpoint, or no such thing under it."""


class MethodNotAllowed(RouterError):
    """The endpoint exists, for other methods."""

    def __init__(self, allow: Sequence[str]) -> None:
        super().__init__(f"method not allowed; allowed: {', '.join(allow)}")
        self.allow = tuple(allow)


class Forbidden(RouterError):
    """The endpoint is switched off on this node."""
