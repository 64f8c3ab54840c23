"""The pool against a slow model: never an overrun, the order kept, nobody left behind."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from loader.devices import BadDevice, Cordon, Cordoned, DevicePool, OutOfQuota, Priority

QUOTA = 100
OWNERS = st.integers(0, 12).map(lambda n: f"owner-{n}")
MB = st.integers(1, QUOTA)
PRIORITY = st.sampled_from(list(Priority))


class Pool(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.pool = DevicePool({"gpu:0": QUOTA}, waiting_max=8)
        self.held: dict[str, int] = {}
        self.line: list[tuple[int, int, str, int]] = []
        self.arrived = 0
        self.served: list[str] = []
        self.cordoned = False

    def model_serve(self) -> list[str]:
        served: list[str] = []
        while self.line and not self.cordoned:
            entry = min(self.line)
            _, _, owner, mb = entry
            if sum(self.held.values()) + mb > QUOTA:
                break
            self.line.remove(entry)
            self.held[owner] = mb
            served.append(owner)
        return served

    def check(self, expected: list[str]) -> None:
        assert self.served == expected
        self.served.clear()

    @rule(owner=OWNERS, mb=MB, priority=PRIORITY)
    def reserve(self, owner: str, mb: int, priority: Priority) -> None:
        before = self.held.get(owner, 0)
        if before == mb:
            self.pool.reserve(owner, "gpu:0", mb, priority=priority)
            return
        if any(entry[2] == owner for entry in self.line):
            with pytest.raises(BadDevice):
                self.pool.reserve(owner, "gpu:0", mb, priority=priority)
            return
        if self.cordoned:
            with pytest.raises(Cordoned):
                self.pool.reserve(owner, "gpu:0", mb, priority=priority)
            return
        ahead = any(-entry[0] >= priority for entry in self.line)
        fits = sum(self.held.values()) - before + mb <= QUOTA
        if mb < before or (fits and not ahead):
            self.pool.reserve(owner, "gpu:0", mb, priority=priority)
            self.held[owner] = mb
            self.check(self.model_serve())
        else:
            with pytest.raises(OutOfQuota):
                self.pool.reserve(owner, "gpu:0", mb, priority=priority)

    @rule(owner=OWNERS, mb=MB, priority=PRIORITY)
    def wait(self, owner: str, mb: int, priority: Priority) -> None:
        if owner in self.held or any(entry[2] == owner for entry in self.line):
            return
        if len(self.line) >= 8:
            with pytest.raises(OutOfQuota):
                self.pool.enqueue(owner, "gpu:0", mb, lambda: None, priority=priority)
            return
        at_once = self.pool.enqueue(
            owner, "gpu:0", mb, lambda: self.served.append(owner), priority=priority
        )
        self.line.append((-priority, self.arrived, owner, mb))
        self.arrived += 1
        served = self.model_serve()
        assert at_once == (served == [owner])
        self.check([])

    @rule(owner=OWNERS)
    def release(self, owner: str) -> None:
        waited = [entry for entry in self.line if entry[2] == owner]
        known = owner in self.held or bool(waited)
        for entry in waited:
            self.line.remove(entry)
        self.held.pop(owner, None)
        expected = self.model_serve()
        assert self.pool.release(owner) == known
        self.check(expected)

    @rule()
    def cordon(self) -> None:
        assert self.pool.cordon("gpu:0", Cordon("XID:79", "bad", "now")) != self.cordoned
        self.cordoned = True

    @precondition(lambda self: self.cordoned)
    @rule()
    def uncordon(self) -> None:
        assert self.pool.uncordon("gpu:0")
        self.cordoned = False
        self.check(self.model_serve())

    @invariant()
    def never_overrun_and_as_the_model_says(self) -> None:
        (usage,) = self.pool.usage()
        assert usage.reserved_mb == sum(self.held.values()) <= QUOTA
        assert self.pool.waiting("gpu:0") == tuple(entry[2] for entry in sorted(self.line))
        for owner, mb in self.held.items():
            reservation = self.pool.held(owner)
            assert reservation is not None
            assert reservation.memory_mb == mb

    def teardown(self) -> None:
        """Nobody starves: once all who hold let go, one after the other, everyone is served."""
        if self.cordoned:
            self.pool.uncordon("gpu:0")
            self.cordoned = False
            self.check(self.model_serve())
        for _ in range(200):
            if not self.held:
                break
            self.release(next(iter(self.held)))
        assert not self.line
        assert self.pool.waiting("gpu:0") == ()
        assert self.pool.free_mb("gpu:0") == QUOTA


TestPool = Pool.TestCase
TestPool.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
