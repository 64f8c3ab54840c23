"""What each request passes where access control or limits are on: who is it, may it, how often.

A front door holds one `Guard`, or ``None``, and swaps it as a value when the document changes.
"""

from __future__ import annotations

import hashlib
import ipaddress
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from aiohttp import web

from registry.gateway_spec import Access, GatewayLimits, Jwt
from registry.names import ModelName
from router.access.api_keys import KEY_PREFIX, ApiKeys
from router.access.buckets import Buckets, Quota, headers
from router.access.caller import Caller
from router.access.errors import (
    AccessClosed,
    AccessError,
    BadToken,
    NotPermitted,
    RateLimited,
    Unauthenticated,
)
from router.access.jwks import RemoteKeys
from router.access.keyring import KeySet, UnknownKey, verify
from router.access.resources import Area, Resource
from router.access.tokens import TOKEN_BYTES_MAX, judge, read_token

_VERIFIED_MAX = 512
"""Tokens remembered as signed by a key of ours. What they say is judged each time anew."""
_NO_HEADERS: Mapping[str, str] = {}
_IPV6_CLIENT_BITS = 64


@dataclass(frozen=True, slots=True)
class Admission:
    """A request that was let in."""

    caller: Caller
    headers: Mapping[str, str] = field(default_factory=dict[str, str])
    """For the answer: what is left of the client's quota."""


class Guarding(Protocol):
    """What a front door asks."""

    @property
    def body_timeout_s(self) -> float | None: ...

    def body_limit(self, limit_bytes: int) -> int:
        """The size of a body where the model allows ``limit_bytes``."""
        ...

    async def admit(self, request: web.BaseRequest, resource: Resource) -> Admission:
        """Let it in, or raise an `AccessError`."""
        ...

    async def is_admin(self, request: web.BaseRequest) -> bool:
        """Whether names may be shown in what is open to all."""
        ...


@dataclass(slots=True)
class Keyring:
    """The keys in use. Whoever reads files or fetches puts newer ones here."""

    secret: KeySet | None = None
    """``None``: the file could not be read so far."""
    file: KeySet | None = None
    remote: RemoteKeys | None = None

    def sets(self, rules: Jwt) -> list[KeySet | None]:
        """Those that the document names; ``None`` for what is not here."""
        found: list[KeySet | None] = []
        if rules.keys.secret_file is not None:
            found.append(self.secret)
        if rules.keys.jwks_file is not None:
            found.append(self.file)
        if rules.keys.jwks_url is not None:
            found.append(None if self.remote is None else self.remote.keys)
        return found


class ClosedGuard:
    """Lets nobody in but probes: whether access control is on is not known, or it cannot work."""

    body_timeout_s: float | None = None

    def body_limit(self, limit_bytes: int) -> int:
        return limit_bytes

    def __init__(self, reason: str) -> None:
        self.reason = reason

    async def admit(self, request: web.BaseRequest, resource: Resource) -> Admission:
        del request
        if resource.area is Area.OPEN:
            return Admission(_NOBODY)
        raise AccessClosed("access control is not ready")

    async def is_admin(self, request: web.BaseRequest) -> bool:
        del request
        return False


_NOBODY = Caller("nobody", frozenset(), is_admin=False)


class Guard:
    """One document's rules. Buckets outlive it: an edited document gives nobody a fresh quota."""

    def __init__(
        self,
        access: Access | None,
        limits: GatewayLimits,
        keyring: Keyring,
        buckets: Buckets,
        *,
        counts: bool = True,
        wall: Callable[[], float] = time.time,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """counts: whether rate limits are kept here. wall: seconds since the epoch."""
        self.limits = limits
        self._access = access
        self._jwt = access.jwt if access is not None else None
        self._accepted = frozenset(self._jwt.algorithms if self._jwt is not None else ())
        self._api_keys = ApiKeys(access.api_keys if access is not None else ())
        self._keyring = keyring
        self._buckets = buckets
        self._counts = counts
        self._wall = wall
        self._clock = clock
        self._verified: OrderedDict[bytes, Mapping[str, Any]] = OrderedDict()
        self._verified_with: list[KeySet | None] = []

    def body_limit(self, limit_bytes: int) -> int:
        own = self.limits.max_body_mb
        return limit_bytes if own is None else min(limit_bytes, own * 1_000_000)

    @property
    def body_timeout_s(self) -> float | None:
        return self.limits.body_timeout_s

    async def admit(self, request: web.BaseRequest, resource: Resource) -> Admission:
        """Let it in, or raise an `AccessError`.

        What a client may not use is refused in the same words whether or not it exists.
        """
        if resource.area is Area.OPEN:
            return Admission(_NOBODY)
        caller = await self.caller(request)
        match resource.area:
            case Area.MODEL if not caller.may_use(resource.model):
                raise NotPermitted
            case Area.ADMIN if not caller.is_admin:
                raise NotPermitted
            case _:
                pass
        if self._counts and resource.area is not Area.ADMIN:
            return Admission(caller, self._spend(caller, resource))
        return Admission(caller)

    async def is_admin(self, request: web.BaseRequest) -> bool:
        try:
            return (await self.caller(request)).is_admin
        except AccessError:
            return False

    async def caller(self, request: web.BaseRequest) -> Caller:
        """Say who asks. Raises `Unauthenticated`, `AccessClosed`."""
        if self._access is None:
            address = _client_address(request.remote)
            return Caller(f"address:{address}", None, is_admin=True)
        credential = _credential(request)
        if credential.startswith(KEY_PREFIX) or self._jwt is None:
            return self._api_keys.caller(credential)
        return judge(await self._claims(credential, self._jwt), self._jwt, now_s=self._wall())

    async def _claims(self, text: str, rules: Jwt) -> Mapping[str, Any]:
        """The claims of a token that a key of ours signed. Raises `BadToken`, `AccessClosed`."""
        sets = self._keyring.sets(rules)
        if sets != self._verified_with:
            self._verified.clear()  # a key that was taken out signs nothing any more
            self._verified_with = sets
        name = hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()
        known = self._verified.get(name)
        if known is not None:
            self._verified.move_to_end(name)
            return known
        token = read_token(text)
        try:
            verify(token, sets, self._accepted)
        except (UnknownKey, AccessClosed):
            remote = self._keyring.remote
            if remote is None or not await remote.look_again():
                raise
            return await self._claims(text, rules)
        self._verified[name] = token.claims
        if len(self._verified) > _VERIFIED_MAX:
            self._verified.popitem(last=False)
        return token.claims

    def _spend(self, caller: Caller, resource: Resource) -> Mapping[str, str]:
        limits = self.limits
        quotas: list[Quota] = []
        rate = limits.clients.get(caller.name, limits.per_client) if caller.name else (
            limits.per_client
        )  # fmt: skip
        if rate is not None:
            quotas.append(Quota("client", caller.id, rate))
        if resource.area is Area.MODEL:
            rate = limits.models.get(ModelName(resource.model), limits.per_model)
            if rate is not None:
                quotas.append(Quota("model", resource.model, rate))
        if not quotas:
            return _NO_HEADERS
        spent = self._buckets.spend(quotas, now_s=self._clock())
        shown = headers(spent)
        if spent.refused_by is not None:
            raise RateLimited("too many requests", shown)
        return shown


def _credential(request: web.BaseRequest) -> str:
    """The one credential of a request. Raises `Unauthenticated`."""
    bearers = request.headers.getall("Authorization", [])
    keys = request.headers.getall("X-Api-Key", [])
    if not bearers and not keys:
        raise Unauthenticated("a credential is needed")
    if len(bearers) + len(keys) > 1:
        raise BadToken("more than one credential")
    if keys:
        if not keys[0].startswith(KEY_PREFIX):
            raise BadToken("not a key of ours")
        return keys[0]
    scheme, _, credential = bearers[0].partition(" ")
    if scheme.lower() != "bearer":
        raise Unauthenticated("want a bearer token or an API key")
    if len(credential) > TOKEN_BYTES_MAX:
        raise BadToken("the token is too long")
    return credential.strip(" ")


def _client_address(remote: str | None) -> str:
    """One client for a limit: an IPv4 address, or the /64 that an IPv6 client picks from."""
    try:
        address = ipaddress.ip_address((remote or "").partition("%")[0])
    except ValueError:
        return "unknown"
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            return str(address.ipv4_mapped)
        return str(ipaddress.IPv6Network((address, _IPV6_CLIENT_BITS), strict=False))
    return str(address)
