"""`/admin/drill` on this node: the HTTP side's words to the drill box and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from loader.drills import BadDrill, DrillBox
from loader.manager import Manager
from registry.names import ModelName, Version
from router.errors import BadRequest, UnknownModel


class NodeDrills:
    """Satisfies `router.ports.Drills`."""

    def __init__(self, box: DrillBox, manager: Manager) -> None:
        self._box = box
        self._manager = manager

    async def arm(self, document: Mapping[str, Any]) -> Mapping[str, Any]:
        """Arm what ``document`` asks for; without a version, on the live one of this moment."""
        model = document.get("model")
        view = self._manager.view(ModelName(model)) if isinstance(model, str) else None
        if view is None:
            if isinstance(model, str):
                raise UnknownModel(model)
            raise BadRequest("model: want a model's name")
        live = view.in_force.live
        version = document.get("version")
        if version is not None and Version(str(version)) not in {
            servable.id.version for servable in view.servables
        }:
            raise BadRequest(f"version: {version!r} is not loaded here")
        try:
            return self._box.arm(document, live=live.version if live else None).as_json()
        except BadDrill as exc:
            raise BadRequest(str(exc)) from exc

    async def armed(self) -> Sequence[Mapping[str, Any]]:
        return [drill.as_json() for drill in self._box.armed()]

    async def disarm(self, drill_id: str) -> bool:
        return self._box.disarm(drill_id)
