"""Under which document no gateway answer may fall any more, model by model (pure).

Only documents with the strategy ``barrier`` raise a floor: with any other, nodes on different
documents serve side by side, and are meant to.
"""

from __future__ import annotations

from collections.abc import Mapping

from registry.names import Revision
from registry.rollouts import Phase, RolloutRecord
from registry.spec import ModelDocument
from router.table import NO_REVISION


def floor_of(record: RolloutRecord | None) -> Revision:
    """What the coordinator's word alone makes of it; 0: nothing."""
    if record is None or record.strategy != "barrier" or record.phase is not Phase.COMMITTED:
        return NO_REVISION
    return record.revision


def raises_floor(documents: Mapping[Revision, ModelDocument], revision: Revision) -> bool:
    """Whether an answer from ``revision`` means that nothing older may answer.

    documents: those of the model that are known. Of another one its node knows (`ROLLOUT_HEADER`
    of `router.floor`).
    """
    document = documents.get(revision)
    return document is not None and document.spec.rollout.strategy == "barrier"
