"""What a pipeline needs from its node, as protocols that the wiring satisfies."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from registry.inference import Array, Signature
from registry.names import ModelName
from router.pipeline.plan import Plan


class Transforms(Protocol):
    """The installed transforms, run beside the event loop."""

    @property
    def signatures(self) -> Mapping[str, Signature]:
        """Those that could be imported, by their entry points' names."""
        ...

    async def run(
        self, name: str, feeds: Mapping[str, Array], *, deadline_s: float
    ) -> Mapping[str, Array]:
        """Run one. ``deadline_s``: the loop's time, after which its process is ended.

        Raises `BadInput` (it said `ValueError`), `DeadlineExceeded`, `Overloaded`,
        `TransformFailed`.
        """
        ...


@dataclass(frozen=True, slots=True)
class Pipeline:
    """One pipeline as its node knows it."""

    name: ModelName
    plan: Plan | None
    """The document in force; ``None`` while none was ever accepted."""
    status: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """What else ``GET /v1/pipelines/<name>`` tells of its documents."""


@dataclass(frozen=True, slots=True)
class Pipelines:
    """All pipelines of a node as of one moment: a value, swapped whole."""

    by_name: Mapping[str, Pipeline] = field(default_factory=dict[str, Pipeline])
    is_complete: bool = True
    """Whether all are known: before the documents were read once, one may well exist."""
