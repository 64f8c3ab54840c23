"""Keeps a front door's access control as the gateway document says, on gateways and nodes alike.

A document that is refused changes nothing: the last good one stays in force, and the refusal is
in the log, in `/readyz?verbose` and in `/admin/access`. Where access control has to be on but
cannot work (nothing was read yet, no document says who may come), nobody is let in but probes.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import orjson
import structlog

from registry.document_tree import ConfigError, FieldError
from registry.errors import PaddlewheelError
from registry.gateway_spec import GatewayDocument, GatewayLimits, JwtKeys, parse_gateway
from registry.keys import GatewayKey, Keys
from registry.names import Revision
from registry.store import Batch, Put, Store, StoreError
from router.access.buckets import Buckets
from router.access.guard import ClosedGuard, Guard, Guarding, Keyring
from router.access.jwks import RemoteKeys
from router.access.keyring import BadKeys, KeySet, read_jwks, secret_key
from router.http_server import ConnectionLimits
from router.ports import Check

log = structlog.get_logger(__name__)

FILES_EVERY_S = 2.0
"""How often key files are looked at."""
RETRY_S = 2.0
_KEY_FILE_BYTES_MAX = 1 << 20
NOT_READ = "the gateway document was not read yet"
NO_ACCESS = "no gateway document says who may use what"


class FrontDoor(Protocol):
    """What has requests to guard: `router.app.App`, `router.gateway_app.GatewayApp`."""

    @property
    def guard(self) -> Guarding | None: ...

    @guard.setter
    def guard(self, guard: Guarding | None) -> None: ...

    @property
    def limits(self) -> ConnectionLimits: ...


@dataclass(frozen=True, slots=True)
class InForce:
    """The document that counts."""

    revision: Revision
    document: GatewayDocument


class AccessControl:
    """One front door's. `restore` first, then `run` for as long as it serves."""

    def __init__(
        self,
        door: FrontDoor,
        *,
        store: Store,
        keys: Keys,
        required: bool,
        is_node: bool,
        snapshot: Path | None = None,
        on_document: Callable[[GatewayDocument | None], None] = lambda _document: None,
    ) -> None:
        """required: let nobody in without a document that says whom.

        is_node: gateways stand in front of it, so rates count only with ``limits.nodes``.
        snapshot: where the last good document is kept for a start without etcd.
        """
        self._door = door
        self._store = store
        self._keys = keys
        self._required = required
        self._is_node = is_node
        self._snapshot = snapshot
        self._on_document = on_document
        self._keyring = Keyring()
        self._files = _KeyFiles(self._keyring)
        self._buckets = Buckets()
        self._is_known = False
        """Whether etcd, or the snapshot, was read."""
        self._in_force: InForce | None = None
        self._seen = Revision(0)
        """Of the newest document, 0 without one."""
        self._errors: tuple[FieldError, ...] = ()
        """What is wrong with it, where it is not the one in force."""
        self._fetching: asyncio.Task[None] | None = None

    # --- what follows from it -----------------------------------------------------------------

    def _publish(self) -> None:
        """Put into force what is known now."""
        document = None if self._in_force is None else self._in_force.document
        limits = GatewayLimits() if document is None else document.spec.limits
        access = None if document is None else document.spec.access
        if self._is_node and not limits.nodes:
            limits = GatewayLimits(
                max_body_mb=limits.max_body_mb,
                head_timeout_s=limits.head_timeout_s,
                body_timeout_s=limits.body_timeout_s,
            )
        connections = self._door.limits
        connections.head_timeout_s = limits.head_timeout_s
        connections.send_timeout_s = limits.body_timeout_s
        connections.per_client = limits.connections_per_client
        reason = self._closed_for()
        if reason is not None:
            self._door.guard = ClosedGuard(reason)
        elif access is None and limits == GatewayLimits():
            self._door.guard = None
        else:
            self._door.guard = Guard(access, limits, self._keyring, self._buckets)
        self._on_document(document)

    def _closed_for(self) -> str | None:
        """Why nobody may be let in; ``None``: the document in force counts, or there is none."""
        if self._in_force is not None and self._in_force.document.spec.access is not None:
            return None
        if self._required:
            return NO_ACCESS if self._is_known else NOT_READ
        if self._in_force is None and self._errors:
            return "the gateway document is refused, and there is no earlier one"
        return None

    # --- what people read ---------------------------------------------------------------------

    @property
    def is_open(self) -> bool:
        """Whether anybody can be let in."""
        return not isinstance(self._door.guard, ClosedGuard)

    def check(self) -> Check:
        """For `/readyz`: not ready while nobody is let in."""
        return Check("access", self.is_open, self._closed_for() or "")

    def remarks(self) -> list[Check]:
        """For people: neither makes ready what is not, nor the other way round."""
        found: list[Check] = []
        if self._errors:
            shown = "; ".join(str(error) for error in self._errors[:3])
            found.append(
                Check("gateway_document", False, f"revision {self._seen} refused: {shown}")
            )
        found += [Check("access_keys", False, problem) for problem in self._key_problems()]
        return found

    def report(self) -> dict[str, Any]:
        """``GET /admin/access``. Nothing of keys, not even digests."""
        in_force = self._in_force
        access = None if in_force is None else in_force.document.spec.access
        state = "closed" if not self.is_open else "off" if access is None else "on"
        report: dict[str, Any] = {
            "access": state,
            "reason": self._closed_for(),
            "revision": self._seen,
            "applied_revision": None if in_force is None else in_force.revision,
            "accepted": not self._errors,
            "errors": [
                {"path": error.path, "line": error.line, "message": error.message}
                for error in self._errors
            ],
            "key_problems": self._key_problems(),
            "clients_counted": len(self._buckets),
        }
        if in_force is not None:
            spec = in_force.document.spec
            report["limits"] = spec.limits.model_dump(mode="json", by_alias=True, exclude_none=True)
        if access is not None:
            report["api_keys"] = [
                key.model_dump(mode="json", exclude={"sha256"}) for key in access.api_keys
            ]
            if access.jwt is not None:
                report["jwt"] = access.jwt.model_dump(mode="json", exclude_none=True)
        return report

    def _key_problems(self) -> list[str]:
        remote = self._keyring.remote
        found = list(self._files.problems.values())
        if remote is not None and remote.error is not None:
            found.append(f"{remote.url}: {remote.error}")
        return found

    # --- from etcd ----------------------------------------------------------------------------

    def restore(self) -> None:
        """Start from the snapshot where there is one. Before the door opens; blocks shortly."""
        saved = None if self._snapshot is None else _load(self._snapshot, self._keys.prefix)
        if saved is not None:
            self._is_known, self._seen, self._in_force = True, saved.revision, saved
            self._files.follow(_keys_of(saved.document))
            self._files.look()
        self._publish()

    async def run(self) -> None:
        """Follow the document and the keys that it names, for ever."""
        self._fetch_from(self._in_force)
        looking = asyncio.create_task(self._look_at_files(), name="key files")
        try:
            while True:
                try:
                    await self._follow()
                except StoreError as exc:  # refused by etcd: what is known stays in force
                    log.error("gateway_document_not_followed", reason=str(exc))
                await asyncio.sleep(RETRY_S)
        finally:
            for task in (looking, self._fetching):
                if task is not None:
                    task.cancel()
            self._fetching = None

    async def _follow(self) -> None:
        """The first batch is all there is; then what follows."""
        is_listing = True
        async for batch in self._store.watch_prefix(self._keys.gateway):
            await self._take(batch, is_listing=is_listing)
            is_listing = False

    async def _take(self, batch: Batch, *, is_listing: bool) -> None:
        there = any(isinstance(e, Put) and self._is_ours(e.kv.key) for e in batch.events)
        if is_listing and not there and (self._in_force is not None or self._seen):
            await self._deleted(batch.revision)
        for event in batch.events:
            key = event.kv.key if isinstance(event, Put) else event.key
            if not self._is_ours(key):
                continue
            if isinstance(event, Put):
                await self._put(event.kv.value, event.kv.mod_revision)
            else:
                await self._deleted(event.mod_revision)
        self._is_known = True
        self._publish()

    def _is_ours(self, key: str) -> bool:
        return isinstance(self._keys.parse(key), GatewayKey)  # not configs/gateway-2 and the like

    async def _put(self, text: bytes, revision: Revision) -> None:
        if self._in_force is not None and revision == self._in_force.revision:
            return
        self._seen = revision
        try:
            document = await asyncio.to_thread(parse_gateway, text)
        except ConfigError as exc:
            self._errors = exc.errors
            log.warning(
                "gateway_document_refused",
                revision=revision,
                errors=[str(error) for error in exc.errors[:5]],
                in_force=None if self._in_force is None else self._in_force.revision,
            )
            return
        self._errors = ()
        self._in_force = in_force = InForce(revision, document)
        self._files.follow(_keys_of(document))
        await asyncio.to_thread(self._files.look)
        self._fetch_from(in_force)
        log.info(
            "gateway_document_accepted",
            revision=revision,
            access=document.spec.access is not None,
        )
        if self._snapshot is not None:
            await asyncio.to_thread(_save, self._snapshot, self._keys.prefix, revision, text)

    async def _deleted(self, revision: Revision) -> None:
        log.info("gateway_document_deleted", revision=revision)
        self._seen, self._errors, self._in_force = Revision(0), (), None
        self._files.follow(None)
        self._fetch_from(None)
        if self._snapshot is not None:
            await asyncio.to_thread(self._snapshot.unlink, missing_ok=True)

    def _fetch_from(self, in_force: InForce | None) -> None:
        """Have the key set of the document fetched; one that is there already is kept."""
        keys = None if in_force is None else _keys_of(in_force.document)
        url = None if keys is None else keys.jwks_url
        remote = self._keyring.remote
        if url is None or keys is None:
            self._keyring.remote = None
        elif remote is None or remote.url != url:
            self._keyring.remote = RemoteKeys(url, refresh_s=keys.refresh_s)
        else:
            remote.refresh_s = keys.refresh_s
        if self._keyring.remote is remote and self._fetching is not None:
            return
        if self._fetching is not None:
            self._fetching.cancel()
            self._fetching = None
        if self._keyring.remote is not None:
            self._fetching = asyncio.create_task(self._keyring.remote.run(), name="jwks")

    async def _look_at_files(self) -> None:
        while True:
            await asyncio.sleep(FILES_EVERY_S)
            await asyncio.to_thread(self._files.look)


def _keys_of(document: GatewayDocument) -> JwtKeys | None:
    access = document.spec.access
    return None if access is None or access.jwt is None else access.jwt.keys


class _KeyFiles:
    """The key files that the document names, read when they change. What cannot be read leaves
    the keys that were there."""

    def __init__(self, keyring: Keyring) -> None:
        self._keyring = keyring
        self._paths: dict[str, str] = {}
        self._read: dict[str, tuple[int, ...]] = {}
        """Path to what its `stat` said when it was read."""
        self.problems: dict[str, str] = {}

    def follow(self, keys: JwtKeys | None) -> None:
        paths = {
            name: path
            for name, path in (
                ("secret", None if keys is None else keys.secret_file),
                ("file", None if keys is None else keys.jwks_file),
            )
            if path is not None
        }
        for name in ("secret", "file"):
            if paths.get(name) != self._paths.get(name):
                self._read.pop(self._paths.get(name, ""), None)
                setattr(self._keyring, name, None)  # another file's keys are not ours
        self._paths = paths
        self.problems = {path: why for path, why in self.problems.items() if path in paths.values()}

    def look(self) -> None:
        """Read what changed. Blocks for the reading of small files."""
        for name, path in list(self._paths.items()):
            try:
                stat = Path(path).stat()
                mark = (stat.st_mtime_ns, stat.st_size, stat.st_ino)
                if self._read.get(path) == mark:
                    continue
                if stat.st_size > _KEY_FILE_BYTES_MAX:
                    raise BadKeys(f"over {_KEY_FILE_BYTES_MAX} bytes")
                content = Path(path).read_bytes()
                keys: KeySet = secret_key(content) if name == "secret" else read_jwks(content)
            except (OSError, BadKeys) as exc:
                why = exc.strerror if isinstance(exc, OSError) and exc.strerror else str(exc)
                problem = f"{path}: {why}"
                if self.problems.get(path) != problem:
                    log.error("access_keys_not_read", path=path, reason=why)
                self.problems[path] = problem
                continue
            setattr(self._keyring, name, keys)
            self._read[path] = mark
            self.problems.pop(path, None)
            log.info("access_keys_read", path=path, keys=len(keys.keys), ignored=keys.ignored)


# --- on disk --------------------------------------------------------------------------------------


def _load(path: Path, prefix: str) -> InForce | None:
    try:
        saved: Any = orjson.loads(path.read_bytes())
        if saved["prefix"] != prefix:
            return None
        return InForce(Revision(int(saved["revision"])), parse_gateway(str(saved["text"])))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError, PaddlewheelError) as exc:
        log.warning("gateway_snapshot_ignored", path=str(path), reason=repr(exc))
        return None


def _save(path: Path, prefix: str, revision: Revision, text: bytes) -> None:
    """Replace the file whole or not at all. What cannot be written is logged: etcd has it."""
    content = orjson.dumps({"prefix": prefix, "revision": revision, "text": text.decode()})
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as exc:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        log.warning("gateway_snapshot_not_saved", path=str(path), reason=str(exc))
