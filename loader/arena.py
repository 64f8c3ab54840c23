"""Shared memory for tensors: anonymous, growable, mapped by the front and by one worker.

Each slot of a worker has two arenas, one written by the front and one written by the worker.
The writer grows its arena and says so in its next message; the reader then maps it anew.
"""

from __future__ import annotations

import fcntl
import mmap
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np

from loader.errors import LoaderError
from registry.inference import Array

ALIGN_BYTES = 64
"""A cache line, and what vector loads want."""

MIN_BYTES = 64 * 1024
LIMIT_BYTES = 512 * 1024 * 1024

WIRE_DTYPES = frozenset(
    {"bool", "uint8", "uint16", "int8", "int16", "int32", "int64", "float16", "float32", "float64"}
)
"""numpy names of what may lie in an arena; bfloat16 travels as uint16."""

# The fcntl module of Python 3.11 has the names on Linux only; pyright wants plain numbers.
_F_ADD_SEALS, _F_SEAL_SEAL, _F_SEAL_SHRINK = 1033, 0x1, 0x2


class ArenaFull(LoaderError):
    """Tensors that do not fit under the arena's limit, or not into this machine's memory."""


class OutOfBounds(LoaderError):
    """The other side spoke of bytes that its arena does not have."""


@dataclass(frozen=True, slots=True)
class Placed:
    """Where one tensor lies in an arena. C order, native byte order."""

    name: str
    dtype: str
    """One of `WIRE_DTYPES`."""
    shape: tuple[int, ...]
    offset: int
    """In bytes from the arena's start; a multiple of `ALIGN_BYTES`."""


class Arena:
    """One memfd, mapped here.

    It only grows: F_SEAL_SHRINK makes sure that neither side, however broken, can cut it and
    turn the other's next read into SIGBUS. Every byte is allocated before it is mapped, for the
    same reason.
    """

    def __init__(self, fd: int, *, limit_bytes: int = LIMIT_BYTES) -> None:
        self.fd = fd
        self.limit_bytes = limit_bytes
        self._map = _mapped(fd, os.fstat(fd).st_size)

    @classmethod
    def create(cls, name: str, *, limit_bytes: int = LIMIT_BYTES) -> Self:
        fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.posix_fallocate(fd, 0, MIN_BYTES)
            fcntl.fcntl(fd, _F_ADD_SEALS, _F_SEAL_SHRINK | _F_SEAL_SEAL)
            return cls(fd, limit_bytes=limit_bytes)
        except BaseException:
            os.close(fd)
            raise

    @property
    def size_bytes(self) -> int:
        return len(self._map)

    def write(self, tensors: Iterable[tuple[str, Array]]) -> list[Placed]:
        """Copy the tensors in, growing first where needed; what lay here before is gone.

        Raises `ArenaFull` with nothing written, `TypeError` for a dtype not in `WIRE_DTYPES`.
        """
        pending: list[tuple[Placed, Array]] = []
        end = 0
        for name, array in tensors:
            dtype = array.dtype.name
            if dtype not in WIRE_DTYPES:
                raise TypeError(f"{name}: dtype {dtype} cannot travel")
            pending.append((Placed(name, dtype, array.shape, end), array))
            end += -(-array.nbytes // ALIGN_BYTES) * ALIGN_BYTES
        if end > len(self._map):
            self._grow(end)
        for place, array in pending:
            view: Array = np.ndarray(
                array.shape, array.dtype.newbyteorder("="), buffer=self._map, offset=place.offset
            )
            np.copyto(view, array)
        return [place for place, _ in pending]

    def view(self, place: Placed) -> Array:
        """The tensor where it lies: valid until the writer's next `write`.

        Raises `OutOfBounds` when it is not wholly inside the arena.
        """
        dtype = np.dtype(place.dtype)
        nbytes = dtype.itemsize
        for dim in place.shape:
            nbytes *= dim
        if place.offset < 0 or nbytes < 0 or place.offset + nbytes > len(self._map):
            raise OutOfBounds(f"{place} in an arena of {len(self._map)} bytes")
        return np.ndarray(place.shape, dtype, buffer=self._map, offset=place.offset)

    def follow(self, size_bytes: int) -> None:
        """Map anew after the writer said that its arena has ``size_bytes`` now.

        Raises `OutOfBounds` when it lied: reading past the end would be SIGBUS.
        """
        if size_bytes == len(self._map):
            return
        if not len(self._map) < size_bytes <= os.fstat(self.fd).st_size:
            raise OutOfBounds(f"{size_bytes} bytes announced, {os.fstat(self.fd).st_size} there")
        self._map = _mapped(self.fd, size_bytes)

    def close(self) -> None:
        """Close the descriptor; the memory goes with the last view of it."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
            self._map = mmap.mmap(-1, mmap.PAGESIZE)

    def _grow(self, wanted_bytes: int) -> None:
        if wanted_bytes > self.limit_bytes:
            raise ArenaFull(f"{wanted_bytes} bytes of tensors, limit {self.limit_bytes}")
        old_bytes = len(self._map)
        new_bytes = min(_rounded(wanted_bytes), self.limit_bytes)
        # fallocate on a memfd does not answer ENOSPC when memory runs short: the OOM killer does.
        available_bytes = _available_bytes()
        if new_bytes - old_bytes > available_bytes:
            raise ArenaFull(f"{new_bytes - old_bytes} bytes more, {available_bytes} available")
        try:
            os.posix_fallocate(self.fd, old_bytes, new_bytes - old_bytes)
        except OSError as exc:
            raise ArenaFull(f"{new_bytes} bytes: {exc.strerror}") from exc
        self._map = _mapped(self.fd, new_bytes)


@dataclass(frozen=True, slots=True)
class Slot:
    """Room for one request: what the front writes and what the worker writes."""

    input: Arena
    output: Arena

    @classmethod
    def create(cls, name: str, *, limit_bytes: int = LIMIT_BYTES) -> Self:
        first = Arena.create(f"{name}-in", limit_bytes=limit_bytes)
        try:
            return cls(first, Arena.create(f"{name}-out", limit_bytes=limit_bytes))
        except BaseException:
            first.close()
            raise

    @classmethod
    def attach(cls, fds: Sequence[int], *, limit_bytes: int = LIMIT_BYTES) -> tuple[Self, ...]:
        """Slots over the descriptors that `fds` of the other side listed."""
        arenas = [Arena(fd, limit_bytes=limit_bytes) for fd in fds]
        return tuple(cls(*pair) for pair in zip(arenas[::2], arenas[1::2], strict=True))

    @property
    def fds(self) -> tuple[int, int]:
        return self.input.fd, self.output.fd

    def close(self) -> None:
        self.input.close()
        self.output.close()


def _mapped(fd: int, size_bytes: int) -> mmap.mmap:
    # Populated at once: faulting page by page would be paid by a request.
    return mmap.mmap(fd, size_bytes, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)


def _rounded(size_bytes: int) -> int:
    """Up to the next quarter of a power of two: few growths, at most a fifth wasted."""
    step = max(MIN_BYTES, 1 << max(0, (size_bytes - 1).bit_length() - 3))
    return -(-size_bytes // step) * step


def _available_bytes() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return LIMIT_BYTES
