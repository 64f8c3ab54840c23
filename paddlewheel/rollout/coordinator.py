"""Every node is a candidate; the one that is elected coordinates the fleet's rollouts."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any, Protocol

import structlog

from paddlewheel.rollout.telling import Telling
from paddlewheel.rollout.term import Parse, Term
from registry.election import Deposed, Leadership, leadership
from registry.events import FLEET_SOURCE, EventType
from registry.keys import Keys
from registry.names import ModelName
from registry.rollouts import CoordinatorRecord
from registry.spec import ModelDocument, parse_model
from registry.store import Store, StoreError

log = structlog.get_logger(__name__)

TTL_MAX_S = 5
"""A coordinator that is killed is replaced within that time; nobody's traffic waits for one."""
REFUSED_RETRY_S = 5.0


class Emit(Protocol):
    """`registry.event_writer.EventWriter.emit`."""

    def __call__(
        self,
        type_: EventType,
        subject: str = "",
        data: Mapping[str, Any] | None = None,
        *,
        id_: str | None = None,
        source: str | None = None,
    ) -> object: ...


async def parse_in_thread(raw: bytes, model: ModelName) -> ModelDocument:
    """Large documents take up to 0.3 s: not for an event loop that serves."""
    return await asyncio.to_thread(parse_model, raw, name=model)


class Coordinator:
    """One candidate. Loop-bound; all durations are the loop's."""

    def __init__(
        self,
        store: Store,
        keys: Keys,
        node: str,
        *,
        ttl_s: int = TTL_MAX_S,
        emit: Emit | None = None,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
        parse: Parse = parse_in_thread,
        rng: random.Random | None = None,
    ) -> None:
        """node: our id.
        now: the time of day, only to be written down."""
        self._store = store
        self._keys = keys
        self._node = node
        self._ttl_s = ttl_s
        self._emit = emit
        self._now = now
        self._parse = parse
        self._rng = rng or random.Random()
        self.terms = 0
        """How often it was elected."""

    async def run(self) -> None:
        """Stand for election, and coordinate while elected, until cancelled; then resign."""
        while True:
            try:
                async with leadership(
                    self._store, self._keys.coordinator, self._says,
                    ttl_s=self._ttl_s, rng=self._rng,
                ) as led:  # fmt: skip
                    self.terms += 1
                    await self._lead(led)
            except StoreError as exc:
                log.error("store_refuses", part="coordinator", error=str(exc))
                await asyncio.sleep(REFUSED_RETRY_S)

    def _says(self) -> bytes:
        return CoordinatorRecord(id=self._node, at=self._now()).to_json()

    async def _lead(self, led: Leadership) -> None:
        log.info("coordinating", node=self._node, fence=led.fence)
        lost = asyncio.create_task(led.lost.wait())
        try:
            while led.is_held:
                term = Term(
                    self._store, self._keys, self._node, led,
                    parse=self._parse, tell=self._tell, now=self._now, rng=self._rng,
                )  # fmt: skip
                work = asyncio.create_task(term.run(), name="coordinator-term")
                try:
                    await asyncio.wait({work, lost}, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    work.cancel()
                    await asyncio.gather(work, return_exceptions=True)
                if not work.cancelled():
                    work.result()
        except Deposed:
            pass  # logged where it was noticed
        finally:
            lost.cancel()
        log.info("coordinating_no_more", node=self._node, fence=led.fence)

    def _tell(self, telling: Telling) -> None:
        if self._emit is not None:
            self._emit(
                telling.type, telling.subject, telling.data, id_=telling.id, source=FLEET_SOURCE
            )
