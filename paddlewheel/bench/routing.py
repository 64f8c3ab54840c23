"""``paddlewheel bench routing``: what one routing decision costs, on this machine."""

from __future__ import annotations

import gc
import platform
import random
import time
from typing import Any

from registry.names import Digest, ModelName, Revision, ServableId, Version
from registry.spec import HeaderRule, PercentRule, RegionRule, Rule, UserRule
from router.rules import compile_rules
from router.table import RequestFacts, Route, RouteTable

_DIGEST = Digest("sha256:" + "0" * 64)
_BATCH = 1000


def routing(
    *, models: int = 100, rules: int = 20, requests: int = 200_000, seed: int = 1
) -> dict[str, Any]:
    """Time ``requests`` decisions one by one over a table of ``models`` with ``rules`` each.

    The requests are mixed: users in and out of the canary, regions, a header now and then, a
    pinned version. Percentiles are of single decisions, in microseconds; the clock's own cost is
    measured the same way and shown beside them, not taken off.
    """
    dice = random.Random(seed)
    table = _table(models, rules)
    wanted = [_request(dice, models) for _ in range(min(requests, 20_000))]
    clock = time.perf_counter_ns
    taken_ns: list[int] = []
    clock_ns: list[int] = []
    kinds: dict[str, int] = {}
    was_collecting = gc.isenabled()
    gc.disable()  # the samples themselves would set it off, which no request does
    try:
        for number in range(requests):
            request = wanted[number % len(wanted)]
            start = clock()
            choice = table.pick(request)
            end = clock()
            taken_ns.append(end - start)
            kinds[choice.kind] = kinds.get(choice.kind, 0) + 1
            if number % _BATCH == 0:
                start = clock()
                clock_ns.append(clock() - start)
    finally:
        if was_collecting:
            gc.enable()
    taken_ns.sort()
    clock_ns.sort()
    return {
        "bench": "routing",
        "models": models,
        "rules": rules,
        "requests": requests,
        "p50_us": _percentile_us(taken_ns, 0.50),
        "p99_us": _percentile_us(taken_ns, 0.99),
        "p999_us": _percentile_us(taken_ns, 0.999),
        "max_us": _percentile_us(taken_ns, 1.0),
        "mean_us": round(sum(taken_ns) / len(taken_ns) / 1e3, 3),
        "clock_p50_us": _percentile_us(clock_ns, 0.50),
        "routes": kinds,
        "python": platform.python_version(),
    }


def _table(models: int, rules: int) -> RouteTable:
    routes: dict[ModelName, Route] = {}
    for number in range(models):
        model = ModelName(f"model-{number}")
        live = ServableId(model, Version("1"), _DIGEST)
        canary = ServableId(model, Version("2"), _DIGEST)
        routes[model] = Route(
            model=model,
            live=live,
            canary=canary,
            rules=compile_rules(model, _rules(rules)),
            revision=Revision(number + 1),
            pinned={live.version: live, canary.version: canary},
        )
    return RouteTable(Revision(models), routes)


def _rules(count: int) -> list[Rule]:
    """Return ``count`` rules of all kinds; most of them have to be asked and say no."""
    made: list[Rule] = [
        UserRule(header="X-User-Id", percent=5.0),
        RegionRule(header="X-Region", regions=("cn-sh", "us-west"), percent=10.0),
        PercentRule(percent=2.0),
    ]
    for number in range(count - len(made)):
        if number % 3 == 0:
            made.append(HeaderRule(name=f"X-Canary-{number}", equals="1"))
        elif number % 3 == 1:
            made.append(UserRule(header="X-Tenant-Id", percent=0.5))
        else:
            made.append(RegionRule(header="X-Region", regions=(f"zone-{number}",)))
    return made[:count]


def _request(dice: random.Random, models: int) -> RequestFacts:
    headers = {
        "host": "localhost", "content-type": "application/json", "x-request-id": "0",
        "x-region": dice.choice(("cn-sh", "us-west", "eu-north", "ap-south")),
    }  # fmt: skip
    if dice.random() < 0.8:
        headers["x-user-id"] = f"user-{dice.randrange(100_000)}"
        headers["x-tenant-id"] = f"tenant-{dice.randrange(1000)}"
    if dice.random() < 0.05:
        headers["x-canary-0"] = "1"
    version = dice.choice(("1", "2")) if dice.random() < 0.05 else None
    return RequestFacts(
        f"model-{dice.randrange(models)}", version, None, headers, None, dice.random()
    )


def _percentile_us(sorted_ns: list[int], share: float) -> float:
    place = min(len(sorted_ns) - 1, int(share * len(sorted_ns)))
    return round(sorted_ns[place] / 1e3, 3)
