"""Who a canary's steps take: the promised share of users, and never one of them out again."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from registry.names import ModelName
from registry.spec import HeaderRule, PercentRule, Rule, UserRule
from registry.spec_canary import Sticky
from router.rules import CompiledRules, StepShare, compile_rules, user_bucket

MODEL = ModelName("ocr-rec")
USERS = 100_000
PERCENTS = (0.5, 5.0, 25.0, 50.0, 99.0)
STICKY = Sticky(header="X-User-Id")


def step(
    percent: float, *rules: Rule, sticky: Sticky | None = STICKY, at: int = 0
) -> CompiledRules:
    return compile_rules(MODEL, rules, StepShare(at, percent, sticky))


def takes(rules: CompiledRules, headers: Mapping[str, str], chance: float = 0.999) -> bool:
    return rules.decide(headers, None, chance).match is not None


def test_100k_users_get_the_promised_shares_and_none_moves_out() -> None:
    """Five standard deviations: one run in two million would be outside by chance."""
    before: set[int] = set()
    for percent in PERCENTS:
        rules = step(percent)
        taken = {
            user for user in range(USERS) if takes(rules, {"x-user-id": f"user-{user}"})
        }  # fmt: skip
        share = percent / 100
        bound = 5 * math.sqrt(USERS * share * (1 - share))
        assert abs(len(taken) - USERS * share) <= bound, (percent, len(taken))
        assert before <= taken, f"{len(before - taken)} users moved out at {percent} %"
        before = taken


@given(st.text(min_size=1), st.floats(0, 100), st.floats(0, 100), st.floats(0, 1))
def test_a_user_stays_in_as_the_steps_grow(
    user: str, one: float, other: float, chance: float
) -> None:
    low, high = sorted((one, other))
    headers = {"x-user-id": user}
    assert takes(step(high), headers, chance) or not takes(step(low), headers, chance)
    assert takes(step(100), headers, chance)
    assert not takes(step(0), headers, chance)


def test_a_step_takes_the_users_that_a_user_rule_of_its_percent_takes() -> None:
    by_rule = compile_rules(MODEL, [UserRule(header="X-User-Id", percent=10)])
    for user in range(2000):
        headers = {"x-user-id": str(user)}
        assert takes(by_rule, headers) == takes(step(10), headers)
        assert takes(step(10), headers) == (user_bucket(MODEL, str(user)) < 1000)


def test_models_draw_their_users_apart() -> None:
    other = compile_rules(ModelName("ocr-det"), [], StepShare(0, 10, STICKY))
    both = sum(
        takes(step(10), {"x-user-id": str(user)}) and takes(other, {"x-user-id": str(user)})
        for user in range(20_000)
    )
    assert 120 < both < 280, "1 % of the users, not the same 10 % twice"


def test_without_an_id_chance_decides_and_the_share_holds_after_other_rules() -> None:
    rng = random.Random(3)
    rules = step(20, PercentRule(percent=10))
    kinds = [
        match.kind
        for _ in range(50_000)
        if (match := rules.decide({}, None, rng.random()).match) is not None
    ]
    assert kinds.count("percent") == pytest.approx(5000, abs=350)
    assert kinds.count("step") == pytest.approx(0.2 * 45_000, abs=450)
    assert rules.share({}, None) == pytest.approx(0.1 + 0.9 * 0.2)
    assert rules.share({"x-user-id": "7"}, None) in (pytest.approx(0.1), 1.0)


def test_rules_come_first_and_the_answer_names_the_step() -> None:
    rules = step(100, HeaderRule(name="X-Canary", equals="1"), at=2)
    by_header = rules.decide({"x-canary": "1"}, None, 0.5).match
    by_step = rules.decide({"x-user-id": "7"}, None, 0.5).match
    assert by_header is not None
    assert by_header.kind == "header"
    assert by_step is not None
    assert (by_step.kind, by_step.index) == ("step", 2)
    assert by_step.detail == "100 % by header X-User-Id, else by chance"


IDS = {
    "a claim": (Sticky(claim="sub"), {}, {"sub": "ann"}, "ann"),
    "a claim that is a number": (Sticky(claim="uid"), {}, {"uid": 7}, "7"),
    "a header is no claim": (Sticky(claim="sub"), {"sub": "ann", "x-user-id": "ann"}, None, None),
    "another header": (Sticky(header="X-Account"), {"x-account": "a1"}, None, "a1"),
    "not the usual header": (Sticky(header="X-Account"), {"x-user-id": "ann"}, None, None),
    "an empty one is none": (STICKY, {"x-user-id": ""}, None, None),
    "the usual header, unless told": (None, {"x-user-id": "ann"}, None, "ann"),
}


@pytest.mark.parametrize(("sticky", "headers", "claims", "user"), IDS.values(), ids=IDS.keys())
def test_where_the_id_is(
    sticky: Sticky | None,
    headers: dict[str, str],
    claims: dict[str, object] | None,
    user: str | None,
) -> None:
    verdict = step(0, sticky=sticky).decide(headers, claims, 0.5)
    assert verdict.bucket == (None if user is None else user_bucket(MODEL, user))


def test_unless_told_the_id_is_that_of_the_first_user_rule() -> None:
    rules = step(0, UserRule(header="X-Account", percent=0), sticky=None)
    assert rules.decide({"x-account": "a", "x-user-id": "b"}, None, 0.5).bucket == user_bucket(
        MODEL, "a"
    )
