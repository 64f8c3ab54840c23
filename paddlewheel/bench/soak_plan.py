"""What goes wrong during a soak, and when, as a seed decides: any run can be had again (pure)."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

LIVELY, STEADY = "lively", "steady"
"""The model whose versions come and go, and the one with two replicas that only suffers."""
VERSIONS = ("1", "2", "3", "4")
CODES = ("700", "719", "716", "214", "2", "-101", "-102", "-204", "CUDNN:8")
ENDS = ("SIGSEGV", "SIGABRT", "SIGBUS", "SIGKILL", "EXIT:3")
EVERY_S = 1.0

KINDS: Mapping[str, int] = {
    "code": 20, "crash": 10, "hang": 4, "slow": 8, "nan": 6, "oom": 4,
    "kill": 10, "stop": 3, "etcd": 4, "edit": 10, "load": 15, "canary": 5,
    "refused document": 4, "broken version": 4, "release": 10,
}  # fmt: skip
"""Each kind of step and how often it comes, relative to the others."""


@dataclass(frozen=True, slots=True)
class Step:
    """One thing done to the node."""

    at_s: float
    """Since the start."""
    kind: str
    model: str
    what: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """A drill's document, a version, a signal; ``pick``: a number to choose a process by."""


def plan(seed: int, duration_s: float) -> Iterator[Step]:
    """A step about every second, each kind at its share. The same seed, the same steps."""
    rng = random.Random(seed)
    bag = list[str]()
    at_s = EVERY_S
    while at_s < duration_s:
        if not bag:  # every kind comes in every bag: short runs see all of them, too
            bag = [kind for kind, weight in KINDS.items() for _ in range(max(1, weight // 4))]
            rng.shuffle(bag)
        yield _step(rng, at_s, bag.pop())
        at_s += EVERY_S * rng.uniform(0.5, 1.5)


def _step(rng: random.Random, at_s: float, kind: str) -> Step:
    model = LIVELY if rng.random() < 0.75 else STEADY
    what: dict[str, Any]
    match kind:
        case "code":
            what = {"code": rng.choice(CODES), "count": rng.randint(1, 4)}
        case "crash":
            what = {"code": rng.choice(ENDS), "count": rng.randint(1, 3)}
        case "hang":
            what = {"count": 1}
        case "slow":
            what = {"count": rng.randint(1, 10), "delay_ms": rng.randint(20, 300)}
        case "oom":
            what = {"count": rng.randint(1, 3)}
        case "nan":
            # Once: what every version answers with NaN is given as it is, for it may be right.
            what = {"count": 1}
        case "kill" | "stop":
            what = {"pick": rng.randrange(1 << 16)}
        case "edit":
            what = {"timeout_s": rng.choice([4, 5, 6]), "queue": rng.choice([128, 256])}
        case "load" | "canary":
            model = LIVELY
            what = {"version": rng.choice(VERSIONS), "bake_s": rng.choice([2, 20, 20, 600])}
        case "refused document" | "broken version":
            model = LIVELY
            what = {}
        case _:
            what = {}
    if kind in ("code", "crash", "slow"):
        what |= {"share": rng.choice([1.0, 1.0, 0.5])}
    return Step(round(at_s, 3), kind, model, what)
