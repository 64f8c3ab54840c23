"""Why a request is not let in. A client reads nothing here of keys, models or other clients."""

from __future__ import annotations

from collections.abc import Mapping

from router.errors import RouterError


class AccessError(RouterError):
    """Base of these. ``headers`` go with the answer."""

    def __init__(self, message: str, headers: Mapping[str, str]) -> None:
        super().__init__(message)
        self.headers = headers


class Unauthenticated(AccessError):
    """Nobody we know, or no proof of it (RFC 6750: 401 with ``WWW-Authenticate``).

    code: ``invalid_token``, or ``None`` where nothing was presented at all.
    """

    def __init__(self, message: str, code: str | None = None) -> None:
        shown = 'Bearer realm="paddlewheel"'
        if code is not None:
            shown += f', error="{code}", error_description="{message}"'
        super().__init__(message, {"WWW-Authenticate": shown})
        self.code = code


class BadToken(Unauthenticated):
    """A credential that does not hold. ``message`` is one of a few fixed texts."""

    def __init__(self, message: str) -> None:
        super().__init__(message, "invalid_token")


class NotPermitted(AccessError):
    """A client that we know asks for what it may not use, whether or not that exists."""

    def __init__(self, message: str = "not permitted") -> None:
        shown = 'Bearer realm="paddlewheel", error="insufficient_scope"'
        super().__init__(message, {"WWW-Authenticate": shown})


class RateLimited(AccessError):
    """The client, or all clients of a model together, sent more than the document allows."""


class AccessClosed(AccessError):
    """Nobody can be let in now: the rules, or the keys that they name, are not here."""

    def __init__(self, message: str) -> None:
        super().__init__(message, {"Retry-After": "1"})
