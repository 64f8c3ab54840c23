"""What etcd last said to a gateway, kept on disk for a start while etcd is away.

It is a cache of etcd and never more: nodes are probed before long, whatever it says of them, and
what changed meanwhile is applied when etcd is back.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
import structlog

from registry import sealed_file
from registry.names import Revision
from registry.sealed_file import Damaged
from registry.store import Batch, KeyValue, Listing, Put, Store, StoreError

log = structlog.get_logger(__name__)

FILE = "gateway.snapshot"
PATIENCE_S = 2.0
"""How long to wait for etcd's first word before what is on disk is used."""
SAVE_AFTER_S = 1.0
"""A fleet's status keys change in bursts."""
REFUSED_RETRY_S = 5.0
_MAGIC = "paddlewheel-gateway"
_FORMAT = 1


@dataclass(frozen=True, slots=True)
class News:
    """One step of what a prefix holds."""

    batch: Batch
    whole: Listing | None = None
    """All there is, where that is more than the batch says: at the start, and when another store
    answers, or the same one with less than it had."""


class GatewayMemory:
    """Follows prefixes like a watch, from what is on disk where etcd is not heard."""

    def __init__(
        self, store: Store, folder: Path | None, *, prefix: str, endpoints: Sequence[str]
    ) -> None:
        """folder: ``None`` remembers nothing. prefix, endpoints: another fleet's are not ours."""
        self._store = store
        self._path = None if folder is None else folder / FILE
        self._prefix = prefix
        self._endpoints = tuple(endpoints)
        self._held: dict[str, dict[str, KeyValue]] = {}
        self._at: dict[str, tuple[Revision, str]] = {}
        """By prefix: the position, and whose it is."""
        self._saved: dict[str, Listing] = {}
        self._changed = asyncio.Event()

    async def restore(self) -> None:
        """Read the file, for those whom `follow` finds without etcd."""
        if self._path is not None:
            self._saved = await asyncio.to_thread(self._load, self._path)

    async def follow(self, prefix: str) -> AsyncIterator[News]:
        """What is there, then every change, for ever. A store that refuses us is asked again."""
        listing = await self._first(prefix)
        self._take(prefix, listing)
        yield News(_puts(listing), listing)
        while True:
            try:
                async for batch in self._store.watch_prefix(prefix, known=self._listing(prefix)):
                    yield self._note(prefix, batch)
            except StoreError as exc:
                log.error("store_refuses", prefix=prefix, error=str(exc))
                await asyncio.sleep(REFUSED_RETRY_S)

    async def run(self) -> None:
        """Keep the file up to date until cancelled; then write once more what is still to be."""
        path, failing = self._path, False
        if path is None:
            return
        try:
            while True:
                await self._changed.wait()
                await asyncio.sleep(SAVE_AFTER_S)
                self._changed.clear()
                try:
                    await asyncio.to_thread(self._save, path, self._listings())
                    failing = False
                except OSError as exc:
                    if not failing:
                        log.warning("snapshot_not_saved", path=str(path), reason=str(exc))
                    failing = True
        finally:
            if self._changed.is_set():
                with contextlib.suppress(OSError):
                    self._save(path, self._listings())

    # --- from etcd --------------------------------------------------------------------------

    async def _first(self, prefix: str) -> Listing:
        listing = asyncio.ensure_future(self._list(prefix))
        try:
            if (saved := self._saved.pop(prefix, None)) is None:
                return await listing
            await asyncio.wait([listing], timeout=PATIENCE_S)
            if listing.done():
                return listing.result()
            log.warning("snapshot_used", prefix=prefix, keys=len(saved.kvs))
            return saved
        finally:
            listing.cancel()

    async def _list(self, prefix: str) -> Listing:
        while True:
            try:
                return await self._store.list_prefix(prefix)
            except StoreError as exc:
                log.info("gateway_waits_for_listing", prefix=prefix, error=str(exc))
                await asyncio.sleep(0.2)

    def _take(self, prefix: str, listing: Listing) -> None:
        self._held[prefix] = {kv.key: kv for kv in listing.kvs}
        self._at[prefix] = (listing.revision, listing.store_id)
        self._changed.set()

    def _note(self, prefix: str, batch: Batch) -> News:
        revision, store_id = self._at[prefix]
        is_other = batch.store_id not in ("", store_id)
        held = self._held[prefix]
        for event in batch.events:
            if isinstance(event, Put):
                held[event.kv.key] = event.kv
            else:
                held.pop(event.key, None)
        self._at[prefix] = (batch.revision, batch.store_id or store_id)
        self._changed.set()
        if is_other or batch.revision < revision:
            log.warning("store_rewound", prefix=prefix, was=revision, now=batch.revision)
            return News(batch, self._listing(prefix))
        return News(batch)

    def _listings(self) -> dict[str, Listing]:
        return {prefix: self._listing(prefix) for prefix in self._held}

    def _listing(self, prefix: str) -> Listing:
        revision, store_id = self._at[prefix]
        kvs = sorted(self._held[prefix].values(), key=lambda kv: kv.key)
        return Listing(tuple(kvs), revision, store_id)

    # --- the file, beside the event loop ----------------------------------------------------

    def _load(self, path: Path) -> dict[str, Listing]:
        try:
            body: Any = orjson.loads(sealed_file.read(path, magic=_MAGIC, version=_FORMAT))
            if body["prefix"] != self._prefix or not {*body["etcd"]} & {*self._endpoints}:
                raise Damaged("it is of another fleet")
            return {prefix: _listing_of(saved) for prefix, saved in body["listings"].items()}
        except FileNotFoundError:
            return {}
        except (OSError, Damaged, KeyError, TypeError, ValueError, AttributeError) as exc:
            log.warning("snapshot_ignored", path=str(path), reason=str(exc))
            return {}

    def _save(self, path: Path, listings: dict[str, Listing]) -> None:
        """Raises `OSError`."""
        body = orjson.dumps(
            {
                "prefix": self._prefix,
                "etcd": self._endpoints,
                "listings": {prefix: _as_json(held) for prefix, held in listings.items()},
            }
        )
        sealed_file.write(path, body, magic=_MAGIC, version=_FORMAT)


def _puts(listing: Listing) -> Batch:
    return Batch(listing.revision, tuple(map(Put, listing.kvs)), listing.store_id)


def _as_json(listing: Listing) -> dict[str, Any]:
    kvs = [
        [kv.key, base64.b64encode(kv.value).decode(), kv.mod_revision, kv.create_revision]
        for kv in listing.kvs
    ]
    return {"revision": listing.revision, "store": listing.store_id, "kvs": kvs}


def _listing_of(saved: Any) -> Listing:
    """Raises `KeyError`, `TypeError`, `ValueError`."""
    kvs = [
        KeyValue(
            str(key), base64.b64decode(value), Revision(int(mod)),
            create_revision=Revision(int(create)),
        )
        for key, value, mod, create in saved["kvs"]
    ]  # fmt: skip
    return Listing(tuple(kvs), Revision(int(saved["revision"])), str(saved["store"]))
