"""A hundred seeded scenarios of each kind, with noise: the verdict is right in at least 95.

The scenario plays a node: requests with random inputs reach the live version, what fails runs
again on the standby, and the judge is asked where the product asks it: when the counted faults
trip, and when one input has ended workers of both versions. Noise is what a machine does anyway:
the client's own errors, an out-of-memory kill here, a lone code there, on either version, and
inputs that come again. A verdict of "input" refuses those inputs and play goes on, as in the
product; any other verdict ends it.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from loader.blame import Blame, Incident, Verdict, judge
from loader.counting import FaultCounter
from loader.faults import Fault, from_code
from registry.names import Version

LIVE, STANDBY = Version("2"), Version("1")
SEVERE = ["700", "719", "716", "214", "SIGSEGV", "SIGABRT", "SIGKILL", "HANG", "CUDNN:8"]
MILD = ["2", "-101", "-102", "-204", "NAN"]
NOISE = ["SIGKILL", "700", "-101", "999", "SIGSEGV", "InvalidArgument", "InvalidArgument"]

Fails = Callable[[Version, str], str | None]
"""The code with which this version fails on this input now; ``None``: it answers."""


@dataclass
class Node:
    rng: random.Random
    fails: Fails
    noise: float
    has_standby: bool = True
    counter: FaultCounter = field(default_factory=FaultCounter)
    incidents: list[Incident] = field(default_factory=list)
    answered: int = 0
    refused: set[str] = field(default_factory=set)

    def run(self, version: Version, digest: str, now_s: float) -> Fault | None:
        code = self.fails(version, digest)
        if self.rng.random() < self.noise:
            code = self.rng.choice(NOISE)
        if code is None:
            self.answered += 1
            return None
        fault = from_code(code)
        self.incidents.append(
            Incident(now_s, version, fault.code, fault.fault_class, digest, "gpu:0", self.answered)
        )
        return fault

    def play(self, requests: int, inputs: int) -> Verdict:
        """Play until version or device is blamed, at most ``requests``; the last verdict."""
        last = Verdict(Blame.UNDECIDED, "never asked")
        for n in range(requests):
            now_s = n * 0.005
            digest = f"input-{self.rng.randrange(inputs)}"
            if digest in self.refused:
                continue
            fault = self.run(LIVE, digest, now_s)
            if fault is None:
                self.counter.success()
                continue
            tripped = self.counter.add(now_s, fault) is not None
            killed_both = False
            if self.has_standby and fault.handling.rerun:
                again = self.run(STANDBY, digest, now_s)
                killed_both = again is not None and again.fault_class in ("crash", "sticky")
            if not (tripped or killed_both):
                continue
            recent = [i for i in self.incidents if now_s - i.at_s <= 30]
            standby = STANDBY if self.has_standby else None
            verdict = judge(recent, live=LIVE, standby=standby, answered=self.answered)
            if verdict.blame is Blame.INPUT:
                self.refused |= verdict.inputs
            elif verdict.blame is Blame.DEVICE:
                self.refused -= verdict.inputs
            if verdict.blame is not Blame.UNDECIDED:
                last = verdict
            if verdict.blame in (Blame.VERSION, Blame.DEVICE):
                break
        return last


def bad_version(rng: random.Random) -> Fails:
    code, share = rng.choice(SEVERE + MILD), rng.choice([1.0, 1.0, 0.8, 0.5])

    def fails(version: Version, digest: str) -> str | None:
        return code if version == LIVE and rng.random() < share else None

    return fails


def bad_device(rng: random.Random) -> Fails:
    code, share = rng.choice(SEVERE[:5] + SEVERE[8:]), rng.choice([1.0, 1.0, 0.95, 0.9])
    return lambda version, digest: code if rng.random() < share else None


def poison_input(rng: random.Random) -> Fails:
    code, killers = rng.choice(SEVERE), {f"input-{n}" for n in range(rng.choice([1, 1, 2, 3]))}
    return lambda version, digest: code if digest in killers else None


def right(kind: str, node: Node, verdict: Verdict) -> bool:
    if kind == "version":
        return verdict.blame is Blame.VERSION and not node.refused
    if kind == "device":
        return verdict.blame is Blame.DEVICE and len(node.refused) <= 1
    killers = {"input-0", "input-1", "input-2"}
    return verdict.blame is Blame.INPUT and bool(node.refused) and node.refused <= killers


KINDS: dict[str, Callable[[random.Random], Fails]] = {
    "version": bad_version,
    "device": bad_device,
    "input": poison_input,
}


@pytest.mark.parametrize("noise", [0.0, 0.001, 0.003])
@pytest.mark.parametrize("inputs", [30, 200])
@pytest.mark.parametrize("kind", KINDS)
def test_right_in_95_of_100(kind: str, inputs: int, noise: float) -> None:
    wrong: list[str] = []
    for seed in range(100):
        rng = random.Random(seed)
        node = Node(rng, KINDS[kind](rng), noise)
        verdict = node.play(requests=6 * inputs, inputs=inputs)
        if not right(kind, node, verdict):
            wrong.append(f"seed {seed}: {verdict.blame} ({verdict.reason}) {node.refused}")
    assert len(wrong) <= 5, "\n".join(wrong)


@pytest.mark.parametrize("kind", ["version", "device"])
def test_right_when_every_request_is_the_same(kind: str) -> None:
    """A benchmark, a probe: one input only. It is not taken for poison."""
    wrong = 0
    for seed in range(100):
        rng = random.Random(seed)
        node = Node(rng, KINDS[kind](rng), noise=0.0)
        code = node.fails(LIVE, "input-0") or "700"
        verdict = node.play(requests=600, inputs=1)
        crash = from_code(code).fault_class == "crash"
        wrong += not (right(kind, node, verdict) or (kind == "device" and crash))
    assert wrong <= 5


@pytest.mark.parametrize("noise", [0.001, 0.005])
def test_noise_alone_blames_neither_device_nor_input(noise: float) -> None:
    """Noise that trips the counter may look like a version; it never cordons, never refuses."""
    blamed: Counter[Blame] = Counter()
    for seed in range(100):
        node = Node(random.Random(seed), lambda version, digest: None, noise)
        blamed[node.play(requests=2000, inputs=200).blame] += 1
    assert blamed[Blame.DEVICE] + blamed[Blame.INPUT] <= 5, blamed


def test_without_a_standby_only_inputs_are_blamed() -> None:
    wrong: list[str] = []
    for seed in range(100):
        rng = random.Random(seed)
        kind = rng.choice(list(KINDS))
        node = Node(rng, KINDS[kind](rng), noise=0.001, has_standby=False)
        verdict = node.play(requests=400, inputs=20)
        blamed = verdict.blame is not Blame.UNDECIDED
        if not (right(kind, node, verdict) if kind == "input" else not blamed):
            wrong.append(f"seed {seed} {kind}: {verdict.blame} ({verdict.reason})")
    assert len(wrong) <= 5, "\n".join(wrong)
