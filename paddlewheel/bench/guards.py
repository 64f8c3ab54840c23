"""What the output guards cost: the same model with and without them, turn and turn about."""

from __future__ import annotations

import asyncio
import itertools
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from paddlewheel.bench.checks import infer_body
from paddlewheel.bench.closed_loop import closed_loop
from paddlewheel.bench.load import http_request
from paddlewheel.bench.stage import Ready, Status, Watcher, put_document
from paddlewheel.bench.subjects import MODEL, Subject
from registry.names import Revision
from registry.store import Store

GUARDS_RATIO = 0.97
NAME = "compared"
GUARDED, PLAIN, AGAIN = "guarded", "plain", "plain_again"
_ON = "rollback: {bake_s: 0, on: {nan_rate: 0.01, p95_ms: 60000}}"
"""Objectives that hold, so that they are looked at with every answer and nothing comes of it."""
_TURN_S = 0.2
_CONCURRENCY = 4


def in_force(revision: Revision) -> Callable[[Status], bool]:
    """Whether a status says so of the document of this revision."""
    return lambda status: bool(status["applied_revision"] == revision)


async def guards(
    store: Store, watcher: Watcher, ready: Ready, subject: Subject, rounds: int
) -> dict[str, Any]:
    """Requests per second of both, and the median of the rounds' ratios.

    One model and one worker whose document changes between turns: two workers differ by more than
    the guards cost (some 3 us an answer). Each round asks one, then the other, in changing order:
    what the machine does besides meets both alike. ``noise`` is the same ratio of a turn without
    them to another: no finer difference can be seen.
    """
    plain = subject.document("1").replace(f"name: {MODEL}", f"name: {NAME}")
    guarded = plain.replace("rollback: {bake_s: 0}", _ON)
    texts = {GUARDED: guarded, PLAIN: plain, AGAIN: plain}
    headers, body = infer_body(subject.inputs, binary=True)
    data = http_request("POST", f"/v2/models/{NAME}/infer", body, headers=headers)
    per_s: dict[str, list[float]] = {name: [] for name in texts}
    for number in range(rounds + 1):
        for name in list(texts) if number % 2 else reversed(texts):
            revision = await put_document(store, NAME, texts[name])
            await watcher.until(NAME, in_force(revision), what=f"{name} in force")
            done = await asyncio.to_thread(
                closed_loop, ready.host, ready.port, itertools.repeat(data),
                concurrency=_CONCURRENCY, duration_s=_TURN_S,
            )  # fmt: skip
            if number:  # the first round warms up
                per_s[name].append(done.per_s)
    return {
        "rounds": rounds,
        "ratio": _ratio(per_s[GUARDED], per_s[PLAIN]),
        "noise": _ratio(per_s[AGAIN], per_s[PLAIN]),
        **{name: {"per_s": round(statistics.median(seen), 1)} for name, seen in per_s.items()},
    }


def _ratio(ones: Sequence[float], others: Sequence[float]) -> float:
    return round(statistics.median(a / b for a, b in zip(ones, others, strict=True)), 4)
