"""``/admin``: what is served and why, and fault drills where they are switched on."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

from registry.inference import BadInput
from router.errors import BadRequest, Forbidden, MethodNotAllowed, NotFound
from router.explain import explain
from router.http_path import Target
from router.http_reply import Reply, json_reply
from router.ports import Drills, NodeView
from router.protocols.exchange import parse_json
from router.serving import Serving


class Admin:
    """The ``/admin`` endpoints. ``drills`` is ``None`` where they are switched off."""

    def __init__(
        self, node: NodeView, serving: Callable[[], Serving], drills: Drills | None
    ) -> None:
        self._node = node
        self._serving = serving
        self._drills = drills

    def routes(self) -> Reply:
        return json_reply(self._serving().table.as_dict())

    def servables(self) -> Reply:
        return json_reply(
            {"node": self._node.node_id, "servables": [dict(s) for s in self._node.servables()]}
        )

    def explain(self, target: Target) -> Reply:
        """``?model=M[&version=V]&header=K:V&header=...``. Raises `BadRequest`, and as ``pick``."""
        model: str | None = None
        version: str | None = None
        headers: dict[str, str] = {}
        for name, value in target.parameters():
            if name == "model":
                model = value
            elif name == "version":
                version = value
            elif name == "header":
                key, colon, content = value.partition(":")
                if not colon or not key.strip():
                    raise BadRequest("header: want NAME:VALUE")
                headers.setdefault(key.strip().lower(), content.strip())
            else:
                raise BadRequest(
                    f"unknown parameter {name[:64]!r}; there are model, version, header"
                )
        if not model:
            raise BadRequest("model: want a model's name")
        return json_reply(explain(self._serving().table, model, headers, version=version))

    async def drill(self, method: str, drill_id: str | None, body: bytes) -> Reply:
        """``GET``, ``POST /admin/drill`` and ``DELETE /admin/drill/<id>``.

        Raises `Forbidden` where drills are switched off, `BadRequest` for what is no drill.
        """
        if self._drills is None:
            raise Forbidden("drills are switched off on this node (--enable-drills)")
        if drill_id is not None:
            if method != "DELETE":
                raise MethodNotAllowed(("DELETE",))
            if not await self._drills.disarm(drill_id):
                raise NotFound(f"no drill {drill_id[:64]!r}")
            return json_reply({"id": drill_id, "armed": False})
        if method == "GET":
            return json_reply({"drills": [dict(drill) for drill in await self._drills.armed()]})
        if method != "POST":
            raise MethodNotAllowed(("GET", "POST"))
        try:
            document = parse_json(body)
        except BadInput as exc:
            raise BadRequest(str(exc)) from exc
        if not isinstance(document, dict):
            raise BadRequest("the drill: want a JSON object")
        return json_reply(dict(await self._drills.arm(cast("dict[str, object]", document))))
