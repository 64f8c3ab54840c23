"""etcd's words and ours: method paths, and messages made from and turned into store values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from google.protobuf.message import Message

from registry.etcd.messages import etcd_pb2 as pb
from registry.names import Revision
from registry.store import (
    Compare,
    CreateRevisionIs,
    DeleteOp,
    GetOp,
    KeyValue,
    ModRevisionIs,
    Op,
    PutOp,
    TxnResult,
)

Request = TypeVar("Request", bound=Message)
Response = TypeVar("Response", bound=Message)


@dataclass(frozen=True, slots=True)
class Method(Generic[Request, Response]):
    """One RPC: its path, and what it takes and gives."""

    path: str
    request: type[Request]
    response: type[Response]


RANGE = Method("/etcdserverpb.KV/Range", pb.RangeRequest, pb.RangeResponse)
PUT = Method("/etcdserverpb.KV/Put", pb.PutRequest, pb.PutResponse)
DELETE = Method("/etcdserverpb.KV/DeleteRange", pb.DeleteRangeRequest, pb.DeleteRangeResponse)
TXN = Method("/etcdserverpb.KV/Txn", pb.TxnRequest, pb.TxnResponse)
COMPACT = Method("/etcdserverpb.KV/Compact", pb.CompactionRequest, pb.CompactionResponse)
WATCH = Method("/etcdserverpb.Watch/Watch", pb.WatchRequest, pb.WatchResponse)
GRANT = Method("/etcdserverpb.Lease/LeaseGrant", pb.LeaseGrantRequest, pb.LeaseGrantResponse)
REVOKE = Method("/etcdserverpb.Lease/LeaseRevoke", pb.LeaseRevokeRequest, pb.LeaseRevokeResponse)
KEEPALIVE = Method(
    "/etcdserverpb.Lease/LeaseKeepAlive", pb.LeaseKeepAliveRequest, pb.LeaseKeepAliveResponse
)
TIME_TO_LIVE = Method(
    "/etcdserverpb.Lease/LeaseTimeToLive", pb.LeaseTimeToLiveRequest, pb.LeaseTimeToLiveResponse
)
AUTHENTICATE = Method(
    "/etcdserverpb.Auth/Authenticate", pb.AuthenticateRequest, pb.AuthenticateResponse
)


def prefix_end(prefix: bytes) -> bytes:
    """The first key after every key that starts with ``prefix``, as etcd's ranges want it.

    For the empty prefix, ``\\x00``: etcd's word for "to the end of the key space".
    """
    trimmed = prefix.rstrip(b"\xff")
    return trimmed[:-1] + bytes([trimmed[-1] + 1]) if trimmed else b"\x00"


def prefix_range(prefix: str) -> tuple[bytes, bytes]:
    """``(key, range_end)`` of a prefix; etcd wants ``\\x00`` for the empty key."""
    start = prefix.encode()
    return start or b"\x00", prefix_end(start)


def store_id(header: pb.ResponseHeader) -> str:
    """Of the cluster that answered; see `registry.store.Listing`."""
    return f"{header.cluster_id:x}"


def key_value(kv: pb.KeyValue) -> KeyValue:
    """A key that is not UTF-8 (nobody's of ours) stays distinct and readable, and never raises."""
    return KeyValue(
        key=kv.key.decode(errors="backslashreplace"),
        value=kv.value,
        mod_revision=Revision(kv.mod_revision),
        create_revision=Revision(kv.create_revision),
        version=kv.version,
        lease=kv.lease,
    )


def txn_request(
    compares: Sequence[Compare], success: Sequence[Op], failure: Sequence[Op]
) -> pb.TxnRequest:
    return pb.TxnRequest(
        compare=[_compare(compare) for compare in compares],
        success=[_op(op) for op in success],
        failure=[_op(op) for op in failure],
    )


def txn_result(response: pb.TxnResponse) -> TxnResult:
    ranges = (
        answer.response_range
        for answer in response.responses
        if answer.WhichOneof("response") == "response_range"
    )
    return TxnResult(
        succeeded=response.succeeded,
        revision=Revision(response.header.revision),
        got=tuple(key_value(got.kvs[0]) if got.kvs else None for got in ranges),
    )


def _compare(compare: Compare) -> pb.Compare:
    key = compare.key.encode()
    if isinstance(compare, ModRevisionIs):
        return pb.Compare(target=pb.Compare.MOD, key=key, mod_revision=compare.revision)
    if isinstance(compare, CreateRevisionIs):
        return pb.Compare(target=pb.Compare.CREATE, key=key, create_revision=compare.revision)
    return pb.Compare(target=pb.Compare.VALUE, key=key, value=compare.value)


def _op(op: Op) -> pb.RequestOp:
    key = op.key.encode()
    if isinstance(op, PutOp):
        return pb.RequestOp(request_put=pb.PutRequest(key=key, value=op.value, lease=op.lease))
    if isinstance(op, DeleteOp):
        return pb.RequestOp(request_delete_range=pb.DeleteRangeRequest(key=key))
    return pb.RequestOp(request_range=pb.RangeRequest(key=key))


def is_read_only(success: Sequence[Op], failure: Sequence[Op]) -> bool:
    """Whether a transaction of these branches may be sent twice without a second effect."""
    return all(isinstance(op, GetOp) for op in (*success, *failure))
