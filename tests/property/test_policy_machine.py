"""The policy against a world that does what it likes: documents, failures, faults, time.

The invariants are the promises: the last ready version is never taken away, each state has one
writer and routing at most one live version, and left alone the world converges.
"""

from __future__ import annotations

from dataclasses import replace

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from loader.lifecycle import LOADED, UNDERWAY, State, transition
from loader.policy import (
    Abandon,
    Action,
    Aspiration,
    Drain,
    Forget,
    InForce,
    Load,
    Snapshot,
    Swap,
    Unload,
    World,
    next_action,
    role,
)
from registry.names import Digest, ModelName, Revision, ServableId, Version

VERSIONS = [
    ServableId(ModelName("m"), Version(v), Digest(f"sha256:{v}{i}")) for v in "abc" for i in (1, 2)
]
versions = st.sampled_from(VERSIONS)
PATH_TO_READY = [State.FETCHING, State.LOADING, State.WARMING, State.READY]
STEPS_MAX = 60


class PolicyMachine(RuleBasedStateMachine):
    """The manager's part is played here: it performs, and only through `transition`."""

    def __init__(self) -> None:
        super().__init__()
        self.world = World(None, InForce(), {}, now_s=0.0)
        self.revision = 0
        self.may_serve: frozenset[ServableId] = frozenset()
        """All that a document in force, or meant to be, ever named."""

    # --- the world ----------------------------------------------------------------------------

    def put(self, snapshot: Snapshot) -> None:
        servables = {**self.world.servables, snapshot.id: snapshot}
        self.world = replace(self.world, servables=servables)

    def drop(self, id: ServableId) -> None:
        servables = {k: v for k, v in self.world.servables.items() if k != id}
        self.world = replace(self.world, servables=servables)

    def move(self, id: ServableId, state: State) -> None:
        snapshot = self.world.servables[id]
        new = transition(snapshot.state, state)
        if new is State.GONE:
            self.drop(id)
        else:
            self.put(replace(snapshot, state=new))

    def perform(self, action: Action) -> None:
        match action:
            case Swap(to):
                self.check_swap(to)
                self.world = replace(self.world, in_force=to)
                for id, snapshot in list(self.world.servables.items()):
                    if snapshot.state in LOADED and role(id, to) is not snapshot.state:
                        self.move(id, role(id, to))
            case Load(id):
                assert id not in self.world.servables
                self.put(Snapshot(id, State.NEW))
            case Abandon(id):
                assert self.world.servables[id].state in UNDERWAY
                self.drop(id)
            case Forget(id):
                self.move(id, State.GONE)
            case Drain(id):
                assert id not in self.world.in_force.ids(), "drained what routing points at"
                if self.world.prepared is not None and not self.world.is_tight:
                    assert id not in self.world.prepared.ids(), "drained what is prepared"
                self.move(id, State.DRAINING)
                by_s = self.world.now_s + 30
                self.put(replace(self.world.servables[id], drain_by_s=by_s))
            case Unload(id):
                self.move(id, State.GONE)

    def check_swap(self, to: InForce) -> None:
        if self.world.aspiration is None and not self.world.is_kept:
            return
        if self.world.is_good(self.world.in_force.live):
            assert self.world.is_good(to.live), "took the last ready version away"
        for id in to.ids():
            assert self.world.is_good(id), "routed to what is not ready"
        aspired = self.world.aspiration
        if aspired is None or to.revision != aspired.revision:
            assert to.revision >= self.world.in_force.revision, "went back to an older document"
        prepared = self.world.prepared
        if prepared is not None:
            assert to.revision != prepared.revision, "a prepared document came into force"
            only_prepared = prepared.ids() - self.may_serve - {self.world.fallback}
            assert not to.ids() & only_prepared, "routed to what is only prepared"

    def settle(self) -> None:
        for _ in range(STEPS_MAX):
            action = next_action(self.world)
            if action is None:
                return
            self.perform(action)
        raise AssertionError("does not come to rest")

    # --- what may happen, in any order --------------------------------------------------------

    @rule(live=versions, canary=st.none() | versions, bake_s=st.sampled_from([0.0, 10.0, 600.0]))
    def document(self, live: ServableId, canary: ServableId | None, bake_s: float) -> None:
        self.revision += 1
        aspiration = Aspiration(Revision(self.revision), live, canary, bake_s)
        self.may_serve |= aspiration.ids()
        self.world = replace(self.world, aspiration=aspiration, prepared=None, keeps=False)
        self.another_chance()

    def another_chance(self) -> None:
        """A new document is one for what failed before (the manager forgets it)."""
        for id, snapshot in list(self.world.servables.items()):
            if snapshot.state is State.FAILED:
                self.move(id, State.GONE)

    @rule(live=versions, canary=st.none() | versions, awaits_base=st.booleans())
    def document_to_prepare(
        self, live: ServableId, canary: ServableId | None, awaits_base: bool
    ) -> None:
        self.revision += 1
        prepared = Aspiration(Revision(self.revision), live, canary, 10.0)
        self.world = replace(self.world, prepared=prepared, awaits_base=awaits_base)
        self.another_chance()

    @precondition(lambda self: self.world.prepared is not None)
    @rule()
    def commit(self) -> None:
        """What is ready comes into force by swaps alone."""
        prepared = self.world.prepared
        assert prepared is not None
        self.may_serve |= prepared.ids()
        was_ready = all(map(self.world.is_good, prepared.ids()))
        self.world = replace(
            self.world, aspiration=prepared, prepared=None, awaits_base=False, keeps=False
        )
        if was_ready:
            action = next_action(self.world)
            assert isinstance(action, Swap)
            assert action.to.revision == prepared.revision
            assert (action.to.live, action.to.canary) == (prepared.live, prepared.canary)

    @rule()
    def abort(self) -> None:
        self.world = replace(self.world, prepared=None, awaits_base=False)

    @precondition(lambda self: self.world.prepared is not None)
    @rule()
    def abort_a_first_document(self) -> None:
        self.world = replace(
            self.world, aspiration=None, prepared=None, awaits_base=False, keeps=True
        )

    @rule()
    def base_is_known(self) -> None:
        self.world = replace(self.world, awaits_base=False)

    @rule()
    def document_deleted(self) -> None:
        self.world = replace(
            self.world,
            aspiration=None,
            fallback=None,
            prepared=None,
            awaits_base=False,
            keeps=False,
        )

    @rule(fallback=versions)
    def last_good(self, fallback: ServableId) -> None:
        self.may_serve |= {fallback}
        self.world = replace(self.world, fallback=fallback)

    @rule(is_tight=st.booleans())
    def memory(self, is_tight: bool) -> None:
        self.world = replace(self.world, is_tight=is_tight)

    @rule(is_tentative=st.booleans())
    def a_wave(self, is_tentative: bool) -> None:
        self.world = replace(self.world, is_tentative=is_tentative)

    @rule(data=st.data())
    def load_goes_on(self, data: st.DataObject) -> None:
        if under_way := [s for s in self.world.servables.values() if s.state in UNDERWAY]:
            snapshot = data.draw(st.sampled_from(under_way))
            order = [State.NEW, *PATH_TO_READY]
            self.move(snapshot.id, order[order.index(snapshot.state) + 1])

    @rule(data=st.data())
    def load_fails(self, data: st.DataObject) -> None:
        if under_way := [s for s in self.world.servables.values() if s.state in UNDERWAY]:
            self.move(data.draw(st.sampled_from(under_way)).id, State.FAILED)

    @rule(data=st.data())
    def quarantine(self, data: st.DataObject) -> None:
        if loaded := [s for s in self.world.servables.values() if s.state in LOADED]:
            self.move(data.draw(st.sampled_from(loaded)).id, State.QUARANTINED)

    @rule(data=st.data(), in_flight=st.integers(0, 2))
    def requests(self, data: st.DataObject, in_flight: int) -> None:
        if self.world.servables:
            snapshot = self.world.servables[
                data.draw(st.sampled_from(sorted(self.world.servables)))
            ]
            self.put(replace(snapshot, in_flight=in_flight))

    @rule(seconds=st.sampled_from([1.0, 11.0, 31.0, 601.0]))
    def time(self, seconds: float) -> None:
        self.world = replace(self.world, now_s=self.world.now_s + seconds)

    @rule()
    def one_step(self) -> None:
        if (action := next_action(self.world)) is not None:
            self.perform(action)

    @rule()
    def reconcile(self) -> None:
        self.settle()

    @precondition(lambda self: self.world.aspiration is not None)
    @rule()
    def left_alone_it_converges(self) -> None:
        """Every load succeeds and requests end: what is aspired is in force, the rest is gone."""
        aspiration = self.world.aspiration
        assert aspiration is not None
        for id, snapshot in list(self.world.servables.items()):
            if snapshot.state in (State.FAILED, State.QUARANTINED):
                self.move(id, State.GONE)
        self.world = replace(self.world, is_tight=False, is_tentative=False)
        for _ in range(STEPS_MAX):
            self.settle()
            for id, snapshot in list(self.world.servables.items()):
                self.put(replace(self.world.servables[id], in_flight=0))
                if snapshot.state in UNDERWAY:
                    order = [State.NEW, *PATH_TO_READY]
                    self.move(id, order[order.index(snapshot.state) + 1])
            self.world = replace(self.world, now_s=self.world.now_s + 100)
        in_force = self.world.in_force
        assert in_force.live == aspiration.live
        assert in_force.canary == aspiration.canary
        assert in_force.revision == aspiration.revision
        prepared = frozenset() if self.world.prepared is None else self.world.prepared.ids()
        assert set(self.world.servables) == in_force.ids() | prepared
        assert next_action(self.world) is None

    # --- the promises -------------------------------------------------------------------------

    @invariant()
    def at_most_one_live(self) -> None:
        live = [s.id for s in self.world.servables.values() if s.state is State.LIVE]
        assert len(live) <= 1
        assert not live or live == [self.world.in_force.live]

    @invariant()
    def a_good_version_keeps_serving(self) -> None:
        """Once reconciled, a model with a loaded live version routes to a good one."""
        after = self.world
        if after.aspiration is None and not after.is_kept:
            return
        route = after
        for _ in range(STEPS_MAX):
            action = next_action(route)
            if not isinstance(action, Swap):
                break
            route = replace(route, in_force=action.to)
        if after.is_good(after.in_force.live) or after.is_good(after.in_force.standby):
            assert route.is_good(route.in_force.live)


TestPolicy = PolicyMachine.TestCase
TestPolicy.settings = settings(max_examples=300, stateful_step_count=40, deadline=None)
