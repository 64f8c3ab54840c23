"""Rollouts in any order of events: what the plan may never do, whatever nodes and users do.

Nodes see documents and records late and each for itself; coordinators are replaced at any moment,
and with them all that was not written down.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from paddlewheel.rollout.plan import next_record
from paddlewheel.rollout.reading import SETTLE_S
from paddlewheel.rollout.world import NodeSeen, World
from registry.names import NodeId, Revision, Version
from registry.records import ModelStatus, ServableStatus
from registry.rollouts import (
    NONE_BEFORE,
    Order,
    OrderKind,
    Phase,
    RolloutRecord,
    Stand,
    is_gated,
    standing,
)
from registry.spec import ModelDocument
from tests.rollouts import AT, M, document

NODES = [NodeId(f"n{at}") for at in range(1, 5)]
ROLLOUTS = [
    "",
    "require_ack: 100",
    "require_ack: 50",
    "strategy: barrier",
    "strategy: barrier, require_ack: 50",
    "strategy: waves, waves: [{percent: 25, bake_s: 5}, {percent: 50, bake_s: 0}]",
    "strategy: waves, waves: [{percent: 25, bake_s: 0}, {percent: 50, bake_s: 0}]",
    "strategy: waves, require_ack: 50, waves: [{labels: {zone: a}, bake_s: 5}]",
]
DOCUMENTS = {rollout: document("1", rollout) for rollout in ROLLOUTS}


@dataclass
class Node:
    """One that does as `standing` says, with what it has seen."""

    id: NodeId
    labels: dict[str, str]
    is_draining: bool = False
    newest: Revision = NONE_BEFORE
    record: RolloutRecord | None = None
    refused: set[Revision] = field(default_factory=set[Revision])
    prepared: set[Revision] = field(default_factory=set[Revision])
    failed: set[Revision] = field(default_factory=set[Revision])
    applied: list[Revision] = field(default_factory=list[Revision])

    def status(self) -> ModelStatus:
        state = "FAILED" if self.newest in self.failed else "LOADING"
        return ModelStatus(
            model=M,
            node=self.id,
            revision=self.newest or None,
            accepted=self.newest not in self.refused,
            applied_revision=self.applied[-1] if self.applied else None,
            prepared_revision=max(self.prepared, default=None),
            servables=(ServableStatus(model=M, version=Version("1"), state=state),),
        )

    def can_serve(self, revision: Revision) -> bool:
        return revision in self.prepared


class Rollouts(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.revision = Revision(1)
        self.documents: dict[Revision, ModelDocument] = {}
        self.newest = NONE_BEFORE
        self.nodes: dict[NodeId, Node] = {}
        self.order: Order | None = None
        self.records: list[RolloutRecord] = []
        """All that were ever written."""
        self.waited_s = 0.0

    @initialize(rollout=st.sampled_from(ROLLOUTS), count=st.integers(0, 4))
    def begin(self, rollout: str, count: int) -> None:
        for at, id_ in enumerate(NODES[:count]):
            self.join(id_, at % 2 == 0)
        self.put("", 0)
        for node in self.nodes.values():
            self.do_well(node)
        self.put(rollout, 0)

    # --- users --------------------------------------------------------------------------------

    @rule(rollout=st.sampled_from(ROLLOUTS), but=st.integers(0, 3))
    def put(self, rollout: str, but: int) -> None:
        if but:
            return  # seldom: it ends what was under way
        self.revision = Revision(self.revision + 1)
        self.newest = self.revision
        self.documents[self.revision] = DOCUMENTS[rollout]

    @precondition(lambda self: self.newest)
    @rule(kind=st.sampled_from(list(OrderKind)), late=st.booleans(), but=st.integers(0, 2))
    def give_order(self, kind: OrderKind, late: bool, but: int) -> None:
        if but:
            return
        revision = Revision(self.newest - late)
        self.order = Order(order=kind, revision=revision, at=AT)

    # --- nodes --------------------------------------------------------------------------------

    @rule(id_=st.sampled_from(NODES), in_zone=st.booleans())
    def join_late(self, id_: NodeId, in_zone: bool) -> None:
        self.join(id_, in_zone)

    def join(self, id_: NodeId, in_zone: bool) -> None:
        self.nodes.setdefault(id_, Node(id_, {"zone": "a"} if in_zone else {}))

    @precondition(lambda self: self.nodes)
    @rule(data=st.data(), but=st.integers(0, 2))
    def leave(self, data: st.DataObject, but: int) -> None:
        if but:
            return
        del self.nodes[self.pick(data).id]

    @precondition(lambda self: self.nodes)
    @rule(data=st.data(), but=st.integers(0, 2))
    def drain(self, data: st.DataObject, but: int) -> None:
        if but:
            return
        self.pick(data).is_draining = True

    @precondition(lambda self: self.nodes and self.newest)
    @rule(data=st.data(), accepts=st.sampled_from([True, True, True, False]))
    def see_document(self, data: st.DataObject, accepts: bool) -> None:
        node = self.pick(data)
        node.newest = self.newest
        if not accepts and self.newest not in node.prepared:
            node.refused.add(self.newest)

    @precondition(lambda self: self.nodes)
    @rule(data=st.data())
    def see_record(self, data: st.DataObject) -> None:
        self.pick(data).record = self.record

    @precondition(lambda self: self.nodes)
    @rule(data=st.data(), well=st.sampled_from([True, True, True, False]))
    def load(self, data: st.DataObject, well: bool) -> None:
        node = self.pick(data)
        if node.newest and node.newest not in node.refused | node.prepared | node.failed:
            (node.prepared if well else node.failed).add(node.newest)

    @precondition(lambda self: self.nodes)
    @rule(data=st.data())
    def obey(self, data: st.DataObject) -> None:
        node = self.pick(data)
        if node.newest and node.newest not in node.refused:
            found = standing(self.documents[node.newest], node.newest, node.record, node.id)
            wanted = node.newest if found.stand is Stand.APPLY else found.base
            if node.can_serve(wanted):
                node.applied.append(wanted)

    @precondition(lambda self: self.nodes and self.newest)
    @rule(data=st.data(), looks=st.integers(0, 3))
    def one_does_well(self, data: st.DataObject, looks: int) -> None:
        """Else most rollouts would never get anywhere."""
        self.do_well(self.pick(data))
        self.look(looks)

    @precondition(lambda self: self.nodes and self.newest)
    @rule(looks=st.integers(0, 3))
    def all_do_well(self, looks: int) -> None:
        for node in self.nodes.values():
            self.do_well(node)
        self.look(looks)

    def do_well(self, node: Node) -> None:
        node.newest, node.record = self.newest, self.record
        if self.newest not in node.refused | node.failed:
            node.prepared.add(self.newest)
            found = standing(self.documents[self.newest], self.newest, self.record, node.id)
            if found.stand is Stand.APPLY:
                node.applied.append(self.newest)

    def pick(self, data: st.DataObject) -> Node:
        return self.nodes[data.draw(st.sampled_from(sorted(self.nodes)))]

    # --- the coordinator ----------------------------------------------------------------------

    @property
    def record(self) -> RolloutRecord | None:
        return self.records[-1] if self.records else None

    @rule(seconds=st.sampled_from([1.0, 5.0, 600.0]))
    def wait(self, seconds: float) -> None:
        self.waited_s += seconds
        self.step()

    @rule()
    def replace_coordinator(self) -> None:
        self.waited_s = 0.0

    @rule(times=st.integers(1, 3))
    def look(self, times: int) -> None:
        for _ in range(times):
            self.step()

    def step(self) -> None:
        world = self.world()
        record = next_record(world)
        if record is None:
            return
        self.check(world, record)
        self.records.append(record)
        self.waited_s = 0.0

    def world(self) -> World:
        return World(
            model=M,
            document=self.documents[self.newest],
            revision=self.newest,
            created=Revision(1),
            now=AT,
            record=self.record,
            order=self.order,
            waited_s=self.waited_s,
            nodes=tuple(
                NodeSeen(node.id, node.labels, node.is_draining, node.status(), SETTLE_S)
                for _, node in sorted(self.nodes.items())
            ),
        )

    # --- promises -----------------------------------------------------------------------------

    def check(self, world: World, record: RolloutRecord) -> None:
        """Of one step, by the world that it was made in: with the nodes' own state, not what the
        plan reads into their statuses."""
        before = self.record
        assert record.revision == self.newest
        assert before != record
        staying = [node for node in self.nodes.values() if not node.is_draining]
        ready = [node for node in staying if node.can_serve(record.revision)]
        asked = world.document.spec.rollout.require_ack / 100 * len(staying)
        if record.phase is Phase.COMMITTED and is_gated(world.document):
            assert staying
            if record.strategy == "immediate":
                accepted = [n for n in staying if n.newest == self.newest]
                assert len([n for n in accepted if self.newest not in n.refused]) >= asked
            elif record.strategy == "barrier":
                assert len(ready) >= max(asked, 1)
                left = {refusal.node for refusal in record.refused}
                assert all(n.can_serve(record.revision) for n in staying if n.id not in left)
            else:
                # One that joins during the last wave is told by the commit.
                serving = [node for node in staying if node.id in record.released]
                assert serving
                assert all(node.applied[-1] >= record.revision for node in serving)
        if before is not None and before.revision == record.revision:
            joining = set(record.released) - set(before.released)
            assert all(self.nodes[id_].can_serve(record.revision) for id_ in joining)
            if record.paused and before.paused:
                raise AssertionError("something was written while paused")

    @invariant()
    def an_end_is_an_end(self) -> None:
        for before, after in pairwise(self.records):
            if before.revision == after.revision:
                assert not before.has_ended
            else:
                assert after.revision > before.revision

    @invariant()
    def what_is_released_stays_released_until_it_is_aborted(self) -> None:
        for before, after in pairwise(self.records):
            if before.revision == after.revision and after.phase is not Phase.ABORTED:
                assert set(before.released) <= set(after.released)

    @invariant()
    def what_was_before_was_in_force(self) -> None:
        committed = {r.revision for r in self.records if r.phase is Phase.COMMITTED}
        plain = {r for r, each in self.documents.items() if not is_gated(each)}
        for record in self.records:
            assert record.previous < record.revision
            assert record.previous in committed | plain | {NONE_BEFORE}

    @invariant()
    def nothing_is_in_force_that_nobody_released(self) -> None:
        given = {
            (node, record.revision)
            for record in self.records
            for node in (NODES if record.phase is Phase.COMMITTED else record.released)
        }
        for node in self.nodes.values():
            for revision in node.applied:
                if is_gated(self.documents[revision]):
                    assert (node.id, revision) in given


Rollouts.TestCase.settings = settings(max_examples=150, stateful_step_count=50, deadline=None)
TestRollouts = Rollouts.TestCase
