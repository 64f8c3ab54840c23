"""The steps of a canary: what share of the traffic it has, and when it gets more (pure).

`paddlewheel.rollout.plan` asks here once a document is committed; before, its canary has nothing.
"""

from __future__ import annotations

from paddlewheel.rollout.world import World
from registry.rollouts import CanaryProgress, RolloutRecord
from registry.spec import ModelDocument


def has_steps(document: ModelDocument) -> bool:
    """Whether the document's canary is advanced by the coordinator, so that it needs a record even
    where nothing waits for a commit."""
    return False


def advance(world: World, record: RolloutRecord) -> CanaryProgress | None:
    """The canary's next progress, or ``None`` while there is nothing to change.

    record: about ``world``'s document, and committed.
    """
    return None


def wake_s(world: World, record: RolloutRecord) -> float | None:
    """In how many seconds to ask again though nothing has changed; ``None``: not for time's sake.

    record: as in `advance`, which has just returned ``None``.
    """
    return None
