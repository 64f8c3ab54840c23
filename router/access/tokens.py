"""What a JSON Web Token says and whether it holds now (pure). Signatures: `keyring`.

Strict where the standards leave room: one spelling of base64url, no JSON key twice, no header that
would have us fetch or take a key from the token itself (RFC 8725, JWT Best Current Practices).
"""

from __future__ import annotations

import binascii
import json
import math
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, cast

from registry.gateway_spec import Jwt, read_models
from router.access.caller import Caller
from router.access.errors import BadToken

TOKEN_BYTES_MAX = 8192
_JSON_DEPTH_MAX = 8
_REFUSED_HEADERS = frozenset(("jku", "jwk", "x5u", "x5c", "crit", "b64", "zip", "enc"))
"""The token bringing its own key, or asking for what we do not do."""
_TYPES = frozenset(("jwt", "at+jwt", "application/at+jwt"))
_FUTURE_S = 1e11
"""No date: 5138 and later."""


@dataclass(frozen=True, slots=True)
class Token:
    """A token taken apart; nothing in it is to be trusted yet."""

    text: str
    algorithm: str
    kid: str | None
    claims: Mapping[str, Any]


def read_token(text: str) -> Token:
    """Take a token apart. Raises `BadToken`."""
    if len(text) > TOKEN_BYTES_MAX:
        raise BadToken("the token is too long")
    parts = text.split(".")
    if len(parts) != 3:
        raise BadToken("not a signed token")
    header = _json_part(parts[0])
    claims = _json_part(parts[1])
    if not parts[2]:
        raise BadToken("not a signed token")
    _decode(parts[2])
    algorithm, kid, kind = header.get("alg"), header.get("kid"), header.get("typ")
    if not isinstance(algorithm, str):
        raise BadToken("the token's algorithm is not accepted")
    if not _REFUSED_HEADERS.isdisjoint(header):
        raise BadToken("the token's header is not accepted")
    if kid is not None and not (isinstance(kid, str) and 0 < len(kid) <= 256):
        raise BadToken("the token's header is not accepted")
    if kind is not None and not (isinstance(kind, str) and kind.lower() in _TYPES):
        raise BadToken("the token's header is not accepted")
    return Token(text, algorithm, kid, claims)


def judge(claims: Mapping[str, Any], rules: Jwt, *, now_s: float) -> Caller:
    """Say whose token it is, from claims whose signature was verified.

    now_s: seconds since the epoch. Raises `BadToken`.
    """
    leeway_s = rules.leeway_s
    expires_s = _time(claims, "exp")
    if expires_s is None:
        raise BadToken("the token has no exp")
    if now_s >= expires_s + leeway_s:
        raise BadToken("the token has expired")
    for name in ("nbf", "iat"):
        begins_s = _time(claims, name)
        if begins_s is not None and begins_s > now_s + leeway_s:
            raise BadToken("the token is not valid yet")
    audience = claims.get("aud")
    named = cast("list[object]", audience) if isinstance(audience, list) else [audience]
    if not all(isinstance(name, str) for name in named):
        raise BadToken("the token's aud is not text")
    if not set(named) & set(rules.audience):
        raise BadToken("the token is for another audience")
    issuer = claims.get("iss")
    if issuer is not None and not isinstance(issuer, str):
        raise BadToken("the token's iss is not text")
    if rules.issuer is not None and issuer != rules.issuer:
        raise BadToken("the token is from another issuer")
    subject = claims.get("sub")
    if subject is not None and not (isinstance(subject, str) and 0 < len(subject) <= 512):
        raise BadToken("the token's sub is not text")
    if any(claims.get(name) is None for name in rules.required):
        raise BadToken("a claim is missing")
    return _caller(claims, rules, subject)


def _caller(claims: Mapping[str, Any], rules: Jwt, subject: str | None) -> Caller:
    permission: object = claims.get(rules.permission_claim, ())
    try:
        models = read_models(permission)
    except ValueError as exc:  # the checking library's errors are that
        raise BadToken("the token's models are not a list of names") from exc
    admin: object = claims.get(rules.admin_claim, False)
    if not isinstance(admin, bool):
        raise BadToken("the token's admin claim is not true or false")
    # Without a subject all such tokens share one limit: the id must not be the client's to choose.
    return Caller(f"sub:{subject or ''}", models, admin, subject, claims)


def _time(claims: Mapping[str, Any], name: str) -> float | None:
    value = claims.get(name)
    if value is None:
        if name in claims:
            raise BadToken("a time in the token is not a number")
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise BadToken("a time in the token is not a number")
    if not (0 <= value < _FUTURE_S) or not math.isfinite(value):
        raise BadToken("a time in the token is not a number")
    return float(value)


def _json_part(part: str) -> Mapping[str, Any]:
    raw = _decode(part)
    try:
        value: object = json.loads(
            raw.decode("utf-8"), object_pairs_hook=_once, parse_constant=_no_constant
        )
    except (ValueError, RecursionError) as exc:
        raise BadToken("not a signed token") from exc
    if not isinstance(value, dict) or _is_deeper(cast("object", value), _JSON_DEPTH_MAX):
        raise BadToken("not a signed token")
    return cast("dict[str, Any]", value)


def _decode(part: str) -> bytes:
    try:
        raw = part.encode("ascii")
        decoded = urlsafe_b64decode(raw + b"=" * (-len(raw) % 4))
    except (UnicodeEncodeError, binascii.Error) as exc:
        raise BadToken("not a signed token") from exc
    if urlsafe_b64encode(decoded).rstrip(b"=") != raw:  # padding, other alphabets, stray bits
        raise BadToken("not a signed token")
    return decoded


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key twice")
    return found


def _no_constant(name: str) -> float:
    raise ValueError(name)


def _is_deeper(value: object, levels: int) -> bool:
    """Whether mappings and lists nest deeper than ``levels``; looks no deeper than that."""
    below: Iterable[object]
    if isinstance(value, dict):
        below = cast("dict[str, object]", value).values()
    elif isinstance(value, list):
        below = cast("list[object]", value)
    else:
        return False
    return levels == 0 or any(_is_deeper(each, levels - 1) for each in below)
