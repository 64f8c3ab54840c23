"""gRPC's status codes and etcd's messages, translated once into the store's errors."""

from __future__ import annotations

from enum import Enum

import grpc
import grpc.aio

from registry.store import (
    LeaseNotFound,
    PermissionDenied,
    StoreError,
    StoreRefused,
)


class Verdict(Enum):
    """What a failed attempt says about the call."""

    NOT_DONE = "not done"
    """Surely not done: may be sent again, to another member too."""
    UNKNOWN = "unknown"
    """May have been done, now or later. Only a read may be sent again."""
    STALE_TOKEN = "stale token"  # noqa: S105 a word, not a secret
    """Refused before anything was done; log in again and send again."""
    FINAL = "final"
    """An answer; sending again brings the same."""


_Code = grpc.StatusCode

# Said before the request reaches raft (etcd server/etcdserver/api/v3rpc/interceptor.go and
# server/etcdserver/v3_server.go), or by a raft that has nobody to hand it to. Not among them:
# "request timed out", "leader changed", "server stopped".
_BEFORE_RAFT = (
    "failed to connect to all addresses",
    "etcdserver: no leader",
    "etcdserver: not capable",
    "etcdserver: too many requests",
    "etcdserver: rpc not supported for learner",
    "raft proposal dropped",
)

_FULL = ("database space exceeded", "message larger than max")
"""Final although they come as RESOURCE_EXHAUSTED: the quota, and the server's message limit."""

# The last: an auth change came between the check of our token and the application.
_STALE_TOKEN = ("invalid auth token", "user name is empty", "revision of auth store is old")

_UNKNOWN = frozenset(
    {
        _Code.UNAVAILABLE,
        _Code.DEADLINE_EXCEEDED,
        _Code.CANCELLED,
        _Code.UNKNOWN,
        _Code.INTERNAL,
        _Code.ABORTED,
        _Code.RESOURCE_EXHAUSTED,
    }
)


def verdict(error: grpc.aio.AioRpcError) -> Verdict:
    """Whether the call may have happened, and whether sending it again makes sense."""
    details = error.details() or ""
    if any(text in details for text in _STALE_TOKEN):
        return Verdict.STALE_TOKEN
    if any(text in details for text in _BEFORE_RAFT):
        return Verdict.NOT_DONE
    if any(text in details for text in _FULL):
        return Verdict.FINAL
    return Verdict.UNKNOWN if error.code() in _UNKNOWN else Verdict.FINAL


def final_error(error: grpc.aio.AioRpcError, doing: str) -> StoreError:
    """The store's error for an answer of etcd's (`Verdict.FINAL`)."""
    text = f"{doing}: {error.details() or error.code().name}"
    if error.code() is _Code.NOT_FOUND and "lease" in text:
        return LeaseNotFound(text)
    if error.code() in (_Code.PERMISSION_DENIED, _Code.UNAUTHENTICATED):
        return PermissionDenied(text)
    if any(word in text for word in ("authentication failed", *_STALE_TOKEN)):
        return PermissionDenied(text)
    return StoreRefused(text)
