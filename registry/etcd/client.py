"""The `Store` on a real etcd."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence

import grpc.aio

from registry.etcd import wire
from registry.etcd.channel import Member
from registry.etcd.failures import Verdict, final_error, verdict
from registry.etcd.link import Counters, Link, pause
from registry.etcd.messages import etcd_pb2 as pb
from registry.etcd.settings import EtcdSettings
from registry.etcd.watch import watch
from registry.names import Revision
from registry.store import (
    Batch,
    Compare,
    KeyValue,
    LeaseNotFound,
    Listing,
    Op,
    TxnResult,
    Unavailable,
)

PAGE = 1000
"""Keys asked for at once by a listing, so that no answer grows with the fleet."""


class EtcdStore:
    """`registry.store.Store` over gRPC: reads retried on other members, writes sent once."""

    def __init__(self, link: Link) -> None:
        self._link = link

    @classmethod
    def connect(cls, settings: EtcdSettings) -> EtcdStore:
        """Make a store; no member has to be up yet.

        Call it inside the event loop that will use it. Raises `BadEndpoint`, and `OSError` when
        a TLS file cannot be read.
        """
        return cls(Link(settings))

    @property
    def counters(self) -> Counters:
        return self._link.counters

    @property
    def rotations(self) -> int:
        """How often a member was left for the next, for metrics."""
        return self._link.members.rotations

    async def get(self, key: str) -> KeyValue | None:
        answer = await self._link.read(wire.RANGE, pb.RangeRequest(key=key.encode()))
        return wire.key_value(answer.kvs[0]) if answer.kvs else None

    async def list_prefix(self, prefix: str) -> Listing:
        """Pages of `PAGE` keys, all at the revision of the first."""
        start, end = wire.prefix_range(prefix)
        kvs: list[KeyValue] = []
        revision = 0
        while True:
            page = await self._link.read(
                wire.RANGE,
                pb.RangeRequest(key=start, range_end=end, limit=PAGE, revision=revision),
            )
            revision = revision or page.header.revision
            kvs.extend(map(wire.key_value, page.kvs))
            if not page.more:
                return Listing(tuple(kvs), Revision(revision), wire.store_id(page.header))
            start = page.kvs[-1].key + b"\x00"

    async def put(self, key: str, value: bytes, *, lease: int = 0) -> Revision:
        request = pb.PutRequest(key=key.encode(), value=value, lease=lease)
        return Revision((await self._link.write(wire.PUT, request)).header.revision)

    async def delete(self, key: str) -> bool:
        request = pb.DeleteRangeRequest(key=key.encode())
        return (await self._link.write(wire.DELETE, request)).deleted > 0

    async def delete_prefix(self, prefix: str) -> int:
        start, end = wire.prefix_range(prefix)
        request = pb.DeleteRangeRequest(key=start, range_end=end)
        return (await self._link.write(wire.DELETE, request)).deleted

    async def txn(
        self,
        compares: Sequence[Compare],
        success: Sequence[Op] = (),
        failure: Sequence[Op] = (),
    ) -> TxnResult:
        request = wire.txn_request(compares, success, failure)
        read_only = wire.is_read_only(success, failure)
        send = self._link.read if read_only else self._link.write
        return wire.txn_result(await send(wire.TXN, request))

    def watch_prefix(self, prefix: str, *, known: Listing | None = None) -> AsyncIterator[Batch]:
        return watch(self._link, self.list_prefix, prefix, known)

    def leave_member(self) -> None:
        """Go on with the next member, watches too. For an operator about to take one away."""
        self._link.members.rotate(self._link.members.current)

    async def compact(self, revision: Revision) -> None:
        """Make etcd forget what was before ``revision``. For tests and maintenance."""
        await self._link.write(wire.COMPACT, pb.CompactionRequest(revision=revision))

    # --- leases -----------------------------------------------------------------------------

    async def lease_grant(self, ttl_s: int) -> int:
        """Sent again when unanswered: a lease nobody knows of holds no key and expires."""
        answer = await self._link.read(wire.GRANT, pb.LeaseGrantRequest(TTL=ttl_s))
        return answer.ID

    async def lease_keepalive(self, lease: int) -> float:
        """One renewal, on a stream of its own: one kept open would stay with a frozen member."""
        link = self._link
        why = "no member reachable"
        try:
            async with asyncio.timeout(link.timeout_s):
                while True:
                    member = link.members.current
                    try:
                        remaining_s = await self._renew_once(member, lease)
                    except grpc.aio.AioRpcError as exc:
                        said = verdict(exc)
                        if said is Verdict.FINAL:
                            raise final_error(exc, "LeaseKeepAlive") from exc
                        remaining_s, why = None, f"{member.endpoint}: {exc.details()}"
                    if remaining_s is not None:
                        break
                    link.members.rotate(member)
                    await pause()
        except TimeoutError as exc:
            raise Unavailable(f"LeaseKeepAlive: lease {lease:x}: {why}") from exc
        if remaining_s <= 0:
            raise LeaseNotFound(f"lease {lease:x} is gone")
        return float(remaining_s)

    async def _renew_once(self, member: Member, lease: int) -> int | None:
        """The remaining TTL in seconds, 0 for a lost lease, ``None`` when nobody answered."""
        link = self._link
        if not await member.connected(link.attempt_s):
            return None
        stream = await link.open(member, wire.KEEPALIVE, timeout_s=link.attempt_s)
        try:
            await stream.write(pb.LeaseKeepAliveRequest(ID=lease))
            answer = await stream.read()
        except grpc.aio.AioRpcError as exc:
            if verdict(exc) is Verdict.STALE_TOKEN:
                link.forget_token(stream.token)
            raise
        finally:
            stream.cancel()
        return None if answer is None else answer.TTL

    async def lease_keys(self, lease: int) -> frozenset[str]:
        request = pb.LeaseTimeToLiveRequest(ID=lease, keys=True)
        answer = await self._link.read(wire.TIME_TO_LIVE, request)
        if answer.TTL < 0:
            raise LeaseNotFound(f"lease {lease:x} is gone")
        return frozenset(key.decode(errors="backslashreplace") for key in answer.keys)

    async def lease_revoke(self, lease: int) -> None:
        """Done when the lease is gone, whoever ended it."""
        try:
            await self._link.read(wire.REVOKE, pb.LeaseRevokeRequest(ID=lease))
        except LeaseNotFound:
            return

    async def close(self) -> None:
        await self._link.close()
