"""A ``.pdiparams`` file (Paddle's save_combine) as named numpy views, without a copy.

For each tensor, in the order of the program's sorted persistable names: u32 0, u64 number of LoD
levels (each a u64 size and that many bytes), u32 0, i32 size of a `TensorDesc` message, the
message, the raw little-endian data. No magic, no names, no checksum: what is right can only be
said together with the program. Source: ``SerializeToStream`` in Paddle's dense_tensor_serialize.cc.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from loader import protobuf
from loader.errors import LoaderError
from loader.tensor_desc import (
    TensorDesc,
    element_count,
    encode_tensor_desc,
    parse_tensor_desc,
    storage_dtype,
)
from registry.inference import Array

_MAX_DESC_BYTES = 1024
_MAX_LOD_LEVELS = 8
_MAX_TENSORS = 1_000_000


class ParamsError(LoaderError):
    """The file is not what save_combine writes, or not what the program wants.

    ``offset`` is the byte at which it went wrong; ``index`` the tensor, counted from 0.
    """

    def __init__(self, path: Path, *, index: int, offset: int, reason: str) -> None:
        super().__init__(f"{path.name}: tensor {index} at byte {offset}: {reason}")
        self.path = path
        self.index = index
        self.offset = offset
        self.reason = reason


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where one tensor lies in the file."""

    index: int
    name: str | None
    """``None`` when no program said the names."""
    dtype: str
    dims: tuple[int, ...]
    offset: int
    """Of the raw data, from the start of the file."""
    nbytes: int


class ParamsFile(Mapping[str, Array]):
    """The whole file, mapped read-only; each value is a view of it.

    bfloat16 tensors are ``uint16`` arrays of their bits. The mapping lives as long as any view
    does; the file must not be cut short meanwhile (a cached folder never is).
    """

    def __init__(self, data: protobuf.Buffer, entries: Sequence[TensorEntry]) -> None:
        self._data = data
        self.entries = tuple(entries)
        """In file order."""
        self._by_name = {entry.name: entry for entry in entries if entry.name is not None}

    @classmethod
    def open(cls, path: Path | str, names: Sequence[str]) -> ParamsFile:
        """Map the file and read it whole as these tensors, in this order.

        Raises `ParamsError`: cut anywhere, bytes left over, fewer or more tensors than names,
        anything that save_combine would not write. `OSError` when it can't be opened.
        """
        where = Path(path)
        data = _map(where)
        return cls(data, list(_scan(where, data, names)))

    def __getitem__(self, name: str) -> Array:
        return self.view(self._by_name[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._by_name)

    def __len__(self) -> int:
        return len(self._by_name)

    def view(self, entry: TensorEntry) -> Array:
        """One tensor, read-only, without a copy."""
        raw = self._data[entry.offset : entry.offset + entry.nbytes]
        return np.frombuffer(raw, dtype=storage_dtype(entry.dtype)).reshape(entry.dims)


def list_tensors(path: Path | str, names: Sequence[str] | None = None) -> list[TensorEntry]:
    """Where every tensor of the file lies, named when ``names`` (in file order) are given.

    Reads headers only: the data stays on disk. Raises as `ParamsFile.open` does.
    """
    return list(scan_tensors(path, names))


def scan_tensors(path: Path | str, names: Sequence[str] | None) -> Iterator[TensorEntry]:
    """`list_tensors`, one at a time: the error of a broken file comes after what is whole."""
    where = Path(path)
    yield from _scan(where, _map(where), names)


def write_params(path: Path | str, tensors: Mapping[str, Array]) -> None:
    """Write a file that Paddle loads, byte for byte what it would have written itself.

    The order is that of the sorted names. A ``uint16`` array is taken as the bits of a bfloat16
    tensor: Paddle has no uint16.
    """
    with Path(path).open("wb") as out:
        for name in sorted(tensors, key=str.encode):
            _write_tensor(out, tensors[name])


def _write_tensor(out: IO[bytes], tensor: Array) -> None:
    dtype = "bfloat16" if tensor.dtype == np.uint16 else tensor.dtype.newbyteorder("=").name
    desc = encode_tensor_desc(TensorDesc(dtype, tensor.shape))
    out.write(struct.pack("<IQIi", 0, 0, 0, len(desc)) + desc)
    out.write(np.ascontiguousarray(tensor, dtype=storage_dtype(dtype)).tobytes())


def _map(path: Path) -> protobuf.Buffer:
    with path.open("rb") as file:
        if file.seek(0, 2) == 0:  # mmap refuses an empty file
            return memoryview(b"")
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


def _scan(path: Path, data: protobuf.Buffer, names: Sequence[str] | None) -> Iterator[TensorEntry]:
    at = 0
    index = 0
    most = _MAX_TENSORS if names is None else len(names)
    while at < len(data):
        if index >= most:
            raise ParamsError(
                path, index=index, offset=at,
                reason=f"{len(data) - at} bytes left over after the last of {most} tensors",
            )  # fmt: skip
        name = None if names is None else names[index]
        entry = _Cursor(path, data, at, index).tensor(name)
        yield entry
        at = entry.offset + entry.nbytes
        index += 1
    if names is not None and index < len(names):
        raise ParamsError(
            path, index=index, offset=at,
            reason=f"the file ends here, {len(names) - index} of {len(names)} tensors are missing, "
            f"the first is {names[index]!r}",
        )  # fmt: skip


class _Cursor:
    """Reads one tensor's header; every step checks what is left before it takes it."""

    def __init__(self, path: Path, data: protobuf.Buffer, at: int, index: int) -> None:
        self._path = path
        self._data = data
        self._at = at
        self._index = index

    def tensor(self, name: str | None) -> TensorEntry:
        called = "" if name is None else f" of {name!r}"
        self._expect_zero("LoD version", called)
        levels = self._number("<Q", f"LoD level count{called}")
        if levels > _MAX_LOD_LEVELS:
            raise self._error(f"{levels} LoD levels{called}, a parameter has none", back=8)
        for _ in range(levels):
            size = self._number("<Q", f"LoD level size{called}")
            self._take(size, f"LoD level{called}")
        self._expect_zero("tensor version", called)
        size = self._number("<i", f"size of the tensor description{called}")
        if not 0 < size <= _MAX_DESC_BYTES:
            raise self._error(f"a tensor description{called} of {size} bytes", back=4)
        message = self._take(size, f"tensor description{called}")
        try:
            desc = parse_tensor_desc(message)
            count = element_count(desc.dims)
        except protobuf.WireError as exc:
            raise self._error(f"tensor description{called}: {exc.reason}", back=size) from exc
        nbytes = count * storage_dtype(desc.dtype).itemsize
        offset = self._at
        self._take(nbytes, f"{desc.dtype} data {list(desc.dims)}{called}")
        return TensorEntry(self._index, name, desc.dtype, desc.dims, offset, nbytes)

    def _take(self, size: int, what: str) -> protobuf.Buffer:
        left = len(self._data) - self._at
        if size > left:
            raise self._error(f"cut short: {what} needs {size} bytes, {left} left")
        taken = self._data[self._at : self._at + size]
        self._at += size
        return taken

    def _number(self, form: str, what: str) -> int:
        value: int = struct.unpack(form, self._take(struct.calcsize(form), what))[0]
        return value

    def _expect_zero(self, what: str, called: str) -> None:
        value = self._number("<I", f"{what}{called}")
        if value != 0:
            raise self._error(f"{what}{called} is {value}, want 0: no tensor starts here", back=4)

    def _error(self, reason: str, *, back: int = 0) -> ParamsError:
        return ParamsError(self._path, index=self._index, offset=self._at - back, reason=reason)
