"""Why a request would go where it goes: the same `pick`, shown as SPEC section 7's shape (pure)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from router.table import CANARY, RequestFacts, RouteTable

_UNLUCKY = 1.0
"""No dice falls for the canary, so that the same question always gets the same answer."""


def explain(
    table: RouteTable,
    model: str,
    headers: Mapping[str, str],
    *,
    version: str | None = None,
    claims: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return where a request with ``headers`` (lower-case names) goes, and by which rule.

    ``reason`` says why live is not what the document asks for (a quarantine), ``unavailable`` the
    same of each version that is loaded and taken out. Where chance has a say, ``route`` is what the
    unlucky get and ``canary_percent`` is the share of such requests that the canary takes. Raises
    as `RouteTable.pick`.
    """
    route = table.route(model)
    version = version or headers.get("x-model-version")
    facts = RequestFacts(model, version, None, headers, claims, _UNLUCKY)
    choice = route.pick(facts)
    percent = 100.0 if choice.kind == CANARY else 0.0
    if version is None and route.canary is not None and route.rules is not None:
        percent = round(100 * route.rules.share(headers, claims), 4)
    rule = choice.rule
    return {
        "model": model,
        "version": choice.servable.version,
        "route": choice.kind,
        "rule": None
        if rule is None
        else {"kind": rule.kind, "index": rule.index, "detail": rule.detail},
        "config_revision": route.revision,
        "bucket": choice.bucket,
        "canary_percent": percent,
        "digest": choice.servable.digest,
        "reason": route.reason,
        "unavailable": dict(route.unavailable),
    }
