"""CloudEvents: their JSON, their keys, and a writer that survives bad weather."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any

import orjson
import pytest

from registry.event_writer import EventWriter
from registry.events import (
    FLEET_SOURCE,
    BadEvent,
    CloudEvent,
    EventType,
    event_key,
    node_source,
    read_events,
    stable_id,
)
from registry.keys import Keys
from registry.memory_store import MemoryStore
from registry.names import NodeId
from tests.eventually import eventually

KEYS = Keys("/test")
AT = datetime(2024, 6, 10, 23, 30, 0, 123_000, tzinfo=UTC)
NODE = node_source(NodeId("n1"))


class Clock:
    def __init__(self) -> None:
        self.at = AT

    def __call__(self) -> datetime:
        return self.at


def writer(store: MemoryStore, clock: Clock | None = None, **more: Any) -> EventWriter:
    return EventWriter(store, KEYS, NODE, now=clock or Clock(), **more)


async def stored(store: MemoryStore) -> list[CloudEvent]:
    return [event async for event in read_events(store.client(), KEYS)]


# --- values -----------------------------------------------------------------------------------


def test_json_is_a_cloud_event_and_comes_back() -> None:
    event = CloudEvent("abc", NODE, EventType.ROLLBACK, AT, "ocr/2", {"code": "700", "count": 3})
    assert orjson.loads(event.to_json()) == {
        "specversion": "1.0", "id": "abc", "source": "/paddlewheel/nodes/n1",
        "type": "io.paddlewheel.rollback", "subject": "ocr/2",
        "time": "2024-06-10T23:30:00.123Z", "datacontenttype": "application/json",
        "data": {"code": "700", "count": 3},
    }  # fmt: skip
    assert CloudEvent.from_json(event.to_json()) == event


@pytest.mark.parametrize(
    "raw",
    [
        b"", b"{", b"[]", b"null", b"{}", b'{"specversion":"0.3"}', b"\xff",
        b'{"specversion":"1.0","id":"","source":"s","type":"t","time":"2024-06-10T00:00:00Z"}',
        b'{"specversion":"1.0","id":1,"source":"s","type":"t","time":"2024-06-10T00:00:00Z"}',
        b'{"specversion":"1.0","id":"i","source":"s","type":"t","time":"yesterday"}',
        b'{"specversion":"1.0","id":"i","source":"s","type":"t","time":"2024-06-10T00:00:00"}',
        b'{"specversion":"1.0","id":"i","source":"s","type":"t"}',
    ],
)  # fmt: skip
def test_what_is_not_an_event_is_refused(raw: bytes) -> None:
    with pytest.raises(BadEvent):
        CloudEvent.from_json(raw)


def test_an_event_of_a_newer_version_is_read() -> None:
    raw = (
        b'{"specversion":"1.0","id":"i","source":"s","type":"io.paddlewheel.new","new":1,'
        b'"time":"2024-06-10T00:00:00+02:00","data":[1]}'
    )
    event = CloudEvent.from_json(raw)
    assert (event.type, event.data, event.subject) == ("io.paddlewheel.new", {}, "")


def test_every_type_has_our_prefix() -> None:
    assert all(type_.startswith("io.paddlewheel.") for type_ in EventType)


def test_stable_id_tells_facts_apart() -> None:
    assert stable_id("a", 1) == stable_id("a", 1)
    assert len({stable_id("a", "b"), stable_id("ab"), stable_id("b", "a"), stable_id("a")}) == 4


def test_key_is_by_time_and_the_same_for_a_retry() -> None:
    event = CloudEvent("i", NODE, EventType.ROLLBACK, AT)
    other = CloudEvent("j", NODE, EventType.ROLLBACK, AT)
    assert event_key(event, 1000) == event_key(event, 1000) != event_key(other, 1000)
    assert event_key(event, 999) < event_key(other, 1000) < event_key(event, 1001)
    KEYS.event(event_key(event, 1_718_060_000_000))


# --- the writer -------------------------------------------------------------------------------


async def test_written_in_order_on_one_lease_a_day() -> None:
    store, clock = MemoryStore(), Clock()
    events = writer(store, clock)
    await events.start()
    for n in range(100):
        events.emit(EventType.ROUTE_SWAPPED, f"ocr/{n}", {"n": n})
    await events.flushed(5)
    assert [event.data["n"] for event in await stored(store)] == list(range(100))
    listing = await store.list_prefix(KEYS.events_prefix)
    (lease,) = {kv.lease for kv in listing.kvs}
    assert 7 * 86400 < await store.lease_keepalive(lease) <= 8 * 86400
    clock.at += timedelta(hours=1)
    events.emit(EventType.RELEASE, "ocr/1")
    await events.flushed(5)
    listing = await store.list_prefix(KEYS.events_prefix)
    assert len({kv.lease for kv in listing.kvs}) == 2, "the next day has a lease of its own"
    await events.stop()


async def test_emit_before_start_and_stop_writes_what_is_queued() -> None:
    store = MemoryStore()
    events = writer(store)
    events.emit(EventType.NODE_JOINED, "n1")
    assert events.queued == 1
    await events.start()
    await events.start()
    events.emit(EventType.NODE_LEFT, "n1")
    await events.stop()
    await events.stop()
    assert [e.type for e in await stored(store)] == [EventType.NODE_JOINED, EventType.NODE_LEFT]


async def test_a_fact_seen_again_is_one_event() -> None:
    store = MemoryStore()
    one, other = writer(store), EventWriter(store.client(), KEYS, node_source(NodeId("n2")))
    fact = stable_id("quarantine", "ocr", "2", 42)
    for node in (one, other, one):
        await node.start()
        node.emit(EventType.QUARANTINE, "ocr/2", id_=fact, source=FLEET_SOURCE)
        await node.flushed(5)
    assert len(await stored(store)) == 1
    assert one.counters.written == 1
    await one.stop()
    await other.stop()


@pytest.mark.parametrize("fate", ["applied", "lost"])
async def test_a_write_without_an_answer_is_neither_lost_nor_doubled(fate: Any) -> None:
    store = MemoryStore()
    store.faults.ambiguous = [fate]
    events = writer(store)
    await events.start()
    events.emit(EventType.ROLLBACK, "ocr/2")
    await events.flushed(5)
    listing = await store.list_prefix(KEYS.events_prefix)
    assert [kv.version for kv in listing.kvs] == [1]
    await events.stop()


async def test_away_the_oldest_are_dropped_counted_and_told() -> None:
    store = MemoryStore()
    store.cut_off()
    events = writer(store, queue_max=10)
    await events.start()
    first = events.emit(EventType.ROLLBACK, "ocr/first")
    await eventually(lambda: events.counters.failures > 0, within_s=5)
    for n in range(25):
        events.emit(EventType.ROLLBACK, f"ocr/{n}")
    assert (events.counters.dropped, events.queued) == (15, 10)
    store.heal()
    await events.flushed(10)
    found = await stored(store)
    assert [e.subject for e in found if e.type == EventType.ROLLBACK] == [
        first.subject, *(f"ocr/{n}" for n in range(15, 25)),
    ]  # fmt: skip
    (told,) = [e for e in found if e.type == EventType.EVENTS_DROPPED]
    assert told.data == {"count": 15}
    await events.stop()


async def test_a_lost_lease_is_granted_again() -> None:
    store = MemoryStore()
    events = writer(store)
    await events.start()
    events.emit(EventType.ROLLBACK, "a")
    await events.flushed(5)
    store.cluster.revoke_all()
    events.emit(EventType.ROLLBACK, "b")
    await events.flushed(5)
    assert [e.subject for e in await stored(store)] == ["b"]
    await events.stop()


async def test_what_the_store_refuses_does_not_block_the_rest() -> None:
    store = MemoryStore()
    events = writer(store)
    events.emit(EventType.ROLLBACK, "a")
    events.emit(EventType.ROLLBACK, "huge", {"text": "x" * 2_000_000})
    events.emit(EventType.ROLLBACK, "b")
    await events.start()
    await events.flushed(5)
    assert [e.subject for e in await stored(store)] == ["a", "b"]
    assert (events.counters.written, events.counters.dropped) == (2, 1)
    await events.stop()


@pytest.mark.parametrize(
    ("data", "wanted"),
    [
        ({"a": {1, 2} and AT}, {"a": "2024-06-10T23:30:00.123000+00:00"}),
        ({"a": NODE, 5: float("nan")}, {"a": NODE, "5": None}),
        ({"a": ValueError("no")}, {"a": "no"}),
        ({"a": 2**70}, {"text": repr({"a": 2**70})}),
    ],
)
async def test_emit_takes_whatever_data(data: Any, wanted: dict[str, Any]) -> None:
    assert writer(MemoryStore()).emit(EventType.ROLLBACK, data=data).data == wanted


# --- following --------------------------------------------------------------------------------


async def take(events: AsyncIterator[CloudEvent], count: int) -> list[str]:
    async with asyncio.timeout(5):
        return [(await anext(events)).subject for _ in range(count)]


async def test_follow_yields_what_is_there_then_what_comes_each_once() -> None:
    store = MemoryStore()
    events = writer(store)
    await events.start()
    events.emit(EventType.SERVABLE_READY, "ocr/1")
    await events.flushed(5)
    await store.put(f"{KEYS.events_prefix}odd", b"not an event")
    following = read_events(store.client(), KEYS, follow=True)
    assert await take(following, 1) == ["ocr/1"]
    again = (await store.list_prefix(KEYS.events_prefix)).kvs[0]
    events.emit(EventType.SERVABLE_READY, "ocr/2")
    await events.flushed(5)
    await store.put(again.key, again.value)
    await store.delete(again.key)
    events.emit(EventType.SERVABLE_FAILED, "ocr/3")
    await events.flushed(5)
    assert await take(following, 2) == ["ocr/2", "ocr/3"]
    await events.stop()
