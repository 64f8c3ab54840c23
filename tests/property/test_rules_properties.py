"""Promises of the canary rules over all users, percents and dice."""

from __future__ import annotations

import math
import random
import subprocess
import sys

from hypothesis import given, settings
from hypothesis import strategies as st

from registry.names import ModelName
from registry.spec import HeaderRule, PercentRule, RegionRule, Rule, UserRule
from router.rules import compile_rules, user_bucket

MODEL = ModelName("ocr")
users = st.text(min_size=1, max_size=40)
percents = st.integers(0, 10_000).map(lambda steps: steps / 100)
chances = st.floats(0, 1, exclude_max=True)
rules = st.lists(
    st.one_of(
        st.builds(HeaderRule, name=st.just("X-Canary"), equals=st.sampled_from(["1", "2"])),
        st.builds(UserRule, header=st.sampled_from(["X-User-Id", "X-Other"]), percent=percents),
        st.builds(
            RegionRule,
            header=st.just("X-Region"),
            regions=st.sampled_from([("a",), ("a", "b")]),
            percent=percents,
        ),
        st.builds(PercentRule, percent=percents),
    ),
    max_size=8,
)
headers = st.dictionaries(
    st.sampled_from(["x-canary", "x-user-id", "x-other", "x-region"]),
    st.sampled_from(["1", "2", "a", "b", "someone", "somebody else", ""]),
)
ORDER = ["header", "user", "region", "percent"]


@given(users, percents, percents)
def test_growing_a_percent_never_moves_a_user_out(user: str, one: float, other: float) -> None:
    low, high = sorted((one, other))

    def takes(percent: float) -> bool:
        compiled = compile_rules(MODEL, [UserRule(header="X-User-Id", percent=percent)])
        return compiled.decide({"x-user-id": user}, None, 0.5).match is not None

    assert takes(high) or not takes(low)
    assert takes(100)
    assert not takes(0)


@given(users, chances, chances)
def test_a_user_is_sticky_whatever_the_dice(user: str, one: float, other: float) -> None:
    compiled = compile_rules(
        MODEL,
        [
            UserRule(header="X-User-Id", percent=30),
            RegionRule(header="X-Region", regions=("a",), percent=60),
        ],
    )
    seen = {"x-user-id": user, "x-region": "a"}
    assert compiled.decide(seen, None, one) == compiled.decide(seen, None, other)


def test_a_share_of_users_is_what_the_percent_says() -> None:
    count = 20_000
    for percent in (1, 5, 25, 50):
        compiled = compile_rules(MODEL, [UserRule(header="X-User-Id", percent=percent)])
        taken = sum(
            compiled.decide({"x-user-id": f"user-{n}"}, None, 0.5).match is not None
            for n in range(count)
        )
        share = percent / 100
        assert abs(taken - count * share) < 5 * math.sqrt(count * share * (1 - share))


def test_users_of_two_models_are_not_the_same_ones() -> None:
    both = sum(
        user_bucket("a", f"u{n}") < 1000 and user_bucket("b", f"u{n}") < 1000 for n in range(20_000)
    )
    assert 100 < both < 300


def test_shares_by_chance_are_what_the_percents_say_each_of_the_rest() -> None:
    dice = random.Random(7)
    compiled = compile_rules(
        MODEL,
        [
            RegionRule(header="X-Region", regions=("a",), percent=10),
            PercentRule(percent=20),
            PercentRule(percent=50),
        ],
    )
    count = 40_000
    taken = [0, 0, 0]
    for _ in range(count):
        match = compiled.decide({"x-region": "a"}, None, dice.random()).match
        if match is not None:
            taken[match.index] += 1
    for seen, share in zip(taken, (0.1, 0.9 * 0.2, 0.9 * 0.8 * 0.5), strict=True):
        assert abs(seen - count * share) < 5 * math.sqrt(count * share * (1 - share))
    assert abs(compiled.share({"x-region": "a"}, None) - 0.64) < 1e-9


@given(rules, headers, chances, st.randoms(use_true_random=False))
@settings(max_examples=300)
def test_the_order_written_matters_within_a_kind_only(
    written: list[Rule], seen: dict[str, str], chance: float, dice: random.Random
) -> None:
    shuffled = sorted(written, key=lambda rule: (dice.random(), rule.kind))
    by_kind = sorted(shuffled, key=lambda rule: ORDER.index(rule.kind))
    one = compile_rules(MODEL, shuffled).decide(seen, None, chance)
    other = compile_rules(MODEL, by_kind).decide(seen, None, chance)
    assert (one.match is None) == (other.match is None)
    if one.match is not None and other.match is not None:
        assert shuffled[one.match.index] == by_kind[other.match.index]
        assert one.match.kind == shuffled[one.match.index].kind
    assert one.bucket == other.bucket


@given(rules, headers, chances)
@settings(max_examples=300)
def test_the_share_agrees_with_the_decision(
    written: list[Rule], seen: dict[str, str], chance: float
) -> None:
    compiled = compile_rules(MODEL, written)
    share = compiled.share(seen, None)
    assert 0 <= share <= 1
    taken = compiled.decide(seen, None, chance).match is not None
    if share == 0:
        assert not taken
    if share == 1:
        assert taken


def test_another_process_with_another_hash_seed_agrees() -> None:
    code = (
        "from router.rules import user_bucket\n"
        "print([user_bucket('m', f'u{n}') for n in range(50)])"
    )
    seen = {
        subprocess.run(
            [sys.executable, "-c", code],
            check=True,
            capture_output=True,
            text=True,
            env={"PYTHONHASHSEED": seed},
        ).stdout
        for seed in ("1", "2")
    }
    assert len(seen) == 1
