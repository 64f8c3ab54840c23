from __future__ import annotations

import fcntl
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from loader.arena import ALIGN_BYTES, MIN_BYTES, WIRE_DTYPES, Arena, ArenaFull, OutOfBounds, Placed
from registry.inference import Array


@pytest.fixture
def pair():
    """A writer, and a reader over a descriptor of its own, as in another process."""
    writer = Arena.create("test", limit_bytes=64 << 20)
    reader = Arena(os.dup(writer.fd))
    yield writer, reader
    writer.close()
    reader.close()


ARRAYS = hnp.arrays(
    dtype=st.sampled_from(sorted(WIRE_DTYPES)).map(np.dtype),
    shape=hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=9),
)


@given(st.lists(ARRAYS, max_size=5))
def test_what_is_written_is_read(arrays: list[Array]):
    writer = Arena.create("test")
    reader = Arena(os.dup(writer.fd))
    try:
        places = writer.write((f"t{i}", array) for i, array in enumerate(arrays))
        reader.follow(writer.size_bytes)
        for place, array in zip(places, arrays, strict=True):
            seen = reader.view(place)
            assert seen.dtype == array.dtype
            assert seen.shape == array.shape
            assert seen.tobytes() == array.tobytes()
            assert place.offset % ALIGN_BYTES == 0
    finally:
        writer.close()
        reader.close()


def test_strided_and_big_endian_arrays_travel_by_value(pair: tuple[Arena, Arena]):
    writer, reader = pair
    square = np.arange(12, dtype=np.float32).reshape(3, 4)
    swapped = np.arange(5, dtype=">i4")
    places = writer.write([("t", square.T), ("s", square[::2, ::3]), ("b", swapped)])
    seen = [reader.view(place) for place in places]
    assert np.array_equal(seen[0], square.T)
    assert np.array_equal(seen[1], square[::2, ::3])
    assert np.array_equal(seen[2], [0, 1, 2, 3, 4])


def test_grows_on_demand_and_the_reader_follows(pair: tuple[Arena, Arena]):
    writer, reader = pair
    large = np.random.default_rng(0).random(600_000)
    (place,) = writer.write([("x", large)])
    assert writer.size_bytes >= large.nbytes > MIN_BYTES
    with pytest.raises(OutOfBounds):
        reader.view(place)
    reader.follow(writer.size_bytes)
    assert np.array_equal(reader.view(place), large)
    # every byte is there before anybody touches it
    assert os.fstat(writer.fd).st_blocks * 512 >= writer.size_bytes


def test_views_of_before_a_growth_stay_readable(pair: tuple[Arena, Arena]):
    writer, reader = pair
    (place,) = writer.write([("x", np.arange(8))])
    before = reader.view(place)
    writer.write([("x", np.zeros(1 << 20))])
    reader.follow(writer.size_bytes)
    assert before.shape == (8,)
    assert int(before.sum()) == 0  # the same memory, written anew


def test_a_limit_is_an_error_and_changes_nothing(pair: tuple[Arena, Arena]):
    writer, reader = pair
    (place,) = writer.write([("x", np.arange(8))])
    with pytest.raises(ArenaFull):
        writer.write([("x", np.zeros(65 << 20, np.uint8))])
    assert writer.size_bytes == MIN_BYTES
    assert np.array_equal(reader.view(place), np.arange(8))


def test_more_than_the_machine_has_is_an_error_not_the_oom_killer():
    arena = Arena.create("test", limit_bytes=1 << 50)
    with pytest.raises(ArenaFull):
        arena.write([("x", np.lib.stride_tricks.as_strided(np.zeros(1), (1 << 45,), (0,)))])
    arena.close()


@pytest.mark.parametrize("size", [1, MIN_BYTES - 1, MIN_BYTES + 1, 1 << 40])
def test_a_size_that_is_not_there_is_refused(pair: tuple[Arena, Arena], size: int):
    with pytest.raises(OutOfBounds):
        pair[1].follow(size)


@pytest.mark.parametrize(
    "place",
    [
        Placed("x", "float32", (1 << 20,), 0),
        Placed("x", "float32", (16,), MIN_BYTES - 32),
        Placed("x", "float32", (1,), -64),
        Placed("x", "uint8", (1 << 40, 1 << 40), 0),
    ],
)
def test_a_place_outside_is_refused(pair: tuple[Arena, Arena], place: Placed):
    with pytest.raises(OutOfBounds):
        pair[1].view(place)


def test_neither_side_can_cut_it_under_the_other(pair: tuple[Arena, Arena]):
    for arena in pair:
        with pytest.raises(PermissionError):
            os.ftruncate(arena.fd, 0)
    with pytest.raises(PermissionError):  # nor take the seal off or add others
        fcntl.fcntl(pair[0].fd, 1033, 0x8)


def test_objects_do_not_travel(pair: tuple[Arena, Arena]):
    with pytest.raises(TypeError):
        pair[0].write([("x", np.array([object()]))])


def test_nothing_is_left_after_close():
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(20):
        arena = Arena.create("test")
        arena.write([("x", np.zeros(1 << 20))])
        arena.close()
        arena.close()
    assert len(list(Path("/proc/self/fd").iterdir())) == before
