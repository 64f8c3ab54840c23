"""Which one thing to do next for the servables of one model. Pure; the manager does it.

Two questions, answered apart. *What should routing point at?* (`route_wanted`): the versions the
document aspires to once all of them are ready; until then what is in force; and when that is no
longer good, the standby, then the last good version. *What step brings servables there?*
(`next_action`): swap, give up, load, drain, unload, one at a time, until nothing is left to do.

A document that waits for the fleet's word is *prepared*: its versions are loaded beside what
serves, and routing does not know of it. The word makes it the aspiration, and what follows is a
change of pointer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from loader.lifecycle import LOADED, UNDERWAY, State
from registry.names import Revision, ServableId


@dataclass(frozen=True, slots=True)
class Aspiration:
    """What the accepted document wants, as identities of servables."""

    revision: Revision
    live: ServableId
    canary: ServableId | None = None
    bake_s: float = 0.0
    """How long the version before stays loaded as the warm standby."""

    def ids(self) -> frozenset[ServableId]:
        return frozenset({self.live} if self.canary is None else {self.live, self.canary})


@dataclass(frozen=True, slots=True)
class InForce:
    """What routing points at. A value: it is replaced whole, never edited."""

    revision: Revision = Revision(0)
    """The document these came from; 0 before the first one is applied."""
    live: ServableId | None = None
    canary: ServableId | None = None
    standby: ServableId | None = None
    bake_until_s: float = 0.0
    """When the live version counts as proven and the standby may go (loop time)."""

    def ids(self) -> frozenset[ServableId]:
        """Everything that a request can be routed to by default."""
        return frozenset(i for i in (self.live, self.canary, self.standby) if i is not None)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One servable as it is."""

    id: ServableId
    state: State
    in_flight: int = 0
    drain_by_s: float = 0.0
    """When a draining servable is ended even with requests in flight (loop time)."""


@dataclass(frozen=True, slots=True)
class World:
    """All that a decision may look at."""

    aspiration: Aspiration | None
    """``None``: the document was deleted (or none was ever accepted), unless `is_kept`."""
    in_force: InForce
    servables: Mapping[ServableId, Snapshot]
    now_s: float
    fallback: ServableId | None = None
    """The last good version, where it is another one than the aspired."""
    fallback_revision: Revision = Revision(0)
    """Of the document that the fallback comes from."""
    is_tight: bool = False
    """Memory is too short to load what is wanted while a standby is kept."""
    suspected: frozenset[ServableId] = frozenset()
    """Failing, and not yet judged: not routed to while anything else can serve."""
    prepared: Aspiration | None = None
    """A document to be loaded beside what serves, and not to be routed to."""
    awaits_base: bool = False
    """The document to have in force meanwhile is still being looked up."""
    keeps: bool = False
    """No document is to be in force, and what serves goes on."""
    is_tentative: bool = False
    """The fleet may still take the document in force back: its standby stays, whatever the bake."""

    @property
    def is_kept(self) -> bool:
        """Nothing is aspired to, but not because the document was deleted."""
        return self.keeps or self.awaits_base or self.prepared is not None

    def is_good(self, id: ServableId | None) -> bool:
        return self.is_loaded(id) and id not in self.suspected

    def is_loaded(self, id: ServableId | None) -> bool:
        return id is not None and id in self.servables and self.servables[id].state in LOADED

    def is_bad(self, id: ServableId | None) -> bool:
        if id is None or id not in self.servables:
            return False
        return self.servables[id].state in (State.FAILED, State.QUARANTINED)


@dataclass(frozen=True, slots=True)
class Swap:
    """Point routing at ``to``."""

    to: InForce


@dataclass(frozen=True, slots=True)
class Load:
    """Make this servable ready: fetch, check, load, warm up."""

    id: ServableId


@dataclass(frozen=True, slots=True)
class Abandon:
    """Stop making ready what nobody wants any more."""

    id: ServableId


@dataclass(frozen=True, slots=True)
class Forget:
    """Drop the record of a failed servable that no document names any more."""

    id: ServableId


@dataclass(frozen=True, slots=True)
class Drain:
    """No new requests; those in flight finish."""

    id: ServableId


@dataclass(frozen=True, slots=True)
class Unload:
    """End the workers of a drained servable."""

    id: ServableId


Action = Swap | Load | Abandon | Forget | Drain | Unload


def route_wanted(world: World) -> InForce:
    """What routing should point at now.

    A document is applied whole or not at all: live and canary are routed together once both are
    ready. The one exception is a model that serves nothing: its live version is routed alone,
    because availability comes before completeness.
    """
    now, aspiration = world.in_force, world.aspiration
    if aspiration is None:
        return _held(world) if world.is_kept else InForce(revision=now.revision)
    live_is_good = world.is_good(aspiration.live)
    canary_is_good = aspiration.canary is None or world.is_good(aspiration.canary)
    if live_is_good and (canary_is_good or not world.is_good(now.live)):
        return _applied(world, aspiration, aspiration.canary if canary_is_good else None)
    return _held(world)


def _applied(world: World, aspiration: Aspiration, canary: ServableId | None) -> InForce:
    now = world.in_force
    if now.live == aspiration.live:
        bake_until_s = min(now.bake_until_s, world.now_s + aspiration.bake_s)
        standby = now.standby
    else:
        bake_until_s = world.now_s + aspiration.bake_s
        # What an older document takes the place of was taken back: nothing to fall back to.
        standby = now.live if aspiration.revision >= now.revision else None
    # A suspected standby stays: it is the control by which it will be judged.
    is_baking = bake_until_s > world.now_s or world.is_tentative
    keeps = world.is_loaded(standby) and is_baking and not world.is_tight
    return InForce(
        revision=aspiration.revision,
        live=aspiration.live,
        canary=canary,
        standby=standby if keeps else None,
        bake_until_s=bake_until_s,
    )


def _held(world: World) -> InForce:
    """The aspired version is not there (yet, or for good): keep what serves, or what served."""
    now = world.in_force
    canary = now.canary if world.is_good(now.canary) else None
    standby = now.standby if world.is_loaded(now.standby) else None
    if world.is_good(now.live):
        is_baking = now.bake_until_s > world.now_s or world.is_tentative
        if not is_baking or world.is_tight:
            standby = None
        return replace(now, canary=canary, standby=standby)
    if world.is_good(standby):
        return replace(
            now,
            live=standby,
            standby=None,
            canary=canary if canary != standby else None,
            bake_until_s=world.now_s,
        )
    if world.is_good(world.fallback):
        return replace(
            now,
            revision=max(now.revision, world.fallback_revision),
            live=world.fallback,
            standby=None,
            canary=canary if canary != world.fallback else None,
            bake_until_s=world.now_s,
        )
    # A suspect is better than nothing.
    live = now.live if world.is_loaded(now.live) else standby
    return replace(now, live=live, standby=standby if standby != live else None, canary=canary)


def wanted(world: World) -> tuple[ServableId, ...]:
    """The servables that should be loaded, most important first: what is to serve, then what is
    only prepared."""
    ids = [] if world.aspiration is None else _aspired(world, world.aspiration)
    serves = world.is_good(world.in_force.live)
    if world.fallback is not None and not serves:
        # Kept while it loads, even if the aspired version is being tried again meanwhile.
        fallback = world.servables.get(world.fallback)
        is_needed = (
            world.is_kept if world.aspiration is None else world.is_bad(world.aspiration.live)
        )
        if is_needed or (ids and fallback is not None and fallback.state in UNDERWAY):
            ids.append(world.fallback)
    if world.prepared is not None and not _yields(world):
        ids += _aspired(world, world.prepared)
    return tuple(dict.fromkeys(ids))


def _yields(world: World) -> bool:
    """Whether what is only prepared gives its memory to what is to serve."""
    return world.is_tight and not world.is_good(world.in_force.live)


def _aspired(world: World, aspiration: Aspiration) -> list[ServableId]:
    if aspiration.canary is None or world.is_bad(aspiration.live):
        return [aspiration.live]
    return [aspiration.live, aspiration.canary]


def next_action(world: World) -> Action | None:
    """Choose the next step for the servables of one model, or ``None`` when converged.

    Availability comes before memory: what routing points at is never drained, and routing leaves
    a good live version only for another good one, or because the document was deleted.
    """
    route = route_wanted(world)
    if route != world.in_force:
        return Swap(route)
    wants = wanted(world)
    kept = route.ids() | set(wants)
    for action in (
        _give_up(world, wants),
        _load(world, wants),
        _drain(world, kept),
        _unload(world),
    ):
        if action is not None:
            return action
    return None


def _give_up(world: World, wants: Iterable[ServableId]) -> Action | None:
    aspired = set(wants)
    for aspiration in (world.aspiration, None if _yields(world) else world.prepared):
        if aspiration is not None:
            aspired |= aspiration.ids()
    for snapshot in world.servables.values():
        if snapshot.id in aspired:
            continue
        if snapshot.state in UNDERWAY:
            return Abandon(snapshot.id)
        if snapshot.state in (State.FAILED, State.QUARANTINED) and snapshot.id != world.fallback:
            return Forget(snapshot.id)
    return None


def _load(world: World, wants: Iterable[ServableId]) -> Action | None:
    """One load at a time for a model: two would only make each other, and serving, slower.

    But where nothing serves, what is to serve waits for no load that is only prepared, and takes
    no memory from what is still being looked up.
    """
    states = {s.state for s in world.servables.values()}
    if world.is_tight and State.DRAINING in states:
        return None
    under_way = {s.id for s in world.servables.values() if s.state in UNDERWAY}
    if (under_way or world.awaits_base) and not world.is_good(world.in_force.live):
        shadows = _only_prepared(world)
        under_way -= shadows
        wants = [id for id in wants if id not in shadows]
    if under_way:
        return None
    for id in wants:
        if id not in world.servables:
            return Load(id)
    return None


def _only_prepared(world: World) -> frozenset[ServableId]:
    if world.prepared is None:
        return frozenset()
    to_serve = frozenset() if world.aspiration is None else world.aspiration.ids()
    return world.prepared.ids() - to_serve - {world.fallback}


def _drain(world: World, kept: Iterable[ServableId]) -> Action | None:
    held = set(kept)
    for snapshot in world.servables.values():
        if snapshot.state in LOADED and snapshot.id not in held:
            return Drain(snapshot.id)
    return None


def _unload(world: World) -> Action | None:
    for snapshot in world.servables.values():
        if snapshot.state is State.DRAINING and (
            snapshot.in_flight == 0 or snapshot.drain_by_s <= world.now_s
        ):
            return Unload(snapshot.id)
    return None


def role(id: ServableId, in_force: InForce) -> State:
    """The state of a loaded servable, given what routing points at."""
    if id == in_force.live:
        return State.LIVE
    if id == in_force.canary:
        return State.CANARY
    if id == in_force.standby:
        return State.STANDBY
    return State.READY


def next_wake_s(world: World) -> float | None:
    """When, without any event, the answer of `next_action` may change, or a bake ends."""
    times = [s.drain_by_s for s in world.servables.values() if s.state is State.DRAINING]
    has_standby = world.in_force.standby is not None and not world.is_tentative
    if world.in_force.bake_until_s > world.now_s or has_standby:
        times.append(world.in_force.bake_until_s)
    return min(times, default=None)
