"""Canaries that grow by themselves, on real nodes behind a real gateway, under judged traffic."""

from __future__ import annotations

import json
import re
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import pytest_asyncio

from paddlewheel.bench.load_process import PlannedRequest
from paddlewheel.bench.samples import Result
from registry.events import EventType, read_events
from registry.names import ModelName
from registry.rollouts import CanaryProgress, Order, OrderKind, RolloutRecord
from registry.samples import NodeSamples
from registry.spec import ModelDocument, parse_model
from router.rules import user_bucket
from tests.etcd import EtcdCluster, etcd_cluster
from tests.eventually import eventually
from tests.fault.rollback_stage import Fleet, fleet_of, steady
from tests.fleet import start_gateway
from tests.node import Command
from tests.served import KEYS, Models, Traffic

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(180)]

NODES = ("n1", "n2")
USERS = 120
LIMITS = {"timeout_s": 15, "hang_s": 5, "queue": 4000}
GATES = {"min_samples": 40, "p95_ratio": 30, "error_rate": 0.05}
"""A machine that tests share is noisy: 30 times the time of a small MLP is still a moment."""


class CanaryModels(Models):
    """Every request is some user's, and its name in the result says whose."""

    def requests(self) -> tuple[PlannedRequest, ...]:
        return tuple(
            replace(
                planned,
                name=f"user-{place % USERS}",
                data=planned.data.replace(
                    b"\r\n", f"\r\nX-User-Id: user-{place % USERS}\r\n".encode(), 1
                ),
            )
            for place, planned in enumerate(super().requests())
        )


@pytest.fixture(scope="module")
def cluster() -> Iterator[EtcdCluster]:
    with etcd_cluster() as cluster:
        yield cluster


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def fleet(
    cluster: EtcdCluster, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Fleet]:
    async with fleet_of(cluster, tmp_path_factory.mktemp("nodes"), *NODES) as fleet:
        yield fleet


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def gateway(
    cluster: EtcdCluster, fleet: Fleet, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Command]:
    gateway = await start_gateway(cluster, tmp_path_factory.mktemp("gateway"))
    yield gateway
    await gateway.end()
    assert not [e for e in gateway.events() if e.get("level") == "error"], gateway.tail()


class Stage:
    """One model with a canary, version 2, beside version 1."""

    def __init__(self, fleet: Fleet, gateway: Command, models: CanaryModels) -> None:
        self.fleet = fleet
        self.gateway = gateway
        self.models = models
        self.rollback: dict[str, Any] = {"bake_s": 3600}

    async def serve(self, steps: Sequence[tuple[float, float]] = (), **canary: Any) -> None:
        """Put the document; returns once both nodes serve live and canary."""
        written = [{"percent": percent, "hold_s": hold_s} for percent, hold_s in steps]
        self.models.spec = {
            "limits": LIMITS,
            "rollback": self.rollback,
            "canary": {"version": "2", "gates": GATES, "steps": written, **canary},
        }
        revision = await self.models.put(self.fleet.store, "1")
        await self.fleet.until_serves(self.models.name, "1", canary="2", revision=revision)

        async def is_known() -> bool:
            return (await self.routes(self.gateway.http)).get("canary") is not None

        await eventually(is_known, within_s=10, what="the gateway knows the canary")

    async def record(self) -> RolloutRecord | None:
        kv = await self.fleet.store.get(KEYS.rollout(self.models.name))
        return None if kv is None else RolloutRecord.from_json(kv.value)

    async def document(self) -> ModelDocument:
        kv = await self.fleet.store.get(KEYS.model(self.models.name))
        assert kv is not None
        return parse_model(kv.value, name=self.models.name)

    async def until(
        self, holds: Callable[[CanaryProgress], bool], *, within_s: float, what: str
    ) -> CanaryProgress:
        last: list[CanaryProgress | None] = [None]

        async def is_so() -> bool:
            record = await self.record()
            last[0] = None if record is None else record.canary
            return last[0] is not None and holds(last[0])

        try:
            await eventually(is_so, within_s=within_s)
        except AssertionError:
            raise AssertionError(
                f"not within {within_s:g} s: {what}: {last[0]}\n{await self.samples()}"
            ) from None
        assert last[0] is not None
        return last[0]

    async def samples(self) -> list[NodeSamples]:
        listing = await self.fleet.store.list_prefix(KEYS.samples_prefix(self.models.name))
        return [NodeSamples.from_json(kv.value) for kv in listing.kvs]

    async def routes(self, http: str) -> dict[str, Any]:
        async with aiohttp.ClientSession() as session, session.get(f"{http}/admin/routes") as got:
            return dict((await got.json())["models"].get(self.models.name) or {})

    async def until_shared(self, percent: float | None) -> None:
        """Until all nodes and the gateway give the canary that much; ``None``: have no step."""

        async def is_so() -> bool:
            for http in self.doors:
                step = ((await self.routes(http)).get("canary") or {}).get("step")
                if (None if step is None else step["percent"]) != percent:
                    return False
            return True

        await eventually(is_so, within_s=5, what=f"{percent} % everywhere")

    @property
    def doors(self) -> list[str]:
        return [*(self.fleet[id].http for id in NODES), self.gateway.http]

    async def events(self, kind: EventType) -> list[Any]:
        told = [event async for event in read_events(self.fleet.store, KEYS)]
        return [e for e in told if (e.type, e.subject) == (kind, self.models.name)]

    async def is_told(self, kind: EventType) -> None:
        async def told() -> bool:
            return bool(await self.events(kind))

        await eventually(told, within_s=5, what=kind)

    async def answers(self, running: Traffic) -> tuple[set[str], Result]:
        """The versions that answer from now on for a moment, and all of the traffic."""
        from_s = time.monotonic()
        await eventually(lambda: time.monotonic() > from_s + 0.6, within_s=5)
        result = await running.stop()
        return {each.version for each in result.samples if each.due_s > from_s}, result

    async def order(self, kind: OrderKind) -> None:
        """What ``paddlewheel pause``, ``resume`` and ``abort`` write."""
        record = await self.record()
        assert record is not None
        given = Order(order=kind, revision=record.revision, at=record.since, by="tester")
        await self.fleet.store.put(KEYS.order(self.models.name), given.to_json())


@pytest_asyncio.fixture(loop_scope="module")
async def stage(
    fleet: Fleet, gateway: Command, request: pytest.FixtureRequest, tmp_path: Path
) -> AsyncIterator[Stage]:
    name = re.sub("[^a-z0-9]+", "-", request.node.name.removeprefix("test_"))[:60].strip("-")
    stage = Stage(fleet, gateway, CanaryModels(tmp_path, name=ModelName(name)))
    yield stage
    await fleet.store.delete(KEYS.model(stage.models.name))
    await fleet.store.delete(KEYS.order(stage.models.name))


async def test_a_good_one_is_promoted_through_its_steps_and_users_stay(stage: Stage) -> None:
    await stage.serve([(20, 0.5), (50, 0.5)])
    async with steady(stage.gateway, stage.models, rate_per_s=150) as running:
        await stage.until(lambda seen: seen.step == 1, within_s=20, what="the second step")
        await stage.fleet.until_serves(stage.models.name, "2", standby="1", within_s=20)
        versions_now, result = await stage.answers(running)
    assert versions_now == {"2"}
    document = await stage.document()
    assert (document.spec.live, document.spec.canary) == ("2", None)

    versions: dict[str, list[str]] = defaultdict(list)
    for sample in sorted(result.samples, key=lambda sample: sample.due_s):
        versions[sample.name].append(sample.version)
    assert len(versions) == USERS
    for user, seen in versions.items():
        assert seen == sorted(seen), f"{user} was moved out: {seen}"
    first = {user for user, seen in versions.items() if seen[0] == "2"}
    assert first <= {u for u in versions if user_bucket(stage.models.name, u) < 2000}
    await stage.is_told(EventType.CANARY_PASSED)
    assert len(await stage.events(EventType.CANARY_STEP)) == 2

    async def are_gone() -> bool:
        return not await stage.samples()

    await eventually(are_gone, within_s=5, what="no samples once nothing is watched")


CODES_OFF = {"bake_s": 3600, "consecutive": 100_000}
FAILING: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "slow": ({"kind": "slow", "delay_ms": 120, "count": 10_000}, {"p95_ratio": 8}, "p95: canary"),
    # With codes off, only the gate stands against it.
    "error": ({"kind": "code", "code": 2, "count": 10_000, "share": 0.5}, {}, "errors: canary"),
    "quarantine": (
        {"kind": "code", "code": 700, "count": 3}, {"error_rate": 1}, "2 is quarantined: "
    ),
}  # fmt: skip


@pytest.mark.parametrize("how", FAILING)
async def test_a_bad_one_goes_to_nothing(stage: Stage, how: str) -> None:
    drill, gates, why = FAILING[how]
    if how == "error":
        stage.rollback = CODES_OFF
    await stage.serve([(15, 600)], gates={**GATES, **gates})
    await stage.until(lambda seen: seen.percent == 15, within_s=10, what="the first step")
    await stage.until_shared(15)
    before = await stage.document()
    async with steady(stage.gateway, stage.models, rate_per_s=80) as running:
        armed = [
            await stage.fleet[id].drill(stage.models.name, version="2", **drill) for id in NODES
        ]
        failed = await stage.until(lambda seen: seen.phase == "failed", within_s=25, what="failed")
        await stage.until_shared(None)
        versions_now, _ = await stage.answers(running)
    assert versions_now == {"1"}
    assert failed.percent == 0
    assert (failed.detail or "").startswith(why), failed.detail
    assert await stage.document() == before, "never rewritten by a failure"
    for id, drill_id in zip(NODES, armed, strict=True):
        await stage.fleet[id].call("DELETE", f"/admin/drill/{drill_id}")
    await stage.is_told(EventType.CANARY_FAILED)


async def test_too_little_traffic_holds_and_users_are_the_same_everywhere(stage: Stage) -> None:
    """2,000 user ids, asked of both nodes and of the gateway; and what real requests get."""
    await stage.serve([(10, 0.2), (35, 0.2)], sticky={"header": "X-Account"})
    held = await stage.until(
        lambda seen: seen.verdict == "inconclusive", within_s=10, what="inconclusive"
    )
    assert (held.step, held.percent) == (0, 10)
    assert "of at least 40" in (held.detail or "")
    await stage.until_shared(10)
    ids = [f"account-{number}" for number in range(300)]
    wanted = {id: user_bucket(stage.models.name, id) < 1000 for id in ids}
    url = f"/admin/explain?model={stage.models.name}&header=X-Account:"
    async with aiohttp.ClientSession() as session:

        async def explained(http: str, id: str) -> tuple[bool, str | None]:
            async with session.get(http + url + id) as answer:
                said = await answer.json()
            rule = said["rule"]
            return said["route"] == "canary", None if rule is None else rule["kind"]

        for http in stage.doors:
            for id in ids:
                assert await explained(http, id) == (wanted[id], "step" if wanted[id] else None)
        body = json.dumps({"inputs": {"x": [[0.5] * 64]}}).encode()
        predict = f"/v1/models/{stage.models.name}/predict"
        for place, id in enumerate(ids[:60]):
            http = stage.doors[place % len(stage.doors)]
            async with session.post(
                http + predict,
                data=body,
                headers={"X-Account": id, "Content-Type": "application/json"},
            ) as answer:
                assert answer.status == 200
                assert answer.headers["X-Model-Version"] == ("2" if wanted[id] else "1")
    seen = await stage.until(lambda seen: True, within_s=1, what="")
    assert seen.step == 0, f"went on with 60 requests: {seen}"


async def test_paused_it_holds_aborted_it_ends(stage: Stage) -> None:
    await stage.serve([(20, 0.2), (50, 600)])
    await stage.until(lambda seen: seen.percent == 20, within_s=10, what="the first step")
    await stage.order(OrderKind.PAUSE)
    async with steady(stage.gateway, stage.models, rate_per_s=150):
        await stage.until(
            lambda seen: (seen.detail or "").startswith("paused; ") and seen.verdict == "pass",
            within_s=20,
            what="paused",
        )
        await stage.order(OrderKind.RESUME)
        await stage.until(lambda seen: seen.step == 1, within_s=10, what="the second step")
        await stage.order(OrderKind.ABORT)
        ended = await stage.until(lambda seen: seen.phase == "failed", within_s=5, what="aborted")
        await stage.until_shared(None)
    assert ended.detail == "aborted by tester"


async def test_faults_in_copies_take_a_shadow_out_before_it_answered_anybody(stage: Stage) -> None:
    await stage.serve(mirror={"percent": 100})
    for id in NODES:
        await stage.fleet[id].drill(stage.models.name, version="2", kind="code", code=-101, count=3)
    async with steady(stage.gateway, stage.models, rate_per_s=60) as running:

        async def is_out() -> bool:
            return await stage.fleet.quarantine(stage.models.name, "2") is not None

        await eventually(is_out, within_s=15, what="quarantined")
        result = await running.stop()
    assert result.by(lambda sample: sample.version).keys() == {"1"}


async def test_a_shadow_is_compared_and_judged_without_any_traffic(stage: Stage) -> None:
    """Both versions tell who they are in one output, so exact answers never agree."""
    await stage.serve(mirror={"percent": 100}, gates={**GATES, "agreement": 0.9})
    async with steady(stage.gateway, stage.models, rate_per_s=100) as running:
        failed = await stage.until(lambda seen: seen.phase == "failed", within_s=20, what="failed")
        result = await running.stop()
    assert result.by(lambda sample: sample.version).keys() == {"1"}
    assert (failed.detail or "").startswith("agreement: 0 of ")
    counted: dict[str, float] = defaultdict(float)
    async with aiohttp.ClientSession() as session:
        for id in NODES:
            async with session.get(f"{stage.fleet[id].http}/metrics") as answer:
                for line in (await answer.text()).splitlines():
                    if f'model="{stage.models.name}"' in line:
                        counted[line.split("{")[0]] += float(line.split()[-1])
                        is_request = line.startswith("paddlewheel_requests_total")
                        assert not (is_request and 'version="2"' in line), line
    assert counted["paddlewheel_requests_total"] >= len(result)
    assert counted["paddlewheel_mirror_differed_total"] > 0
    assert counted["paddlewheel_mirror_agreed_total"] == 0
    assert counted["paddlewheel_mirror_failed_total"] == 0
