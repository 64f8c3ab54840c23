"""What the front door needs to know of its node, as protocols that the wiring satisfies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True, slots=True)
class Check:
    """One reason to be ready, or not to be."""

    name: str
    ok: bool
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Health:
    """What the probes show. Computed by the node, rendered by `router.health`."""

    ready: bool
    """A good version of every required model can serve here, and the node is not draining."""
    started: bool
    """It was ready once."""
    live: bool
    """The control loop turns and no device is stuck; says nothing about etcd."""
    checks: Sequence[Check] = ()


class NodeView(Protocol):
    """The node as its HTTP side sees it. Called on the event loop: must not block."""

    @property
    def node_id(self) -> str: ...

    def health(self) -> Health: ...

    def servables(self) -> Sequence[Mapping[str, Any]]:
        """One entry for each servable in any state, in the shape of SPEC section 7."""
        ...


class Drills(Protocol):
    """Fault injection, where it is switched on (``--enable-drills``)."""

    async def arm(self, document: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return ``{"id", "armed": true}``. Raises `router.errors.BadRequest`."""
        ...

    async def armed(self) -> Sequence[Mapping[str, Any]]:
        """Return the drills that are armed now."""
        ...

    async def disarm(self, drill_id: str) -> bool:
        """Return whether there was such a drill."""
        ...
