"""The hot path: body to tensors, one choice, one inference, tensors to body."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import structlog
from aiohttp import web
from multidict import CIMultiDict

from registry.errors import PaddlewheelError
from registry.inference import Array, InferenceError, Predictor, Signature
from registry.names import ServableId
from router import http_errors
from router.access.guard import Admission, Guarding
from router.access.resources import Area, Resource
from router.canary_watch import CanaryWatch
from router.deadline import TIMEOUT_HEADER, parse_timeout_s
from router.dispatch import Served, dispatch
from router.floor import (
    FLOOR_HEADER,
    REVISION_HEADER,
    ROLLOUT_HEADER,
    FloorGate,
    parse_floor,
)
from router.http_body import pack, read_body, wanted_packing
from router.http_errors import CLIENT_CLOSED, JSON, PROBLEM
from router.http_reply import SERVER
from router.metrics import Metrics, Series
from router.protocols.exchange import Answer, Exchange
from router.serving import Serving
from router.table import Choice, RequestFacts

log = structlog.get_logger()

Parse = Callable[[bytes, str | None, Signature], Exchange]
"""A protocol: body, ``Inference-Header-Content-Length`` and signature to an understood request."""

_HEADER_LENGTH = "Inference-Header-Content-Length"


@dataclass(frozen=True, slots=True)
class Target:
    """One choice's predictor with what each of its answers needs, made ready once."""

    predictor: Predictor
    series: Series
    headers: Mapping[str, str]
    watch: CanaryWatch | None
    """Told how its requests end while a canary is measured against it, or it is one."""


class Published:
    """A `Serving` with its targets. Lives as long as the table it was published with."""

    __slots__ = ("_metrics", "_targets", "serving")

    def __init__(self, serving: Serving, metrics: Metrics) -> None:
        self.serving = serving
        self._metrics = metrics
        self._targets: dict[tuple[ServableId, str, str | None], Target] = {}

    def target(self, choice: Choice) -> Target:
        rule = choice.rule.kind if choice.rule is not None else None
        key = (choice.servable, choice.kind, rule)
        target = self._targets.get(key)
        if target is None:
            model, version = choice.servable.model, choice.servable.version
            route = choice.kind if rule is None else f"{choice.kind}; rule={rule}"
            of = self.serving.table.route(model)
            target = self._targets[key] = Target(
                self.serving.predictors[choice.servable],
                self._metrics.series(model, version, choice.kind),
                {
                    "Server": SERVER,
                    "X-Model-Name": model,
                    "X-Model-Version": version,
                    "X-Model-Route": route,
                    REVISION_HEADER: str(of.revision),
                    **({ROLLOUT_HEADER: "barrier"} if of.is_barrier else {}),
                },
                self.serving.watches.get(model),
            )
        return target


class InferEndpoint:
    """Answers inference requests of every protocol from what was published last."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self.published = Published(Serving(), metrics)
        self.floors = FloorGate(lambda: self.published.serving.table)
        self.guard: Guarding | None = None
        """``None``: everybody may use everything."""

    async def __call__(
        self,
        request: web.BaseRequest,
        request_id: str,
        model: str,
        parse: Parse,
        *,
        version: str | None = None,
        label: str | None = None,
    ) -> web.Response:
        """Answer one request; refused ones too.

        version, label: from the path; without them ``X-Model-Version`` may pin one.
        Cancelled when the client goes away, which frees its place in the queue.
        """
        loop = asyncio.get_running_loop()
        began_s = loop.time()
        target: Target | None = None
        headers = request.headers
        guard = self.guard
        admission: Admission | None = None
        try:
            if guard is not None:  # the model asked about is the one that is served below
                admission = await guard.admit(request, Resource(Area.MODEL, model))
            # This look at the table only bounds the upload: how long that takes is up to the
            # client, and the version it would pin to may be unloaded long before it ends.
            limits = self.published.serving.table.route(model).limits
            waited_s = 0.0
            if FLOOR_HEADER in headers and version is None and label is None:
                waited_s = await self._reach_floor(headers, model, limits.timeout_s)
            limit_bytes = limits.max_body_mb * 1_000_000
            body = await read_body(
                request,
                limit_bytes if guard is None else guard.body_limit(limit_bytes),
                timeout_s=None if guard is None else guard.body_timeout_s,
            )

            # The clock starts with the whole request: how long its upload took is the client's.
            began_s = loop.time() - waited_s
            # From here on the request knows this one table, and nothing waits until its
            # inference is in the servable's hands: a drain cannot pass in between.
            published = self.published
            serving = published.serving
            route = serving.table.route(model)
            if version is None and label is None:
                version = headers.get("X-Model-Version")
            claims = None if admission is None else admission.caller.claims
            choice = route.pick(
                RequestFacts(model, version, label, headers, claims, random.random())
            )
            target = published.target(choice)
            exchange = parse(body, headers.get(_HEADER_LENGTH), target.predictor.signature)
            del body
            timeout_s = route.limits.timeout_s
            for wanted_s in (exchange.timeout_s, parse_timeout_s(headers.get(TIMEOUT_HEADER))):
                if wanted_s is not None:
                    timeout_s = min(timeout_s, wanted_s)
            served = await self.run(
                serving, choice, target, exchange.feeds, deadline_s=began_s + timeout_s
            )
            if served.choice != choice:  # also where the first choice had no worker at all
                target = published.target(served.choice)
            response = await self._answer(request, request_id, exchange, served, target)
        except asyncio.CancelledError:
            self._count(target, CLIENT_CLOSED, began_s)
            raise
        except PaddlewheelError as exc:
            response = self._refuse(request, request_id, exc, target)
        except Exception as exc:
            log.exception("request_crashed", model=model, request_id=request_id)
            response = self._refuse(request, request_id, exc, target)
        self._count(target, response.status, began_s)
        if admission is not None:
            response.headers.update(admission.headers)
        return response

    async def _reach_floor(self, headers: Mapping[str, str], model: str, timeout_s: float) -> float:
        """Wait for the document asked for; return how long that took, in seconds.

        Before the body is read: a request that is refused here can still be sent elsewhere.
        """
        loop = asyncio.get_running_loop()
        began_s = loop.time()
        wait_s = parse_timeout_s(headers.get(TIMEOUT_HEADER)) or timeout_s
        floor = parse_floor(headers[FLOOR_HEADER])
        await self.floors.reach(model, floor, within_s=min(wait_s, timeout_s))
        return loop.time() - began_s

    async def run(
        self,
        serving: Serving,
        choice: Choice,
        target: Target,
        feeds: Mapping[str, Array],
        *,
        deadline_s: float,
    ) -> Served:
        """One inference on a choice, told to whom it concerns: a request's own, or a step's."""
        in_flight = target.series.in_flight
        in_flight.inc()
        try:
            served = await dispatch(serving, choice, feeds, deadline_s=deadline_s)
        except InferenceError as exc:
            if target.watch is not None:
                target.watch.refused(choice, exc)
            raise
        finally:
            in_flight.dec()
        if target.watch is not None:
            as_chosen = not served.reruns and served.choice.servable == choice.servable
            target.watch.answered(choice, served.inference, feeds, as_chosen=as_chosen)
        if served.reruns:
            self._metrics.rerun(choice.servable.model)
        target.series.queue.observe(served.inference.queue_s)
        return served

    def count(self, target: Target, status: int, took_s: float) -> None:
        """One inference on ``target`` ended."""
        target.series.count(http_errors.outcome_of(status))
        if status < 400:
            target.series.duration.observe(took_s)

    async def _answer(
        self,
        request: web.BaseRequest,
        request_id: str,
        exchange: Exchange,
        served: Served,
        target: Target,
    ) -> web.Response:
        predictor, inference = target.predictor, served.inference
        rendered = exchange.render(
            Answer(predictor.id.model, predictor.id.version, predictor.signature, inference.outputs)
        )
        headers = CIMultiDict(target.headers)
        headers["X-Request-Id"] = request_id
        headers["Server-Timing"] = (
            f"queue;dur={inference.queue_s * 1e3:.3f}, infer;dur={inference.run_s * 1e3:.3f}"
        )
        if rendered.header_length is None:
            headers["Content-Type"] = JSON
        else:
            headers["Content-Type"] = "application/octet-stream"
            headers[_HEADER_LENGTH] = str(rendered.header_length)
        body = rendered.body
        coding = wanted_packing(request.headers.get("Accept-Encoding"))
        if coding is not None:
            packed = await pack(body, coding)
            if packed is not None:
                body = packed
                headers["Content-Encoding"] = coding
                headers["Vary"] = "Accept-Encoding"
        return web.Response(body=body, headers=headers)

    def _refuse(
        self, request: web.BaseRequest, request_id: str, error: Exception, target: Target | None
    ) -> web.Response:
        status = http_errors.status_of(error)
        as_problem = PROBLEM in request.headers.get("Accept", "")
        shown = dict(target.headers) if target is not None else {"Server": SERVER}
        body = http_errors.error_body(
            error,
            status,
            as_problem=as_problem,
            instance=request.rel_url.raw_path,
            model=shown.get("X-Model-Name"),
            version=shown.get("X-Model-Version"),
            revision=shown.get("X-Config-Revision"),
        )
        shown |= http_errors.error_headers(error, status)
        shown["X-Request-Id"] = request_id
        shown["Content-Type"] = PROBLEM if as_problem else JSON
        return web.Response(status=status, body=body, headers=shown)

    def _count(self, target: Target | None, status: int, began_s: float) -> None:
        if target is None:
            self._metrics.refused(status)
            return
        target.series.count(http_errors.outcome_of(status))
        if status < 400:
            target.series.duration.observe(asyncio.get_running_loop().time() - began_s)
