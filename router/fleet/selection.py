"""Which nodes may answer a request, and which one of them does (pure).

`candidates` names the nodes; it changes only when the fleet, a probe or an ejection does.
`choose` picks one for each request: the less busy of two drawn at random.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import NamedTuple

from registry.names import ModelName, NodeId, Revision, Version
from router.fleet.members import Fleet, Member, Report
from router.fleet.probes import UNKNOWN, Vitals
from router.table import CANARY, NO_REVISION, PINNED, Choice

PANIC_SHARE = 0.5
"""Under this share of the nodes that answer their probes, all of those are used again."""
SPILL = 4
"""Requests by which a node nearby may be busier before one farther away is asked."""


class Want(NamedTuple):
    """What of a model a request is for: `ANY` takes whatever the node serves by default."""

    kind: str = ""
    version: Version | None = None


ANY = Want()


def want_of(choice: Choice) -> Want:
    """What a routing decision asks of a node. Stable traffic goes to any node that serves."""
    if choice.kind in (PINNED, CANARY):
        return Want(choice.kind, choice.servable.version)
    return ANY


@dataclass(frozen=True, slots=True)
class Candidates:
    """The nodes to choose from, those in the gateway's own zone first."""

    near: tuple[NodeId, ...] = ()
    far: tuple[NodeId, ...] = ()
    is_panic: bool = False
    """Whether nodes without a lease, ejected ones, or ones under the floor are among them."""
    floor: Revision = NO_REVISION
    """The oldest document that they may answer from; 0: any."""

    @property
    def nodes(self) -> tuple[NodeId, ...]:
        return self.near + self.far


class _Host(NamedTuple):
    node: NodeId
    member: Member
    report: Report
    serves: bool
    """By its probes."""
    is_good: bool
    is_lost: bool

    def reaches(
        self, floor: Revision, behind: AbstractSet[NodeId], ahead: AbstractSet[NodeId]
    ) -> bool:
        """Whether it has the document in force, or waits with it for the word."""
        status = self.report.status
        known = max(status.applied_revision or 0, status.prepared_revision or 0)
        return (known >= floor or self.node in ahead) and self.node not in behind


def candidates(
    fleet: Fleet,
    model: ModelName,
    want: Want,
    vitals: Mapping[NodeId, Vitals],
    ejected: AbstractSet[NodeId],
    zone: Mapping[str, str],
    *,
    floor: Revision = NO_REVISION,
    behind: AbstractSet[NodeId] = frozenset(),
    ahead: AbstractSet[NodeId] = frozenset(),
    is_news: bool = False,
) -> Candidates:
    """The nodes for requests of ``model``; empty only when none ever said that it serves that.

    Good ones are registered, not draining, answer their probes and are not ejected. When they
    are less than half of those that answer their probes and have what is wanted, something else
    than nodes has failed (etcd lost every lease, one bad answer was for all of them), and all of
    these are used. Failing that, one that drains but still takes requests, and when nobody answers
    a probe everyone who does not drain: an attempt is better than a refusal.

    zone: labels that a node shares to be near; empty: all are.
    floor: the oldest document to be answered from. Where no node at all has it in force or ready,
    an answer from an older one is better than none. behind: nodes found to lack it after all.
    ahead: nodes that have answered from it, whatever they last said of themselves in etcd.
    is_news: that document was heard of from a node, before etcd told of it: what nodes last said
    of themselves is as old, so whoever is not behind is asked.
    """
    hosts = _hosts(fleet, model, want, vitals, ejected)
    good = [host for host in hosts if host.is_good]
    answering = [
        host
        for host in hosts
        if host.serves and not host.member.record.draining and (host.is_good or _counts(host))
    ]
    is_panic = len(good) < PANIC_SHARE * len(answering)
    chosen = answering if is_panic else good
    if not chosen:
        # Nobody who counts: a report taken back may be a lease whose end is half seen.
        chosen = [host for host in hosts if host.serves] or [
            host for host in hosts if not host.member.record.draining
        ]
        is_panic = bool(chosen)
    if floor and chosen:
        if is_news:
            there = [host for host in chosen if host.node not in behind]
        else:
            there = [host for host in chosen if host.reaches(floor, behind, ahead)]
            there = there or [host for host in answering if host.reaches(floor, behind, ahead)]
        is_panic = is_panic or not there
        floor = floor if there else NO_REVISION
        chosen = there or chosen
    near = tuple(h.node for h in chosen if zone.items() <= h.member.record.labels.items())
    far = tuple(h.node for h in chosen if h.node not in near)
    return Candidates(near or far, far if near else (), is_panic, floor)


def _counts(host: _Host) -> bool:
    """Ejected, or without a lease but not because it went: it would serve if it were asked."""
    return host.is_lost or (host.member.is_registered and host.report.gone_at is None)


def _hosts(
    fleet: Fleet,
    model: ModelName,
    want: Want,
    vitals: Mapping[NodeId, Vitals],
    ejected: AbstractSet[NodeId],
) -> list[_Host]:
    hosts: list[_Host] = []
    for node, report in sorted(fleet.reports.get(model, {}).items()):
        member = fleet.members.get(node)
        if member is None or not _has(report, want):
            continue
        serves = vitals.get(node, UNKNOWN).serves_model(model)
        is_good = (
            serves
            and member.is_registered
            and report.gone_at is None
            and not member.record.draining
            and node not in ejected
        )
        hosts.append(_Host(node, member, report, serves, is_good, fleet.is_lost(report, member)))
    return hosts


def _has(report: Report, want: Want) -> bool:
    if want.kind == CANARY:
        return report.canary == want.version
    if want.kind == PINNED:
        return want.version in report.loaded
    return report.serves_default


def choose(near: Sequence[int], far: Sequence[int], chances: tuple[float, float]) -> int:
    """Return the place, in ``near`` followed by ``far``, of the node for one request.

    near, far: requests in flight on each node; one of them at least is not empty.
    chances: two numbers drawn for this request, uniform in [0, 1).
    The less busy of two different nodes drawn at random: nearly as even as asking all of them,
    without every gateway running to the same idle node at once. A node far away is asked when it
    has `SPILL` requests less.
    """
    if not near:
        return _two_choices(far, chances)
    first = _two_choices(near, chances)
    if far and near[first] >= SPILL:
        other = _two_choices(far, chances)
        if near[first] - far[other] >= SPILL:
            return len(near) + other
    return first


def _two_choices(loads: Sequence[int], chances: tuple[float, float]) -> int:
    count = len(loads)
    if count == 1:
        return 0
    first = int(chances[0] * count)
    second = (first + 1 + int(chances[1] * (count - 1))) % count
    return second if loads[second] < loads[first] else first
