"""Writes that are known to have happened or not, even when the answer was lost.

Each goes through a compare on the key's revision, so sending it again after an `Ambiguous` answer
cannot do it twice, and a first one that arrives late cannot undo what came after it.

Ours and another's write are told apart by their bytes. Where two writers may write the same bytes
and it matters who did, the value must carry something of its owner's (a node's id, a nonce).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tenacity import (
    AsyncRetrying,
    retry_if_exception_type,
    stop_after_delay,
    wait_random_exponential,
)

from registry.names import Revision
from registry.store import Ambiguous, GetOp, KeyValue, ModRevisionIs, PutOp, Store, Unavailable

RETRY_S = 15.0
"""How long a write is tried again, longer than an election takes."""


@dataclass(frozen=True, slots=True)
class Conflict:
    """Somebody else's write stands. ``current`` is what the key holds, ``None`` when it is gone."""

    current: KeyValue | None


async def put_if(
    store: Store,
    key: str,
    value: bytes,
    revision: Revision,
    *,
    lease: int = 0,
    retry_s: float = RETRY_S,
) -> Revision | Conflict:
    """Write ``key`` if its mod_revision still is ``revision`` (0: if it does not exist).

    Returns the key's new revision, or the `Conflict`. After a lost answer a key that holds
    ``value`` at a later revision counts as written.
    Raises `Unavailable` (surely not written) or `Ambiguous` when ``retry_s`` did not bring
    certainty, and at once whatever retrying does not mend.
    """
    unproven: Ambiguous | None = None
    retrying = AsyncRetrying(
        retry=retry_if_exception_type((Ambiguous, Unavailable)),
        wait=wait_random_exponential(multiplier=0.05, max=1.0),
        stop=stop_after_delay(retry_s),
        reraise=True,
    )
    try:
        async for attempt in retrying:
            with attempt:
                try:
                    done = await store.txn(
                        [ModRevisionIs(key, revision)], [PutOp(key, value, lease)], [GetOp(key)]
                    )
                except Ambiguous as exc:
                    unproven = exc
                    raise
                if done.succeeded:
                    return done.revision
                current = done.got[0]
                if unproven is not None and current is not None and current.value == value:
                    return current.mod_revision
                return Conflict(current)
    except Unavailable as exc:
        if unproven is not None:
            raise unproven from exc
        raise
    raise AssertionError("tenacity ends with a result or an error")


async def create_if_absent(
    store: Store, key: str, value: bytes, *, lease: int = 0, retry_s: float = RETRY_S
) -> bool:
    """Whether this call created ``key``. Raises as `put_if` does."""
    done = await put_if(store, key, value, Revision(0), lease=lease, retry_s=retry_s)
    return not isinstance(done, Conflict)


async def replace_if(
    store: Store, key: str, value: bytes, revision: Revision, *, retry_s: float = RETRY_S
) -> Revision | Conflict:
    """`put_if` without a lease, by the name its callers think in."""
    return await put_if(store, key, value, revision, retry_s=retry_s)


async def update(
    store: Store,
    key: str,
    change: Callable[[KeyValue | None], bytes | None],
    *,
    retry_s: float = RETRY_S,
) -> Revision | None:
    """Read, let ``change`` say the new value (``None``: leave it), write if nobody was faster.

    ``change`` is called again with what the faster one wrote. Returns the key's revision after
    our write, ``None`` when nothing was to be written. Raises as `put_if` does.
    """
    current = await store.get(key)
    while (value := change(current)) is not None:
        expected = Revision(0) if current is None else current.mod_revision
        done = await put_if(store, key, value, expected, retry_s=retry_s)
        if not isinstance(done, Conflict):
            return done
        current = done.current
    return None
