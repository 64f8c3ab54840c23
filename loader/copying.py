"""Copy the files of a source into a folder, hashed on the way, going on where it was left."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import orjson

from loader.cache import Cache
from loader.errors import FetchFailed
from loader.sources import CHUNK_BYTES, CannotSeek, Source, SourceFile

_FULL = (errno.ENOSPC, errno.EDQUOT)


class SourceChanged(FetchFailed):
    """The files were written to while they were read. Trying again may see them at rest."""


@dataclass(slots=True)
class Copier:
    """One copy of one source's files. ``check`` raises when nobody wants it any more."""

    source: Source
    cache: Cache
    check: Callable[[], None]
    progress: Callable[[int, int], None]
    """Told bytes done and in all (0 where the source does not say) after each chunk."""
    done_bytes: int = 0
    total_bytes: int = 0
    has_resumed: bool = False
    """Whether some of it was copied earlier, by a copy that ended early."""

    def copy(self, files: Sequence[SourceFile], into: Path) -> dict[str, str]:
        """Copy all of them; returns each one's hex sha256. The files are synced to disk.

        Raises `FetchFailed`, `SourceChanged` when a file is not as long as it was said to be,
        `DiskFull`. What was copied stays in ``into``.
        """
        self.total_bytes = sum(max(file.size, 0) for file in files)
        self.done_bytes = 0
        try:
            return {file.name: self._one(file, into) for file in files}
        except OSError as exc:
            if exc.errno in _FULL:
                raise self.cache.disk_full(self.total_bytes - self.done_bytes) from exc
            raise FetchFailed(f"writing to {into}: {exc.strerror or exc}") from exc

    def hash_in_place(self, files: Sequence[SourceFile]) -> dict[str, str]:
        """Each file's hex sha256, read at the source, nothing copied."""
        self.total_bytes = sum(max(file.size, 0) for file in files)
        self.done_bytes = 0
        found: dict[str, str] = {}
        for file in files:
            digest = hashlib.sha256()
            for chunk in self.source.chunks(file.name, 0):
                digest.update(chunk)
                self._step(len(chunk))
            found[file.name] = digest.hexdigest()
        return found

    def _one(self, file: SourceFile, into: Path) -> str:
        part, note = into / f"{file.name}.part", _Note(into / f"{file.name}.note")
        identity = {"url": self.source.url, "size": file.size, "tag": file.tag}
        safe_bytes = 0 if file.tag is None else note.safe_bytes(identity)
        with part.open("r+b" if part.exists() else "w+b") as out:
            out.truncate(safe_bytes)  # beyond it may be what a power cut left
            digest = self._hash_existing(out)
            size = out.tell()
            self.has_resumed = self.has_resumed or size > 0
            try:
                if size != file.size:
                    size = self._append(file, out, digest, size)
            except CannotSeek:
                self.done_bytes -= size
                out.truncate(0)
                out.seek(0)
                digest = hashlib.sha256()
                size = self._append(file, out, digest, 0)
            finally:
                out.flush()
                os.fsync(out.fileno())
                note.write(identity, out.tell())
        if file.size not in (-1, size):
            part.unlink()
            raise SourceChanged(f"{file.name} was {file.size} bytes, {size} were read")
        return str(digest.hexdigest())

    def _append(self, file: SourceFile, out: IO[bytes], digest: Any, size: int) -> int:
        for chunk in self.source.chunks(file.name, size):
            self.check()
            out.write(chunk)
            digest.update(chunk)
            size += len(chunk)
            self._step(len(chunk))
            if -1 < file.size < size:
                break
        return size

    def _hash_existing(self, out: IO[bytes]) -> Any:
        digest = hashlib.sha256()
        while chunk := out.read(CHUNK_BYTES):
            digest.update(chunk)
            self._step(len(chunk))
        return digest

    def _step(self, size: int) -> None:
        self.check()
        self.done_bytes += size
        self.progress(self.done_bytes, self.total_bytes)


@dataclass(frozen=True, slots=True)
class _Note:
    """Beside a half copied file: of what it is a copy, and how much of it is safely on disk."""

    path: Path

    def safe_bytes(self, identity: Mapping[str, Any]) -> int:
        """0 unless the copy is of the very same file."""
        try:
            noted = orjson.loads(self.path.read_bytes())
            return int(noted["bytes"]) if noted["of"] == identity else 0
        except (OSError, ValueError, KeyError, TypeError):
            return 0

    def write(self, identity: Mapping[str, Any], safe_bytes: int) -> None:
        self.path.write_bytes(orjson.dumps({"of": identity, "bytes": safe_bytes}))


def gather(files: Sequence[SourceFile], partial: Path) -> Path:
    """Move the finished files into one folder of their own, ready to be published."""
    ready = partial / "ready"
    shutil.rmtree(ready, ignore_errors=True)
    ready.mkdir()
    for file in files:
        (partial / f"{file.name}.part").replace(ready / file.name)
        (partial / f"{file.name}.note").unlink(missing_ok=True)
    return ready
