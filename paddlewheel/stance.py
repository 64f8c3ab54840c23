"""Where this node stands with each model's newest document, told to the manager.

The rule is `paddlewheel.gating`; here are the documents to go back to, as far as they are known,
and the manager's side of it. Nothing here waits: what only history knows is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from loader.manager import Manager
from paddlewheel.gating import Shadow, Step, next_step
from registry.catalog import Accepted
from registry.names import ModelName, NodeId, Revision
from registry.rollouts import RolloutRecord
from registry.spec import ModelDocument

BASES_MAX = 4
"""Documents of each model that are remembered, to be gone back to; history has them all."""


class Stance:
    """One a node, on its event loop. ``ask``: have history searched for a model's base."""

    def __init__(
        self,
        *,
        manager: Manager,
        node: NodeId,
        labels: Mapping[str, str],
        ask: Callable[[ModelName], None],
    ) -> None:
        self._manager = manager
        self._node = node
        self._labels = labels
        self._ask = ask
        self._recent: dict[ModelName, dict[Revision, ModelDocument]] = {}
        """Documents that were accepted here, the oldest first."""
        self._without_base: dict[ModelName, Revision] = {}
        """Models whose document to go back to is not in history, or not for this node."""
        self.rollouts_known = False
        """Whether etcd was asked for the rollouts since this process began."""

    def is_placed_here(self, document: ModelDocument) -> bool:
        return document.spec.placement.labels.items() <= self._labels.items()

    def remember(self, document: ModelDocument, revision: Revision) -> None:
        """``document`` was accepted here, and may be gone back to."""
        if self.is_placed_here(document):
            recent = self._recent.setdefault(document.name, {})
            recent.pop(revision, None)
            recent[revision] = document
            while len(recent) > BASES_MAX:
                del recent[next(iter(recent))]

    def look_again(self, model: ModelName) -> None:
        """Something new is known: a base that was not found may be another one now."""
        self._without_base.pop(model, None)

    def give_up(self, model: ModelName, revision: Revision) -> None:
        """The document of ``revision`` is nowhere, or not for this node."""
        self._without_base[model] = revision

    def forget(self, model: ModelName) -> None:
        self._recent.pop(model, None)
        self._without_base.pop(model, None)

    def lacks(self, newest: Accepted, record: RolloutRecord | None) -> Revision | None:
        """The document that history is to be asked for, if one is."""
        if not self.rollouts_known:
            return None  # the record of before a restart may be of the past
        aspire = self._step(newest, record).aspire
        if aspire is None or self._at(newest, aspire) is not None:
            return None
        return aspire

    def take(self, newest: Accepted, record: RolloutRecord | None) -> Step | None:
        """Tell the manager what follows for it; ``None``: nothing of the model belongs here.

        newest: the newest accepted document of a model.
        """
        step, manager, model = self._step(newest, record), self._manager, newest.document.name
        if not self.is_placed_here(newest.document) and (
            step.aspire == newest.revision or (step.aspire is None and manager.view(model) is None)
        ):
            return None
        match step.shadow:
            case Shadow.PREPARE:
                manager.prepare(newest.document, newest.revision)
            case Shadow.DROP if step.aspire != newest.revision:
                manager.drop_prepared(model)
            case _:
                pass  # what was prepared comes into force as it is
        if step.aspire is None:
            manager.await_base(model, is_awaited=not self.rollouts_known)
        elif (document := self._at(newest, step.aspire)) is not None:
            manager.aspire(document, step.aspire, is_tentative=step.is_tentative)
        elif self._without_base.get(model) == step.aspire:
            manager.await_base(model, is_awaited=False)
        else:
            manager.await_base(model)
            self._ask(model)
        return step

    def _step(self, newest: Accepted, record: RolloutRecord | None) -> Step:
        view = self._manager.view(newest.document.name)
        step = next_step(
            newest.document,
            newest.revision,
            record,
            self._node,
            aspired=view.aspired_revision if view is not None else None,
            is_placed_here=self.is_placed_here(newest.document),
        )
        if step.aspire is not None and step.aspire < newest.created:
            # The record is still of the time before the model was deleted.
            return replace(step, aspire=None)
        return step

    def _at(self, newest: Accepted, revision: Revision) -> ModelDocument | None:
        if newest.revision == revision:
            return newest.document
        return self._recent.get(newest.document.name, {}).get(revision)
