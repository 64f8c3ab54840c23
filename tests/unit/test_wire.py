from __future__ import annotations

import contextlib
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loader import wire
from loader.arena import Placed
from loader.recipe import Recipe
from loader.wire import Failure, Nonsense
from registry.inference import Signature, TensorSpec
from registry.names import ModelName, Version

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False)
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=12,
)  # fmt: skip
FIELDS = st.sampled_from(
    ["id", "ok", "failure", "outputs", "run_s", "arena_bytes", "signature", "inputs", "device",
     "load_s", "rss_bytes", "warm_s", "runs"]
)  # fmt: skip
PARSERS = [wire.parse_run_done, wire.parse_checked, wire.parse_loaded, wire.parse_warmed]


@given(st.binary(max_size=200))
def test_any_bytes_are_a_reply_or_nonsense(data: bytes):
    with contextlib.suppress(Nonsense):
        wire.parse_reply(data)


@given(st.dictionaries(FIELDS, JSON), st.sampled_from(PARSERS))
def test_any_json_is_a_value_or_nonsense(body: dict[str, Any], parse: Any):
    with contextlib.suppress(Nonsense):
        wire.parse_reply(orjson.dumps({"id": 1, **body}))
    with contextlib.suppress(Nonsense):
        parse(body)


@pytest.mark.parametrize(
    "data",
    {
        "empty": b"",
        "not json": b"\x80\x04pickle",
        "not an object": b"[1]",
        "no id": b'{"ok":{}}',
        "negative id": b'{"id":-1,"ok":{}}',
        "a bool for an id": b'{"id":true,"ok":{}}',
        "neither ok nor failure": b'{"id":1}',
        "short failure": b'{"id":1,"failure":["fault","700","sticky"]}',
        "failure of numbers": b'{"id":1,"failure":[1,2,3,4]}',
    }.values(),
)
def test_nonsense_replies(data: bytes):
    with pytest.raises(Nonsense):
        wire.parse_reply(data)


@pytest.mark.parametrize(
    "tensor",
    [
        ["y", "float32", [2, 3], 7],
        ["y", "float32", [2, 3], -64],
        ["y", "float32", [2, 3], 0.0],
        ["y", "float32", [2, -3], 0],
        ["y", "float32", [2, True], 0],
        ["y", "float32", [1] * 40, 0],
        ["y", "object", [2], 0],
        ["y", ["float32"], [2], 0],
        [None, "float32", [2], 0],
        ["y", "float32", 0],
        "y",
    ],
)
def test_nonsense_tensors(tensor: Any):
    with pytest.raises(Nonsense):
        wire.parse_run_done({"outputs": [tensor], "run_s": 0.1, "arena_bytes": 4096})


def test_a_failure_crosses_with_its_fields_and_a_bounded_text():
    failure = Failure("fault", "700", "sticky", "x" * 100_000)
    reply = wire.parse_reply(wire.failure_message(7, failure))
    assert reply.id == 7
    assert reply.failure is not None
    assert (reply.failure.code, reply.failure.fault_class) == ("700", "sticky")
    assert len(reply.failure.message) == wire.TEXT_MAX_CHARS


def test_a_signature_crosses_unchanged():
    signature = Signature(
        (TensorSpec("x", "float32", (-1, 3)), TensorSpec("n", "int64", ())),
        (TensorSpec("y", "bfloat16", (-1,)),),
    )
    data = wire.packed({"signature": wire.signature_json(signature)})
    assert wire.parse_checked(wire.unpacked(data)) == signature


def test_places_cross_unchanged():
    places = (Placed("x", "uint16", (2, 0), 0), Placed("n", "bool", (), 64))
    body = {"outputs": wire.placed_json(places), "run_s": 0.5, "arena_bytes": 65536}
    assert wire.parse_run_done(wire.unpacked(wire.packed(body))).outputs == places


def test_a_recipe_crosses_unchanged():
    recipe = Recipe(
        ModelName("m"), Version("1"), "/models/m", sha256={"a": "b"}, threads=2,
        options={"onednn": False}, warmup_shapes={"x": (1, 3)}, golden="g.npz",
    )  # fmt: skip
    assert wire.parse_recipe(wire.unpacked(wire.packed(wire.recipe_json(recipe)))) == recipe


def test_a_message_larger_than_a_packet_is_refused_by_its_sender():
    with pytest.raises(Nonsense):
        wire.packed({"x": "y" * wire.MESSAGE_MAX_BYTES})


@given(st.lists(st.integers(0, 90_000), min_size=1, max_size=12))
def test_joined_messages_come_apart_in_order_and_no_packet_is_too_large(sizes: list[int]):
    messages = [wire.packed({"id": n, "pad": "x" * size}) for n, size in enumerate(sizes)]
    packets = wire.joined(messages)
    assert all(len(packet) <= wire.MESSAGE_MAX_BYTES for packet in packets)
    apart = [message for packet in packets for message in wire.messages_of(packet)]
    assert [(m["id"], len(m["pad"])) for m in apart] == list(enumerate(sizes))


def test_small_messages_share_a_packet_and_the_largest_goes_alone():
    small = wire.packed({"id": 1})
    largest = wire.packed(
        {"id": 2, "pad": "x" * (wire.MESSAGE_MAX_BYTES - len('{"id":2,"pad":""}'))}
    )
    assert len(largest) == wire.MESSAGE_MAX_BYTES
    assert wire.joined([small] * 5) == [b"[" + b",".join([small] * 5) + b"]"]
    assert wire.joined([small, largest, small]) == [small, largest, small]
