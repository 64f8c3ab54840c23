"""Canary rules, compiled: which of a model's requests go to the canary, and by which rule.

First match wins; the kinds are tried in the order header, user, region, percent, whatever the
order written (SPEC section 3), and last the share of the canary's step. No clock and no dice here:
chance comes in as a number.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple

from registry.canary import CanaryStand
from registry.names import ModelName
from registry.spec import HeaderRule, PercentRule, RegionRule, Rule, UserRule
from registry.spec_canary import CanarySpec, Sticky

BUCKETS = 10_000
"""A percent counts in steps of 0.01."""

_SALT = b"paddlewheel-v1"
_DEFAULT_USER_HEADER = "x-user-id"

Headers = Mapping[str, str]
"""Looked up by lower-case names: a case-insensitive mapping, or one with lower-case keys."""


@dataclass(frozen=True, slots=True)
class Match:
    """The rule that took a request."""

    kind: str
    """header, user, region, percent or step."""
    index: int
    """Its place among the rules, or the steps, as written, from 0."""
    detail: str
    """The rule in words, from the document alone: nothing that the client sent."""


class Verdict(NamedTuple):
    match: Match | None
    bucket: int | None
    """The user's bucket, 0..9999, where one was looked at."""


def user_bucket(model: str, user: str) -> int:
    """Return 0..9999 for ``(model, user)``: the same in every process, on every node, for ever."""
    digest = hashlib.blake2b(
        f"{model}\0{user}".encode("utf-8", "surrogateescape"), digest_size=8, salt=_SALT
    )
    return int.from_bytes(digest.digest(), "big") % BUCKETS


@dataclass(frozen=True, slots=True)
class _Header:
    match: Match
    name: str
    equals: str | None
    prefix: str | None


@dataclass(frozen=True, slots=True)
class _Users:
    """Neighbouring user rules with one source of ids: it is read, and hashed, once for all."""

    header: str | None
    claim: str | None
    rules: tuple[tuple[int, Match], ...]
    """Buckets below the number are in."""

    def user_id(self, headers: Headers, claims: Mapping[str, Any] | None) -> str | None:
        """Return the id, or ``None`` when the request has none (or an empty one)."""
        if self.header is not None:
            return headers.get(self.header) or None
        value = claims.get(self.claim) if claims is not None and self.claim else None
        return str(value) if value not in (None, "") else None


@dataclass(frozen=True, slots=True)
class _Region:
    match: Match
    threshold: int
    share: float


@dataclass(frozen=True, slots=True)
class _Regions:
    """Neighbouring region rules that look at one header, by the region they name."""

    header: str
    by_region: Mapping[str, tuple[_Region, ...]]


@dataclass(frozen=True, slots=True)
class _Percent:
    match: Match
    share: float


class StepShare(NamedTuple):
    """The share of users that a canary's step gives it."""

    step: int
    """Its place among the steps, from 0."""
    percent: float
    sticky: Sticky | None = None
    """Where the user's id is; ``None``: the first user rule's, else ``X-User-Id``."""


@dataclass(frozen=True, slots=True)
class _Step:
    """A percent like any other, except that a user stays on one side of it."""

    match: Match
    threshold: int
    share: float
    ids: _Users | None
    """``None``: where region rules find theirs."""


@dataclass(frozen=True, slots=True)
class CompiledRules:
    """The rules of one model's canary, sorted by kind and ready to be asked.

    Made by `compile_rules`. Rules are asked in this order; growing a percent only adds users.
    """

    model: ModelName
    written: tuple[Rule, ...]
    _headers: tuple[_Header, ...]
    _users: tuple[_Users, ...]
    _regions: tuple[_Regions, ...]
    _percents: tuple[_Percent, ...]
    step: StepShare | None = None
    _step: _Step | None = None

    def decide(self, headers: Headers, claims: Mapping[str, Any] | None, chance: float) -> Verdict:
        """Return the rule that takes this request to the canary, if any does.

        chance: drawn by the caller for this request, uniform in [0, 1).
        """
        for header in self._headers:
            value = headers.get(header.name)
            if value is None:
                continue
            if header.equals is not None:
                if value == header.equals:
                    return Verdict(header.match, None)
            elif header.prefix is None or value.startswith(header.prefix):
                return Verdict(header.match, None)
        seen: str | None = None
        bucket: int | None = None
        for users in self._users:
            user_id = users.user_id(headers, claims)
            if user_id is None:
                continue
            if bucket is None or user_id != seen:
                seen, bucket = user_id, user_bucket(self.model, user_id)
            for threshold, match in users.rules:
                if bucket < threshold:
                    return Verdict(match, bucket)
        for regions in self._regions:
            for region in regions.by_region.get(headers.get(regions.header, ""), ()):
                if region.share >= 1.0:
                    return Verdict(region.match, bucket)
                user_id = self._region_user(headers, claims)
                if user_id is not None:
                    if bucket is None or user_id != seen:
                        seen, bucket = user_id, user_bucket(self.model, user_id)
                    if bucket < region.threshold:
                        return Verdict(region.match, bucket)
                elif chance < region.share:
                    return Verdict(region.match, bucket)
                else:
                    # What is left of the number is uniform again: the next rule has its own dice.
                    chance = (chance - region.share) / (1.0 - region.share)
        for percent in self._percents:
            if chance < percent.share or percent.share >= 1.0:
                return Verdict(percent.match, bucket)
            chance = (chance - percent.share) / (1.0 - percent.share)
        step = self._step
        if step is not None:
            user_id = self._step_user(step, headers, claims)
            if user_id is not None:
                if bucket is None or user_id != seen:
                    bucket = user_bucket(self.model, user_id)
                if bucket < step.threshold:
                    return Verdict(step.match, bucket)
            elif chance < step.share or step.share >= 1.0:
                return Verdict(step.match, bucket)
        return Verdict(None, bucket)

    def share(self, headers: Headers, claims: Mapping[str, Any] | None) -> float:
        """Return how many of such requests the rules take, 0..1: 0 or 1 where no dice is thrown."""
        certain = self.decide(headers, claims, _UNLUCKY)
        if certain.match is not None:
            return 1.0
        left = 1.0
        if self._region_user(headers, claims) is None:
            for regions in self._regions:
                for region in regions.by_region.get(headers.get(regions.header, ""), ()):
                    left *= 1.0 - region.share
        for percent in self._percents:
            left *= 1.0 - percent.share
        step = self._step
        if step is not None and self._step_user(step, headers, claims) is None:
            left *= 1.0 - step.share
        return 1.0 - left

    def _step_user(
        self, step: _Step, headers: Headers, claims: Mapping[str, Any] | None
    ) -> str | None:
        if step.ids is None:
            return self._region_user(headers, claims)
        return step.ids.user_id(headers, claims)

    def _region_user(self, headers: Headers, claims: Mapping[str, Any] | None) -> str | None:
        """The first user rule's id, else ``X-User-Id``, else nobody (SPEC section 8)."""
        user_id = self._users[0].user_id(headers, claims) if self._users else None
        return user_id or headers.get(_DEFAULT_USER_HEADER) or None


_UNLUCKY = 1.0
"""Above every chance: no dice falls for the canary, except where the share is all of it."""


def compile_rules(
    model: ModelName, rules: Sequence[Rule], step: StepShare | None = None
) -> CompiledRules:
    """Sort ``rules`` by kind and prepare what each needs per request; ``step`` comes after all."""
    headers: list[_Header] = []
    users: list[tuple[UserRule, Match]] = []
    regions: list[tuple[RegionRule, Match]] = []
    percents: list[_Percent] = []
    for index, rule in enumerate(rules):
        match rule:
            case HeaderRule():
                found = Match("header", index, _header_detail(rule))
                headers.append(_Header(found, rule.name.lower(), rule.equals, rule.prefix))
            case UserRule():
                source = f"header {rule.header}" if rule.header else f"claim {rule.claim}"
                users.append((rule, Match("user", index, f"{source}, {rule.percent:g} %")))
            case RegionRule():
                names = ", ".join(rule.regions)
                detail = f"{rule.header} in {names}, {rule.percent:g} %"
                regions.append((rule, Match("region", index, detail)))
            case PercentRule():
                found = Match("percent", index, f"{rule.percent:g} % by chance")
                percents.append(_Percent(found, rule.percent / 100))
    return CompiledRules(
        model,
        tuple(rules),
        tuple(headers),
        _by_source(users),
        _by_header(regions),
        tuple(percents),
        step,
        None if step is None else _compile_step(step),
    )


def canary_rules(
    model: ModelName, canary: CanarySpec | None, stand: CanaryStand
) -> CompiledRules | None:
    """The rules of a canary that is as far as ``stand`` says; ``None``: nobody gets it.

    Nodes and gateways route by this one function.
    """
    if canary is None or stand.is_failed:
        return None
    step: StepShare | None = None
    if stand.step is not None:
        step = StepShare(stand.step, stand.percent, canary.sticky)
    return compile_rules(model, canary.rules, step)


def _compile_step(step: StepShare) -> _Step:
    sticky = step.sticky
    ids: _Users | None = None
    source = "user"
    if sticky is not None:
        source = f"header {sticky.header}" if sticky.header else f"claim {sticky.claim}"
        ids = _Users(sticky.header and sticky.header.lower(), sticky.claim, ())
    detail = f"{step.percent:g} % by {source}, else by chance"
    threshold = _threshold(step.percent)
    return _Step(Match("step", step.step, detail), threshold, step.percent / 100, ids)


def _by_source(rules: Sequence[tuple[UserRule, Match]]) -> tuple[_Users, ...]:
    def source(entry: tuple[UserRule, Match]) -> tuple[str | None, str | None]:
        header = entry[0].header
        return (None if header is None else header.lower(), entry[0].claim)

    return tuple(
        _Users(header, claim, tuple((_threshold(rule.percent), match) for rule, match in group))
        for (header, claim), group in groupby(rules, source)
    )


def _by_header(rules: Sequence[tuple[RegionRule, Match]]) -> tuple[_Regions, ...]:
    groups: list[_Regions] = []
    for header, group in groupby(rules, lambda entry: entry[0].header.lower()):
        by_region: dict[str, tuple[_Region, ...]] = {}
        for rule, match in group:
            region = _Region(match, _threshold(rule.percent), rule.percent / 100)
            for name in dict.fromkeys(rule.regions):
                by_region[name] = (*by_region.get(name, ()), region)
        groups.append(_Regions(header, by_region))
    return tuple(groups)


def _header_detail(rule: HeaderRule) -> str:
    if rule.equals is not None:
        return f"{rule.name} equals {rule.equals!r}"
    if rule.prefix is not None:
        return f"{rule.name} starts with {rule.prefix!r}"
    return f"{rule.name} is present"


def _threshold(percent: float) -> int:
    return round(percent * BUCKETS / 100)
