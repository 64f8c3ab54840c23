"""What a node's readiness probe says, and what a row of probes adds up to (pure)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import orjson

from registry.names import ModelName

PROBE_PATH = "/v2/health/ready?verbose"
TIMEOUTS_TO_SILENT = 2
"""A busy node may be late once. A refused connection leaves no doubt."""

_NOT_THE_NODE = ("model:", "device:", "models")
"""Checks about one model or device, or about all models, unnamed, where access control is on.
Whatever else fails, the node serves nothing."""


@dataclass(frozen=True, slots=True)
class Vitals:
    """A node as its probes show it."""

    answers: bool
    """Whether it spoke at all the last times it was asked."""
    serves: bool
    """Whether it is up and takes requests: not draining, and with its documents known."""
    failing: frozenset[ModelName] = frozenset()
    """Models that it says it cannot serve now."""
    timeouts: int = 0
    """Probes in a row without an answer."""

    def serves_model(self, model: ModelName) -> bool:
        return self.answers and self.serves and model not in self.failing


UNKNOWN = Vitals(answers=True, serves=True)
"""Before the first probe: what etcd says counts."""


def read_probe(status: int, body: bytes) -> Vitals:
    """Understand one answer of `PROBE_PATH`.

    A node that is unready for the sake of one model serves the others. What is not our node's
    JSON counts by its status alone.
    """
    if status == 200:
        return UNKNOWN
    try:
        document: Any = orjson.loads(body)
        checks = cast("list[Mapping[str, Any]]", document["checks"])
        failed = [str(check["name"]) for check in checks if not check["ok"]]
    except (orjson.JSONDecodeError, KeyError, TypeError):
        return Vitals(answers=True, serves=False)
    models = frozenset(
        ModelName(name.removeprefix("model:")) for name in failed if name.startswith("model:")
    )
    about_models = bool(models) or "models" in failed
    serves = about_models and all(name.startswith(_NOT_THE_NODE) for name in failed)
    return Vitals(answers=True, serves=serves, failing=models)


def after_timeout(before: Vitals) -> Vitals:
    """No answer in time."""
    timeouts = before.timeouts + 1
    if timeouts >= TIMEOUTS_TO_SILENT:
        return Vitals(answers=False, serves=False, timeouts=timeouts)
    return Vitals(before.answers, before.serves, before.failing, timeouts)


def after_refusal(before: Vitals) -> Vitals:
    """No connection, or cut before an answer: nobody is there."""
    return Vitals(answers=False, serves=False, timeouts=before.timeouts)
