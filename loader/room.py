"""Whether memory is short for what a model wants next, and who would make room for it."""

from __future__ import annotations

import contextlib

from loader.devices import BadDevice, DevicePool, Priority
from loader.lifecycle import State
from loader.model import Model
from loader.readying import total_mb
from loader.servable import Servable
from registry.names import ServableId


def is_tight(model: Model, devices: DevicePool) -> bool:
    """Whether what is wanted next fits only once this model's standby has gone.

    Wanted by this model, or by one of a higher priority that stands in line. Where nothing serves,
    what is only prepared goes too.
    """
    standby_id = model.in_force.standby
    standby = model.servables.get(standby_id) if standby_id is not None else None
    if standby is not None and _is_outranked(standby, devices):
        return True
    going = [s for s in model.servables.values() if s.state is State.DRAINING]
    shadows = _shadows(model)
    if standby is not None:
        going.append(standby)
    to_serve = _to_serve(model)
    return any(
        _is_short(model, devices, id, [*going, *(shadows if id in to_serve else ())])
        for id in (*to_serve, *_to_prepare(model))
    )


def _to_serve(model: Model) -> tuple[ServableId, ...]:
    aspired = () if model.aspiration is None else tuple(model.aspiration.ids())
    return aspired if model.fallback is None else (*aspired, model.fallback)


def _to_prepare(model: Model) -> tuple[ServableId, ...]:
    return () if model.prepared is None else tuple(model.prepared.aspiration.ids())


def _shadows(model: Model) -> list[Servable]:
    """What is only prepared, where nothing serves."""
    live = model.in_force.live
    if live is not None and live in model.servables and model.servables[live].is_loaded:
        return []
    kept = {*_to_serve(model), *model.in_force.ids()}
    return [
        servable
        for id in _to_prepare(model)
        if id not in kept and (servable := model.servables.get(id)) is not None
    ]


def _is_short(model: Model, devices: DevicePool, id: ServableId, leaving: list[Servable]) -> bool:
    """Whether ``id`` stands in line for memory that only these give it."""
    fetched, order = model.fetched.get(id), model.orders.get(id)
    if fetched is None or order is None:
        return False
    wanted = model.servables.get(id)
    if wanted is not None and (wanted.state is not State.FETCHING or wanted.memory_mb):
        return False  # it has its memory, or failed for want of something else
    recipe = order.recipe
    leaving_mb = sum(each.memory_mb for each in leaving if each.recipe.device == recipe.device)
    with contextlib.suppress(BadDevice):
        free_mb = devices.free_mb(recipe.device)
        return free_mb < total_mb(recipe, fetched) <= free_mb + leaving_mb
    return False


def _is_outranked(standby: Servable, devices: DevicePool) -> bool:
    with contextlib.suppress(BadDevice):
        first = devices.waiting_priority(standby.recipe.device)
        return first is not None and first > Priority.parse(standby.recipe.priority)
    return False
