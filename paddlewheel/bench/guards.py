"""What the output guards cost: the same model with and without them, turn and turn about."""

from __future__ import annotations

import asyncio
import itertools
import statistics
from collections.abc import Callable
from typing import Any

from paddlewheel.bench.checks import infer_body
from paddlewheel.bench.closed_loop import closed_loop
from paddlewheel.bench.load import http_request
from paddlewheel.bench.stage import Ready, Status, Watcher, put_document
from paddlewheel.bench.subjects import MODEL, Subject
from registry.names import Revision
from registry.store import Store

GUARDS_RATIO = 0.97
GUARDED, PLAIN = "guarded", "plain"
_ON = "rollback: {bake_s: 0, on: {nan_rate: 0.01, p95_ms: 60000}}"
"""Objectives that hold, so that they are looked at with every answer and nothing comes of it."""
_TURN_S = 0.4
_CONCURRENCY = 4


def in_force(revision: Revision) -> Callable[[Status], bool]:
    """Whether a status says so of the document of this revision."""
    return lambda status: bool(status["applied_revision"] == revision)


async def guards(
    store: Store, watcher: Watcher, ready: Ready, subject: Subject, rounds: int
) -> dict[str, Any]:
    """Requests per second of both, and the median of the rounds' ratios.

    Each round asks one, then the other, in changing order: what the machine does besides meets
    both alike.
    """
    for name in (GUARDED, PLAIN):
        text = subject.document("1").replace(f"name: {MODEL}", f"name: {name}")
        if name == GUARDED:
            text = text.replace("rollback: {bake_s: 0}", _ON)
        revision = await put_document(store, name, text)
        await watcher.until(name, in_force(revision), what=f"{name} live")
    headers, body = infer_body(subject.inputs, binary=True)
    per_s: dict[str, list[float]] = {GUARDED: [], PLAIN: []}
    for number in range(rounds + 1):
        for name in (GUARDED, PLAIN) if number % 2 else (PLAIN, GUARDED):
            data = http_request("POST", f"/v2/models/{name}/infer", body, headers=headers)
            done = await asyncio.to_thread(
                closed_loop, ready.host, ready.port, itertools.repeat(data),
                concurrency=_CONCURRENCY, duration_s=_TURN_S,
            )  # fmt: skip
            if number:  # the first round warms up
                per_s[name].append(done.per_s)
    ratios = [one / other for one, other in zip(per_s[GUARDED], per_s[PLAIN], strict=True)]
    return {
        "rounds": rounds,
        "ratio": round(statistics.median(ratios), 4),
        **{name: {"per_s": round(statistics.median(seen), 1)} for name, seen in per_s.items()},
    }
