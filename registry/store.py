"""The Store protocol, in etcd's own words. `registry.etcd` and `registry.memory_store` keep it.

The same contract tests run against both (tests/integration/store_contract.py).
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from registry.errors import PaddlewheelError
from registry.names import Revision

_NEVER = Revision(0)


@dataclass(frozen=True, slots=True)
class KeyValue:
    """One key as of some revision."""

    key: str
    value: bytes
    mod_revision: Revision
    create_revision: Revision = _NEVER
    version: int = 0
    lease: int = 0


@dataclass(frozen=True, slots=True)
class Put:
    """A key was written, or (after a compaction) found to have been written."""

    kv: KeyValue


@dataclass(frozen=True, slots=True)
class Delete:
    """A key went away at ``mod_revision``."""

    key: str
    mod_revision: Revision


Event = Put | Delete


@dataclass(frozen=True, slots=True)
class Batch:
    """All events of one revision (or the synthesised difference after a compaction), in order."""

    revision: Revision
    events: tuple[Event, ...]
    store_id: str = ""
    """Of a difference: the store that was listed, as in `Listing`."""


@dataclass(frozen=True, slots=True)
class Listing:
    """A prefix as of one revision, sorted by key."""

    kvs: tuple[KeyValue, ...]
    revision: Revision
    store_id: str = ""
    """Which store answered (etcd's cluster id); what another one lacks was deleted by nobody."""


# --- transactions -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ModRevisionIs:
    """Holds when the key's mod_revision equals ``revision``; 0 means: does not exist."""

    key: str
    revision: Revision


@dataclass(frozen=True, slots=True)
class CreateRevisionIs:
    key: str
    revision: Revision


@dataclass(frozen=True, slots=True)
class ValueIs:
    key: str
    value: bytes


Compare = ModRevisionIs | CreateRevisionIs | ValueIs


@dataclass(frozen=True, slots=True)
class PutOp:
    key: str
    value: bytes
    lease: int = 0


@dataclass(frozen=True, slots=True)
class DeleteOp:
    key: str


@dataclass(frozen=True, slots=True)
class GetOp:
    key: str


Op = PutOp | DeleteOp | GetOp


@dataclass(frozen=True, slots=True)
class TxnResult:
    succeeded: bool
    revision: Revision
    got: tuple[KeyValue | None, ...] = ()
    """One entry for each `GetOp` of the branch taken, in order."""


# --- errors -----------------------------------------------------------------------------------


class StoreError(PaddlewheelError):
    """Base of what a store raises."""


class Unavailable(StoreError):
    """No member answered in time. Only raised where nothing can have been written."""


class Ambiguous(StoreError):
    """A write that may or may not have happened: read back before doing it again."""


class PermissionDenied(StoreError):
    """User, password or role do not allow this. Retrying will not help."""


class LeaseNotFound(StoreError):
    """The lease expired or was revoked."""


class StoreRefused(StoreError):
    """The store answered with an error that retrying will not mend (too large, bad request)."""


class Store(Protocol):
    """Every call has a deadline of its own; every key is text, every value bytes."""

    async def get(self, key: str) -> KeyValue | None: ...

    async def list_prefix(self, prefix: str) -> Listing: ...

    async def put(self, key: str, value: bytes, *, lease: int = 0) -> Revision:
        """Raises `Ambiguous` when it may have happened, `Unavailable` when it surely did not."""
        ...

    async def delete(self, key: str) -> bool: ...

    async def delete_prefix(self, prefix: str) -> int: ...

    async def txn(
        self,
        compares: Sequence[Compare],
        success: Sequence[Op] = (),
        failure: Sequence[Op] = (),
    ) -> TxnResult: ...

    def watch_prefix(self, prefix: str, *, known: Listing | None = None) -> AsyncIterator[Batch]:
        """Every change under ``prefix``, for ever: no event lost, none repeated, none reordered.

        Starts after ``known`` (a listing of the same prefix) when it is given. Otherwise lists
        first and yields that listing as one batch of puts (an empty one too: nothing is there,
        and that is known), then what follows. Survives member loss, leader change, cut streams
        and compaction (a compaction yields the difference between what was delivered and what is,
        as one batch at the new head).
        Ends only when the caller closes it; raises only `PermissionDenied`.
        """
        ...

    async def lease_grant(self, ttl_s: int) -> int: ...

    async def lease_keepalive(self, lease: int) -> float:
        """One renewal. Returns the remaining TTL in seconds; raises `LeaseNotFound`."""
        ...

    async def lease_keys(self, lease: int) -> frozenset[str]:
        """The keys now under the lease; raises `LeaseNotFound`."""
        ...

    async def lease_revoke(self, lease: int) -> None:
        """End the lease, and its keys with it. Nothing happens when it is gone already."""
        ...

    async def close(self) -> None: ...
