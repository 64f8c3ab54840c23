"""Probes, metrics, and the health and metadata that the Open Inference Protocol asks for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from registry.names import ServableId
from router import health
from router.errors import NothingServes, UnknownVersion
from router.http_reply import Reply, json_reply
from router.ports import NodeView
from router.protocols import open_inference, tf_serving
from router.repository import repository_index, version_status
from router.serving import Serving
from router.table import STABLE, RequestFacts

PLATFORM = "paddle_inference"
EXTENSIONS = ("binary_tensor_data", "model_repository")

Seen = Callable[[str], bool]
"""Whether the asker may know of a model."""


def everything(_model: str) -> bool:
    return True


class Inspection:
    """Answers every question about the node and its models that is no inference."""

    def __init__(
        self, node: NodeView, serving: Callable[[], Serving], product_version: str
    ) -> None:
        self._node = node
        self._serving = serving
        self._product_version = product_version

    def livez(self) -> Reply:
        status, body = health.live(self._node.health())
        return json_reply(body, status)

    def readyz(self, *, verbose: bool, names: bool = True) -> Reply:
        status, body = health.ready(self._node.health(), verbose=verbose, names=names)
        return json_reply(body, status)

    def startupz(self) -> Reply:
        status, body = health.started(self._node.health())
        return json_reply(body, status)

    def server_metadata(self) -> Reply:
        """``GET /v2``."""
        return json_reply(
            {
                "name": "paddlewheel",
                "version": self._product_version,
                "extensions": list(EXTENSIONS),
            }
        )

    def model_metadata(self, model: str, version: str | None) -> Reply:
        """``GET /v2/models/{m}[/versions/{v}]``. Raises as `router.table.RouteTable.pick`."""
        serving = self._serving()
        route = serving.table.route(model)
        choice = _pick(serving, model, version, None)
        signature = serving.predictors[choice].signature
        versions = [*route.loaded] if version is None else [choice.version]
        return json_reply(
            open_inference.metadata(model, [str(v) for v in versions], signature, PLATFORM),
            X_Config_Revision=str(route.revision),
        )

    def model_ready(self, model: str, version: str | None) -> Reply:
        """``GET .../ready``: 200, or 503 for what is known here but cannot serve, or 404."""
        try:
            choice = _pick(self._serving(), model, version, None)
        except NothingServes as exc:
            return json_reply({"name": model, "ready": False, "error": str(exc)}, 503)
        except UnknownVersion as exc:
            if exc.reason is None and not self._servables(model, version):
                raise
            return json_reply({"name": model, "ready": False, "error": str(exc)}, 503)
        return json_reply({"name": model, "version": choice.version, "ready": True})

    def repository_index(self, *, ready_only: bool, seen: Seen = everything) -> Reply:
        servables = (s for s in self._node.servables() if seen(s["model"]))
        return json_reply(repository_index(servables, ready_only=ready_only))

    def models(self, seen: Seen = everything) -> Reply:
        """``GET /v1/models``, KServe's list, as far as the asker may see it."""
        return json_reply({"models": [name for name in self._serving().table.models if seen(name)]})

    def model_status(self, model: str, version: str | None, label: str | None) -> Reply:
        """``GET /v1/models/{m}[...]``: TensorFlow Serving's keys and KServe's, side by side."""
        serving = self._serving()
        route = serving.table.route(model)
        if label is not None:
            version = _pick(serving, model, None, label).version
        servables = self._servables(model, version)
        if version is not None and not servables:
            _pick(serving, model, version, None)
        return json_reply(
            {
                "model_version_status": version_status(servables),
                "name": model,
                "ready": route.default is not None,
            }
        )

    def _servables(self, model: str, version: str | None) -> list[Mapping[str, Any]]:
        return [
            servable
            for servable in self._node.servables()
            if servable["model"] == model and version in (None, servable["version"])
        ]

    def tf_metadata(self, model: str, version: str | None, label: str | None) -> Reply:
        """``GET /v1/models/{m}[...]/metadata``."""
        serving = self._serving()
        choice = _pick(serving, model, version, label)
        signature = serving.predictors[choice].signature
        return json_reply(tf_serving.metadata(model, choice.version, signature))


def _pick(serving: Serving, model: str, version: str | None, label: str | None) -> ServableId:
    """The servable that speaks for a model without a request: as named, or the default one."""
    if version is None and label is None:
        label = STABLE
    return serving.table.pick(RequestFacts(model, version, label)).servable
