"""Static keys, known by their digests (pure).

A key is 256 random bits. Nobody can guess one, with the digest or without, so a plain sha256 is as
good here as a slow password hash, and costs 1 us instead of 100 ms a request. That holds for
random keys alone: anything that is not in the form of a generated key is refused unseen, so that
a digest of somebody's password in the document is a key that never works.
"""

from __future__ import annotations

import hashlib
import re
from base64 import urlsafe_b64encode
from collections.abc import Iterable, Mapping

from registry.gateway_spec import ApiKey
from router.access.caller import Caller
from router.access.errors import BadToken

KEY_PREFIX = "pwk_"
"""Also lets scanners for leaked secrets find one."""
SECRET_BYTES = 32
_FORM = re.compile(r"pwk_[A-Za-z0-9_-]{43}")


def show_key(secret: bytes) -> str:
    """Return the key's text for `SECRET_BYTES` random bytes."""
    if len(secret) != SECRET_BYTES:
        raise ValueError(f"want {SECRET_BYTES} random bytes, got {len(secret)}")
    return KEY_PREFIX + urlsafe_b64encode(secret).rstrip(b"=").decode()


def digest_of(key: str) -> str:
    """Return what stands in the document for ``key``."""
    return hashlib.sha256(key.encode()).hexdigest()


class ApiKeys:
    """The document's keys."""

    def __init__(self, keys: Iterable[ApiKey]) -> None:
        self._callers: Mapping[str, Caller] = {
            key.sha256: Caller(f"key:{key.id}", key.models, key.admin, key.id) for key in keys
        }

    def caller(self, key: str) -> Caller:
        """Say whose key it is. Raises `BadToken`.

        The lookup's time tells at most which digests share leading bits, of a digest that the
        client cannot steer without hashing 2**256 keys.
        """
        if _FORM.fullmatch(key) is None:
            raise BadToken("not a key of ours")
        found = self._callers.get(digest_of(key))
        if found is None:
            raise BadToken("not a key of ours")
        return found
