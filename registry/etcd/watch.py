"""A watch that loses nothing, repeats nothing and keeps the order, whatever happens to etcd.

It resumes at the last *delivered* mod_revision + 1, never at a revision from a header or a
progress notification: a member may announce a revision before it has sent that revision's events.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator
from itertools import groupby
from typing import Any, Literal

import grpc
import grpc.aio
import structlog

from registry.etcd import wire
from registry.etcd.channel import Member
from registry.etcd.failures import Verdict, verdict
from registry.etcd.link import Link, pause
from registry.etcd.messages import etcd_pb2 as pb
from registry.etcd.stream import Stream
from registry.known import Known
from registry.names import Revision
from registry.store import (
    Batch,
    Delete,
    Event,
    Listing,
    PermissionDenied,
    Put,
    StoreError,
)

log = structlog.get_logger("registry.etcd")

ListPrefix = Callable[[str], Awaitable[Listing]]


class _Break(Exception):
    """The stream is over; resume where it stood. ``reason`` is one of `Counters.watch_restarts`."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason


class _Compacted(Exception):
    """etcd no longer has what we want to resume from."""


async def watch(
    link: Link, list_prefix: ListPrefix, prefix: str, listing: Listing | None
) -> AsyncIterator[Batch]:
    """See `registry.store.Store.watch_prefix`."""
    if listing is None:
        listing = await _list(list_prefix, prefix)
        yield Batch(listing.revision, tuple(map(Put, listing.kvs)))
    known, store_id = Known(listing), listing.store_id
    denied = False
    while not link.is_closed:
        member = link.members.current
        attempt = _Attempt(link, member, prefix)
        batches = attempt.batches(known.revision, store_id)
        try:
            async for batch in batches:
                denied = False
                known.note(batch)
                yield batch
            continue
        except _Compacted:
            restart = "compacted"
        except _Break as exc:
            restart = exc.reason
            if restart == "broken":
                link.members.rotate(member)
        except PermissionDenied:
            # etcd 3.5.1 says "permission denied" to a watch whose token it forgot as well: only a
            # second refusal, with a fresh token, is meant.
            if denied:
                raise
            denied = True
            attempt.forget_token()
            continue
        finally:
            attempt.close()
            await batches.aclose()
        link.counters.watch_restarts[restart] = link.counters.watch_restarts.get(restart, 0) + 1
        log.info("watch_restarted", prefix=prefix, reason=restart, revision=known.revision)
        if restart in ("compacted", "rewound"):
            listing = await _list(list_prefix, prefix)
            batch = known.difference(listing)
            known, store_id = Known(listing), listing.store_id
            if batch.events:
                yield batch
        else:
            await pause()


async def _list(list_prefix: ListPrefix, prefix: str) -> Listing:
    """List, for as long as it takes. Raises `PermissionDenied`."""
    while True:
        try:
            return await list_prefix(prefix)
        except PermissionDenied:
            raise
        except StoreError as exc:
            log.info("watch_waits_for_listing", prefix=prefix, error=str(exc))
            await asyncio.sleep(0.2)


class _Attempt:
    """One watch on one stream to one member."""

    def __init__(self, link: Link, member: Member, prefix: str) -> None:
        self._link = link
        self._member = member
        self._prefix = prefix
        self._stream: Stream[pb.WatchRequest, pb.WatchResponse] | None = None

    def close(self) -> None:
        if self._stream is not None:
            self._stream.cancel()

    def forget_token(self) -> None:
        self._link.forget_token(None if self._stream is None else self._stream.token)

    async def batches(self, after: Revision, store_id: str) -> AsyncGenerator[Batch, None]:
        """The batches after ``after``, until a `_Break`, `_Compacted` or `PermissionDenied`."""
        suspected = asyncio.ensure_future(self._member.suspected.wait())
        try:
            stream = await self._open(after, store_id)
            events: list[pb.Event] = []
            while True:
                answer = await self._read(stream, suspected)
                _check(answer)
                events.extend(answer.events)
                # A revision larger than a message comes in several; the last says no fragment.
                if not answer.fragment and events:
                    for batch in _by_revision(events):
                        yield batch
                    events = []
        except grpc.aio.AioRpcError as exc:
            raise self._broken(exc) from exc
        finally:
            suspected.cancel()

    async def _open(
        self, after: Revision, store_id: str
    ) -> Stream[pb.WatchRequest, pb.WatchResponse]:
        link = self._link
        if not await self._member.connected(link.attempt_s):
            raise _Break("broken", "cannot connect")
        start, end = wire.prefix_range(self._prefix)
        create = pb.WatchCreateRequest(
            key=start, range_end=end, start_revision=after + 1, fragment=True
        )
        try:
            async with asyncio.timeout(link.attempt_s):
                self._stream = await link.open(self._member, wire.WATCH)
                await self._stream.write(pb.WatchRequest(create_request=create))
                created = await self._read(self._stream)
        except TimeoutError as exc:
            raise _Break("broken", "no answer to the request for a watch") from exc
        _check(created)
        if store_id and wire.store_id(created.header) != store_id:
            raise _Break("rewound", "another cluster answers at this address")
        if created.header.revision < after and await self._head() < after:
            raise _Break("rewound", "etcd knows fewer revisions than we saw")
        return self._stream

    async def _read(
        self,
        stream: Stream[pb.WatchRequest, pb.WatchResponse],
        suspected: asyncio.Task[Literal[True]] | None = None,
    ) -> pb.WatchResponse:
        """The next answer, unless ``suspected`` is done first."""
        reading = asyncio.ensure_future(stream.read())
        try:
            waited: set[asyncio.Task[Any]] = (
                {reading} if suspected is None else {reading, suspected}
            )
            await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
            if not reading.done():
                raise _Break("suspected", "another call got no answer from this member")
            if reading.cancelled():
                raise _Break("broken", "channel closed")
            answer = reading.result()
        finally:
            reading.cancel()
        if answer is None:
            raise _Break("broken", "end of stream")
        return answer

    async def _head(self) -> int:
        """The cluster's revision by a linearizable read; a member alone may lag behind."""
        try:
            request = pb.RangeRequest(key=self._prefix.encode() or b"\x00", count_only=True)
            return (await self._link.read(wire.RANGE, request)).header.revision
        except StoreError as exc:
            raise _Break("broken", str(exc)) from exc

    def _broken(self, error: grpc.aio.AioRpcError) -> Exception:
        if verdict(error) is Verdict.STALE_TOKEN:
            self.forget_token()
        if error.code() is grpc.StatusCode.PERMISSION_DENIED:
            return PermissionDenied(f"watch {self._prefix}: {error.details()}")
        return _Break("broken", f"{error.code().name} {error.details()}")


def _check(answer: pb.WatchResponse) -> None:
    """Raise when ``answer`` says that the watch is over."""
    if answer.compact_revision > 0:
        raise _Compacted
    if answer.canceled:
        if "permission denied" in answer.cancel_reason.lower():
            raise PermissionDenied(f"watch: {answer.cancel_reason}")
        raise _Break("broken", answer.cancel_reason or "cancelled by etcd")


def _by_revision(events: list[pb.Event]) -> Iterator[Batch]:
    """Events in etcd's order, cut into whole revisions."""
    for revision, same in groupby(events, key=lambda event: event.kv.mod_revision):
        yield Batch(Revision(revision), tuple(map(_event, same)))


def _event(event: pb.Event) -> Event:
    kv = wire.key_value(event.kv)
    return Put(kv) if event.type == pb.Event.PUT else Delete(kv.key, kv.mod_revision)
