"""The gateway's front door: requests about a model go to a node, the rest is answered here."""

from __future__ import annotations

import asyncio
import itertools
import secrets
from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

import structlog
from aiohttp import web
from multidict import CIMultiDict

from registry.errors import PaddlewheelError
from registry.inference import BadInput
from registry.names import ModelName
from router import health, http_errors
from router.deadline import TIMEOUT_HEADER, parse_timeout_s
from router.errors import BadRequest, MethodNotAllowed, NotFound
from router.explain import explain
from router.fleet.paths import ModelPath, model_path
from router.gateway_metrics import GatewayMetrics
from router.http_body import read_body
from router.http_errors import CLIENT_CLOSED, JSON, PROBLEM
from router.http_path import Target, parse_target
from router.http_probes import EXTENSIONS
from router.http_reply import SERVER, Reply, json_reply
from router.http_server import HttpServer
from router.metrics import Metrics, Reading
from router.ports import Health
from router.protocols.exchange import parse_json
from router.proxy import HOP_BY_HOP, Answer, Forward, Proxy, request_head, take_body
from router.repository import repository_index
from router.rotation import Rotation
from router.upstream import AnswerBroken

log = structlog.get_logger(__name__)

NODE_HEADER = "X-Node"
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
        self._server: HttpServer | None = None
        self._id_prefix = secrets.token_hex(6)
        self._ids = itertools.count()

    async def start(self, host: str = "127.0.0.1", port: int = 0) -> str:
        """Listen; return the URL, ``http://host:port``. Raises `OSError`."""
        self._server = HttpServer(self.handle)
        return await self._server.start(host, port)

    async def stop(self, *, drain_s: float = 30.0) -> None:
        """Stop accepting, answer what is under way for up to ``drain_s``, then close."""
        if self._server is not None:
            await self._server.stop(drain_s=drain_s)

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        """Answer one request. Raises cancellation, and `AnswerBroken` in the midst of an answer."""
        request_id = self._request_id(request)
        target = parse_target(request.raw_path)
        path = model_path(target.segments)
        if path is not None:
            return await self._forward(request, request_id, path)
        return await self._local(request, request_id, target)

    # --- to a node ------------------------------------------------------------------------------

    async def _forward(
        self, request: web.BaseRequest, request_id: str, path: ModelPath
    ) -> web.StreamResponse:
        loop = asyncio.get_running_loop()
        began_s = loop.time()
        status = CLIENT_CLOSED
        model: str | None = None
        try:
            try:
                route = self._rotation.table.route(path.model)
                model = route.model
                headers = request.headers
                wanted_s = parse_timeout_s(headers.get(TIMEOUT_HEADER))
                body = await take_body(request, route.limits.max_body_mb * 1_000_000)
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
                    self._rotation.want(route, version, path.label, headers),
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
            if answer.body is None or request.method == "HEAD":
                return await self._stream(request, answer)
            return _response(answer, answer.body)
        finally:
            self._count(model, status, began_s)

    async def _stream(self, request: web.BaseRequest, answer: Answer) -> web.StreamResponse:
        """Pass the body on as it comes; a break in it breaks the client's connection too."""
        exchange = answer.exchange
        response = web.StreamResponse(
            status=exchange.status, reason=exchange.message.reason, headers=_headers(answer)
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
        self, request: web.BaseRequest, request_id: str, target: Target
    ) -> web.Response:
        try:
            reply = await self._reply(request, target)
        except Exception as exc:
            if not isinstance(exc, PaddlewheelError):
                log.exception("request_crashed", path=request.raw_path, request_id=request_id)
            return self._refuse(request, request_id, exc, is_admin=target.segments[0] == "admin")
        headers = {**reply.headers, "X-Request-Id": request_id, "Server": SERVER}
        if reply.body or reply.status != 204:
            headers["Content-Type"] = reply.content_type
        return web.Response(status=reply.status, body=reply.body, headers=headers)

    async def _reply(self, request: web.BaseRequest, target: Target) -> Reply:
        segments, method = target.segments, request.method
        if segments[:2] == ("v2", "repository"):
            return await self._repository(request, segments[2:])
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
            case ("readyz",) | ("v2", "health", "ready"):
                verbose = any(name == "verbose" for name, _ in target.parameters())
                status, body = health.ready(self._health(), verbose=verbose)
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
            case ("v1", "models"):
                return json_reply({"models": list(self._rotation.table.models)})
            case ("admin", "routes"):
                return json_reply(self._routes())
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

    async def _repository(self, request: web.BaseRequest, rest: tuple[str, ...]) -> Reply:
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
            for by_node in self._rotation.fleet.reports.values()
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


def _response(answer: Answer, body: bytes) -> web.Response:
    message = answer.exchange.message
    return web.Response(
        status=message.code, reason=message.reason, body=body, headers=_headers(answer)
    )
