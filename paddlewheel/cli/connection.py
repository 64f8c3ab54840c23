"""One short conversation with etcd: connect, do the work, close, whatever happens."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

from paddlewheel.etcd_options import EtcdOptions, Located
from registry.keys import Keys
from registry.store import Store, Unavailable

T = TypeVar("T")

CLOSE_S = 2.0
"""A channel that does not close must not keep a command that has done its work."""


@dataclass(frozen=True, slots=True)
class Connection:
    """What a command needs to talk to etcd."""

    store: Store
    keys: Keys
    located: Located


def with_etcd(options: EtcdOptions, work: Callable[[Connection], Awaitable[T]]) -> T:
    """Run ``work`` in an event loop of its own with a store that is closed afterwards.

    Raises what ``work`` raises; `Unavailable` says which etcd did not answer and why that one.
    """
    return asyncio.run(_converse(options, work))


async def _converse(options: EtcdOptions, work: Callable[[Connection], Awaitable[T]]) -> T:
    from registry.etcd import EtcdStore

    located = options.locate()
    store = EtcdStore.connect(options.settings())
    try:
        return await work(Connection(store, Keys(located.prefix), located))
    except Unavailable as exc:
        where = ",".join(located.endpoints)
        raise Unavailable(f"etcd at {where} ({located.found_by}): {exc}") from exc
    finally:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_S):
                await store.close()
