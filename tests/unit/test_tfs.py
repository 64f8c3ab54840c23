"""TensorFlow Serving's predict and the short form."""

from __future__ import annotations

import base64
import json
from typing import Any

import numpy as np
import pytest

from registry.inference import BadInput, Signature, TensorSpec
from registry.names import ModelName, Version
from router.protocols.exchange import Answer, Exchange
from router.protocols.short import parse_short
from router.protocols.tf_serving import parse_predict
from router.repository import repository_index, version_status

ONE = Signature((TensorSpec("x", "float32", (-1, 2)),), (TensorSpec("y", "float32", (-1, 2)),))
TWO = Signature(
    (TensorSpec("x", "float32", (-1, 2)), TensorSpec("n", "int64", (-1,))),
    (TensorSpec("y", "float32", (-1, 2)), TensorSpec("z", "int64", (-1,))),
)
TEXT = Signature((TensorSpec("t", "bytes", (-1,)),), (TensorSpec("t_bytes", "bytes", (-1,)),))


def predict(document: Any, signature: Signature) -> Exchange:
    return parse_predict(json.dumps(document).encode(), None, signature)


def short(document: Any, signature: Signature) -> Exchange:
    return parse_short(json.dumps(document).encode(), None, signature)


def shown(exchange: Exchange, signature: Signature, **outputs: Any) -> Any:
    rendered = exchange.render(Answer(ModelName("m"), Version("1"), signature, outputs))
    return json.loads(rendered.body)


Y = np.array([[1, 2], [3, 4]], np.float32)
Z = np.array([5, 6])


def test_rows_of_one_input() -> None:
    for instances in ([[1, 2], [3, 4]], [{"x": [1, 2]}, {"x": [3, 4]}]):
        exchange = predict({"instances": instances}, ONE)
        assert exchange.feeds["x"].tolist() == Y.tolist()
        assert shown(exchange, ONE, y=Y) == {"predictions": Y.tolist()}


def test_rows_of_several_inputs() -> None:
    exchange = predict(
        {"signature_name": "serving_default",
         "instances": [{"x": [1, 2], "n": 5}, {"n": 6, "x": [3, 4]}]}, TWO,
    )  # fmt: skip
    assert exchange.feeds["n"].tolist() == [5, 6]
    assert shown(exchange, TWO, y=Y, z=Z) == {
        "predictions": [{"y": [1, 2], "z": 5}, {"y": [3, 4], "z": 6}]
    }


def test_columns() -> None:
    exchange = predict({"inputs": {"x": Y.tolist(), "n": [5, 6]}}, TWO)
    assert shown(exchange, TWO, y=Y, z=Z) == {"outputs": {"y": Y.tolist(), "z": [5, 6]}}
    exchange = predict({"inputs": Y.tolist()}, ONE)
    assert shown(exchange, ONE, y=Y) == {"outputs": Y.tolist()}


def test_bytes_travel_as_b64() -> None:
    packed = {"b64": base64.b64encode(b"\xff\x00").decode()}
    exchange = predict({"instances": [packed, "plain"]}, TEXT)
    assert exchange.feeds["t"].tolist() == [b"\xff\x00", b"plain"]
    assert shown(exchange, TEXT, t_bytes=exchange.feeds["t"])["predictions"][0] == packed
    assert predict({"inputs": [packed]}, TEXT).feeds["t"].tolist() == [b"\xff\x00"]


BAD: dict[str, tuple[Any, Signature, str]] = {
    "a list": ([], ONE, "JSON object"),
    "nothing": ({}, ONE, "exactly one"),
    "both": ({"instances": [[1, 2]], "inputs": [[1, 2]]}, ONE, "exactly one"),
    "another signature": ({"signature_name": "other", "inputs": [[1, 2]]}, ONE, "serving_default"),
    "no instances": ({"instances": []}, ONE, "at least one"),
    "instances that are an object": ({"instances": {}}, ONE, "at least one"),
    "instances that differ": ({"instances": [{"x": [1, 2], "n": 1}, {"x": [1, 2]}]}, TWO, "same"),
    "an unknown input": ({"inputs": {"x": [[1, 2]], "q": 1}}, ONE, "unknown: q"),
    "a missing input": ({"inputs": {"x": [[1, 2]]}}, TWO, "missing: n"),
    "a bare value for two inputs": ({"inputs": [[1, 2]]}, TWO, "an object with"),
    "bare rows for two inputs": ({"instances": [[1, 2]]}, TWO, "an object with"),
    "a float for an integer": ({"inputs": {"x": [[1, 2]], "n": [1.5]}}, TWO, "a float"),
    "another rank": ({"inputs": [1, 2]}, ONE, "dimensions"),
    "a row too short": ({"instances": [[1, 2], [3]]}, ONE, "not nested"),
    "b64 that is none": ({"inputs": [{"b64": "?"}]}, TEXT, "b64"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_refused(case: str) -> None:
    document, signature, why = BAD[case]
    with pytest.raises(BadInput, match=why):
        predict(document, signature)


def test_an_output_without_rows_cannot_answer_rows() -> None:
    exchange = predict({"instances": [[1, 2], [3, 4]]}, ONE)
    with pytest.raises(BadInput, match="column form"):
        shown(exchange, ONE, y=Y[:1])


def test_the_short_form() -> None:
    for document in ({"inputs": {"x": Y.tolist()}}, {"inputs": Y.tolist()}, Y.tolist()):
        exchange = short(document, ONE)
        assert exchange.feeds["x"].tolist() == Y.tolist()
        assert shown(exchange, ONE, y=Y) == {
            "model": "m", "version": "1", "outputs": {"y": Y.tolist()},
        }  # fmt: skip
    for bad, why in (({}, "want inputs"), ({"inputs": 5}, "want an object"), (5, "want an object")):
        with pytest.raises(BadInput, match=why):
            short(bad, ONE)


def listed(version: str, state: str, reason: str | None = None) -> dict[str, Any]:
    return {"model": "m", "version": version, "state": state, "reason": reason}


def test_states_in_other_servers_words() -> None:
    servables = [
        listed("1", "LIVE"), listed("2", "WARMING"), listed("3", "FAILED", "digest: differs"),
        listed("4", "DRAINING"), listed("1", "LOADING"),
    ]  # fmt: skip
    assert repository_index(servables) == [
        {"name": "m", "version": "1", "state": "READY", "reason": ""},
        {"name": "m", "version": "2", "state": "LOADING", "reason": "WARMING"},
        {"name": "m", "version": "3", "state": "UNAVAILABLE", "reason": "digest: differs"},
        {"name": "m", "version": "4", "state": "UNLOADING", "reason": "DRAINING"},
    ]
    assert [e["version"] for e in repository_index(servables, ready_only=True)] == ["1"]
    assert [entry["state"] for entry in version_status(servables)] == [
        "AVAILABLE", "LOADING", "END", "UNLOADING", "LOADING",
    ]  # fmt: skip
    assert version_status(servables)[2]["status"] == {
        "error_code": "ABORTED", "error_message": "digest: differs",
    }  # fmt: skip
