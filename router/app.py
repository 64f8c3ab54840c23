"""The front door: every endpoint of a node, as one handler under one published `Serving`."""

from __future__ import annotations

import asyncio
import itertools
import secrets
import ssl
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

import structlog
from aiohttp import web

from registry.errors import PaddlewheelError
from registry.inference import BadInput
from router import http_errors
from router.access.caller import Caller
from router.access.guard import Guarding
from router.access.resources import OPEN_AND_ADMIN, READINESS, Area, resource_of
from router.errors import BadRequest, MethodNotAllowed, NotFound
from router.floor import FloorGate
from router.http_admin import Admin
from router.http_body import pack, read_body, wanted_packing
from router.http_errors import JSON, PROBLEM
from router.http_infer import InferEndpoint, Parse, Published
from router.http_path import Target, parse_target
from router.http_pipeline import PipelineEndpoint
from router.http_probes import Inspection, Seen, everything
from router.http_reply import SERVER, Reply, json_reply
from router.http_server import ConnectionLimits, Handler, HttpServer
from router.metrics import Metrics
from router.pipeline.metrics import PipelineMetrics
from router.pipeline.ports import Pipelines, Transforms
from router.pipeline.remote import Remote
from router.ports import Drills, NodeView
from router.protocols.exchange import parse_json
from router.protocols.open_inference import parse_infer
from router.protocols.short import parse_short
from router.protocols.tf_serving import parse_predict
from router.serving import Serving

log = structlog.get_logger()

_SMALL_BODY_BYTES = 1_000_000
_READ = ("GET", "HEAD")
_PREDICT = ":predict"
_MANAGED = "managed by config: to load or unload a version, edit the model's document"


class App:
    """All of a node's HTTP. `publish` may be called at any time, on the event loop."""

    def __init__(
        self,
        node: NodeView,
        *,
        product_version: str,
        metrics: Metrics | None = None,
        drills: Drills | None = None,
    ) -> None:
        self.metrics = metrics if metrics is not None else Metrics()
        self._infer = InferEndpoint(self.metrics)
        self._inspect = Inspection(node, lambda: self.serving, product_version)
        self._admin = Admin(node, lambda: self.serving, drills)
        self._remote = Remote()
        self.pipelines = PipelineEndpoint(self._infer, PipelineMetrics(self.metrics), self._remote)
        self.access_report: Callable[[], Mapping[str, Any]] = dict
        """``GET /admin/access``; whoever wires access control sets it."""
        self.limits = ConnectionLimits()
        self._servers: list[HttpServer] = []
        self._has_admin_address = False
        # Ids are for finding a request in logs, not secrets: a random start, then counting.
        self._id_prefix = secrets.token_hex(6)
        self._ids = itertools.count()

    # --- what is served ------------------------------------------------------------------

    @property
    def serving(self) -> Serving:
        return self._infer.published.serving

    @property
    def floors(self) -> FloorGate:
        return self._infer.floors

    def publish(self, serving: Serving) -> None:
        """Serve from ``serving`` from the next request on; those under way keep what they read."""
        self._infer.published = Published(serving, self.metrics)
        self._infer.floors.table_changed()

    def publish_pipelines(self, pipelines: Pipelines, transforms: Transforms) -> None:
        """Answer for these pipelines from the next request on."""
        self.pipelines.publish(pipelines, transforms)

    @property
    def guard(self) -> Guarding | None:
        """Read once by each request; ``None``: everybody may use everything."""
        return self._infer.guard

    @guard.setter
    def guard(self, guard: Guarding | None) -> None:
        self._infer.guard = guard

    # --- connections ---------------------------------------------------------------------

    async def start(
        self, host: str = "127.0.0.1", port: int = 0, *, tls: ssl.SSLContext | None = None
    ) -> str:
        """Listen; return the URL, ``http://host:port``. Raises `OSError`."""
        return await self._listen(self.handle, host, port, tls)

    async def start_admin(
        self, host: str, port: int, *, is_trusted: bool, tls: ssl.SSLContext | None = None
    ) -> str:
        """Serve ``/admin``, ``/metrics`` and the probes here, and no more of them elsewhere.

        is_trusted: whoever reaches the address needs no credential.
        """
        self._has_admin_address = True

        async def handle(request: web.BaseRequest) -> web.StreamResponse:
            target = parse_target(request.raw_path)
            if resource_of(target.segments).area not in OPEN_AND_ADMIN:
                target = _NOWHERE
            guard = None if is_trusted else self.guard
            return await self._other(request, self._request_id(request), target, guard)

        return await self._listen(handle, host, port, tls)

    async def _listen(
        self, handler: Handler, host: str, port: int, tls: ssl.SSLContext | None
    ) -> str:
        server = HttpServer(handler, limits=self.limits)
        url = await server.start(host, port, tls=tls)
        self._servers.append(server)
        return url

    async def stop(self, *, drain_s: float = 30.0) -> None:
        """Stop accepting, answer what is under way for up to ``drain_s``, then close."""
        await asyncio.gather(*(server.stop(drain_s=drain_s) for server in self._servers))
        await self._remote.close()

    # --- requests ------------------------------------------------------------------------

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        """Answer one request. Raises nothing but cancellation."""
        request_id = self._request_id(request)
        target = parse_target(request.raw_path)
        segments = target.segments
        if request.method == "POST":
            # The hot path comes first.
            match segments:
                case ("v2", "models", name, "infer") if self.pipelines.has(name):
                    return await self.pipelines.infer(request, request_id, name)
                case ("v2", "models", name, "versions", revision, "infer") if self.pipelines.has(
                    name
                ):
                    return await self.pipelines.infer(request, request_id, name, version=revision)
                case ("v1", "pipelines", name, "predict"):
                    return await self.pipelines.predict(request, request_id, name)
                case ("v2", "models", model, "infer"):
                    return await self._infer(request, request_id, model, parse_infer)
                case ("v2", "models", model, "versions", version, "infer"):
                    return await self._infer(
                        request, request_id, model, parse_infer, version=version
                    )
                case ("v1", "models", *_):
                    call = _v1_call(segments)
                    if call is not None:
                        return await self._infer(
                            request,
                            request_id,
                            call.model,
                            call.parse,
                            version=call.version,
                            label=call.label,
                        )
                case _:
                    pass
        if self._has_admin_address and resource_of(segments).area is Area.ADMIN:
            target = _NOWHERE
        return await self._other(request, request_id, target, self.guard)

    async def _other(
        self,
        request: web.BaseRequest,
        request_id: str,
        target: Target,
        guard: Guarding | None,
    ) -> web.Response:
        is_admin = target.segments[0] == "admin"
        extra: Mapping[str, str] = {}
        try:
            caller: Caller | None = None
            if guard is not None:
                admission = await guard.admit(request, resource_of(target.segments))
                caller, extra = admission.caller, admission.headers
            reply = await self._reply(request, target, caller, guard)
        except Exception as exc:
            if not isinstance(exc, PaddlewheelError):
                log.exception("request_crashed", path=request.raw_path, request_id=request_id)
            status = http_errors.status_of(exc)
            as_problem = is_admin or PROBLEM in request.headers.get("Accept", "")
            body = http_errors.error_body(
                exc, status, as_problem=as_problem, instance=request.raw_path.partition("?")[0]
            )
            reply = Reply(status, body, PROBLEM if as_problem else JSON)
            extra = http_errors.error_headers(exc, status)
        headers = {**reply.headers, **extra, "X-Request-Id": request_id, "Server": SERVER}
        if reply.body or reply.status != 204:
            headers["Content-Type"] = reply.content_type
        body = reply.body
        coding = wanted_packing(request.headers.get("Accept-Encoding"))
        if coding is not None:
            packed = await pack(body, coding)
            if packed is not None:
                body = packed
                headers |= {"Content-Encoding": coding, "Vary": "Accept-Encoding"}
        return web.Response(status=reply.status, body=body, headers=headers)

    async def _reply(
        self,
        request: web.BaseRequest,
        target: Target,
        caller: Caller | None,
        guard: Guarding | None,
    ) -> Reply:
        """caller: ``None`` where everybody may use everything."""
        segments, method = target.segments, request.method
        seen = everything if caller is None else caller.may_use
        match segments:
            case ("v2", "repository", *rest):
                return await self._repository(request, tuple(rest), seen)
            case ("admin", "drill", *rest) if len(rest) < 2:
                if method == "OPTIONS":
                    return _options(("GET", "POST", "DELETE"))
                body = await read_body(request, _SMALL_BODY_BYTES)
                return await self._admin.drill(method, rest[0] if rest else None, body)
            case _:
                pass
        allow = _READ if not _is_inference(segments) else ("POST",)
        if method not in allow:
            if method == "OPTIONS":
                return _options(allow)
            if allow is _READ:
                self._read(request, target, seen)  # what is not there is 404 by any method
            raise MethodNotAllowed((*allow, "OPTIONS"))
        if guard is not None and segments in READINESS:
            verbose = _is_verbose(target)
            names = verbose and await guard.is_admin(request)
            return self._inspect.readyz(verbose=verbose, names=names)
        return self._read(request, target, seen)

    def _read(self, request: web.BaseRequest, target: Target, seen: Seen) -> Reply:
        """Answer what is read by GET. Raises `NotFound` for any other path."""
        inspect, admin = self._inspect, self._admin
        match target.segments:
            case ("livez",) | ("healthz",) | ("v2", "health", "live"):
                return inspect.livez()
            case ("readyz",) | ("v2", "health", "ready"):
                return inspect.readyz(verbose=_is_verbose(target))
            case ("startupz",):
                return inspect.startupz()
            case ("metrics",):
                text, content_type = self.metrics.render(request.headers.get("Accept", ""))
                return Reply(200, text, content_type)
            case ("v2",):
                return inspect.server_metadata()
            case ("v1", "pipelines"):
                return self.pipelines.list(seen)
            case ("v1", "pipelines", name):
                return self.pipelines.show(name)
            case ("v2", "models", name, *rest) if self.pipelines.has(name):
                return self._read_pipeline(name, tuple(rest))
            case ("v2", "models", model):
                return inspect.model_metadata(model, None)
            case ("v2", "models", model, "versions", version):
                return inspect.model_metadata(model, version)
            case ("v2", "models", model, "ready"):
                return inspect.model_ready(model, None)
            case ("v2", "models", model, "versions", version, "ready"):
                return inspect.model_ready(model, version)
            case ("v1", "models"):
                return inspect.models(seen)
            case ("v1", "models", model, *rest):
                return self._v1_read(model, tuple(rest))
            case ("admin", "routes"):
                return admin.routes()
            case ("admin", "access"):
                return json_reply(self.access_report())
            case ("admin", "servables"):
                return admin.servables()
            case ("admin", "explain"):
                return admin.explain(target)
            case _:
                raise NotFound("no such endpoint")

    def _read_pipeline(self, name: str, rest: tuple[str, ...]) -> Reply:
        match rest:
            case ():
                return self.pipelines.metadata(name, None)
            case ("versions", revision):
                return self.pipelines.metadata(name, revision)
            case ("ready",):
                return self.pipelines.ready(name, None)
            case ("versions", revision, "ready"):
                return self.pipelines.ready(name, revision)
            case _:
                raise NotFound("no such endpoint")

    def _v1_read(self, model: str, rest: tuple[str, ...]) -> Reply:
        inspect = self._inspect
        version: str | None = None
        label: str | None = None
        match rest:
            case ("versions", version, *rest_):
                tail = tuple(rest_)
            case ("labels", label, *rest_):
                tail = tuple(rest_)
            case _:
                tail = rest
        match tail:
            case ():
                return inspect.model_status(model, version, label)
            case ("metadata",):
                return inspect.tf_metadata(model, version, label)
            case _:
                raise NotFound("no such endpoint")

    async def _repository(
        self, request: web.BaseRequest, rest: tuple[str, ...], seen: Seen
    ) -> Reply:
        """Triton's repository extension: the index is real, loading is the document's business."""
        match rest:
            case ("index",):
                pass
            case ("models", _, "load" | "unload"):
                pass
            case _:
                raise NotFound("no such endpoint")
        if request.method == "OPTIONS":
            return _options(("POST",))
        if request.method != "POST":
            raise MethodNotAllowed(("POST", "OPTIONS"))
        if rest != ("index",):
            raise BadRequest(_MANAGED)
        body = await read_body(request, _SMALL_BODY_BYTES)
        wanted: object = parse_json(body) if body.strip() else {}
        if not isinstance(wanted, dict):
            raise BadInput("the request: want a JSON object")
        ready = cast("dict[str, object]", wanted).get("ready", False)
        if not isinstance(ready, bool):
            raise BadInput("ready: want true or false")
        return self._inspect.repository_index(ready_only=ready, seen=seen)

    def _request_id(self, request: web.BaseRequest) -> str:
        given = request.headers.get("X-Request-Id")
        if given and len(given) <= 128 and given.isascii() and given.isprintable():
            return given
        return f"{self._id_prefix}{next(self._ids):08x}"


_NOWHERE = Target(("",), "")
"""For what is served at another address."""


def _is_verbose(target: Target) -> bool:
    return any(name == "verbose" for name, _ in target.parameters())


class _Call(NamedTuple):
    model: str
    parse: Parse
    version: str | None = None
    label: str | None = None


def _v1_call(segments: tuple[str, ...]) -> _Call | None:
    """Return what a path under ``/v1/models`` calls, or ``None`` when it is no call."""
    match segments[2:]:
        case (model, "predict"):
            return _Call(model, parse_short)
        case (model, "versions", version, "predict"):
            return _Call(model, parse_short, version=version)
        case (verb,) if verb.endswith(_PREDICT):
            return _Call(verb.removesuffix(_PREDICT), parse_predict)
        case (model, "versions", verb) if verb.endswith(_PREDICT):
            return _Call(model, parse_predict, version=verb.removesuffix(_PREDICT))
        case (model, "labels", verb) if verb.endswith(_PREDICT):
            return _Call(model, parse_predict, label=verb.removesuffix(_PREDICT))
        case _:
            return None


def _is_inference(segments: tuple[str, ...]) -> bool:
    if segments[:2] == ("v1", "models"):
        return _v1_call(segments) is not None
    if segments[:2] == ("v1", "pipelines"):
        return segments[3:] == ("predict",)
    return segments[:2] == ("v2", "models") and segments[-1] == "infer" and len(segments) in (4, 6)


def _options(allow: tuple[str, ...]) -> Reply:
    return Reply(204, b"", headers={"Allow": ", ".join((*allow, "OPTIONS"))})
