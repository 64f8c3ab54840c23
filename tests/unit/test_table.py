"""The routing table: where each request goes."""

from __future__ import annotations

import json

import pytest

from registry.names import Digest, ModelName, Revision, ServableId, Version
from registry.spec import HeaderRule
from router.errors import NothingServes, UnknownModel, UnknownVersion
from router.rules import compile_rules
from router.table import RequestFacts, Route, RouteTable

M = ModelName("m")


def servable(version: str) -> ServableId:
    return ServableId(M, Version(version), Digest("sha256:" + version * 8))


V1, V2, V3 = servable("1"), servable("2"), servable("3")
FULL = Route(
    M,
    live=V2,
    standby=V1,
    canary=V3,
    rules=compile_rules(M, [HeaderRule(name="X-Canary", equals="1")]),
    revision=Revision(9),
    pinned={v.version: v for v in (V1, V2, V3)},
    unavailable={Version("4"): "FAILED: digest: params differ"},
)
CANARY = {"x-canary": "1"}

CASES: dict[str, tuple[Route, RequestFacts, tuple[ServableId, str] | type[Exception]]] = {
    "live": (FULL, RequestFacts("m"), (V2, "stable")),
    "canary by rule": (FULL, RequestFacts("m", headers=CANARY), (V3, "canary")),
    "pinned": (FULL, RequestFacts("m", "1"), (V1, "pinned")),
    "pinned to live says so too": (FULL, RequestFacts("m", "2"), (V2, "pinned")),
    "a pin wins over the rules": (FULL, RequestFacts("m", "1", headers=CANARY), (V1, "pinned")),
    "a version not here": (FULL, RequestFacts("m", "9"), UnknownVersion),
    "a version that failed": (FULL, RequestFacts("m", "4"), UnknownVersion),
    "label stable ignores the rules": (
        FULL, RequestFacts("m", label="stable", headers=CANARY), (V2, "stable")),
    "label canary": (FULL, RequestFacts("m", label="canary"), (V3, "canary")),
    "another label": (FULL, RequestFacts("m", label="beta"), UnknownVersion),
    "label canary without one": (
        Route(M, live=V2), RequestFacts("m", label="canary"), UnknownVersion),
    "a canary that is not loaded takes nobody": (
        Route(M, live=V2, rules=FULL.rules), RequestFacts("m", headers=CANARY), (V2, "stable")),
    "standby where there is no live": (
        Route(M, live=None, standby=V1), RequestFacts("m"), (V1, "standby")),
    "canary without rules takes nobody": (
        Route(M, live=V2, canary=V3), RequestFacts("m", chance=0.0), (V2, "stable")),
    "nothing loaded": (Route(M, live=None), RequestFacts("m"), NothingServes),
    "nothing loaded, by label": (
        Route(M, live=None), RequestFacts("m", label="stable"), NothingServes),
    "another model": (FULL, RequestFacts("other"), UnknownModel),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_pick(case: str) -> None:
    route, request, wanted = CASES[case]
    table = RouteTable().with_route(route)
    if isinstance(wanted, type):
        with pytest.raises(wanted):
            table.pick(request)
    else:
        choice = table.pick(request)
        assert (choice.servable, choice.kind) == wanted


def test_an_unknown_version_lists_the_loaded_ones_and_says_why() -> None:
    with pytest.raises(UnknownVersion) as caught:
        RouteTable().with_route(FULL).pick(RequestFacts("m", "4"))
    assert caught.value.loaded == ("1", "2", "3")
    assert caught.value.reason == "FAILED: digest: params differ"
    assert "1, 2, 3" in str(caught.value)


def test_versions_are_listed_in_their_own_order() -> None:
    versions = ("10", "2", "1.4.0", "1.4.0-canary.2", "v1", "1.10.0", "20240521")
    route = Route(M, live=V1, pinned={Version(version): V1 for version in versions})
    wanted = ("1.4.0", "1.4.0-canary.2", "1.10.0", "2", "10", "20240521", "v1")
    assert route.loaded == wanted


def test_tables_are_values() -> None:
    before = RouteTable().with_route(FULL)
    after = before.with_route(Route(M, live=V1, revision=Revision(12)))
    gone = after.without(M)
    assert before.pick(RequestFacts("m")).servable == V2
    assert after.pick(RequestFacts("m")).servable == V1
    assert (before.revision, after.revision, gone.revision) == (9, 12, 12)
    with pytest.raises(UnknownModel):
        gone.pick(RequestFacts("m"))


def test_the_table_renders_to_plain_values() -> None:
    shown = json.loads(json.dumps(RouteTable().with_route(FULL).as_dict()))
    model = shown["models"]["m"]
    assert shown["revision"] == 9
    assert (model["live"], model["standby"], model["config_revision"]) == ("2", "1", 9)
    assert model["canary"]["version"] == "3"
    assert model["canary"]["rules"] == [{"header": {"name": "X-Canary", "equals": "1"}}]


def test_a_model_is_unknown_only_once_all_are_known() -> None:
    with pytest.raises(NothingServes, match="not read yet"):
        RouteTable(is_complete=False).pick(RequestFacts("m"))
    with pytest.raises(UnknownModel):
        RouteTable().pick(RequestFacts("m"))
