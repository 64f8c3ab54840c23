"""Requests that may not be answered from before a document: the node's side of it.

When a document comes into force everywhere at once, nodes change within milliseconds of each
other. A gateway that has passed on an answer of the new document asks for no older one
(`FLOOR_HEADER`), and a node that is still about to change makes such a request wait for that.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from registry.inference import Overloaded
from registry.names import ModelName, Revision
from router.errors import BadRequest
from router.table import RouteTable

FLOOR_HEADER = "X-Min-Config-Revision"
"""The oldest document that may answer. Gateways send it and pass none on from clients; to a client
of a node it is of no use, and no harm: it waits for `WAIT_MAX_S` at most."""
REVISION_HEADER = "X-Config-Revision"
"""The document that an answer comes from."""
ROLLOUT_HEADER = "X-Config-Rollout"
"""``barrier`` in answers from a document with that strategy. Who passes one on passes on none from
an older document, whether or not it has heard of the document itself."""
WAIT_MAX_S = 1.0
"""The coordinator's word takes milliseconds; who has not heard it by then is cut off."""
WAITING_MAX = 4096
RETRY_AFTER_S = 1.0
_DIGITS_MAX = 19


class Behind(Overloaded):
    """This node has an older document in force than the request asks for."""

    def __init__(self, model: str, floor: Revision, revision: Revision) -> None:
        super().__init__(
            f"model {model!r}: revision {revision} is in force here, {floor} is wanted",
            retry_after_s=RETRY_AFTER_S,
        )
        self.revision = revision
        """The one in force."""


def parse_floor(text: str) -> Revision:
    """Read the header. Raises `BadRequest`."""
    text = text.strip()
    if not (text.isascii() and text.isdigit() and len(text) <= _DIGITS_MAX):
        raise BadRequest(f"{FLOOR_HEADER}: want a revision")
    return Revision(int(text))


class FloorGate:
    """Where requests wait for a routing table. ``table``: the one in use."""

    def __init__(self, table: Callable[[], RouteTable]) -> None:
        self._table = table
        self._changed: asyncio.Future[None] | None = None
        self.waiting = 0
        """Requests that wait now."""

    def table_changed(self) -> None:
        """Look again, all who wait."""
        if self._changed is not None:
            self._changed.set_result(None)
            self._changed = None

    async def reach(self, model: str, floor: Revision, *, within_s: float) -> None:
        """Return once this document of ``model``, or a newer one, is in force.

        At once for a model that is not known here: the table refuses it. Raises `Behind` when it
        is not so ``within_s`` or `WAIT_MAX_S`, or when too many wait already.
        """
        loop = asyncio.get_running_loop()
        until_s = loop.time() + min(within_s, WAIT_MAX_S)
        while (revision := self._revision(model)) is not None and revision < floor:
            if self.waiting >= WAITING_MAX or loop.time() >= until_s:
                raise Behind(model, floor, revision)
            if self._changed is None:
                self._changed = loop.create_future()
            self.waiting += 1
            try:
                async with asyncio.timeout_at(until_s):
                    await asyncio.shield(self._changed)
            except TimeoutError:
                pass  # looked at once more above
            finally:
                self.waiting -= 1

    def _revision(self, model: str) -> Revision | None:
        route = self._table().models.get(ModelName(model))
        return None if route is None else route.revision
