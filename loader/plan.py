"""From an accepted document to recipes: which versions it wants, and how each is made (pure)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from loader.policy import Aspiration
from loader.recipe import Recipe
from registry.names import Digest, Revision, ServableId, Version
from registry.spec import ModelDocument

PENDING = "pending:"
"""Starts the digest of a servable whose bytes are not known yet."""


@dataclass(frozen=True, slots=True)
class Order:
    """One version that a document wants, before its bytes are known."""

    recipe: Recipe
    compatibility: str
    """strict | loose | none, against the version it would replace."""


def recipe_for(document: ModelDocument, version: Version) -> Recipe:
    """How ``document`` wants ``version`` to be made. Raises `KeyError` when it is not listed."""
    spec = document.spec
    entry = spec.version(version)
    placement, predictor, warmup = spec.placement, spec.predictor, spec.warmup
    return Recipe(
        model=document.metadata.name,
        version=version,
        source=entry.source,
        sha256=dict(entry.sha256),
        device=placement.device,
        replicas=placement.replicas,
        memory_mb=placement.memory_mb,
        priority=placement.priority,
        threads=predictor.threads,
        precision=predictor.precision,
        options=dict(predictor.options),
        warmup_requests=warmup.requests,
        warmup_shapes=dict(warmup.shapes),
        golden=warmup.golden,
        rtol=warmup.rtol,
        atol=warmup.atol,
    )


def order_for(document: ModelDocument, version: Version) -> Order:
    """The same with what else decides whether it is admitted."""
    entry = document.spec.version(version)
    return Order(recipe_for(document, version), str(entry.compatibility))


def pending_id(recipe: Recipe, revision: Revision) -> ServableId:
    """Stands for a servable until its bytes were read.

    It carries the revision: the next document may find other bytes at the same source.
    """
    return ServableId(recipe.model, recipe.version, Digest(f"{PENDING}{revision}"), recipe.key())


def fallback_id(recipe: Recipe, revision: Revision) -> ServableId:
    """The same for the last good version, as ``revision`` had it."""
    digest = Digest(f"{PENDING}lastgood:{revision}")
    return ServableId(recipe.model, recipe.version, digest, recipe.key())


def is_pending(id: ServableId) -> bool:
    return id.digest.startswith(PENDING)


def aspire(
    document: ModelDocument, revision: Revision
) -> tuple[Aspiration, Mapping[ServableId, Order]]:
    """What ``document`` aspires to, every version still pending, and how to make each."""
    spec = document.spec
    live = order_for(document, spec.live)
    orders = {pending_id(live.recipe, revision): live}
    canary_id: ServableId | None = None
    if spec.canary is not None:
        canary = order_for(document, spec.canary.version)
        canary_id = pending_id(canary.recipe, revision)
        orders[canary_id] = canary
    aspiration = Aspiration(
        revision=revision,
        live=pending_id(live.recipe, revision),
        canary=canary_id,
        bake_s=spec.rollback.bake_s,
    )
    return aspiration, orders
