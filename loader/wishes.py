"""What documents ask of one model, taken into the manager's record of it.

Called by the manager only. The document that is to be in force (`Model.aspired`) and the one that
is only to be made ready beside it (`Model.prepared`) are kept apart; what is being loaded for
either goes on where the same is still wanted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from loader.lifecycle import UNDERWAY
from loader.model import Model, Prepared
from loader.plan import Order, aspire, is_pending
from loader.policy import Aspiration
from registry.names import Revision, ServableId
from registry.spec import ModelDocument

FORMER_MAX = 2
"""Documents of before whose servables are remembered: the way back is a change of pointer."""


def take_aspired(model: Model, document: ModelDocument, revision: Revision) -> bool:
    """Make ``document`` what is to be in force; return whether it is a new one.

    Anything prepared for it, or for an older one, is prepared no more. One that was prepared, or
    was in force a moment ago and still is loaded, needs no look at its source again.
    """
    prepared = model.prepared
    if prepared is not None and prepared.aspiration.revision <= revision:
        model.prepared = None
    model.keeps = model.awaits_base = False
    if revision == model.aspired_revision and document == model.aspired:
        return False
    _remember(model)
    known = _known(model, prepared, document, revision)
    model.aspired, model.aspired_revision = document, revision
    model.is_deleted = False
    if known is not None:
        model.aspiration = known
        _prune(model)
    else:
        model.aspiration, orders = aspire(document, revision)
        model.aspiration = _take_orders(model, model.aspiration, orders)
    return prepared is None or known is not prepared.aspiration


def take_prepared(model: Model, document: ModelDocument, revision: Revision) -> bool:
    """Make ``document`` what is made ready beside what serves; return whether it is a new one."""
    prepared = model.prepared
    if prepared is not None and prepared.is_for(document, revision):
        return False
    model.is_deleted = False
    aspiration = _known(model, None, document, revision)
    if aspiration is not None:
        model.prepared = Prepared(document, aspiration)
        return True
    aspiration, orders = aspire(document, revision)
    model.prepared = Prepared(document, aspiration)
    model.prepared = Prepared(document, _take_orders(model, aspiration, orders))
    return True


def resolve(model: Model, pending: ServableId, id: ServableId) -> None:
    """The bytes behind ``pending`` are known now."""
    if model.aspiration is not None:
        model.aspiration = _resolved(model.aspiration, pending, id)
    if model.prepared is not None:
        aspiration = _resolved(model.prepared.aspiration, pending, id)
        model.prepared = replace(model.prepared, aspiration=aspiration)
    if model.fallback == pending:
        model.fallback = id


def _resolved(aspiration: Aspiration, pending: ServableId, id: ServableId) -> Aspiration:
    return replace(
        aspiration,
        live=id if aspiration.live == pending else aspiration.live,
        canary=id if aspiration.canary == pending else aspiration.canary,
    )


def _remember(model: Model) -> None:
    if model.aspired is None or model.aspiration is None or model.aspired_revision is None:
        return
    if any(is_pending(id) for id in model.aspiration.ids()):
        return
    model.former.pop(model.aspired_revision, None)
    model.former[model.aspired_revision] = (model.aspired, model.aspiration)
    while len(model.former) > FORMER_MAX:
        del model.former[next(iter(model.former))]


def _known(
    model: Model, prepared: Prepared | None, document: ModelDocument, revision: Revision
) -> Aspiration | None:
    """The servables of ``document``, where they are known, loaded or on their way."""
    if prepared is not None and prepared.is_for(document, revision):
        return prepared.aspiration
    before, aspiration = model.former.get(revision, (None, None))
    if before != document or aspiration is None:
        return None
    loaded = {servable.id for servable in model.servables.values() if servable.is_loaded}
    return aspiration if aspiration.ids() <= loaded else None


def _take_orders(
    model: Model, aspiration: Aspiration, orders: Mapping[ServableId, Order]
) -> Aspiration:
    """Take the new orders; what is being made ready for the same order goes on.

    Everything else is resolved again: the bytes at a source may have changed.
    """
    _prune(model)
    for pending, order in orders.items():
        under_way = [
            s.id for s in model.servables.values()
            if s.state in UNDERWAY and model.orders[s.id] == order and not is_pending(s.id)
        ]  # fmt: skip
        if under_way:
            aspiration = _resolved(aspiration, pending, under_way[0])
        else:
            model.orders[pending] = order
    return aspiration


def _prune(model: Model) -> None:
    """Keep no record of what nobody asks for any more."""
    kept = {model.fallback, *model.servables}
    if model.aspiration is not None:
        kept |= model.aspiration.ids()
    if model.prepared is not None:
        kept |= model.prepared.aspiration.ids()
    model.orders = {id: order for id, order in model.orders.items() if id in kept}
    model.fetched = {id: fetched for id, fetched in model.fetched.items() if id in kept}
    model.fetch_ms = {id: ms for id, ms in model.fetch_ms.items() if id in kept}
