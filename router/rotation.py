"""The fleet in use: what etcd, the probes and the answers say, put together for each request.

Everything here happens on one event loop. Whoever learns something (`publish`, `observe`,
`report`) replaces what requests read; a request reads once for each of its attempts.
"""

from __future__ import annotations

import random
import ssl
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any
from urllib.parse import urlsplit

import structlog

from registry.names import ModelName, NodeId, Revision
from registry.rollouts import RolloutRecord
from registry.spec import ModelDocument
from router.errors import NothingServes, UnknownVersion
from router.fleet.ejection import Ejections
from router.fleet.floor import floor_of, raises_floor
from router.fleet.members import Fleet
from router.fleet.paths import ModelPath
from router.fleet.pipelines import pipeline_route
from router.fleet.probes import UNKNOWN, Vitals
from router.fleet.routes import fleet_route
from router.fleet.selection import ANY, Candidates, Want, candidates, choose, want_of
from router.pipeline.errors import UnknownPipeline
from router.rules import Headers
from router.table import NO_REVISION, PINNED, RequestFacts, Route, RouteTable
from router.upstream import Tuning, Upstream

log = structlog.get_logger(__name__)

Documents = Mapping[ModelName, Mapping[Revision, ModelDocument]]
"""The accepted documents that are known: the newest, and those that some node still serves by."""

Rollouts = Mapping[ModelName, RolloutRecord]
"""What the coordinator says of each model's document."""

_UNLUCKY = 1.0
"""Chance is the node's: see `Rotation.want`."""


@dataclass(frozen=True, slots=True)
class _Pool:
    """Candidates with their connections."""

    candidates: Candidates
    near: tuple[Upstream, ...]
    far: tuple[Upstream, ...]


class Rotation:
    """Who answers the next request. Made with the labels that make a node near."""

    def __init__(
        self,
        *,
        zone: Mapping[str, str] | None = None,
        on_suspect: Callable[[NodeId], None] = lambda _node: None,
        clock: Callable[[], float] = time.monotonic,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        """tls: for nodes at ``https://``; ``None``: the system's CAs vouch for them."""
        self.tuning = Tuning()
        self._tls = tls
        self.fleet = Fleet()
        self.vitals: dict[NodeId, Vitals] = {}
        self.upstreams: dict[NodeId, Upstream] = {}
        self.table = RouteTable()
        self.on_suspect = on_suspect
        """Told of a node that failed a request: it is worth a probe at once."""
        self._zone = dict(zone or {})
        self._clock = clock
        self._ejections: dict[ModelName, Ejections] = {}
        self._documents: Documents = {}
        self._rollouts: Rollouts = {}
        self._floors: dict[ModelName, Revision] = {}
        """The oldest document that may still answer a request that pins no version."""
        self._behind: dict[ModelName, set[NodeId]] = {}
        """Nodes found to be under their model's floor, until they say something new."""
        self._ahead: dict[ModelName, set[NodeId]] = {}
        """Nodes that have answered from their model's floor or above: etcd may tell so later."""
        self._seen: dict[ModelName, str] = {}
        """The revision of the last answer, as it was written."""
        self._pools: dict[tuple[str, Want], _Pool] = {}
        self._pools_until_s = float("inf")
        self.ejections_total: dict[NodeId, int] = {}

    # --- what is learnt -----------------------------------------------------------------------

    def publish(
        self, fleet: Fleet, documents: Documents, rollouts: Rollouts = MappingProxyType({})
    ) -> None:
        """Use this fleet from the next request on."""
        before, self.fleet = self.fleet, fleet
        for node, member in fleet.members.items():
            known = before.members.get(node)
            same = known is not None and (
                known.record.http == member.record.http
                and known.record.started_at == member.record.started_at
            )
            if not same:
                self._meet(node, member.record.http)
        for node in self.upstreams.keys() - fleet.members.keys():
            self.upstreams.pop(node).close()
            self.vitals.pop(node, None)
            self._pardon(node)
        changed = {
            model
            for model in {*fleet.reports, *documents, *self.table.models}
            if fleet.reports.get(model) is not before.reports.get(model)
            or documents.get(model) is not self._documents.get(model)
            or rollouts.get(model) is not self._rollouts.get(model)
            or fleet.members is not before.members
        }
        self._documents = dict(documents)  # the caller's may go on changing
        self._rollouts = dict(rollouts)
        for model in changed:
            self._behind.pop(model, None)
            self._reroute(model)
            self._raise_floor(model, floor_of(rollouts.get(model)))
        self._pools.clear()

    def observe(self, node: NodeId, vitals: Vitals) -> None:
        """A probe was answered, or was not."""
        if node not in self.fleet.members:
            return
        before = self.vitals.get(node, UNKNOWN)
        self.vitals[node] = vitals
        if vitals == before:
            return
        upstream = self.upstreams.get(node)
        if before.answers and not vitals.answers:
            log.warning("node_silent", node=node, in_flight=upstream.in_flight if upstream else 0)
            if upstream is not None:
                upstream.drop_idle()
                if any(v.answers for id, v in self.vitals.items() if id != node):
                    upstream.abandon()
        elif vitals.answers and not before.answers:
            log.info("node_answers", node=node)
            self._pardon(node)
        self._pools.clear()

    def report(self, model: ModelName, node: NodeId, *, failed: bool) -> None:
        """One request of ``model`` ended on ``node``; ``failed``: for a reason of the node's."""
        ejections = self._ejections.get(model)
        if not failed:
            if ejections is not None:
                ejections.succeeded(node)
            return
        if ejections is None:
            ejections = self._ejections[model] = Ejections()
        nodes = sum(
            1 for report in self.fleet.reports.get(model, {}).values() if report.serves_default
        )
        span_s = ejections.failed(node, nodes=nodes, now_s=self._clock())
        if span_s is not None:
            log.warning("node_ejected", node=node, model=model, span_s=span_s)
            self.ejections_total[node] = self.ejections_total.get(node, 0) + 1
            self._pools.clear()

    def answered_from(
        self,
        model: ModelName,
        node: NodeId,
        revision: str,
        *,
        is_barrier: bool = False,
        floor: Revision = NO_REVISION,
    ) -> bool:
        """An answer's head is here; return whether it is from under the ``floor`` asked for.

        revision: its ``X-Config-Revision``. is_barrier: whether it says that this document came
        into force everywhere at once.
        """
        if self._seen.get(model) == revision and node in self._ahead.get(model, ()):
            return False
        if not (revision.isascii() and revision.isdigit() and len(revision) < _DIGITS_MAX):
            return False
        number, behind = Revision(int(revision)), self._behind.setdefault(model, set())
        ahead = self._ahead.setdefault(model, set())
        if number < floor:
            behind.add(node)
            ahead.discard(node)
            self._pools.clear()
            return True
        if is_barrier or raises_floor(self._documents.get(model, {}), number):
            self._raise_floor(model, number)
        if number >= self._floors.get(model, number):
            self._seen[model] = revision
            self._behind.setdefault(model, set()).discard(node)
            self._ahead.setdefault(model, set()).add(node)
            if model in self._floors:
                self._pools.clear()
        return False

    def is_behind(self, model: ModelName, node: NodeId) -> bool:
        """Whether the node was found to be under the model's floor."""
        return node in self._behind.get(model, ())

    def _raise_floor(self, model: ModelName, revision: Revision) -> None:
        if model in self.table.models and revision > self._floors.get(model, NO_REVISION):
            self._floors[model] = revision
            self._seen.pop(model, None)
            self._behind.pop(model, None)
            self._ahead.pop(model, None)
            self._pools.clear()

    def _meet(self, node: NodeId, http: str) -> None:
        """A node that is new, or a new process under its name: nothing of before counts."""
        old = self.upstreams.pop(node, None)
        if old is not None:
            old.close()
        self.vitals.pop(node, None)
        self._pardon(node)
        for ahead in self._ahead.values():
            ahead.discard(node)
        address = urlsplit(http)
        try:
            host, port = address.hostname, address.port
        except ValueError:
            host, port = None, None
        if address.scheme not in ("http", "https") or host is None:
            log.error("node_address_not_understood", node=node, http=http)
            return
        tls = None
        if address.scheme == "https":
            tls = self._tls = self._tls or ssl.create_default_context()
            port = port or 443
        self.upstreams[node] = Upstream(node, host, port or 80, tls=tls, tuning=self.tuning)

    def _pardon(self, node: NodeId) -> None:
        for ejections in self._ejections.values():
            ejections.pardon(node)

    def _reroute(self, model: ModelName) -> None:
        documents = self._documents.get(model)
        if documents is None:
            self.table = self.table.without(model)
            self._ejections.pop(model, None)
            self._floors.pop(model, None)
            self._seen.pop(model, None)
            self._ahead.pop(model, None)
            return
        reports = self.fleet.reports.get(model, {})
        there = frozenset(
            node
            for node, report in reports.items()
            if (member := self.fleet.members.get(node)) is not None
            and (report.gone_at is None or self.fleet.is_lost(report, member))
        )
        rollout = self._rollouts.get(model)
        canary = None if rollout is None else rollout.canary
        self.table = self.table.with_route(fleet_route(model, reports, documents, there, canary))

    # --- what a request asks ------------------------------------------------------------------

    def route(self, path: ModelPath) -> Route:
        """Of the model or pipeline that a path names; a model comes first.

        Raises `UnknownPipeline`, and as `RouteTable.route`.
        """
        if path.is_pipeline or path.model not in self.table.models:
            found = pipeline_route(self.fleet, path.model)
            if found is not None:
                return found
            if path.is_pipeline:
                raise UnknownPipeline(path.model)
        return self.table.route(path.model)

    def want(
        self,
        route: Route,
        version: str | None,
        label: str | None,
        headers: Headers,
        claims: Mapping[str, Any] | None = None,
    ) -> Want:
        """What of the model a request needs, by the rules that its node will ask again.

        Chance is left to the node, so that a percent rule is thrown for once: here it counts as
        missed. What no node is known to have is the node's to refuse: it knows first.
        """
        try:
            return want_of(
                route.pick(RequestFacts(route.model, version, label, headers, claims, _UNLUCKY))
            )
        except (UnknownVersion, NothingServes):
            return ANY

    def candidates(self, model: ModelName, want: Want) -> Candidates:
        """The nodes that may answer such a request now."""
        return self._pool(model, want).candidates

    def floor(self, model: ModelName, want: Want) -> Revision:
        """The oldest document that such a request may be answered from now; 0: any."""
        if model not in self._floors:
            return NO_REVISION
        return self._pool(model, want).candidates.floor

    def default_candidates(self, model: ModelName) -> Candidates:
        """Those for a request that no rule takes."""
        return self.candidates(model, ANY)

    def pick(self, model: ModelName, want: Want, tried: Collection[NodeId] = ()) -> Upstream | None:
        """The node for one attempt, none of ``tried``; ``None`` when there is no (other) one.

        Where nobody (else) has what is wanted, anyone who serves the model is asked.
        """
        pool = self._pool(model, want)
        near, far = pool.near, pool.far
        if tried:
            near = tuple(upstream for upstream in near if upstream.id not in tried)
            far = tuple(upstream for upstream in far if upstream.id not in tried)
        if not near and not far:
            return self.pick(model, ANY, tried) if want is not ANY and want != ANY else None
        if len(near) == 1 and not far:
            return near[0]
        place = choose(
            [upstream.in_flight for upstream in near],
            [upstream.in_flight for upstream in far],
            (random.random(), random.random()),
        )
        return near[place] if place < len(near) else far[place - len(near)]

    def _pool(self, model: ModelName, want: Want) -> _Pool:
        if self._pools_until_s < float("inf") and self._clock() >= self._pools_until_s:
            self._pools.clear()  # an ejection has ended
            self._pools_until_s = float("inf")
        key = (model, want)
        pool = self._pools.get(key)
        if pool is None:
            if len(self._pools) > _POOLS_MAX:
                self._pools.clear()
            pool = self._pools[key] = self._make_pool(model, want)
        return pool

    def _make_pool(self, model: ModelName, want: Want) -> _Pool:
        ejections = self._ejections.get(model)
        out: frozenset[NodeId] = frozenset()
        if ejections is not None:
            out = ejections.ejected(self._clock())
            self._pools_until_s = min(self._pools_until_s, ejections.next_end_s)
        floor = NO_REVISION if want.kind == PINNED else self._floors.get(model, NO_REVISION)
        found = candidates(
            self.fleet,
            model,
            want,
            self.vitals,
            out,
            self._zone,
            floor=floor,
            behind=self._behind.get(model, frozenset()),
            ahead=self._ahead.get(model, frozenset()),
            is_news=floor > max(self._documents.get(model, ()), default=NO_REVISION),
        )
        return _Pool(
            found,
            tuple(self.upstreams[node] for node in found.near if node in self.upstreams),
            tuple(self.upstreams[node] for node in found.far if node in self.upstreams),
        )

    # --- for people ---------------------------------------------------------------------------

    def ejected(self, node: NodeId) -> list[ModelName]:
        """The models that get nothing from this node now."""
        now_s = self._clock()
        return [model for model, kept in self._ejections.items() if node in kept.ejected(now_s)]

    def nodes(self) -> list[dict[str, Any]]:
        """``GET /admin/nodes``: each node as it is seen from here."""
        shown: list[dict[str, Any]] = []
        for node, member in sorted(self.fleet.members.items()):
            vitals, upstream = self.vitals.get(node, UNKNOWN), self.upstreams.get(node)
            shown.append(
                {
                    "id": node,
                    "http": member.record.http,
                    "labels": dict(member.record.labels),
                    "registered": member.is_registered,
                    "draining": member.record.draining,
                    "answers": vitals.answers,
                    "serves": vitals.serves,
                    "failing": sorted(vitals.failing),
                    "ejected": self.ejected(node),
                    "in_flight": upstream.in_flight if upstream is not None else 0,
                    "idle_connections": upstream.idle if upstream is not None else 0,
                }
            )
        return shown

    def close(self) -> None:
        for upstream in self.upstreams.values():
            upstream.close()


_DIGITS_MAX = 20
_POOLS_MAX = 4096
"""(model, want) pairs remembered: a pinned version comes from the client."""
