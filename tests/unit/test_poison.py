"""Digests of inputs, and the set of those refused for a while."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from loader.poison import PoisonSet, input_digest

X = np.arange(12, dtype=np.float32)

OTHERS: dict[str, dict[str, Any]] = {
    "another name": {"y": X.reshape(3, 4)},
    "another shape": {"x": X.reshape(4, 3)},
    "another rank": {"x": X},
    "another dtype, same bytes": {"x": X.view(np.int32).reshape(3, 4)},
    "another value": {"x": (X + (X == 11)).reshape(3, 4)},
    "one input more": {"x": X.reshape(3, 4), "z": np.zeros((0,), np.float32)},
    "nothing": {},
}


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
def test_digest_tells_apart(other: dict[str, Any]) -> None:
    assert input_digest({"x": X.reshape(3, 4)}) != input_digest(other)


def test_digest_of_the_same_values_is_the_same() -> None:
    wide = np.zeros((3, 8), np.float32)
    wide[:, ::2] = X.reshape(3, 4)
    a, b = np.ones(2, np.int64), np.float32(3)
    same = [
        {"x": X.reshape(3, 4), "b": b, "a": a},
        {"a": a.copy(), "x": wide[:, ::2], "b": np.array(3, np.float32)},
        {"b": b, "a": a, "x": np.asfortranarray(X.reshape(3, 4))},
    ]
    assert len({input_digest(feeds) for feeds in same}) == 1


def test_joined_fields_do_not_collide() -> None:
    a = {"x": np.frombuffer(b"ab", np.uint8), "y": np.frombuffer(b"c", np.uint8)}
    b = {"x": np.frombuffer(b"a", np.uint8), "y": np.frombuffer(b"bc", np.uint8)}
    assert input_digest(a) != input_digest(b)


def test_refused_until_it_expires() -> None:
    poison = PoisonSet()
    assert not poison
    poison.refuse("a", now_s=100.0, for_s=600.0)
    assert poison
    assert poison.remaining_s("a", 100.0) == 600.0
    assert poison.remaining_s("b", 100.0) == 0.0
    assert poison.remaining_s("a", 699.0) == 1.0
    assert poison.remaining_s("a", 700.0) == 0.0
    assert not poison


def test_refused_again_starts_over_and_can_be_lifted() -> None:
    poison = PoisonSet()
    poison.refuse("a", now_s=0.0, for_s=10.0)
    poison.refuse("a", now_s=5.0, for_s=10.0)
    assert poison.remaining_s("a", 12.0) == 3.0
    assert poison.lift("a")
    assert not poison.lift("a")
    poison.refuse("a", now_s=0.0, for_s=0.0)
    assert len(poison) == 0


def test_bounded_the_oldest_makes_room_after_what_expired() -> None:
    poison = PoisonSet(size_max=3)
    poison.refuse("long", now_s=0.0, for_s=100.0)
    poison.refuse("short", now_s=1.0, for_s=1.0)
    poison.refuse("b", now_s=2.0, for_s=100.0)
    poison.refuse("c", now_s=3.0, for_s=100.0)
    assert [poison.remaining_s(d, 3.0) > 0 for d in ("long", "short", "b", "c")] == [
        True, False, True, True,
    ]  # fmt: skip
    poison.refuse("d", now_s=4.0, for_s=100.0)
    assert poison.remaining_s("long", 4.0) == 0.0
    assert len(poison) == 3
    assert poison.expire(1000.0) == 3
    poison.refuse("e", now_s=4.0, for_s=100.0)
    poison.clear()
    assert not poison
