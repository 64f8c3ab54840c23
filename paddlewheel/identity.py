"""One node id, one node: a second process under the same id refuses, a restart does not.

On one machine a lock on the node's own folder tells, and it falls with the process. Across
machines the key in etcd tells: whoever holds it, under another uid and at another address, for
longer than a dead node's lease could last is alive. The uid is kept in the folder, so that a node
killed and started again knows its own old key.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import time
import uuid
from pathlib import Path

import structlog

from registry.errors import PaddlewheelError
from registry.keys import Keys
from registry.names import NodeId
from registry.records import BadRecord, NodeRecord, rfc3339_ms
from registry.store import Store, StoreError

log = structlog.get_logger(__name__)

LOCK_WAIT_S = 1.0
POLL_S = 0.5
PATIENCE_S = 1.5
"""Beyond a lease's time, for an etcd that takes its time to end one."""


class IdTaken(PaddlewheelError):
    """Another process that lives has this node id."""


class Lodging:
    """A node's own folder, for one process at a time."""

    def __init__(self, folder: Path, node: NodeId) -> None:
        """Take it; blocks for a second where it is taken. Raises `IdTaken`.

        Where the disk cannot lock or be written, etcd has to tell.
        """
        self.uid = str(uuid.uuid4())
        self._lock: int | None = None
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            if not _locked(self._lock):
                holder = os.pread(self._lock, 4096, 0).decode(errors="replace")
                raise IdTaken(
                    f"node id {node!r} is taken on this machine by {holder or 'another process'}; "
                    f"give this one another --id, or a --cache of its own"
                )
            self.uid = _uid(folder / "uid")
        except OSError as exc:
            log.warning("node_folder_not_locked", folder=str(folder), reason=str(exc))
        except IdTaken:
            self.leave()
            raise

    def note(self, record: NodeRecord) -> None:
        """For whoever comes and finds it taken."""
        if self._lock is not None:
            text = f"{_who(record)}, pid {os.getpid()}".encode()
            os.ftruncate(self._lock, 0)
            os.pwrite(self._lock, text, 0)

    def leave(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def _locked(descriptor: int) -> bool:
    """Whether it could be locked; what is left of a killed process may hold it for a moment."""
    until_s = time.monotonic() + LOCK_WAIT_S
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > until_s:
                return False
        time.sleep(LOCK_WAIT_S / 10)


def _uid(path: Path) -> str:
    """Raises `OSError`."""
    try:
        return str(uuid.UUID(path.read_text().strip()))
    except (FileNotFoundError, ValueError):
        uid = str(uuid.uuid4())
        path.write_text(uid + "\n")
        return uid


async def claim(store: Store, keys: Keys, mine: NodeRecord) -> None:
    """Wait until no other living node holds the key of ``mine``. Raises `IdTaken`.

    Free at once where there is no key, or our own from before a restart. Another's has to outlive
    its lease's time to count: a dead node's key does not. While etcd is away nobody can tell.
    """
    loop = asyncio.get_running_loop()
    since_s: float | None = None
    while True:
        try:
            held = await _held(store, keys, mine.id)
        except StoreError as exc:
            log.info("node_id_not_checked", node=mine.id, error=str(exc))
            since_s = None  # etcd gives its leases new time when it comes back
            await asyncio.sleep(POLL_S)
            continue
        if held is None or is_same_node(held, mine):
            return
        if since_s is None:
            since_s = loop.time()
            log.warning("node_id_in_use", node=mine.id, by=_who(held))
        if loop.time() - since_s > held.lease_ttl_s + PATIENCE_S:
            raise IdTaken(f"node id {mine.id!r} is taken by {_who(held)}: it holds its key in etcd")
        await asyncio.sleep(POLL_S)


async def guard(store: Store, keys: Keys, mine: NodeRecord) -> None:
    """Look after the key for ever. Raises `IdTaken` when an older process writes it too.

    For what `claim` cannot see: two that start in the same moment, or with copies of one folder.
    The younger one goes.
    """
    told = ""
    while True:
        await asyncio.sleep(mine.lease_ttl_s / 2)
        try:
            held = await _held(store, keys, mine.id)
        except StoreError:
            continue
        if held is None or held.started_at == mine.started_at:
            continue
        if held.started_at < mine.started_at:
            raise IdTaken(f"node id {mine.id!r} is taken by {_who(held)}: it writes the same keys")
        if told != (told := _who(held)):
            log.error("node_id_used_twice", node=mine.id, by=told)


def is_same_node(held: NodeRecord, mine: NodeRecord) -> bool:
    """Whether a record is this node's own, from before a restart.

    By its uid; or by its address, at which we listen now.
    """
    return (held.uid is not None and held.uid == mine.uid) or held.http == mine.http


async def _held(store: Store, keys: Keys, node: NodeId) -> NodeRecord | None:
    kv = await store.get(keys.node(node))
    try:
        return None if kv is None else NodeRecord.from_json(kv.value)
    except BadRecord:
        return None


def _who(record: NodeRecord) -> str:
    return f"{record.http}, started {rfc3339_ms(record.started_at)}"
