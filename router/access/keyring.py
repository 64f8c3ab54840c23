"""Keys that tokens are signed with, and the one place where a signature is verified.

A key is bound to the algorithms of its own kind when it is read, so that no header can have it
used as another kind: a public RSA key is never an HS256 secret.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, cast

from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
from jwt import PyJWK, PyJWS
from jwt.exceptions import PyJWTError

from registry.errors import PaddlewheelError
from registry.gateway_spec import SYMMETRIC
from router.access.errors import AccessClosed, BadToken
from router.access.tokens import Token

SECRET_BYTES_MIN = 32
SECRET_BYTES_MAX = 4096
RSA_BITS_MIN = 2048
KEYS_MAX = 256
JWKS_BYTES_MAX = 512 * 1024
_TRIED_MAX = 8
"""Keys that a token without ``kid`` is tried against."""
_PRIVATE_PARTS = frozenset(("d", "p", "q", "k"))

_BY_KIND: Mapping[tuple[str, str], tuple[str, ...]] = {
    ("RSA", ""): ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512"),
    ("EC", "P-256"): ("ES256",),
    ("EC", "P-384"): ("ES384",),
    ("EC", "P-521"): ("ES512",),
    ("OKP", "Ed25519"): ("EdDSA",),
}


class BadKeys(PaddlewheelError):
    """A key set or a secret that cannot be used. The text holds nothing of the keys."""


class UnknownKey(BadToken):
    """No key here fits the token's ``kid`` and algorithm: there may be a newer key set."""

    def __init__(self) -> None:
        super().__init__("the token's signature does not hold")


@dataclass(frozen=True, slots=True)
class Key:
    kid: str | None
    algorithms: frozenset[str]
    material: Any
    """As PyJWT's algorithms take it: bytes, or a public key of ``cryptography``."""


@dataclass(frozen=True, slots=True)
class KeySet:
    keys: tuple[Key, ...] = ()
    ignored: tuple[str, ...] = ()
    """Why some entries of a set are not used, for the log."""

    def fitting(self, token: Token) -> tuple[Key, ...]:
        """The keys that may have signed it; those without a ``kid`` fit any."""
        return tuple(
            key
            for key in self.keys
            if token.algorithm in key.algorithms
            and (token.kid is None or key.kid is None or key.kid == token.kid)
        )[:_TRIED_MAX]


def secret_key(content: bytes) -> KeySet:
    """The secret of a file; one newline at its end is no part of it. Raises `BadKeys`."""
    secret = content.removesuffix(b"\n").removesuffix(b"\r")
    if not SECRET_BYTES_MIN <= len(secret) <= SECRET_BYTES_MAX:
        raise BadKeys(f"want a secret of {SECRET_BYTES_MIN} to {SECRET_BYTES_MAX} bytes")
    if b"-----BEGIN" in secret:
        raise BadKeys("want a secret, got what looks like a key or certificate in PEM")
    return KeySet((Key(None, frozenset(SYMMETRIC), secret),))


def read_jwks(content: bytes) -> KeySet:
    """Understand a JSON Web Key Set (RFC 7517). Entries that cannot be used are left out.

    Raises `BadKeys` where it is none, or has no usable key.
    """
    if len(content) > JWKS_BYTES_MAX:
        raise BadKeys(f"the key set is over {JWKS_BYTES_MAX} bytes")
    try:
        document: object = json.loads(content)
    except (ValueError, RecursionError) as exc:
        raise BadKeys("the key set is not JSON") from exc
    listed: object = None
    if isinstance(document, dict):
        listed = cast("dict[str, object]", document).get("keys")
    if not isinstance(listed, list):
        raise BadKeys('want a key set: {"keys": [...]}')
    entries = cast("list[object]", listed)[:KEYS_MAX]
    keys: list[Key] = []
    ignored: list[str] = []
    for at, entry in enumerate(entries):
        try:
            keys.append(_key(entry))
        except BadKeys as exc:
            ignored.append(f"keys[{at}]: {exc}")
    if not keys:
        raise BadKeys("the key set has no usable key: " + ("; ".join(ignored[:3]) or "it is empty"))
    return KeySet(tuple(keys), tuple(ignored))


def _key(entry: object) -> Key:
    if not isinstance(entry, dict):
        raise BadKeys("want a mapping")
    jwk = cast("dict[str, Any]", entry)
    if jwk.get("kty") == "oct" or not _PRIVATE_PARTS.isdisjoint(jwk):
        raise BadKeys("a secret or private key has no place in a key set")
    if jwk.get("use", "sig") != "sig" or "verify" not in jwk.get("key_ops", ["verify"]):
        raise BadKeys("not for verifying signatures")
    kind = (str(jwk.get("kty")), "" if jwk.get("kty") == "RSA" else str(jwk.get("crv")))
    algorithms = _BY_KIND.get(kind)
    if algorithms is None:
        raise BadKeys("a kind of key that is not known here")
    named = jwk.get("alg")
    if named is not None:
        if named not in algorithms:
            raise BadKeys("alg does not fit the kind of key")
        algorithms = (named,)
    kid = jwk.get("kid")
    if kid is not None and not isinstance(kid, str):
        raise BadKeys("kid is not text")
    try:
        material = PyJWK(jwk, algorithm=algorithms[0]).key
    except (PyJWTError, ValueError, TypeError, KeyError) as exc:
        raise BadKeys("cannot be read") from exc
    if isinstance(material, RSAPublicKey) and material.key_size < RSA_BITS_MIN:
        raise BadKeys(f"an RSA key of under {RSA_BITS_MIN} bits")
    return Key(kid, frozenset(algorithms), material)


def verify(token: Token, sets: Iterable[KeySet | None], accepted: frozenset[str]) -> None:
    """Return when a key of ours signed it. ``None`` stands for keys that are not here yet.

    accepted: the algorithms that the document lists. Raises `UnknownKey` where no key fits,
    `BadToken`, and `AccessClosed` where the keys that might fit are not here.
    """
    if token.algorithm not in accepted:
        raise BadToken("the token's algorithm is not accepted")
    known = list(sets)
    fitting = [key for keys in known if keys is not None for key in keys.fitting(token)]
    if not fitting:
        if None in known:
            raise AccessClosed("the keys that tokens are verified with are not here yet")
        raise UnknownKey
    for key in fitting[:_TRIED_MAX]:
        try:
            _JWS.decode_complete(token.text, key.material, algorithms=[token.algorithm])
        except (PyJWTError, ValueError, TypeError):
            continue
        return
    raise BadToken("the token's signature does not hold")


_JWS = PyJWS()
