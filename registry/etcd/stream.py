"""A stream of messages both ways, with the ends and errors of gRPC's told apart."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, Protocol, TypeVar, cast

from google.protobuf.message import Message

from registry.etcd.channel import Member
from registry.etcd.wire import Method

Request = TypeVar("Request", bound=Message)
Response = TypeVar("Response", bound=Message)


class _Call(Protocol):
    """What we use of ``grpc.aio.StreamStreamCall``."""

    async def write(self, request: Any) -> None: ...

    async def read(self) -> object: ...

    def cancel(self) -> bool: ...


class Stream(Generic[Request, Response]):
    """One open stream. Its owner must `cancel` it."""

    def __init__(
        self,
        member: Member,
        method: Method[Request, Response],
        metadata: tuple[tuple[str, str], ...],
        *,
        timeout_s: float | None = None,
        token: str | None = None,
    ) -> None:
        """timeout_s: how long the stream may live; ``None``: for ever."""
        open_call = cast(
            "Callable[..., _Call]",
            member.channel.stream_stream(
                method.path,
                request_serializer=method.request.SerializeToString,
                response_deserializer=method.response.FromString,
            ),
        )
        self.token = token
        """The token it was opened with."""
        self._response = method.response
        self._call = open_call(timeout=timeout_s, metadata=metadata)

    async def write(self, request: Request) -> None:
        """Raises ``AioRpcError``."""
        await self._call.write(request)

    async def read(self) -> Response | None:
        """The next message; ``None`` at the end. Raises ``AioRpcError``."""
        answer = await self._call.read()
        return answer if isinstance(answer, self._response) else None

    def cancel(self) -> None:
        self._call.cancel()
