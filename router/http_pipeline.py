"""Pipelines over HTTP: one request, one snapshot of versions, one answer that names them."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import structlog
from aiohttp import web
from multidict import CIMultiDict

from registry.errors import PaddlewheelError
from registry.inference import Array, Signature
from registry.names import ModelName, Version
from router import http_errors
from router.access.guard import Admission
from router.access.resources import Area, Resource
from router.deadline import TIMEOUT_HEADER, parse_timeout_s
from router.http_body import pack, read_body, wanted_packing
from router.http_errors import CLIENT_CLOSED, JSON, PROBLEM
from router.http_infer import InferEndpoint, Published
from router.http_reply import SERVER, Reply, json_reply
from router.pipeline import engine
from router.pipeline.binding import Binder, Bound
from router.pipeline.engine import Ran, StepAnswer
from router.pipeline.errors import PipelineBroken, StepFailed, UnknownPipeline
from router.pipeline.metrics import PipelineMetrics
from router.pipeline.plan import PlannedStep
from router.pipeline.ports import Pipeline, Pipelines, Transforms
from router.pipeline.remote import Remote
from router.protocols import open_inference
from router.protocols.exchange import Answer, Exchange, Rendered
from router.protocols.open_inference import parse_infer
from router.protocols.pipeline import PredictRequest, parse_pipeline_predict, render_predict

log = structlog.get_logger(__name__)

PLATFORM = "paddlewheel_pipeline"
VERSIONS_HEADER = "X-Pipeline-Versions"
_HEADER_LENGTH = "Inference-Header-Content-Length"

Parse = Callable[[bytes, CIMultiDict[str] | Any, Signature], Exchange]


@dataclass(frozen=True, slots=True)
class _Entry:
    """A pipeline with what its requests need."""

    pipeline: Pipeline
    binder: Binder | None


class PipelineEndpoint:
    """Answers everything about pipelines from what was published last."""

    def __init__(
        self,
        inferences: InferEndpoint,
        metrics: PipelineMetrics,
        remote: Remote,
    ) -> None:
        """inferences: the endpoint of single models: its table, its guard, its way to run one."""
        self._inferences = inferences
        self._metrics = metrics
        self._remote = remote
        self._transforms: Transforms | None = None
        self._entries: dict[str, _Entry] = {}
        self._is_complete = True

    def publish(self, pipelines: Pipelines, transforms: Transforms) -> None:
        """Use these from the next request on; those under way keep what they read."""
        self._transforms = transforms
        before = self._entries
        self._entries = {
            name: _entry(pipeline, before.get(name), transforms)
            for name, pipeline in pipelines.by_name.items()
        }
        self._is_complete = pipelines.is_complete

    def has(self, name: str) -> bool:
        """Whether ``name`` is a pipeline, and no model."""
        return name in self._entries and name not in self._inferences.published.serving.table.models

    # --- requests -------------------------------------------------------------------------------

    async def infer(
        self, request: web.BaseRequest, request_id: str, name: str, *, version: str | None = None
    ) -> web.Response:
        """``/v2/models/<pipeline>[/versions/<revision>]/infer``."""
        return await self._answer(request, request_id, name, _parse_infer, version)

    async def predict(self, request: web.BaseRequest, request_id: str, name: str) -> web.Response:
        """``/v1/pipelines/<pipeline>/predict``."""
        return await self._answer(request, request_id, name, _parse_predict, None)

    async def _answer(
        self,
        request: web.BaseRequest,
        request_id: str,
        name: str,
        parse: Parse,
        version: str | None,
    ) -> web.Response:
        """Answer one request; refused ones too. Cancelled when the client goes away."""
        loop = asyncio.get_running_loop()
        began_s = loop.time()
        known: str | None = None
        headers: dict[str, str] = {"Server": SERVER}
        guard = self._inferences.guard
        admission: Admission | None = None
        try:
            if guard is not None:  # a permission for the pipeline is one for its steps
                admission = await guard.admit(request, Resource(Area.MODEL, name))
            binder = self._binder(name, version)
            known = name
            limit_bytes = binder.plan.limits.max_body_mb * 1_000_000
            body = await read_body(
                request,
                limit_bytes if guard is None else guard.body_limit(limit_bytes),
                timeout_s=None if guard is None else guard.body_timeout_s,
            )

            began_s = loop.time()
            # From here on the request knows these documents, this table and these versions.
            # Nothing waits until they are held: a drain can't pass in between.
            binder = self._binder(name, version)
            published = self._inferences.published
            headers |= {
                "X-Pipeline-Name": name,
                "X-Config-Revision": str(binder.plan.revision),
            }
            claims = None if admission is None else admission.caller.claims
            serving = published.serving
            bound = binder.bind(
                serving.table,
                serving.predictors,
                request.headers,
                claims=claims,
                chance=random.random(),
            )
            exchange = parse(body, request.headers, bound.wiring.signature)
            del body
            timeout_s = binder.plan.limits.timeout_s
            wanted = (exchange.timeout_s, parse_timeout_s(request.headers.get(TIMEOUT_HEADER)))
            for wanted_s in wanted:
                if wanted_s is not None:
                    timeout_s = min(timeout_s, wanted_s)
            with contextlib.ExitStack() as held:
                for servable in bound.servables:
                    held.enter_context(serving.predictors[servable].held())
                ran = await self._run(
                    request, request_id, published, bound, exchange.feeds, began_s + timeout_s
                )
            response = await _respond(request, bound, exchange, ran, headers)
        except asyncio.CancelledError:
            self._metrics.count(known, CLIENT_CLOSED, None)
            raise
        except PaddlewheelError as exc:
            response = _refuse(request, exc, headers)
        except Exception as exc:
            log.exception("request_crashed", pipeline=name, request_id=request_id)
            response = _refuse(request, exc, headers)
        response.headers["X-Request-Id"] = request_id
        if admission is not None:
            response.headers.update(admission.headers)
        self._metrics.count(known, response.status, loop.time() - began_s)
        return response

    async def _run(
        self,
        request: web.BaseRequest,
        request_id: str,
        published: Published,
        bound: Bound,
        feeds: Mapping[str, Array],
        deadline_s: float,
    ) -> Ran:
        async def perform(
            planned: PlannedStep, given: Mapping[str, Array], until_s: float
        ) -> StepAnswer:
            step = planned.step
            if step.transform is not None:
                assert self._transforms is not None
                made = await self._transforms.run(step.transform, given, deadline_s=until_s)
                return StepAnswer(made)
            if step.endpoint is not None:
                return await self._remote.infer(
                    step, given, request.headers, request_id, deadline_s=until_s
                )
            return await self._on_model(published, bound, planned, given, until_s)

        try:
            ran = await engine.run(bound.plan, bound.wiring, perform, feeds, deadline_s=deadline_s)
        except StepFailed as exc:
            self._metrics.step_failed(bound.plan.name, exc.step, http_errors.status_of(exc))
            raise
        for name, step in ran.steps.items():
            self._metrics.step_took(bound.plan.name, name, step.took_s)
        return ran

    async def _on_model(
        self,
        published: Published,
        bound: Bound,
        planned: PlannedStep,
        feeds: Mapping[str, Array],
        until_s: float,
    ) -> StepAnswer:
        """One inference, counted as any other of its model."""
        loop = asyncio.get_running_loop()
        began_s = loop.time()
        choice = bound.choices[planned.name]
        target = published.target(choice)
        status = CLIENT_CLOSED
        try:
            served = await self._inferences.run(
                published.serving, choice, target, feeds, deadline_s=until_s
            )
            status = 200
            if served.choice != choice:
                target = published.target(served.choice)
        except PaddlewheelError as exc:
            status = http_errors.status_of(exc)
            raise
        finally:
            self._inferences.count(target, status, loop.time() - began_s)
        return StepAnswer(served.inference.outputs, served.choice.servable.version)

    def _entry(self, name: str) -> _Entry:
        entry = self._entries.get(name)
        if entry is not None:
            return entry
        if not self._is_complete:
            raise PipelineBroken(name, "the documents were not read yet")
        raise UnknownPipeline(name)

    def _binder(self, name: str, version: str | None) -> Binder:
        entry = self._entry(name)
        binder = entry.binder
        if binder is None:
            why = entry.pipeline.status.get("error") or "no document of it was accepted"
            raise PipelineBroken(name, str(why))
        if version is not None and version != str(binder.plan.revision):
            raise UnknownPipeline(f"{name} at revision {version}")
        return binder

    # --- what is read by GET --------------------------------------------------------------------

    def list(self, seen: Callable[[str], bool]) -> Reply:
        """``GET /v1/pipelines``. seen: whether the asker may know of one."""
        return json_reply({"pipelines": sorted(filter(seen, self._entries))})

    def show(self, name: str) -> Reply:
        """``GET /v1/pipelines/<name>``: its documents, its steps, and what they would run on."""
        entry = self._entry(name)
        bound, reason = self._by_default(entry)
        plan = entry.pipeline.plan
        steps: list[dict[str, Any]] = []
        for step_name, planned in plan.steps.items() if plan is not None else ():
            step = planned.step
            choice = bound.choices.get(step_name) if bound is not None else None
            shown: dict[str, Any] = {
                "name": step_name,
                "model": step.model,
                "transform": step.transform,
                "endpoint": step.endpoint,
                "version": choice.servable.version if choice is not None else step.version,
                "inputs": dict(step.inputs),
            }
            steps.append({key: value for key, value in shown.items() if value is not None})
        document: dict[str, Any] = {
            "name": name,
            "ready": bound is not None,
            "reason": reason,
            **entry.pipeline.status,
            "steps": steps,
        }
        if bound is not None:
            described = open_inference.metadata(name, [], bound.wiring.signature, PLATFORM)
            document |= {"inputs": described["inputs"], "outputs": described["outputs"]}
        return json_reply(document)

    def metadata(self, name: str, version: str | None) -> Reply:
        """``GET /v2/models/<pipeline>``. Raises `PipelineBroken`, `UnknownPipeline`."""
        binder = self._binder(name, version)
        bound = self._bound_by_default(binder)
        revision = str(binder.plan.revision)
        shown = open_inference.metadata(name, [revision], bound.wiring.signature, PLATFORM)
        return json_reply(shown, X_Config_Revision=revision)

    def ready(self, name: str, version: str | None) -> Reply:
        """``GET /v2/models/<pipeline>/ready``: whether every step has what it runs on, here."""
        entry = self._entry(name)
        if version is not None:
            self._binder(name, version)
        bound, reason = self._by_default(entry)
        if bound is None:
            return json_reply({"name": name, "ready": False, "error": reason}, 503)
        return json_reply({"name": name, "version": str(bound.plan.revision), "ready": True})

    def trouble(self, name: str) -> str | None:
        """Why a request of this pipeline would fail now; ``None``: it would not."""
        if name in self._inferences.published.serving.table.models:
            return "a model has this name"
        return self._by_default(self._entry(name))[1]

    def _bound_by_default(self, binder: Binder) -> Bound:
        serving = self._inferences.published.serving
        return binder.by_default(serving.table, serving.predictors)

    def _by_default(self, entry: _Entry) -> tuple[Bound | None, str | None]:
        if entry.binder is None:
            return None, "no document of it was accepted"
        try:
            return self._bound_by_default(entry.binder), None
        except PipelineBroken as exc:
            return None, exc.why


def _entry(pipeline: Pipeline, before: _Entry | None, transforms: Transforms) -> _Entry:
    if pipeline.plan is None:
        return _Entry(pipeline, None)
    if before is not None and before.pipeline.plan is pipeline.plan and before.binder is not None:
        return _Entry(pipeline, before.binder)
    return _Entry(pipeline, Binder(pipeline.plan, transforms.signatures))


def _parse_infer(body: bytes, headers: Any, signature: Signature) -> Exchange:
    return parse_infer(body, headers.get(_HEADER_LENGTH), signature)


def _parse_predict(body: bytes, headers: Any, signature: Signature) -> Exchange:
    return parse_pipeline_predict(body, headers.get("Content-Type"), signature)


async def _respond(
    request: web.BaseRequest,
    bound: Bound,
    exchange: Exchange,
    ran: Ran,
    shown: Mapping[str, str],
) -> web.Response:
    plan = bound.plan
    versions: dict[str, str] = {}
    timings: list[str] = []
    for name in plan.steps:
        step = ran.steps[name]
        timings.append(f"{name};dur={step.took_s * 1e3:.3f}")
        choice = bound.choices.get(name)
        version = step.version or (choice.servable.version if choice is not None else None)
        if version is not None:
            versions[name] = version
    answer = Answer(
        ModelName(plan.name), Version(str(plan.revision)), bound.wiring.signature, ran.outputs
    )
    if isinstance(exchange, PredictRequest):
        rendered = Rendered(render_predict(answer, versions))
    else:
        rendered = exchange.render(answer)
    headers = CIMultiDict(shown)
    headers[VERSIONS_HEADER] = ",".join(f"{step}={version}" for step, version in versions.items())
    headers["Server-Timing"] = ", ".join(timings)
    if rendered.header_length is None:
        headers["Content-Type"] = JSON
    else:
        headers["Content-Type"] = "application/octet-stream"
        headers[_HEADER_LENGTH] = str(rendered.header_length)
    body = rendered.body
    coding = wanted_packing(request.headers.get("Accept-Encoding"))
    packed = None if coding is None else await pack(body, coding)
    if coding is not None and packed is not None:
        body = packed
        headers["Content-Encoding"] = coding
        headers["Vary"] = "Accept-Encoding"
    return web.Response(body=body, headers=headers)


def _refuse(request: web.BaseRequest, error: Exception, shown: Mapping[str, str]) -> web.Response:
    status = http_errors.status_of(error)
    as_problem = PROBLEM in request.headers.get("Accept", "")
    body = http_errors.error_body(
        error,
        status,
        as_problem=as_problem,
        instance=request.rel_url.raw_path,
        pipeline=shown.get("X-Pipeline-Name"),
        step=error.step if isinstance(error, StepFailed) else None,
        revision=shown.get("X-Config-Revision"),
    )
    headers = {**shown, **http_errors.error_headers(error, status)}
    headers["Content-Type"] = PROBLEM if as_problem else JSON
    return web.Response(status=status, body=body, headers=headers)
