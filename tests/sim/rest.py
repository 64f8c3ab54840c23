"""What a fleet at rest looks like: everybody there, every document answered, nothing under way."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import TYPE_CHECKING

from registry.keys import Keys
from registry.names import ModelName
from registry.records import ModelStatus
from registry.spec import ConfigError, ModelDocument, parse_model
from tests.sim.fleet import SimNode
from tests.sim.machine import draws
from tests.sim.promises import Found

if TYPE_CHECKING:
    from tests.sim.scenario import World

KEYS = Keys()


async def until_at_rest(world: World, *, within_s: float) -> list[Found]:
    """Wait until nothing is left to be said against it; what is, after ``within_s``."""
    loop = asyncio.get_running_loop()
    deadline_s = loop.time() + within_s
    while True:
        await asyncio.sleep(1.0)
        for node in world.fleet.nodes.values():
            node.start()  # one that was told to stop may have ended only now
        missing = next(unrest(world), None)
        if missing is None:
            return []
        if loop.time() >= deadline_s:
            return [
                Found("convergence", loop.time(), what)
                for what, _ in zip(unrest(world), range(10), strict=False)
            ]


def unrest(world: World) -> Iterator[str]:
    """What keeps this fleet from being at rest, in words."""
    fleet, etcd = world.fleet, world.etcd
    for failure in fleet.failures:
        yield f"a process ended by itself: {failure}"
    for node in fleet.nodes.values():
        if not node.is_up:
            yield f"{node.id} is not up"
        elif etcd.get(KEYS.node(node.id)) is None:
            yield f"{node.id} runs and is not registered"
    for model in world.models:
        kv = etcd.get(KEYS.model(model))
        if kv is None:
            yield from _deleted(world, model)
            continue
        try:
            document = parse_model(kv.value, name=model)
        except ConfigError:
            document = None
        for node in fleet.nodes.values():
            yield from _answered(world, node, model, kv.mod_revision, document)


def _deleted(world: World, model: ModelName) -> Iterator[str]:
    for node in world.fleet.nodes.values():
        if world.etcd.get(KEYS.status(model, node.id)) is not None:
            yield f"{node.id} has a status of {model}, which was deleted"
        elif node.app is not None and model in node.app.serving.table.models:
            yield f"{node.id} still routes {model}, which was deleted"


def _answered(
    world: World, node: SimNode, model: ModelName, revision: int, document: ModelDocument | None
) -> Iterator[str]:
    """ACK or NACK, and what comes of it."""
    kv = world.etcd.get(KEYS.status(model, node.id))
    if kv is None:
        yield f"{node.id} said nothing of {model} at {revision}"
        return
    status = ModelStatus.from_json(kv.value)
    if status.revision != revision:
        yield f"{node.id} last saw {model} at {status.revision}, not {revision}"
    elif status.accepted is not (document is not None):
        yield f"{node.id} says accepted={status.accepted} of {model} at {revision}"
    elif document is not None:
        yield from _applied(world, node, model, status, document)


def _applied(
    world: World, node: SimNode, model: ModelName, status: ModelStatus, document: ModelDocument
) -> Iterator[str]:
    live = document.spec.live
    source = f"/models/{model}/{live}"
    nature = world.user.nature(source)
    if draws("breaks", node.id, source) < nature.breaks_on:
        if status.live == live:
            yield f"{node.id} serves {model}/{live}, which cannot be made ready there"
        return
    if world.etcd.get(KEYS.quarantine(model, live)) is not None:
        if status.live == live:
            yield f"{node.id} serves {model}/{live}, which is quarantined"
        return
    if status.reason is not None and "quarantined" in status.reason:
        return  # by this node alone, without a quorum
    verdict = world.verdict(model, document, status.revision or 0)
    if verdict == "apply":
        if status.applied_revision != status.revision:
            yield (
                f"{node.id} applied {model} at {status.applied_revision}, not {status.revision}: "
                f"{status.reason}"
            )
        elif status.live != live:
            yield f"{node.id} serves {model}/{status.live}, not {live}: {status.reason}"
    elif verdict == "revert":
        if status.applied_revision == status.revision and not world.is_first(model):
            yield f"{node.id} applied {model} at {status.revision}, which was aborted"
    else:
        yield f"the rollout of {model} at {status.revision} is {verdict}"
