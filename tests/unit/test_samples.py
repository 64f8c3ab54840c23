"""From a canary in force to what the coordinator reads: windows, their ends and the share."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import orjson
import pytest

from paddlewheel.samples import SampleWriter
from registry.canary import plan_id
from registry.keys import Keys
from registry.memory_store import MemoryStore
from registry.names import NodeId, Version
from registry.rollouts import CanaryProgress
from registry.samples import NodeSamples
from registry.session import Session
from registry.spec import ModelDocument, parse_model
from router.canary_watch import CanaryWatch
from router.table import RequestFacts
from tests.eventually import eventually
from tests.unit.manager_harness import FEEDS, MODEL, NODE, ManagedNode, managed, quarantine

pytestmark = pytest.mark.looptime

AT = datetime(2024, 5, 21, 8, 0, 0, tzinfo=UTC)
STEPS = {"steps": [{"percent": 20, "hold_s": 60}, {"percent": 50, "hold_s": 60}]}


def document(live: str = "1", **canary: object) -> ModelDocument:
    spec: dict[str, object] = {
        "live": live,
        "versions": [{"version": v, "source": f"/models/{v}"} for v in "123"],
        "rollback": {"bake_s": 0},
    }
    if canary:
        spec["canary"] = {"version": "2", **canary}
    text = {
        "apiVersion": "paddlewheel/v1", "kind": "Model", "metadata": {"name": MODEL}, "spec": spec
    }  # fmt: skip
    return parse_model(orjson.dumps(text), name=MODEL)


def progress(of: ModelDocument, percent: float, step: int = 0, **more: object) -> CanaryProgress:
    return CanaryProgress(
        version=Version("2"),
        plan=plan_id(of.spec) or "",
        step=step,
        percent=percent,
        since=AT + timedelta(minutes=step),
        **more,  # type: ignore[arg-type]
    )


def steer(node: ManagedNode, said: CanaryProgress | None) -> bool:
    """As the node does when the coordinator has said something."""
    view = node.manager.view(MODEL)
    assert view is not None
    changed = node.told.routes.steer(MODEL, said)
    if changed:
        node.told.routes.put(view)
    return changed


def share(node: ManagedNode, users: int = 1000) -> float:
    """Of users, by the routing table."""
    table = node.told.routes.serving.table
    picked = [
        table.pick(RequestFacts(MODEL, headers={"x-user-id": str(user)}, chance=0.5)).kind
        for user in range(users)
    ]
    return picked.count("canary") / users


def watch(node: ManagedNode) -> CanaryWatch | None:
    return node.told.routes.serving.watches.get(MODEL)


async def ask(node: ManagedNode, times: int = 1) -> None:
    """Requests of one user each, told to the watch as the front door does."""
    watch_ = watch(node)
    for user in range(times):
        choice = node.route.pick(RequestFacts(MODEL, headers={"x-user-id": str(user)}))
        served = await node.infer(chance=0.99)
        if watch_ is not None:
            watch_.answered(choice, served.inference, FEEDS, as_chosen=True)


async def test_the_coordinators_word_is_the_share(tmp_path: Path) -> None:
    of = document(**STEPS)
    async with managed(tmp_path) as node:
        await node.put_and_settle(of, 5)
        assert share(node) == 0, "no step was taken yet"
        assert steer(node, progress(of, 20))
        assert share(node) == pytest.approx(0.2, abs=0.05)
        assert not steer(node, progress(of, 20, verdict="pass", detail="fine")), "only words"
        assert steer(node, progress(of, 50, 1))
        assert share(node) == pytest.approx(0.5, abs=0.06)
        assert steer(node, progress(of, 0, 1, phase="failed"))
        assert share(node) == 0
        assert watch(node) is None
        assert steer(node, None)


async def test_a_failed_one_gets_nothing_by_rules_either_but_can_be_pinned(tmp_path: Path) -> None:
    of = document(**STEPS, rules=[{"percent": 100}])
    async with managed(tmp_path) as node:
        await node.put_and_settle(of, 5)
        assert share(node) == 1
        steer(node, progress(of, 0, phase="failed"))
        assert share(node) == 0
        table = node.told.routes.serving.table
        assert table.pick(RequestFacts(MODEL, version="2")).servable.version == "2"
        assert table.pick(RequestFacts(MODEL, label="canary")).servable.version == "2"


async def test_a_window_ends_with_its_step_and_with_its_servables(tmp_path: Path) -> None:
    of = document(**STEPS)
    async with managed(tmp_path) as node:
        await node.put_and_settle(of, 5)
        steer(node, progress(of, 20))
        first = watch(node)
        await ask(node, 30)
        assert first is not None
        assert first.stable.requests + first.canary.requests == 30
        steer(node, progress(of, 20, verdict="pass"))
        assert watch(node) is first, "words end nothing"
        steer(node, progress(of, 50, 1))
        second = watch(node)
        assert second is not None
        assert second is not first
        assert second.stable.requests == 0

        await node.put_and_settle(document("3", **STEPS), 6)
        third = watch(node)
        assert third is not None
        assert third is not second, "another live version, another comparison"
        node.quarantine(**{"2": quarantine()})
        await node.settle()
        assert watch(node) is None, "nothing is left to watch"


async def test_what_is_not_watched_costs_nothing(tmp_path: Path) -> None:
    async with managed(tmp_path) as node:
        await node.put_and_settle(document(), 5)
        assert watch(node) is None
        await node.put_and_settle(document(rules=[{"percent": 5}]), 6)
        assert watch(node) is None
        assert list(node.told.routes.windows.readings()) == []


async def test_counts_are_written_under_the_lease_and_taken_back(tmp_path: Path) -> None:
    of = document(**STEPS)
    keys, store = Keys(), MemoryStore()
    async with managed(tmp_path) as node, Session(store, ttl_s=3) as session:
        writer = SampleWriter(node.told.routes.windows, session, keys, NODE)
        await node.put_and_settle(of, 5)
        steer(node, progress(of, 20))
        await ask(node, 50)
        writer.write()
        assert await session.settled(5)
        kv = await store.get(keys.samples(MODEL, NODE))
        assert kv is not None
        assert kv.lease == session.lease
        said = NodeSamples.from_json(kv.value)
        assert (said.version, said.since) == ("2", AT)
        assert said.stable.requests + said.canary.requests == 50
        assert said.canary.requests > 0
        assert said.stable.answered == said.stable.requests
        revision = kv.mod_revision
        writer.write()
        assert await session.settled(5)
        again = await store.get(keys.samples(MODEL, NODE))
        assert again is not None
        assert again.mod_revision == revision, "written on change only"

        await node.put_and_settle(document(), 6)
        writer.write()

        async def is_gone() -> bool:
            return await store.get(keys.samples(MODEL, NODE)) is None

        await eventually(is_gone, within_s=5)


async def test_a_mirrors_counters_outlast_its_windows(tmp_path: Path) -> None:
    of = document(**STEPS, mirror={"percent": 100})
    async with managed(tmp_path) as node:
        await node.put_and_settle(of, 5)
        for step, percent in enumerate((20, 50)):
            steer(node, progress(of, percent, step))
            now = watch(node)
            assert now is not None
            assert now.mirror is not None
            for _ in range(3):
                choice = node.route.pick(RequestFacts(MODEL, headers={"x-user-id": "9"}))
                served = await node.infer(version="1")
                now.answered(choice, served.inference, FEEDS, as_chosen=True)
                await node.passes(1)
        (window,) = node.told.routes.windows.samples(NodeId("n1"))
        shown = {r.name: r.samples[0][1] for r in node.told.routes.windows.readings()}
        assert window.mirror.agreed + window.mirror.differed == 3
        assert shown["mirror_compared"] == 6
        assert shown["canary_percent"] == 50
