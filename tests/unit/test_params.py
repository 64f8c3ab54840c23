"""A params file is read whole, or refused with the place at which it went wrong."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loader.params import ParamsError, ParamsFile, list_tensors, write_params
from loader.protobuf import encode_varint
from registry.inference import Array

TENSORS: dict[str, Array] = {
    "b.scalar": np.float32(3.5).reshape(()),
    "a.matrix": np.arange(6, dtype=np.float32).reshape(2, 3),
    "c.empty": np.zeros((0, 4), np.float64),
    "d.bool": np.array([True, False]),
    "e.int16": np.array([-5], np.int16),
    "f.int32": np.array([-5], np.int32),
    "g.int64": np.array([1 << 40], np.int64),
    "h.uint8": np.array([255], np.uint8),
    "i.int8": np.array([-128], np.int8),
    "j.float16": np.array([0.5], np.float16),
    "k.bfloat16": np.array([0x3FC0], np.uint16),
    "l.complex64": np.array([1 + 2j], np.complex64),
    "m.complex128": np.array([1 - 2j], np.complex128),
}
NAMES = sorted(TENSORS)


def header(*, dtype: int = 5, dims: tuple[int, ...] = (1,), lod: int = 0) -> bytes:
    desc = b"\x08" + encode_varint(dtype) + b"".join(b"\x10" + encode_varint(d) for d in dims)
    return struct.pack("<IQIi", 0, lod, 0, len(desc)) + desc


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "m.pdiparams"


def test_every_dtype_comes_back_as_it_was(path: Path) -> None:
    write_params(path, TENSORS)
    found = ParamsFile.open(path, NAMES)
    assert list(found) == NAMES
    for name, tensor in TENSORS.items():
        assert found[name].dtype == tensor.dtype
        np.testing.assert_array_equal(found[name], tensor)
    assert {entry.name: entry.dtype for entry in found.entries}["k.bfloat16"] == "bfloat16"


def test_tensors_are_views_of_the_file_and_cannot_be_written(path: Path) -> None:
    write_params(path, TENSORS)
    view = ParamsFile.open(path, NAMES)["a.matrix"]
    assert not view.flags.owndata
    assert not view.flags.writeable


def test_views_outlive_the_mapping(path: Path) -> None:
    write_params(path, TENSORS)
    view = ParamsFile.open(path, NAMES)["a.matrix"]
    path.unlink()
    assert view.sum() == 15


def test_tensors_are_listed_with_and_without_names(path: Path) -> None:
    write_params(path, TENSORS)
    data = path.read_bytes()
    unnamed, named = list_tensors(path), list_tensors(path, NAMES)
    assert [entry.name for entry in unnamed] == [None] * len(TENSORS)
    assert [entry.name for entry in named] == NAMES
    assert [entry.offset for entry in unnamed] == [entry.offset for entry in named]
    first = named[0]
    assert (first.index, first.dtype, first.dims, first.nbytes) == (0, "float32", (2, 3), 24)
    raw = data[first.offset : first.offset + first.nbytes]
    assert raw == TENSORS["a.matrix"].tobytes()


def test_a_fortran_array_and_a_big_endian_one_are_written_as_what_they_mean(path: Path) -> None:
    matrix = np.asfortranarray(np.arange(6, dtype=">f4").reshape(2, 3))
    write_params(path, {"w": matrix})
    np.testing.assert_array_equal(ParamsFile.open(path, ["w"])["w"], matrix)


BROKEN: dict[str, tuple[bytes, int, str]] = {
    "header cut": (header()[:10], 4, "cut short: LoD level count of 'w' needs 8 bytes, 6 left"),
    "description cut": (header()[:-1], 20, "tensor description of 'w' needs 4 bytes, 3 left"),
    "data cut": (header() + b"\0\0\0", 24, "float32 data [1] of 'w' needs 4 bytes, 3 left"),
    "a byte left over": (header() + b"\0" * 5, 28, "1 bytes left over after the last of 1"),
    "no tensor at all": (b"", 0, "the file ends here, 1 of 1 tensors are missing"),
    "another kind of file": (b"PK\x03\x04" + b"\0" * 60, 0, "LoD version of 'w' is 67324752"),
    "negative dims": (header(dims=(2, -3)) + b"\0" * 24, 20, "negative dims [2, -3]"),
    "dims that overflow": (header(dims=(1 << 40, 1 << 40)), 20, "overflow"),
    "more data than the file": (header(dims=(1 << 50,)), 31, "needs 4503599627370496 bytes"),
    "unknown dtype": (header(dtype=99) + b"\0" * 4, 20, "unknown data type 99"),
    "too many dims": (header(dims=(1,) * 33) + b"\0" * 4, 20, "33 dims, more than 32"),
    "absurd LoD": (header(lod=1 << 60), 4, "LoD levels of 'w', a parameter has none"),
    "LoD level beyond the end": (
        struct.pack("<IQQ", 0, 1, 1 << 62) + b"\0" * 8, 20, "LoD level of 'w' needs"),
    "description of no bytes": (struct.pack("<IQIi", 0, 0, 0, 0), 16, "of 0 bytes"),
    "description of negative size": (struct.pack("<IQIi", 0, 0, 0, -1), 16, "of -1 bytes"),
    "description too large": (
        struct.pack("<IQIi", 0, 0, 0, 1 << 30) + b"\0" * 99, 16, "of 1073741824 bytes"),
    "tensor version": (struct.pack("<IQI", 0, 0, 7), 12, "tensor version of 'w' is 7"),
    "description without a type": (
        struct.pack("<IQIi", 0, 0, 0, 2) + b"\x10\x01" + b"\0" * 4, 20, "no data type"),
    "endless varint": (
        struct.pack("<IQIi", 0, 0, 0, 11) + b"\x08" + b"\xff" * 10, 20, "does not end"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_file_is_refused_with_place_and_reason(path: Path, case: str) -> None:
    data, offset, reason = BROKEN[case]
    path.write_bytes(data)
    with pytest.raises(ParamsError) as caught:
        ParamsFile.open(path, ["w"])
    assert reason in str(caught.value)
    assert caught.value.offset == offset
    assert caught.value.index in (0, 1)


def test_lod_levels_are_read_over(path: Path) -> None:
    level = struct.pack("<Q", 16) + b"\0" * 16
    desc = header()[20:]
    data = struct.pack("<IQ", 0, 1) + level + struct.pack("<Ii", 0, len(desc)) + desc
    path.write_bytes(data + np.float32(2).tobytes())
    assert ParamsFile.open(path, ["w"])["w"][0] == 2


def test_packed_dims_are_understood(path: Path) -> None:
    desc = b"\x08\x05\x12\x02\x02\x03"
    path.write_bytes(struct.pack("<IQIi", 0, 0, 0, len(desc)) + desc + b"\0" * 24)
    assert ParamsFile.open(path, ["w"])["w"].shape == (2, 3)


def test_a_file_cut_anywhere_is_refused(path: Path) -> None:
    write_params(path, TENSORS)
    data = path.read_bytes()
    for size in range(len(data)):
        path.write_bytes(data[:size])
        with pytest.raises(ParamsError):
            ParamsFile.open(path, NAMES)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_damaged_bytes_are_read_or_refused_and_nothing_else(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("fuzz") / "m.pdiparams"
    write_params(path, TENSORS)
    damaged = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(damaged) - 1))
        damaged[at] = data.draw(st.integers(0, 255))
    path.write_bytes(damaged)
    try:
        found = ParamsFile.open(path, NAMES)
    except ParamsError:
        return
    assert sum(entry.nbytes for entry in found.entries) < len(damaged)
    for name in found:
        found[name].sum()
