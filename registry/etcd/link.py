"""Calls to whichever member answers: deadlines, rotation, login, and what a failure means."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import TypeVar, cast

import grpc.aio
from google.protobuf.message import Message

from registry.etcd.channel import Member, Members
from registry.etcd.failures import Verdict, final_error, verdict
from registry.etcd.messages import etcd_pb2 as pb
from registry.etcd.settings import EtcdSettings
from registry.etcd.stream import Stream
from registry.etcd.wire import AUTHENTICATE, Method
from registry.store import Ambiguous, PermissionDenied, Unavailable

Request = TypeVar("Request", bound=Message)
Response = TypeVar("Response", bound=Message)

HAS_LEADER = ("hasleader", "true")
"""Asks a member to refuse, or to break a stream, while it knows no leader."""


@dataclass(slots=True)
class Counters:
    """What went wrong and was mended, for metrics. All grow only."""

    logins: int = 0
    ambiguous: int = 0
    watch_restarts: dict[str, int] = field(default_factory=dict[str, int])
    """By reason: broken, suspected, compacted, rewound."""


class Link:
    """What the store, its watches and its leases share: members, token, counters."""

    def __init__(self, settings: EtcdSettings) -> None:
        """Connects nothing yet. Needs a running event loop; raises as `Members` does."""
        self.members = Members(settings)
        self.counters = Counters()
        self.timeout_s = settings.timeout_s
        self.attempt_s = (
            settings.timeout_s if len(self.members) == 1 else max(1.0, settings.timeout_s / 3)
        )
        """After this long a member that does not answer a read is taken for frozen."""
        self._user = settings.user
        self._password = settings.password or ""
        self._token: str | None = None
        self._login = asyncio.Lock()
        self._is_closed = False

    # --- unary calls ----------------------------------------------------------------------

    async def read(self, method: Method[Request, Response], request: Request) -> Response:
        """Call something that may happen twice.

        Raises `Unavailable`, `PermissionDenied`, `LeaseNotFound`, `StoreRefused`.
        """
        return await self._call(method, request, repeatable=True)

    async def write(self, method: Method[Request, Response], request: Request) -> Response:
        """Call something that must not happen twice. Raises `Ambiguous` too."""
        return await self._call(method, request, repeatable=False)

    async def _call(
        self, method: Method[Request, Response], request: Request, *, repeatable: bool
    ) -> Response:
        loop = asyncio.get_running_loop()
        deadline_s = loop.time() + self.timeout_s
        doing = method.path.rpartition("/")[2]
        logged_in_again = False
        why = "no member reachable"
        while (left_s := deadline_s - loop.time()) > 0:
            member = self.members.current
            if not await member.connected(min(left_s, self.attempt_s)):
                why = f"{member.endpoint}: cannot connect"
                self.members.rotate(member)
                await pause()
                continue
            # A write waits as long as it may: cutting it short makes it ambiguous for nothing.
            attempt_s = min(left_s, self.attempt_s) if repeatable else left_s
            token: str | None = None
            was_sent = False
            try:
                token = await self._get_token(member, attempt_s)
                was_sent = True
                return await unary(member, method, request, token, attempt_s)
            except grpc.aio.AioRpcError as exc:
                said = verdict(exc)
                why = f"{member.endpoint}: {exc.code().name} {exc.details()}"
                if said is Verdict.STALE_TOKEN and self._user and not logged_in_again:
                    logged_in_again = True
                    self.forget_token(token)
                    continue
                if said in (Verdict.FINAL, Verdict.STALE_TOKEN):
                    raise final_error(exc, doing) from exc
                self.members.rotate(member)
                if said is Verdict.UNKNOWN and was_sent and not repeatable:
                    self.counters.ambiguous += 1
                    raise Ambiguous(f"{doing}: {why}") from exc
            await pause()
        raise Unavailable(f"{doing}: no answer within {self.timeout_s:g} s; last: {why}")

    # --- streams --------------------------------------------------------------------------

    async def open(
        self,
        member: Member,
        method: Method[Request, Response],
        *,
        timeout_s: float | None = None,
    ) -> Stream[Request, Response]:
        """A new stream on ``member``. Raises ``AioRpcError`` and `PermissionDenied` (login)."""
        token = await self._get_token(member, self.attempt_s)
        metadata = (HAS_LEADER,) if token is None else (HAS_LEADER, ("token", token))
        return Stream(member, method, metadata, timeout_s=timeout_s, token=token)

    # --- login ----------------------------------------------------------------------------

    async def _get_token(self, member: Member, timeout_s: float) -> str | None:
        """The token to send, logging in first when there is none; ``None`` without a user.

        One login at a time: who waited for another's uses the token that one got.
        Raises ``AioRpcError`` (weather) and `PermissionDenied` (wrong user or password).
        """
        if self._user is None:
            return None
        async with self._login:
            if self._token is None:
                self._token = await self._authenticate(member, timeout_s)
            return self._token or None

    def forget_token(self, token: str | None) -> None:
        """Make the next call log in, unless somebody did since ``token`` was handed out.

        ``None``: sent without one, because etcd had no authentication when we asked.
        """
        if self._token == (token or ""):
            self._token = None

    async def _authenticate(self, member: Member, timeout_s: float) -> str:
        request = pb.AuthenticateRequest(name=self._user or "", password=self._password)
        try:
            self.counters.logins += 1
            return (await unary(member, AUTHENTICATE, request, None, timeout_s)).token
        except grpc.aio.AioRpcError as exc:
            if "authentication is not enabled" in (exc.details() or ""):
                return ""  # As etcdctl does: a user is then not needed, and no reason to stop.
            if verdict(exc) is Verdict.FINAL:
                raise PermissionDenied(f"login as {self._user}: {exc.details()}") from exc
            raise

    @property
    def is_closed(self) -> bool:
        return self._is_closed

    async def close(self) -> None:
        self._is_closed = True
        await self.members.close()


async def unary(
    member: Member,
    method: Method[Request, Response],
    request: Request,
    token: str | None,
    timeout_s: float,
) -> Response:
    """One attempt at one member. Raises ``AioRpcError``."""
    call = cast(
        "Callable[..., Awaitable[Response]]",
        member.channel.unary_unary(
            method.path,
            request_serializer=method.request.SerializeToString,
            response_deserializer=method.response.FromString,
        ),
    )
    metadata = () if token is None else (("token", token),)
    return await call(request, timeout=timeout_s, metadata=metadata)


async def pause() -> None:
    """Between two attempts: short, since members were tried in turn, and never in step."""
    await asyncio.sleep(random.uniform(0.03, 0.12))
