"""How a new document takes effect across the fleet, as values (pure).

What is done with them: `registry.rollouts` on a node, `paddlewheel.rollout` for the whole fleet.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from registry.spec_rules import Value, choose_one, exactly_one
from registry.spec_values import Labels, Percent, PositiveSeconds, Seconds, wants

Strategy = Literal["immediate", "waves", "barrier"]

WAVES_MAX = 64


class WaveSpec(Value):
    """Some of the nodes, and how long they are watched before the next ones follow."""

    model_config = ConfigDict(json_schema_extra=exactly_one("percent", "labels"))

    percent: Percent | None = None
    """So many of the nodes in all, those of earlier waves included; rounded up, by node id."""
    labels: Labels | None = None
    """The nodes with all these labels, besides those of earlier waves."""
    bake_s: Seconds = 60.0
    """Seconds for which they serve it without a failure before the next wave begins."""

    @model_validator(mode="after")
    def _one_choice(self) -> WaveSpec:
        names = ("percent", "labels")
        given = tuple(name for name in names if getattr(self, name) is not None)
        if len(given) != 1:
            raise choose_one(names, given)
        return self


def _by_strategy(given: dict[str, Any]) -> float:
    return 0.0 if given.get("strategy", "immediate") == "immediate" else 100.0


class Rollout(Value):
    """How a new document takes effect across the fleet."""

    strategy: Annotated[Strategy, wants("immediate, waves or barrier")] = "immediate"
    """``immediate``: each node when it is ready. ``waves``: some nodes after the others.
    ``barrier``: all at once, when all are ready."""
    require_ack: Percent = Field(default_factory=_by_strategy)
    """Percent of the nodes that must accept the document, or it takes effect nowhere; 100 for
    waves and barrier, 0 for immediate."""
    waves: Annotated[tuple[WaveSpec, ...], Field(max_length=WAVES_MAX)] = ()
    """Who comes first, for ``waves``; the nodes left over follow as a last wave."""
    timeout_s: PositiveSeconds = 600.0
    """Seconds the nodes have to get ready, in each wave anew; after it the rollout is aborted."""

    @model_validator(mode="after")
    def _waves_where_they_belong(self) -> Rollout:
        if (self.strategy == "waves") is not bool(self.waves):
            said = (
                "want one wave or more with strategy waves"
                if self.strategy == "waves"
                else f"want no waves with strategy {self.strategy}"
            )
            raise PydanticCustomError("said", "{said}", {"said": said})
        return self

    @property
    def is_gated(self) -> bool:
        """Whether a new document waits for the coordinator's word before it takes effect."""
        return self.strategy != "immediate" or self.require_ack > 0
