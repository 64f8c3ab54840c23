"""Passive ejection: nodes that fail in a row get no requests of a model for a while (pure).

Kept for each model apart: a version that fails on one node says nothing about that node's other
models. What counts as a failure is the caller's business (`router.proxy`). After Envoy's
outlier detection.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from registry.names import NodeId

FAILURES = 5
"""In a row, to be ejected."""
BASE_S = 30.0
"""The n-th ejection lasts n times this."""
SHARE_MAX = 0.5
"""Of the nodes, at most so many are out; and never the last one."""


@dataclass(slots=True)
class _Record:
    failures: int = 0
    times: int = 0
    until_s: float = float("-inf")


@dataclass(slots=True)
class Ejections:
    """One model's record of its nodes. Time comes in as a number, on any one clock."""

    _records: dict[NodeId, _Record] = field(default_factory=dict[NodeId, _Record])
    next_end_s: float = float("inf")
    """When the next ejection ends."""

    def succeeded(self, node: NodeId) -> None:
        record = self._records.get(node)
        if record is not None:
            record.failures = 0

    def failed(self, node: NodeId, *, nodes: int, now_s: float) -> float | None:
        """Count one failure; return how many seconds the node is out when it now is ejected.

        nodes: how many nodes serve the model at present, this one included.
        """
        record = self._records.setdefault(node, _Record())
        record.failures += 1
        if record.failures < FAILURES or now_s < record.until_s:
            return None
        out = len(self.ejected(now_s)) + 1
        if out > nodes * SHARE_MAX or out >= nodes:
            return None
        served_well_s = now_s - record.until_s
        # A long good time after the last one is forgiven, one ejection for each base time.
        if served_well_s != float("inf"):
            record.times = max(0, record.times - int(served_well_s // BASE_S))
        record.times += 1
        record.failures = 0
        span_s = BASE_S * record.times
        record.until_s = now_s + span_s
        self.next_end_s = min(self.next_end_s, record.until_s)
        return span_s

    def ejected(self, now_s: float) -> frozenset[NodeId]:
        """Who is out now."""
        out = {node: r.until_s for node, r in self._records.items() if now_s < r.until_s}
        self.next_end_s = min(out.values(), default=float("inf"))
        return frozenset(out)

    def pardon(self, node: NodeId) -> None:
        """Forget a node's record: it is another process now."""
        self._records.pop(node, None)
