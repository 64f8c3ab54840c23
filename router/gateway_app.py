"""The gateway's front door: requests about a model go to a node, the rest is answered here."""

from __future__ import annotations

import asyncio
import itertools
import secrets
import ssl
from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

import structlog
from aiohttp import web
from multidict import CIMultiDict

from registry.errors import PaddlewheelError
from registry.inference import BadInput
from registry.names import ModelName
from router import health, http_errors
from router.access.caller import Caller
from router.access.guard import Admission, Guarding
from router.access.resources import OPEN_AND_ADMIN, READINESS, Area, Resource, resource_of
from router.deadline import TIMEOUT_HEADER, parse_timeout_s
from router.errors import BadRequest, MethodNotAllowed, NotFound
from router.explain import explain
from router.fleet.paths import ModelPath, model_path
from router.fleet.pipelines import pipelines_of
from router.gateway_metrics import GatewayMetrics
from router.http_body import read_body
from router.http_errors import CLIENT_CLOSED, JSON, PROBLEM
from router.http_path import Target, parse_target
from router.http_probes import EXTENSIONS
from router.http_reply import SERVER, Reply, json_reply
from router.http_server import ConnectionLimits, Handler, HttpServer
from router.metrics import Metrics, Reading
from router.ports import Health
from router.protocols.exchange import parse_json
from router.proxy import HOP_BY_HOP, Answer, Forward, Proxy, request_head, take_body
from router.repository import repository_index
from router.rotation import Rotation
from router.upstream import AnswerBroken

log = structlog.get_logger(__name__)

NODE_HEADER = "X-Node"
_NOWHERE = Target(("",), "")
"""For what is served at another address."""
_SMALL_BODY_BYTES = 1_000_000
_READ = ("GET", "HEAD")
_DROPPED = frozenset(name.decode() for name in HOP_BY_HOP)
_MANAGED = "managed by config: to load or unload a version, edit the model's document"


class GatewayApp:
    """All of a gateway's HTTP, over a `Rotation` that its owner keeps up to date."""

    def __init__(
        self, rotation: Rotation, *, product_version: str, read_health: Callable[[], Health]
    ) -> None:
        self._rotation = rotation
        self._product_version = product_version
        self._health = read_health
        self.metrics = GatewayMetrics(Metrics())
        self.metrics.base.add(self._readings)
        self._proxy = Proxy(rotation, on_retry=self.metrics.retried)
        self.guard: Guarding | None = None
        """Read once by each request; ``None``: everybody may use everything."""
        self.access_report: Callable[[], Mapping[str, Any]] = dict
        """``GET /admin/access``; whoever wires access control sets it."""
        self.limits = ConnectionLimits()
        self._servers: list[HttpServer] = []
        self._has_admin_address = False
        self._id_prefix = secrets.token_hex(6)
        self._ids = itertools.count()

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
            return await self._handle_admin(request, is_trusted=is_trusted)

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

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        """Answer one request. Raises cancellation, and `AnswerBroken` in the midst of an answer."""
        request_id = self._request_id(request)
        target = parse_target(request.raw_path)
        path = model_path(target.segments)
        if path is not None:
            return await self._forward(request, request_id, path)
        if self._has_admin_address and resource_of(target.segments).area is Area.ADMIN:
            target = _NOWHERE
        return await self._local(request, request_id, target, self.guard)

    async def _handle_admin(
        self, request: web.BaseRequest, *, is_trusted: bool
    ) -> web.StreamResponse:
        target = parse_target(request.raw_path)
        if resource_of(target.segments).area not in OPEN_AND_ADMIN:
            target = _NOWHERE
        guard = None if is_trusted else self.guard
        return await self._local(request, self._request_id(request), target, guard)

    # --- to a node ------------------------------------------------------------------------------

    async def _forward(
        self, request: web.BaseRequest, request_id: str, path: ModelPath
    ) -> web.StreamResponse:
        loop = asyncio.get_running_loop()
        began_s = loop.time()
        status = CLIENT_CLOSED
        model: str | None = None
        guard = self.guard
        admission: Admission | None = None
        try:
            try:
                if guard is not None:
                    admission = await guard.admit(request, Resource(Area.MODEL, path.model))
                route = self._rotation.route(path)
                model = route.model
                headers = request.headers
                wanted_s = parse_timeout_s(headers.get(TIMEOUT_HEADER))
                limit_bytes = route.limits.max_body_mb * 1_000_000
                body = await take_body(
                    request,
                    limit_bytes if guard is None else guard.body_limit(limit_bytes),
                    replay_max_bytes=self._rotation.tuning.replay_max_bytes,
                    timeout_s=None if guard is None else guard.body_timeout_s,
                )
                # As on a node, the clock starts with the whole request.
                timeout_s = route.limits.timeout_s
                if wanted_s is not None:
                    timeout_s = min(timeout_s, wanted_s)
                deadline_s = loop.time() + timeout_s
                version = path.version
                if version is None and path.label is None:
                    version = headers.get("X-Model-Version")
                length = len(body) if isinstance(body, bytes) else request.content_length
                forward = Forward(
                    route.model,
                    self._rotation.want(
                        route,
                        version,
                        path.label,
                        headers,
                        None if admission is None else admission.caller.claims,
                    ),
                    request_head(
                        request.method,
                        _origin_form(request.raw_path),
                        request.raw_headers,
                        length=length,
                        request_id=request_id,
                        peer=request.remote,
                    ),
                    body,
                    request.method == "HEAD",
                    path.is_inference and version is None and path.label is None,
                )
                answer = await self._proxy.run(forward, deadline_s=deadline_s)
            except PaddlewheelError as exc:
                response = self._refuse(request, request_id, exc, model=model)
                status = response.status
                return response
            except Exception as exc:
                log.exception("request_crashed", path=request.raw_path, request_id=request_id)
                response = self._refuse(request, request_id, exc, model=model)
                status = response.status
                return response
            status = answer.exchange.status
            shown = _headers(answer)
            if admission is not None:
                shown.update(admission.headers)
            if answer.body is None or request.method == "HEAD":
                return await self._stream(request, answer, shown)
            return _response(answer, answer.body, shown)
        finally:
            self._count(model, status, began_s)

    async def _stream(
        self, request: web.BaseRequest, answer: Answer, headers: CIMultiDict[str]
    ) -> web.StreamResponse:
        """Pass the body on as it comes; a break in it breaks the client's connection too."""
        exchange = answer.exchange
        response = web.StreamResponse(
            status=exchange.status, reason=exchange.message.reason, headers=headers
        )
        length = exchange.message.headers.get("Content-Length")
        try:
            if length is not None:
                response.content_length = int(length)
            await response.prepare(request)
            if answer.body is None:
                while piece := await exchange.chunk():
                    await response.write(piece)
            await response.write_eof()
        except AnswerBroken:
            log.warning("answer_broken", node=answer.node, path=request.raw_path)
            if request.transport is not None:
                request.transport.abort()
            raise
        finally:
            if answer.body is None:
                answer.close()
        return response

    def _refuse(
        self,
        request: web.BaseRequest,
        request_id: str,
        error: Exception,
        *,
        model: str | None = None,
        is_admin: bool = False,
    ) -> web.Response:
        status = http_errors.status_of(error)
        as_problem = is_admin or PROBLEM in request.headers.get("Accept", "")
        body = http_errors.error_body(
            error,
            status,
            as_problem=as_problem,
            instance=request.raw_path.partition("?")[0],
            model=model,
        )
        return web.Response(
            status=status,
            body=body,
            headers={
                "Server": SERVER,
                "X-Request-Id": request_id,
                "Content-Type": PROBLEM if as_problem else JSON,
                **http_errors.error_headers(error, status),
            },
        )

    def _count(self, model: str | None, status: int, began_s: float) -> None:
        if model is None:
            self.metrics.base.refused(status)
            return
        series = self.metrics.series(model)
        series.count(status)
        if status < 400:
            series.duration.observe(asyncio.get_running_loop().time() - began_s)

    # --- answered here --------------------------------------------------------------------------

    async def _local(
        self,
        request: web.BaseRequest,
        request_id: str,
        target: Target,
        guard: Guarding | None,
    ) -> web.Response:
        shown: Mapping[str, str] = {}
        try:
            caller: Caller | None = None
            if guard is not None:
                admission = await guard.admit(request, resource_of(target.segments))
                caller, shown = admission.caller, admission.headers
            reply = await self._reply(request, target, caller, guard)
        except Exception as exc:
            if not isinstance(exc, PaddlewheelError):
                log.exception("request_crashed", path=request.raw_path, request_id=request_id)
            return self._refuse(request, request_id, exc, is_admin=target.segments[0] == "admin")
        headers = {**reply.headers, **shown, "X-Request-Id": request_id, "Server": SERVER}
        if reply.body or reply.status != 204:
            headers["Content-Type"] = reply.content_type
        return web.Response(status=reply.status, body=reply.body, headers=headers)

    async def _reply(
        self,
        request: web.BaseRequest,
        target: Target,
        caller: Caller | None,
        guard: Guarding | None,
    ) -> Reply:
        """caller: ``None`` where everybody may use everything."""
        segments, method = target.segments, request.method
        if segments[:2] == ("v2", "repository"):
            return await self._repository(request, segments[2:], caller)
        if segments in READINESS:
            verbose = any(name == "verbose" for name, _ in target.parameters())
            may_see = guard is None or (verbose and await guard.is_admin(request))
            status, body = health.ready(self._health(), verbose=verbose, names=may_see)
            reply = json_reply(body, status)
        elif segments == ("v1", "pipelines"):
            there = pipelines_of(self._rotation.fleet)
            shown = [name for name in there if caller is None or caller.may_use(name)]
            reply = json_reply({"pipelines": shown})
        elif segments == ("v1", "models"):
            models = self._rotation.table.models
            seen = [name for name in models if caller is None or caller.may_use(name)]
            reply = json_reply({"models": seen})
        else:
            reply = self._read(request, target)  # what does not exist is 404, whatever the method
        if method == "OPTIONS":
            return Reply(204, b"", headers={"Allow": "GET, HEAD, OPTIONS"})
        if method not in _READ:
            raise MethodNotAllowed((*_READ, "OPTIONS"))
        return reply

    def _read(self, request: web.BaseRequest, target: Target) -> Reply:
        match target.segments:
            case ("livez",) | ("healthz",) | ("v2", "health", "live"):
                status, body = health.live(self._health())
            case ("startupz",):
                status, body = health.started(self._health())
            case ("metrics",):
                text, kind = self.metrics.base.render(request.headers.get("Accept", ""))
                return Reply(200, text, kind)
            case ("v2",):
                return json_reply(
                    {
                        "name": "paddlewheel",
                        "version": self._product_version,
                        "extensions": list(EXTENSIONS),
                    }
                )
            case ("admin", "routes"):
                return json_reply(self._routes())
            case ("admin", "access"):
                return json_reply(self.access_report())
            case ("admin", "nodes"):
                return json_reply({"nodes": self._rotation.nodes()})
            case ("admin", "explain"):
                return self._explain(target)
            case _:
                raise NotFound("no such endpoint")
        return json_reply(body, status)

    def _routes(self) -> Mapping[str, Any]:
        """As a node's, with the nodes that take the default traffic of each model."""
        table = self._rotation.table.as_dict()
        for model, route in table["models"].items():
            found = self._rotation.default_candidates(ModelName(model))
            route["nodes"] = list(found.nodes)
            route["panic"] = found.is_panic
            route["floor"] = found.floor
        return cast("Mapping[str, Any]", table)

    def _explain(self, target: Target) -> Reply:
        """``?model=M[&version=V]&header=K:V&header=...``. Raises `BadRequest`, and as ``pick``."""
        given: dict[str, str] = {}
        headers: dict[str, str] = {}
        for name, value in target.parameters():
            if name == "header":
                key, colon, content = value.partition(":")
                if not colon or not key.strip():
                    raise BadRequest("header: want NAME:VALUE")
                headers.setdefault(key.strip().lower(), content.strip())
            elif name in ("model", "version"):
                given[name] = value
            else:
                raise BadRequest(
                    f"unknown parameter {name[:64]!r}; there are model, version, header"
                )
        model, version = given.get("model"), given.get("version")
        if not model:
            raise BadRequest("model: want a model's name")
        shown = explain(self._rotation.table, model, headers, version=version)
        route = self._rotation.table.route(model)
        want = self._rotation.want(route, version or headers.get("x-model-version"), None, headers)
        shown["nodes"] = list(self._rotation.candidates(route.model, want).nodes)
        return json_reply(shown)

    async def _repository(
        self, request: web.BaseRequest, rest: tuple[str, ...], caller: Caller | None
    ) -> Reply:
        """Triton's index over all nodes: READY where any node has it so."""
        match rest:
            case ("index",):
                pass
            case ("models", _, "load" | "unload"):
                pass
            case _:
                raise NotFound("no such endpoint")
        if request.method == "OPTIONS":
            return Reply(204, b"", headers={"Allow": "POST, OPTIONS"})
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
        servables = (
            servable.to_dict()
            for model, by_node in self._rotation.fleet.reports.items()
            if caller is None or caller.may_use(model)
            for report in by_node.values()
            for servable in report.status.servables
        )
        return json_reply(repository_index(servables, ready_only=ready))

    def _readings(self) -> Iterable[Reading]:
        nodes = self._rotation.nodes()
        for name, text in (
            ("registered", "1 while the node's key is in etcd."),
            ("answers", "1 while the node answers its probes."),
            ("in_flight", "Requests under way on the node, from this gateway."),
            ("idle_connections", "Connections to the node kept for later."),
        ):
            yield Reading(
                f"gateway_node_{name}",
                text,
                tuple(({"node": node["id"]}, float(node[name])) for node in nodes),
            )
        yield Reading(
            "gateway_node_ejections", "Times that the node was ejected for failing in a row.",
            tuple(
                ({"node": node["id"]}, float(self._rotation.ejections_total.get(node["id"], 0)))
                for node in nodes
            ),
            is_counter=True,
        )  # fmt: skip

    def _request_id(self, request: web.BaseRequest) -> str:
        given = request.headers.get("X-Request-Id")
        if given and len(given) <= 128 and given.isascii() and given.isprintable():
            return given
        return f"{self._id_prefix}{next(self._ids):08x}"


def _origin_form(raw_path: str) -> str:
    """The path as it goes to a node, of the absolute form that some clients send to proxies too."""
    if raw_path.startswith(("http://", "https://")):
        return "/" + raw_path.split("://", 1)[1].partition("/")[2]
    return raw_path


def _headers(answer: Answer) -> CIMultiDict[str]:
    headers = CIMultiDict[str](
        (name, value)
        for name, value in answer.exchange.message.headers.items()
        if name.lower() not in _DROPPED
    )
    headers[NODE_HEADER] = answer.node
    return headers


def _response(answer: Answer, body: bytes, headers: CIMultiDict[str]) -> web.Response:
    message = answer.exchange.message
    return web.Response(status=message.code, reason=message.reason, body=body, headers=headers)
