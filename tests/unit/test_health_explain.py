"""Probes and explanations as they are shown."""

from __future__ import annotations

from dataclasses import replace

import pytest

from registry.names import Digest, ModelName, Revision, ServableId, Version
from registry.spec import HeaderRule, PercentRule, UserRule
from router import health
from router.errors import UnknownModel, UnknownVersion
from router.explain import explain
from router.ports import Check, Health
from router.rules import compile_rules, user_bucket
from router.table import Route, RouteTable

M = ModelName("m")
LIVE = ServableId(M, Version("1"), Digest("sha256:" + "1" * 64))
NEXT = ServableId(M, Version("2"), Digest("sha256:" + "2" * 64))
TABLE = RouteTable().with_route(
    Route(
        M,
        live=LIVE,
        canary=NEXT,
        rules=compile_rules(
            M,
            [
                PercentRule(percent=2),
                UserRule(header="X-User-Id", percent=50),
                HeaderRule(name="X-Canary", present=True),
            ],
        ),
        revision=Revision(41),
        pinned={LIVE.version: LIVE, NEXT.version: NEXT},
    )
)


def node(*, ready: bool = True, live: bool = True, started: bool = True) -> Health:
    return Health(ready, started, live, (Check("models", ready, "" if ready else "ocr: FAILED"),))


def test_every_probe_is_200_or_503() -> None:
    assert health.live(node()) == (200, {"live": True})
    assert health.live(node(live=False)) == (503, {"live": False})
    assert health.ready(node()) == (200, {"ready": True, "live": True})
    assert health.ready(node(ready=False))[0] == 503
    assert health.started(node()) == (200, {"started": True})
    assert health.started(node(started=False)) == (503, {"started": False})


def test_ready_lists_its_checks_when_asked() -> None:
    status, body = health.ready(node(ready=False), verbose=True)
    assert status == 503
    assert body["checks"] == [{"name": "models", "ok": False, "detail": "ocr: FAILED"}]


def test_explain_shows_the_rule_the_bucket_and_the_share() -> None:
    assert explain(TABLE, "m", {"x-canary": ""}) == {
        "model": "m",
        "version": "2",
        "route": "canary",
        "rule": {"kind": "header", "index": 2, "detail": "X-Canary is present"},
        "config_revision": 41,
        "bucket": None,
        "canary_percent": 100.0,
        "digest": NEXT.digest,
        "reason": None,
        "unavailable": {},
    }
    user = next(f"u{n}" for n in range(99) if user_bucket("m", f"u{n}") >= 5000)
    shown = explain(TABLE, "m", {"x-user-id": user})
    assert (shown["route"], shown["rule"], shown["bucket"]) == (
        "stable", None, user_bucket("m", user),
    )  # fmt: skip


def test_explain_throws_no_dice_but_tells_the_odds() -> None:
    shown = [explain(TABLE, "m", {}) for _ in range(200)]
    assert {entry["route"] for entry in shown} == {"stable"}
    assert shown[0]["canary_percent"] == 2.0


def test_explain_tells_of_a_quarantine() -> None:
    why = "QUARANTINED: code 700"
    route = replace(
        TABLE.route("m"), reason="quarantined: code 700", unavailable={Version("3"): why}
    )
    shown = explain(TABLE.with_route(route), "m", {})
    assert shown["reason"] == "quarantined: code 700"
    assert shown["unavailable"] == {"3": why}


def test_explain_follows_a_pin() -> None:
    shown = explain(TABLE, "m", {"x-model-version": "2"})
    assert (shown["version"], shown["route"], shown["canary_percent"]) == ("2", "pinned", 0.0)
    with pytest.raises(UnknownVersion):
        explain(TABLE, "m", {}, version="9")
    with pytest.raises(UnknownModel):
        explain(TABLE, "other", {})
