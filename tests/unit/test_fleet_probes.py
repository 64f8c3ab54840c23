"""What probes say of a node."""

from __future__ import annotations

import orjson
import pytest

from registry.names import ModelName
from router.fleet.probes import UNKNOWN, Vitals, after_refusal, after_timeout, read_probe

M, OTHER = ModelName("m"), ModelName("other")


def body(**checks: bool) -> bytes:
    listed = [{"name": n.replace("__", ":"), "ok": ok, "detail": ""} for n, ok in checks.items()]
    return orjson.dumps({"ready": False, "checks": listed})


CASES: dict[str, tuple[int, bytes, tuple[bool, bool, bool]]] = {
    # status, body -> answers, serves m, serves another model
    "ready": (200, b"", (True, True, True)),
    "one model fails": (503, body(draining=True, model__m=False), (True, False, True)),
    "draining": (503, body(draining=False, model__m=True), (True, False, False)),
    "draining, and a model": (503, body(draining=False, model__m=False), (True, False, False)),
    "no documents yet": (503, body(draining=True, configs_known=False), (True, False, False)),
    "a device too": (503, body(model__m=False, device__cpu=False), (True, False, True)),
    "unready without a reason": (503, body(draining=True), (True, False, False)),
    "no JSON": (503, b"<html>", (True, False, False)),
    "other JSON": (503, b"[1]", (True, False, False)),
    "checks that are none": (503, b'{"checks": [{"name": 1}]}', (True, False, False)),
    "another server": (404, b"not found", (True, False, False)),
}


@pytest.mark.parametrize(("status", "answer", "wanted"), CASES.values(), ids=CASES)
def test_one_answer(status: int, answer: bytes, wanted: tuple[bool, bool, bool]) -> None:
    seen = read_probe(status, answer)
    assert (seen.answers, seen.serves_model(M), seen.serves_model(OTHER)) == wanted


def test_late_once_is_nothing_twice_is_silence() -> None:
    once = after_timeout(UNKNOWN)
    assert once.answers
    assert once.serves_model(M)
    twice = after_timeout(once)
    assert not twice.answers
    assert not twice.serves_model(M)
    assert not after_timeout(twice).answers


def test_late_once_keeps_what_was_known() -> None:
    failing = Vitals(answers=True, serves=True, failing=frozenset({M}))
    assert after_timeout(failing).failing == {M}


def test_a_refused_connection_is_silence_at_once() -> None:
    assert not after_refusal(UNKNOWN).answers
