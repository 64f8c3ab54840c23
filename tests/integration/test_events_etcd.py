"""The event writer and reader on a real etcd: one lease a day, seven days, in order."""

from __future__ import annotations

from registry.etcd import EtcdStore
from registry.event_writer import EventWriter
from registry.events import EventType, node_source, read_events
from registry.keys import Keys
from registry.names import NodeId
from tests.etcd import etcd_cluster

KEYS = Keys("/paddlewheel")


async def test_written_and_read_back_on_etcd() -> None:
    with etcd_cluster(1) as cluster:
        store = EtcdStore.connect(cluster.settings())
        try:
            writer = EventWriter(store, KEYS, node_source(NodeId("n1")))
            await writer.start()
            for n in range(100):
                writer.emit(EventType.ROUTE_SWAPPED, "ocr/1", {"n": n})
            await writer.flushed(10)
            found = [event async for event in read_events(store, KEYS)]
            assert [event.data["n"] for event in found] == list(range(100))
            listing = await store.list_prefix(KEYS.events_prefix)
            (lease,) = {kv.lease for kv in listing.kvs}
            assert 7 * 86400 < await store.lease_keepalive(lease) <= 8 * 86400 + 1
            assert writer.counters.failures == 0
            await writer.stop()
        finally:
            await store.close()
