"""Pipelines over HTTP, on deterministic predictors and transforms: order, snapshots, errors."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import itertools
import json
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
from aiohttp import web

from paddlewheel.bench.checks import infer_body, read_outputs
from registry.inference import Array, BadInput, Overloaded, ServableFailed, Signature, TensorSpec
from registry.names import ModelName, NodeId, Revision, ServableId
from registry.pipeline_records import PipelineStatus
from registry.pipeline_spec import parse_pipeline
from registry.spec import HeaderRule, PercentRule
from registry.store import KeyValue, Put
from router.access.errors import NotPermitted
from router.app import App
from router.http_pipeline import VERSIONS_HEADER
from router.pipeline.plan import plan_of
from router.pipeline.ports import Pipeline, Pipelines
from router.rules import compile_rules
from tests.eventually import eventually
from tests.fleets import KEYS, fold, node_record, put
from tests.gateways import gateway
from tests.integration.test_http_support import (
    ONE,
    SIMPLE,
    NumpyPredictor,
    one_model,
    running,
    servable,
    serving,
)
from tests.pipelines import Answer, Step, call, document

REVISION = Revision(9)
X = [[1.0, 2.0, 3.0]]
CHAIN: tuple[Step, ...] = (
    {"name": "a", "model": "first", "inputs": {"x": "request.x"}},
    {"name": "b", "model": "second", "inputs": {"x": "a.0"}},
)
ROWS = TensorSpec("x", "float32", (-1, 3))


def keep_positive(x: Array) -> Mapping[str, Array]:
    return {"x": np.ascontiguousarray(x[x[:, 0] > 0])}


def decode(raw: Array) -> Mapping[str, Array]:
    if len(raw[0]) % 12:
        raise BadInput("want rows of 12 bytes")
    return {"x": np.frombuffer(raw[0], np.float32).reshape(-1, 3)}


@dataclass
class LocalTransforms:
    """What the node's processes would do, in this one."""

    signatures: Mapping[str, Signature] = field(
        default_factory=lambda: {
            "keep-positive": Signature((ROWS,), (ROWS,)),
            "decode": Signature((TensorSpec("raw", "bytes", (1,)),), (ROWS,)),
        }
    )

    async def run(
        self, name: str, feeds: Mapping[str, Array], *, deadline_s: float
    ) -> Mapping[str, Array]:
        functions: Mapping[str, Callable[..., Mapping[str, Array]]] = {
            "keep-positive": keep_positive, "decode": decode,
        }  # fmt: skip
        return functions[name](**feeds)


def pipelines(*texts: bytes) -> Pipelines:
    by_name: dict[str, Pipeline] = {}
    for text in texts:
        parsed = parse_pipeline(text, name=None)
        status = {"revision": REVISION, "accepted": True, "error": None}
        by_name[parsed.name] = Pipeline(parsed.name, plan_of(parsed, REVISION), status)
    return Pipelines(by_name)


@dataclass
class World:
    app: App
    url: str
    first: NumpyPredictor
    second: NumpyPredictor

    async def predict(self, x: Any = X, name: str = "p", **headers: str) -> Answer:
        named = {key.replace("_", "-"): value for key, value in headers.items()}
        return await call(
            f"{self.url}/v1/pipelines/{name}/predict", {"inputs": {"x": x}}, headers=named
        )


@contextlib.asynccontextmanager
async def world(*steps: Step, others: tuple[Any, ...] = (), **spec: Any) -> AsyncIterator[World]:
    """``first`` 1 doubles and ``second`` 1 adds nothing, times three; the pipeline is ``p``."""
    first, second = one_model("first", "1", ONE, 2.0), one_model("second", "1", ONE, 3.0)
    async with running(serving(first, second, *others)) as (app, url):
        app.publish_pipelines(pipelines(document("p", steps or CHAIN, **spec)), LocalTransforms())
        yield World(app, url, first[1][0], second[1][0])


def outputs(answer: Answer) -> Any:
    assert answer.status == 200, answer.body
    return answer.json["outputs"]["y"]


async def test_one_step_after_the_other() -> None:
    async with world() as w:
        answer = await w.predict()
        assert outputs(answer) == [[6.0, 12.0, 18.0]]
        assert answer.json["versions"] == {"a": "1", "b": "1"}
        assert (answer.json["model"], answer.json["version"]) == ("p", str(REVISION))
        assert answer.headers[VERSIONS_HEADER] == "a=1,b=1"
        assert answer.headers["X-Pipeline-Name"] == "p"
        assert answer.headers["X-Config-Revision"] == str(REVISION)
        assert answer.headers["Server-Timing"].startswith("a;dur=")

        headers, body = infer_body({"x": np.array(X, np.float32)}, binary=True)
        binary = await call(f"{w.url}/v2/models/p/infer", body, headers=headers)
        shown = {key.lower(): value for key, value in binary.headers.items()}
        assert read_outputs(shown, binary.body)["y"].tolist() == outputs(answer)


async def test_branches_run_side_by_side_and_meet() -> None:
    diamond = (
        {"name": "l", "model": "first", "inputs": {"x": "request.x"}},
        {"name": "r", "model": "second", "inputs": {"x": "request.x"}},
    )
    async with world(*diamond, outputs={"y": "l.0", "z": "r.0"}) as w:
        w.first.holding = w.second.holding = asyncio.Event()
        asked = asyncio.create_task(w.predict())
        await eventually(lambda: (w.first.calls, w.second.calls) == (1, 1), within_s=5)
        w.first.holding.set()
        answer = await asked
        assert answer.json["outputs"] == {"y": [[2.0, 4.0, 6.0]], "z": [[3.0, 6.0, 9.0]]}


async def test_a_failing_step_is_named_and_ends_the_others() -> None:
    branches = (
        {"name": "l", "model": "first", "inputs": {"x": "request.x"}},
        {"name": "r", "model": "second", "inputs": {"x": "request.x"}},
    )
    async with world(*branches, outputs={"y": "l.0", "z": "r.0"}) as w:
        w.first.holding = asyncio.Event()
        w.second.failing = lambda _: Overloaded("the queue is full", retry_after_s=7)
        answer = await w.predict()
        assert answer.status == 503
        assert answer.json["error"] == "step 'r' (model second): the queue is full"
        assert answer.headers["Retry-After"] == "7"
        assert w.first.cancelled == 1
        metrics = (await call(f"{w.url}/metrics")).body.decode()
        failed = (
            'paddlewheel_pipeline_step_failures_total{outcome="unavailable",pipeline="p",step="r"}'
        )
        assert f"{failed} 1.0" in metrics


async def test_a_request_keeps_the_versions_it_began_with() -> None:
    async with world() as w:
        w.first.holding = asyncio.Event()
        asked = asyncio.create_task(w.predict())
        await eventually(lambda: w.first.calls == 1, within_s=5)
        assert w.second.in_flight == 1, "held: its step is still to come"
        newer = [one_model(name, "2", ONE, 100.0) for name in ("first", "second")]
        w.app.publish(serving(*newer))
        w.first.holding.set()
        answer = await asked
        assert answer.headers[VERSIONS_HEADER] == "a=1,b=1"
        assert outputs(answer) == [[6.0, 12.0, 18.0]]
        assert w.second.in_flight == 0
        after = await w.predict()
        assert after.headers[VERSIONS_HEADER] == "a=2,b=2"


async def test_what_fails_is_run_again_on_the_standby() -> None:
    route, behind = one_model("second", "2", ONE, 3.0)
    standby = NumpyPredictor(servable("second", "1"), ONE, 3.0)
    behind[0].failing = lambda _: ServableFailed("code 700", code="700", fault_class="sticky")
    async with world() as w:
        first = one_model("first", "1", ONE, 2.0)
        w.app.publish(serving(first, (replace(route, standby=standby.id), [*behind, standby])))
        answer = await w.predict()
        assert outputs(answer) == [[6.0, 12.0, 18.0]]
        assert answer.headers[VERSIONS_HEADER] == "a=1,b=1"


def with_canary(*rules: Any) -> tuple[Any, Any]:
    """``first`` 1 with the canary 2."""
    route, behind = one_model("first", "1", ONE, 2.0)
    canary = NumpyPredictor(servable("first", "2"), ONE, 5.0)
    compiled = compile_rules(ModelName("first"), rules)
    pinned: dict[Any, ServableId] = {**route.pinned, canary.id.version: canary.id}
    routed = replace(route, canary=canary.id, rules=compiled, pinned=pinned)
    return routed, [*behind, canary]


async def test_rules_decide_once_for_all_steps_of_a_model() -> None:
    twice = (
        {"name": "a", "model": "first", "inputs": {"x": "request.x"}},
        {"name": "b", "model": "first", "inputs": {"x": "a.0"}},
        {"name": "c", "model": "first", "label": "stable", "inputs": {"x": "b.0"}},
        {"name": "d", "model": "first", "version": "2", "inputs": {"x": "c.0"}},
    )
    async with world(*twice) as w:
        w.app.publish(serving(with_canary(PercentRule(percent=50))))
        seen = {(await w.predict()).headers[VERSIONS_HEADER] for _ in range(40)}
        assert seen == {"a=1,b=1,c=1,d=2", "a=2,b=2,c=1,d=2"}
        w.app.publish(serving(with_canary(HeaderRule(name="X-Canary", equals="1"))))
        assert (await w.predict(X_Canary="1")).headers[VERSIONS_HEADER] == "a=2,b=2,c=1,d=2"
        pinned = await w.predict(X_Model_Version="2")
        assert pinned.headers[VERSIONS_HEADER] == "a=1,b=1,c=1,d=2", "it pins models, not pipelines"


async def test_no_rows_skip_the_models_behind() -> None:
    steps = (
        {"name": "keep", "transform": "keep-positive", "inputs": {"x": "request.x"}},
        {"name": "a", "model": "first", "inputs": {"x": "keep.x"}},
    )
    async with world(*steps) as w:
        assert outputs(await w.predict([[1.0, 0, 0], [-1.0, 0, 0]])) == [[2.0, 0.0, 0.0]]
        assert w.first.calls == 1
        answer = await w.predict([[-1.0, 0, 0]])
        assert outputs(answer) == []
        assert answer.headers[VERSIONS_HEADER] == "a=1", "what it would have run on"
        assert w.first.calls == 1


async def test_a_raw_body_and_base64() -> None:
    steps = (
        {"name": "decode", "transform": "decode", "inputs": {"raw": "request.raw"}},
        {"name": "a", "model": "first", "inputs": {"x": "decode.x"}},
    )
    raw = np.array(X, np.float32).tobytes()
    async with world(*steps, inputs=[{"name": "raw"}]) as w:
        url = f"{w.url}/v1/pipelines/p/predict"
        for kind in ("image/png", "application/octet-stream"):
            answer = await call(url, raw, headers={"Content-Type": kind})
            assert outputs(answer) == [[2.0, 4.0, 6.0]]
        text = base64.b64encode(raw).decode()
        for value in ({"b64": text}, [{"b64": text}]):
            assert outputs(await call(url, {"inputs": {"raw": value}})) == [[2.0, 4.0, 6.0]]
        element = {"name": "raw", "datatype": "BYTES", "shape": [1]}
        sized = {**element, "parameters": {"binary_data_size": len(raw) + 4}}
        head = json.dumps({"inputs": [sized]}).encode()
        binary = await call(
            f"{w.url}/v2/models/p/infer",
            head + len(raw).to_bytes(4, "little") + raw,
            headers={"Inference-Header-Content-Length": str(len(head))},
        )
        assert binary.status == 200, binary.body
        refused = await call(url, b"short", headers={"Content-Type": "image/png"})
        assert (refused.status, "step 'decode'" in refused.json["error"]) == (400, True)
        empty = await call(url, b"", headers={"Content-Type": "image/png"})
        assert empty.status == 400


async def test_deadlines_are_shared_and_a_steps_own() -> None:
    slow = ({**CHAIN[0], "timeout_s": 0.1}, CHAIN[1])
    async with world(*slow) as w:
        w.first.holding = asyncio.Event()
        answer = await w.predict()
        assert answer.status == 504
        assert "step 'a'" in answer.json["error"]
    async with world() as w:
        w.second.holding = asyncio.Event()
        answer = await w.predict(X_Request_Timeout_Ms="100")
        assert answer.status == 504
        assert "step 'b'" in answer.json["error"]


async def test_whose_fault_it_is() -> None:
    refuse: Callable[[int], BadInput] = lambda _: BadInput("InvalidArgument")  # noqa: E731
    async with world() as w:
        w.first.failing = refuse
        assert (await w.predict()).status == 400, "the client's own tensor"
        w.first.failing = lambda _: None
        w.second.failing = refuse
        assert (await w.predict()).status == 500, "a tensor that a step made"
        assert (await w.predict([[1.0]])).status == 400
        assert (await w.predict(name="q")).status == 404
        bodies: list[Any] = [b"{", {"inputs": {}}, {"inputs": {"x": X, "z": 1}}]
        for body in bodies:
            answer = await call(f"{w.url}/v1/pipelines/p/predict", body)
            assert answer.status == 400, body


NOT_READY: dict[str, tuple[tuple[Step, ...], str]] = {
    "a model that is not there": (
        ({**CHAIN[0], "model": "third"}, CHAIN[1]), "step 'a': unknown model 'third'",
    ),
    "a version that is not there": (({**CHAIN[0], "version": "8"}, CHAIN[1]), "version '8'"),
    "no canary": (({**CHAIN[0], "label": "canary"}, CHAIN[1]), "no canary"),
    "an output that there is not": (
        (CHAIN[0], {**CHAIN[1], "inputs": {"x": "a.z"}}), "step 'a' has no output 'z'",
    ),
    "a position that there is not": (
        (CHAIN[0], {**CHAIN[1], "inputs": {"x": "a.1"}}), "step 'a' has no output '1'",
    ),
    "an input that there is not": (
        (CHAIN[0], {**CHAIN[1], "inputs": {"x": "a.0", "q": "a.0"}}), "no input 'q'",
    ),
    "an input that nothing gives": (
        ({**CHAIN[0], "model": "simple"}, {**CHAIN[1], "inputs": {"x": "a.1"}}), "takes 'n'",
    ),
    "tensors that do not fit": (
        (
            {"name": "a", "model": "simple", "inputs": {"x": "request.x", "n": "request.n"}},
            {"name": "b", "model": "second", "inputs": {"x": "a.1"}},
        ),
        "takes 'x' as FP32 [-1, 3], a.1 is FP32 [-1, 4]",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", NOT_READY)
async def test_what_can_not_be_run_says_why_and_is_not_ready(case: str) -> None:
    steps, why = NOT_READY[case]
    names = sorted({"x"} | ({"n"} if "request.n" in str(steps) else set()))
    inputs = [{"name": name} for name in names]
    async with world(*steps, inputs=inputs, others=(one_model("simple", "1", SIMPLE),)) as w:
        answer = await w.predict()
        assert answer.status == 503
        ready = await call(f"{w.url}/v2/models/p/ready")
        shown = (await call(f"{w.url}/v1/pipelines/p")).json
        assert (ready.status, ready.json["ready"], shown["ready"]) == (503, False, False)
        for text in (answer.json["error"], ready.json["error"], shown["reason"]):
            assert why.replace("a.1 is", "a.scaled is") in text


async def test_what_is_told_of_it() -> None:
    async with world() as w:
        assert (await call(f"{w.url}/v1/pipelines")).json == {"pipelines": ["p"]}
        shown = (await call(f"{w.url}/v1/pipelines/p")).json
        assert shown["ready"] is True
        assert [(s["name"], s["model"], s["version"]) for s in shown["steps"]] == [
            ("a", "first", "1"), ("b", "second", "1"),
        ]  # fmt: skip
        tensor = {"datatype": "FP32", "shape": [-1, 3]}
        for at in ("", f"/versions/{REVISION}"):
            described = (await call(f"{w.url}/v2/models/p{at}")).json
            assert described == {
                "name": "p", "versions": [str(REVISION)], "platform": "paddlewheel_pipeline",
                "inputs": [{"name": "x", **tensor}], "outputs": [{"name": "y", **tensor}],
            }  # fmt: skip
            assert (await call(f"{w.url}/v2/models/p{at}/ready")).status == 200
        assert (await call(f"{w.url}/v2/models/p/versions/8")).status == 404
        assert (await call(f"{w.url}/v1/pipelines/q")).status == 404
        assert (await call(f"{w.url}/v1/pipelines/p/predict")).status == 405
        await w.predict()
        metrics = (await call(f"{w.url}/metrics")).body.decode()
        assert 'paddlewheel_pipeline_requests_total{outcome="ok",pipeline="p"} 1.0' in metrics
        assert 'step_duration_seconds_count{pipeline="p",step="b"} 1.0' in metrics
        own = 'requests_total{model="second",outcome="ok",route="stable",version="1"} 1.0'
        assert own in metrics, "a step is a request of its model"


async def test_a_model_of_the_same_name_comes_first() -> None:
    async with world(others=(one_model("p", "7", ONE, 9.0),)) as w:
        headers, body = infer_body({"x": np.array(X, np.float32)}, binary=False)
        answer = await call(f"{w.url}/v2/models/p/infer", body, headers=headers)
        assert answer.headers["X-Model-Version"] == "7"
        assert outputs(await w.predict()) == [[6.0, 12.0, 18.0]]


async def test_before_the_documents_were_read_it_may_exist() -> None:
    async with world() as w:
        w.app.publish_pipelines(Pipelines({}, is_complete=False), LocalTransforms())
        answer = await w.predict()
        assert answer.status == 503
        refused = Pipeline(ModelName("p"), None, {"error": "spec: wrong"})
        w.app.publish_pipelines(Pipelines({"p": refused}), LocalTransforms())
        answer = await w.predict()
        assert (answer.status, "spec: wrong" in answer.json["error"]) == (503, True)


@dataclass
class OnlyModels:
    """Lets everybody use all but the pipeline ``p``."""

    body_timeout_s: float | None = None

    def body_limit(self, limit_bytes: int) -> int:
        return limit_bytes

    async def admit(self, request: web.BaseRequest, resource: Any) -> Any:
        if resource.model == "p":
            raise NotPermitted("p")
        raise AssertionError(resource)

    async def is_admin(self, request: web.BaseRequest) -> bool:
        return False


async def test_who_may_not_use_it_is_refused_before_anything_is_run() -> None:
    async with world() as w:
        w.app.guard = OnlyModels()  # type: ignore[assignment]
        headers, body = infer_body({"x": np.array(X, np.float32)}, binary=False)
        assert (await w.predict()).status == 403
        assert (await call(f"{w.url}/v2/models/p/infer", body, headers=headers)).status == 403
        assert (await call(f"{w.url}/v1/pipelines/p")).status == 403
        assert w.first.calls == 0


# --- steps elsewhere --------------------------------------------------------------------------


def elsewhere(url: str, **more: Any) -> tuple[Step, Step]:
    return {**CHAIN[0], "endpoint": url, **more}, CHAIN[1]


async def test_a_step_on_another_server() -> None:
    other = one_model("first", "5", ONE, 10.0)
    typed = [{"name": "x", "datatype": "FP32", "shape": [-1, 3]}]
    async with (
        running(serving(other)) as (_, url),
        world(*elsewhere(url), inputs=typed) as w,
    ):
        answer = await w.predict()
        assert outputs(answer) == [[30.0, 60.0, 90.0]]
        assert answer.headers[VERSIONS_HEADER] == "a=5,b=1"
        assert w.first.calls == 0
        other[1][0].holding = asyncio.Event()
        late = await w.predict(X_Request_Timeout_Ms="200")
        assert (late.status, "step 'a'" in late.json["error"]) == (504, True)
        other[1][0].holding = None
        other[1][0].failing = lambda n: Overloaded("busy") if n % 2 else None
        other[1][0].calls = 0
        assert (await w.predict()).status == 200, "503 is tried once more"
        other[1][0].failing = lambda _: BadInput("not so")
        assert (await w.predict()).status == 400
    async with world(*elsewhere("http://127.0.0.1:9"), inputs=typed) as w:
        answer = await w.predict()
        assert answer.status == 503
        assert "step 'a' (model first at http://127.0.0.1:9)" in answer.json["error"]


async def test_what_goes_along_to_another_server() -> None:
    seen: list[Mapping[str, str]] = []

    async def handle(request: web.BaseRequest) -> web.StreamResponse:
        seen.append(request.headers)
        return web.Response(body=next(answers))

    answers = itertools.cycle([b"{}", b"[1]", b'{"outputs": [{"name": "y"}]}', b"\xff"])
    runner = web.ServerRunner(web.Server(handle))
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    typed = [{"name": "x", "datatype": "FP32", "shape": [-1, 3]}]
    try:
        host, port = runner.addresses[0][:2]
        async with world(*elsewhere(f"http://{host}:{port}", version="3"), inputs=typed) as w:
            for _ in range(4):
                answer = await w.predict(
                    X_Region="cn", Authorization="Bearer secret", X_Api_Key="pwk_a", Cookie="a=b"
                )
                assert answer.status == 500
                assert "can't be understood" in answer.json["error"]
            tired = await w.predict(X_Pipeline_Hops="8")
            assert "ask each other in turn" in tired.json["error"]
    finally:
        await runner.cleanup()
    assert len(seen) == 4
    assert seen[0]["X-Region"] == "cn"
    assert 0 < int(seen[0]["X-Request-Timeout-Ms"]) <= 10_000
    assert "Authorization" not in seen[0]
    assert "X-Api-Key" not in seen[0]
    assert "Cookie" not in seen[0]


# --- through a gateway ------------------------------------------------------------------------


def said(node: str, *, ready: bool, **more: Any) -> Put:
    status = PipelineStatus(
        pipeline=ModelName("p"), node=NodeId(node), revision=REVISION, applied_revision=REVISION,
        ready=ready, **more,
    )  # fmt: skip
    key = KEYS.pipeline_status(ModelName("p"), NodeId(node))
    return Put(KeyValue(key, status.to_json(), Revision(2)))


async def test_a_gateway_asks_a_node_that_has_all_of_it() -> None:
    broken = ({**CHAIN[0], "model": "third"}, CHAIN[1])
    async with world() as good, world(*broken) as other, gateway({}) as front:
        nodes = [node_record("good", http=good.url), node_record("other", http=other.url)]
        front.rotation.publish(
            fold(
                [
                    *(put(node) for node in nodes),
                    said("good", ready=True, max_body_mb=1),
                    said("other", ready=False),
                ]
            ),
            {},
            {},
        )
        url = f"{front.url}/v1/pipelines/p/predict"
        for _ in range(8):
            answer = await call(url, {"inputs": {"x": X}})
            assert outputs(answer) == [[6.0, 12.0, 18.0]]
            assert answer.headers["X-Node"] == "good"
        headers, body = infer_body({"x": np.array(X, np.float32)}, binary=True)
        v2 = f"{front.url}/v2/models/p"
        assert (await call(f"{v2}/infer", body, headers=headers)).status == 200
        assert (await call(v2)).json["platform"] == "paddlewheel_pipeline"
        assert (await call(f"{v2}/ready")).status == 200
        assert (await call(f"{front.url}/v1/pipelines/p")).json["ready"] is True
        assert (await call(f"{front.url}/v1/pipelines")).json == {"pipelines": ["p"]}
        assert (await call(f"{front.url}/v1/pipelines/q/predict", b"{}")).status == 404
        large = await call(url, b"x" * 1_000_001)
        assert large.status == 413, "by the limit that the node told"
        assert other.first.calls == 0
