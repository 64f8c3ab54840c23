"""Token buckets (pure): state and time in, state and verdict out."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from registry.gateway_spec import Rate

BUCKETS_MAX = 20_000
"""Remembered. The one unused for longest goes first: it is the fullest."""


class Level(NamedTuple):
    """A bucket at a moment."""

    tokens: float
    at_s: float


@dataclass(frozen=True, slots=True)
class Quota:
    """One policy that a request falls under."""

    policy: str
    """``client`` or ``model``: its name in the headers."""
    key: str
    rate: Rate


def capacity(rate: Rate) -> int:
    return rate.burst or rate.requests


def filled(level: Level | None, rate: Rate, *, now_s: float) -> Level:
    """The bucket at ``now_s``; a new one is full. A clock that went back fills nothing."""
    full = float(capacity(rate))
    if level is None:
        return Level(full, now_s)
    passed_s = max(0.0, now_s - level.at_s)
    return Level(min(full, level.tokens + passed_s * rate.requests / rate.per_s), now_s)


def wait_s(level: Level, rate: Rate) -> float:
    """How long until there is one whole token."""
    return max(0.0, 1.0 - level.tokens) * rate.per_s / rate.requests


class Spent(NamedTuple):
    """What became of one request."""

    refused_by: Quota | None
    wait_s: float
    """For a refused one: when to come back."""
    levels: tuple[tuple[Quota, Level], ...]


class Buckets:
    """All buckets of one front door. The clock is the caller's."""

    def __init__(self) -> None:
        self._levels: OrderedDict[tuple[str, str], Level] = OrderedDict()

    def __len__(self) -> int:
        return len(self._levels)

    def spend(self, quotas: Sequence[Quota], *, now_s: float) -> Spent:
        """Take one token from each, or from none where one of them has none left."""
        levels = [
            filled(self._levels.get((quota.policy, quota.key)), quota.rate, now_s=now_s)
            for quota in quotas
        ]
        longest_s, refused_by = 0.0, None
        for quota, level in zip(quotas, levels, strict=True):
            if level.tokens < 1.0:
                missing_s = wait_s(level, quota.rate)
                if missing_s >= longest_s:
                    longest_s, refused_by = missing_s, quota
        spent = 0.0 if refused_by is not None else 1.0
        after: list[tuple[Quota, Level]] = []
        for quota, level in zip(quotas, levels, strict=True):
            left = Level(level.tokens - spent, level.at_s)
            key = (quota.policy, quota.key)
            self._levels[key] = left
            self._levels.move_to_end(key)
            after.append((quota, left))
        while len(self._levels) > BUCKETS_MAX:
            self._levels.popitem(last=False)
        return Spent(refused_by, longest_s, tuple(after))


def headers(spent: Spent) -> dict[str, str]:
    """``RateLimit`` and ``RateLimit-Policy`` (draft-ietf-httpapi-ratelimit-headers-10), the older
    ``X-RateLimit-*`` for the tightest policy, and ``Retry-After`` for a refused request.
    """
    if not spent.levels:
        return {}
    policies: list[str] = []
    states: list[str] = []
    for quota, level in spent.levels:
        rate = quota.rate
        burst = f";burst={rate.burst}" if rate.burst is not None else ""
        policies.append(f'"{quota.policy}";q={rate.requests};w={rate.per_s}{burst}')
        states.append(f'"{quota.policy}";r={_left(level)};t={_reset_s(level, rate)}')
    tightest = spent.refused_by or min(spent.levels, key=lambda entry: entry[1].tokens)[0]
    level = next(level for quota, level in spent.levels if quota is tightest)
    shown = {
        "RateLimit-Policy": ", ".join(policies),
        "RateLimit": ", ".join(states),
        "X-RateLimit-Limit": str(capacity(tightest.rate)),
        "X-RateLimit-Remaining": str(_left(level)),
        "X-RateLimit-Reset": str(_reset_s(level, tightest.rate)),
    }
    if spent.refused_by is not None:
        shown["Retry-After"] = str(max(1, math.ceil(spent.wait_s)))
    return shown


def _left(level: Level) -> int:
    return max(0, math.floor(level.tokens))


def _reset_s(level: Level, rate: Rate) -> int:
    """Whole seconds until the bucket is full."""
    return math.ceil((capacity(rate) - level.tokens) * rate.per_s / rate.requests)
