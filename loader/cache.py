"""The node's own folder of model files: immutable, by digest, bounded in size.

    <cache>/<hex>/                program and params of the model with that digest, read-only
    <cache>/file-<hex>/           one single file (golden data), read-only
    <cache>/.partial/<key>/       what is being copied; kept across interruptions
    <cache>/.origins/<key>.json   which entry a source gave, and its tags then
    <cache>/.locks/<name>         locked by whoever copies that key or has that entry loaded

Blocking; for the repository's own threads. Several processes may share one cache: leases and
copies are file locks, which the system lets go of when their process dies, however it dies.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import threading
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from loader.errors import FetchFailed
from loader.model_files import NoSuchModel, choose_in, file_sha256, model_digest

HOLD_S = 60.0
"""An entry is not evicted for so long after it was asked for: the time to lease it."""

FILE_PREFIX = "file-"
_PARTIAL_MAX_AGE_S = 24 * 3600.0
_LOCK_POLL_S = 0.05


class DiskFull(FetchFailed):
    """No room for the files, in the cache's limit or on the disk. Says the numbers."""


@dataclass(slots=True)
class _Lease:
    descriptor: int
    count: int = 1


@dataclass(slots=True)
class Cache:
    """``max_bytes``: of everything in it; ``None``: as much as the disk holds."""

    folder: Path
    max_bytes: int | None = None
    hold_s: float = HOLD_S
    _verified: dict[str, str] = field(default_factory=dict[str, str])
    """Entry to the sizes and times of its files when their digest was last computed."""
    _leases: dict[str, _Lease] = field(default_factory=dict[str, _Lease])
    _lock: threading.RLock = field(default_factory=threading.RLock)

    def prepare(self) -> None:
        """Make the folders; drop what was left half copied a day ago or earlier."""
        for name in ("", ".partial", ".origins", ".locks"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        before = time.time() - _PARTIAL_MAX_AGE_S
        for partial in (self.folder / ".partial").iterdir():
            with contextlib.suppress(OSError):
                if partial.stat().st_mtime < before:
                    shutil.rmtree(partial)

    # --- entries --------------------------------------------------------------------------------

    def lookup(self, name: str) -> Path | None:
        """The folder of an entry that is whole, now the most recently used one.

        The digest is computed again the first time in this process and whenever a size or time
        changed since. A corrupt entry is removed; nobody can have loaded it as it is.
        """
        path = self.folder / name
        with self._lock:
            if not path.is_dir():
                return None
            seen = _stat_text(path)
            if self._verified.get(name) != seen:
                if _digest_name(path, name.startswith(FILE_PREFIX)) != name:
                    self._remove(name)
                    return None
                self._verified[name] = seen
            os.utime(path)
        return path

    def is_intact(self, name: str) -> bool:
        """Whether an entry still has the files whose digest was computed last; a few stats."""
        try:
            return self._verified.get(name) == _stat_text(self.folder / name)
        except OSError:
            return False

    def has_sizes(self, sizes: dict[str, int]) -> bool:
        """Whether some entry has files of these very names and sizes: worth comparing digests."""
        return any(
            {file.name: file.stat().st_size for file in entry.iterdir()} == sizes
            for entry in self._entries()
        )

    def publish(self, name: str, ready: Path) -> Path:
        """Make the folder ``ready`` (files synced) the entry ``name``, in one step.

        An entry of that name that is already there and whole is kept instead.
        """
        for file in ready.iterdir():
            file.chmod(0o444)
        _fsync(ready)
        with self._lock:
            there = self.lookup(name)
            if there is None:
                there = self.folder / name
                try:
                    ready.rename(there)
                except OSError as exc:  # another process was faster
                    if exc.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                        raise
                _fsync(self.folder)
            self._verified[name] = _stat_text(there)
        return there

    def total_bytes(self) -> int:
        return sum(_size(entry) for entry in (*self._entries(), self.folder / ".partial"))

    # --- room -----------------------------------------------------------------------------------

    def make_room(self, wanted_bytes: int) -> None:
        """Evict until ``wanted_bytes`` more fit: the least recently used first, never leased ones.

        Raises `DiskFull` with the numbers when that is not enough.
        """
        with self._lock:
            evictable = sorted(self._entries(), key=lambda entry: entry.stat().st_mtime)
            while (shortage := self._shortage(wanted_bytes)) is not None:
                if not evictable:
                    raise DiskFull(shortage)
                self._evict(evictable.pop(0).name)

    def disk_full(self, wanted_bytes: int) -> DiskFull:
        free = shutil.disk_usage(self.folder).free
        return DiskFull(f"disk full: {wanted_bytes} bytes wanted, {free} free in {self.folder}")

    def _shortage(self, wanted_bytes: int) -> str | None:
        total = self.total_bytes()
        if self.max_bytes is not None and total + wanted_bytes > self.max_bytes:
            return (
                f"cache full: {wanted_bytes} bytes wanted, {total} of {self.max_bytes} used "
                f"by models that are loaded or just fetched ({self.folder})"
            )
        if shutil.disk_usage(self.folder).free < wanted_bytes:
            return str(self.disk_full(wanted_bytes))
        return None

    def _evict(self, name: str) -> None:
        if name in self._leases:
            return  # even if somebody removed the lock's file meanwhile
        with contextlib.suppress(FileNotFoundError):
            if time.time() - (self.folder / name).stat().st_mtime < self.hold_s:
                return
            descriptor = self._open_lock(name)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self._remove(name)
            except BlockingIOError:
                return  # leased, here or by another process
            finally:
                os.close(descriptor)

    def _remove(self, name: str) -> None:
        self._verified.pop(name, None)
        # Renamed first: whoever comes meanwhile sees all of it or nothing.
        doomed = self.folder / ".partial" / f"{name}.{os.getpid()}.gone"
        with contextlib.suppress(FileNotFoundError):
            (self.folder / name).rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)

    # --- leases and locks -----------------------------------------------------------------------

    def lease(self, name: str) -> None:
        """Keep an entry from eviction until as many `release` calls, or this process's end.

        Raises `FetchFailed` when there is no such entry (any more).
        """
        with self._lock:
            held = self._leases.get(name)
            if held is not None:
                held.count += 1
                return
            if not (self.folder / name).is_dir():
                raise FetchFailed(f"{name} is not in the cache {self.folder}")
            descriptor = self._open_lock(name)
            fcntl.flock(descriptor, fcntl.LOCK_SH)  # waits for an eviction of it, milliseconds
            if not (self.folder / name).is_dir():
                os.close(descriptor)
                raise FetchFailed(f"{name} was evicted from the cache {self.folder}")
            self._leases[name] = _Lease(descriptor)

    def release(self, name: str) -> None:
        """Give one lease back; without one nothing happens."""
        with self._lock:
            held = self._leases.get(name)
            if held is None:
                return
            held.count -= 1
            if held.count == 0:
                del self._leases[name]
                os.close(held.descriptor)

    @contextlib.contextmanager
    def partial(self, key: str, check: Callable[[], None]) -> Generator[Path]:
        """The folder for what is being copied under ``key``, for one copier at a time.

        check: called while another one is at it; raises to stop waiting. What is in the folder
        afterwards stays for the next time.
        """
        descriptor = self._open_lock(f"copy-{key}")
        try:
            while True:
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    check()
                    time.sleep(_LOCK_POLL_S)
            path = self.folder / ".partial" / key
            path.mkdir(exist_ok=True)
            os.utime(path)
            yield path
        finally:
            os.close(descriptor)

    def origin_path(self, key: str) -> Path:
        return self.folder / ".origins" / f"{key}.json"

    def _open_lock(self, name: str) -> int:
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
        return os.open(self.folder / ".locks" / name, flags, 0o644)

    def _entries(self) -> Iterator[Path]:
        for entry in self.folder.iterdir():
            if not entry.name.startswith(".") and entry.is_dir():
                yield entry


def _digest_name(path: Path, is_file: bool) -> str | None:
    """The name that an entry should have by what lies in it."""
    try:
        if is_file:
            (only,) = path.iterdir()
            return FILE_PREFIX + file_sha256(only)
        files = choose_in(path)
        found = {name: file_sha256(path / name) for name in files.names()}
        return model_digest(files, found).removeprefix("sha256:")
    except (NoSuchModel, OSError, ValueError):
        return None


def _stat_text(path: Path) -> str:
    found = sorted((file.name, file.stat()) for file in path.iterdir())
    return ";".join(
        f"{name}:{stat.st_size}:{stat.st_mtime_ns}:{stat.st_ino}" for name, stat in found
    )


def _size(folder: Path) -> int:
    total = 0
    with contextlib.suppress(FileNotFoundError):  # evicted meanwhile
        for file in folder.rglob("*"):
            with contextlib.suppress(FileNotFoundError):
                if file.is_file():
                    total += file.stat().st_size
    return total


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
