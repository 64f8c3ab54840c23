"""Canary rules: which one takes a request."""

from __future__ import annotations

from typing import Any

import pytest

from registry.names import ModelName
from registry.spec import HeaderRule, PercentRule, RegionRule, Rule, UserRule
from router.rules import Verdict, compile_rules, user_bucket

MODEL = ModelName("ocr")
IN_5 = next(f"u{n}" for n in range(10_000) if user_bucket(MODEL, f"u{n}") < 500)
OUT_5 = next(f"u{n}" for n in range(10_000) if user_bucket(MODEL, f"u{n}") >= 5000)

HEADER = HeaderRule(name="X-Canary", equals="1")
PREFIX = HeaderRule(name="X-Agent", prefix="test/")
PRESENT = HeaderRule(name="X-Beta", present=True)
USER = UserRule(header="X-User-Id", percent=5)
CLAIM = UserRule(claim="sub", percent=5)
REGION = RegionRule(header="X-Region", regions=("cn-sh", "us-west"))
REGION_10 = RegionRule(header="X-Region", regions=("cn-sh",), percent=10)
PERCENT = PercentRule(percent=2)


def decide(
    rules: list[Rule],
    headers: dict[str, str] | None = None,
    *,
    claims: dict[str, Any] | None = None,
    chance: float = 0.999,
) -> Verdict:
    return compile_rules(MODEL, rules).decide(headers or {}, claims, chance)


CASES: dict[str, tuple[list[Rule], dict[str, str], float, tuple[str, int] | None]] = {
    "no rules, nobody": ([], {"x-canary": "1"}, 0.0, None),
    "a header that equals": ([HEADER], {"x-canary": "1"}, 0.9, ("header", 0)),
    "a header with another value": ([HEADER], {"x-canary": "0"}, 0.0, None),
    "a value is compared whole": ([HEADER], {"x-canary": "11"}, 0.0, None),
    "a header that is absent": ([HEADER], {}, 0.0, None),
    "a prefix": ([PREFIX], {"x-agent": "test/1"}, 0.9, ("header", 0)),
    "not the prefix": ([PREFIX], {"x-agent": "best/1"}, 0.0, None),
    "present, even when empty": ([PRESENT], {"x-beta": ""}, 0.9, ("header", 0)),
    "a user in the share": ([USER], {"x-user-id": IN_5}, 0.9, ("user", 0)),
    "a user outside it": ([USER], {"x-user-id": OUT_5}, 0.0, None),
    "no user, no match": ([USER], {}, 0.0, None),
    "an empty user is no user": ([USER], {"x-user-id": ""}, 0.0, None),
    "a whole region": ([REGION], {"x-region": "us-west"}, 0.999, ("region", 0)),
    "another region": ([REGION], {"x-region": "eu"}, 0.0, None),
    "a share of a region, lucky": ([REGION_10], {"x-region": "cn-sh"}, 0.09, ("region", 0)),
    "a share of a region, unlucky": ([REGION_10], {"x-region": "cn-sh"}, 0.11, None),
    "a region's share by user, in": (
        [REGION_10], {"x-region": "cn-sh", "x-user-id": IN_5}, 0.99, ("region", 0)),
    "a region's share by user, out whatever the dice": (
        [REGION_10], {"x-region": "cn-sh", "x-user-id": OUT_5}, 0.0, None),
    "percent, lucky": ([PERCENT], {}, 0.019, ("percent", 0)),
    "percent, unlucky": ([PERCENT], {}, 0.02, None),
    "percent 0 takes nobody": ([PercentRule(percent=0)], {}, 0.0, None),
    "percent 100 takes all": ([PercentRule(percent=100)], {}, 0.9999999, ("percent", 0)),
    "kinds in their order, whatever the order written": (
        [PERCENT, REGION, USER, HEADER],
        {"x-canary": "1", "x-user-id": IN_5, "x-region": "cn-sh"}, 0.0, ("header", 3)),
    "user before region": (
        [REGION, USER], {"x-user-id": IN_5, "x-region": "cn-sh"}, 0.0, ("user", 1)),
    "region before percent": ([PERCENT, REGION], {"x-region": "cn-sh"}, 0.0, ("region", 1)),
    "percent is of what no rule above took": (
        [USER, PERCENT], {"x-user-id": OUT_5}, 0.01, ("percent", 1)),
    "the dice are thrown anew after a region's share": (
        [REGION_10, PercentRule(percent=50)], {"x-region": "cn-sh"}, 0.5, ("percent", 1)),
    "within one kind, as written": (
        [PRESENT, HEADER], {"x-beta": "1", "x-canary": "1"}, 0.9, ("header", 0)),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_rule(case: str) -> None:
    rules, headers, chance, wanted = CASES[case]
    match = decide(rules, headers, chance=chance).match
    assert (match and (match.kind, match.index)) == wanted


def test_a_claim_counts_only_when_there_are_claims() -> None:
    assert decide([CLAIM], {"sub": IN_5}).match is None
    found = decide([CLAIM], claims={"sub": IN_5}).match
    assert found is not None
    assert found.kind == "user"


def test_a_regions_user_is_the_first_user_rules() -> None:
    rules: list[Rule] = [UserRule(header="X-Account", percent=0), REGION_10]
    headers = {"x-region": "cn-sh", "x-account": IN_5, "x-user-id": OUT_5}
    found = decide(rules, headers)
    assert found.match is not None
    assert found.match.kind == "region"
    assert found.bucket == user_bucket(MODEL, IN_5)


def test_a_regions_user_falls_back_to_x_user_id() -> None:
    rules: list[Rule] = [UserRule(header="X-Account", percent=0), REGION_10]
    assert decide(rules, {"x-region": "cn-sh", "x-user-id": IN_5}).match is not None


def test_header_names_are_case_insensitive_in_the_document() -> None:
    assert decide([HeaderRule(name="x-CANARY", equals="1")], {"x-canary": "1"}).match is not None


def test_buckets_stay_what_they_were() -> None:
    """Every node of every release has to agree: these numbers may not change."""
    known = {"alice": 8402, "bob": 9682, "": 9261, "用户": 4768}
    assert {user: user_bucket("ocr", user) for user in known} == known
    assert user_bucket("other", "alice") != user_bucket("ocr", "alice")


def test_a_header_that_is_not_utf8_has_a_bucket_too() -> None:
    assert 0 <= user_bucket("ocr", b"\xff\xfe".decode("utf-8", "surrogateescape")) < 10_000


def test_detail_shows_the_document_and_never_the_client() -> None:
    details = [
        match.detail
        for match in (
            decide([HEADER], {"x-canary": "1"}).match,
            decide([USER], {"x-user-id": IN_5}).match,
            decide([REGION], {"x-region": "cn-sh"}).match,
            decide([PERCENT], chance=0.0).match,
        )
        if match is not None
    ]
    assert details == [
        "X-Canary equals '1'",
        "header X-User-Id, 5 %",
        "X-Region in cn-sh, us-west, 100 %",
        "2 % by chance",
    ]
