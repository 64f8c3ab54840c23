"""The policy, one line a case: what is, and the one step that follows."""

from __future__ import annotations

from dataclasses import replace

import pytest

from loader.lifecycle import State
from loader.policy import (
    Abandon,
    Action,
    Aspiration,
    Drain,
    Forget,
    InForce,
    Load,
    Snapshot,
    Swap,
    Unload,
    World,
    next_action,
    next_wake_s,
)
from registry.names import Digest, ModelName, Revision, ServableId, Version

NOW_S = 100.0


def sid(version: str) -> ServableId:
    return ServableId(ModelName("m"), Version(version), Digest("sha256:" + version))


A, B, C = sid("a"), sid("b"), sid("c")
R1, R2 = Revision(1), Revision(2)


def world(
    states: str,
    aspired: Aspiration | None,
    in_force: InForce = InForce(),  # noqa: B008 - a frozen value
    *,
    fallback: ServableId | None = None,
    is_tight: bool = False,
    in_flight: int = 0,
    suspected: str = "",
    prepared: Aspiration | None = None,
    awaits_base: bool = False,
    keeps: bool = False,
    is_tentative: bool = False,
) -> World:
    """``states``: "a LIVE, b LOADING"."""
    servables = dict[ServableId, Snapshot]()
    for part in filter(None, states.split(", ")):
        version, state = part.split(" ")
        servables[sid(version)] = Snapshot(sid(version), State(state), in_flight, NOW_S + 30)
    suspects = frozenset(map(sid, suspected.split()))
    return World(
        aspired, in_force, servables, NOW_S,
        fallback=fallback, is_tight=is_tight, suspected=suspects,
        prepared=prepared, awaits_base=awaits_base, keeps=keeps, is_tentative=is_tentative,
    )  # fmt: skip


WANT_A = Aspiration(R1, A)
WANT_B = Aspiration(R2, B, bake_s=600)
WANT_A_CANARY_B = Aspiration(R2, A, canary=B)
WANT_A_CANARY_C = Aspiration(R2, A, canary=C)
WANT_C = Aspiration(Revision(3), C)
A_IN_FORCE = InForce(R1, A)
B_BAKED = InForce(R2, B, standby=A, bake_until_s=NOW_S - 100)
B_OVER_A = InForce(R2, B, standby=A, bake_until_s=NOW_S + 600)

CASES: dict[str, tuple[World, Action | None]] = {
    "nothing is wanted, nothing is there": (world("", None), None),
    "load what is aspired": (world("", WANT_A), Load(A)),
    "wait while it loads": (world("a LOADING", WANT_A), None),
    "the first version goes live": (
        world("a READY", WANT_A),
        Swap(InForce(R1, A, bake_until_s=NOW_S)),
    ),
    "converged": (world("a LIVE", WANT_A, A_IN_FORCE), None),
    "load the new one beside the old": (world("a LIVE", WANT_B, A_IN_FORCE), Load(B)),
    "the old one serves while the new one warms": (
        world("a LIVE, b WARMING", WANT_B, A_IN_FORCE),
        None,
    ),
    "swap, and keep the old one as standby": (
        world("a LIVE, b READY", WANT_B, A_IN_FORCE),
        Swap(B_OVER_A),
    ),
    "without a bake time there is no standby": (
        world("a LIVE, b READY", Aspiration(R2, B), A_IN_FORCE),
        Swap(InForce(R2, B, bake_until_s=NOW_S)),
    ),
    "the standby goes when the bake is over": (
        world("a STANDBY, b LIVE", WANT_B, InForce(R2, B, standby=A, bake_until_s=NOW_S)),
        Swap(InForce(R2, B, bake_until_s=NOW_S)),
    ),
    "drain what nothing points at": (
        world("a READY, b LIVE", WANT_B, InForce(R2, B, bake_until_s=NOW_S)),
        Drain(A),
    ),
    "unload when drained": (world("a DRAINING, b LIVE", WANT_B, InForce(R2, B)), Unload(A)),
    "requests in flight are waited for": (
        world("a DRAINING, b LIVE", WANT_B, InForce(R2, B), in_flight=1),
        None,
    ),
    "a failed version leaves traffic where it is": (
        world("a LIVE, b FAILED", WANT_B, A_IN_FORCE),
        None,
    ),
    "a failed version that no document names is forgotten": (
        world("a LIVE, b FAILED", WANT_A, A_IN_FORCE),
        Forget(B),
    ),
    "a load that nobody wants any more is stopped": (
        world("a LIVE, b LOADING", WANT_A, A_IN_FORCE),
        Abandon(B),
    ),
    "a superseded load is stopped before the next one starts": (
        world("a LIVE, b LOADING", Aspiration(Revision(3), C), A_IN_FORCE),
        Abandon(B),
    ),
    "live and canary are routed together": (
        world("a LIVE, b READY", WANT_A_CANARY_B, A_IN_FORCE),
        Swap(InForce(R2, A, canary=B)),
    ),
    "a canary that failed keeps the old document in force": (
        world("a LIVE, b FAILED", WANT_A_CANARY_B, A_IN_FORCE),
        None,
    ),
    "with nothing serving, live does not wait for the canary": (
        world("a READY", WANT_A_CANARY_B),
        Swap(InForce(R2, A, bake_until_s=NOW_S)),
    ),
    "a promoted canary leaves the old live as standby": (
        world("a LIVE, b CANARY", WANT_B, InForce(R1, A, canary=B)),
        Swap(B_OVER_A),
    ),
    "a quarantined live falls back to the standby": (
        world("a STANDBY, b QUARANTINED", WANT_B, B_OVER_A),
        Swap(InForce(R2, A, bake_until_s=NOW_S)),
    ),
    "a quarantined version stays out": (
        world("a LIVE, b QUARANTINED", WANT_B, InForce(R2, A)),
        None,
    ),
    "a quarantined canary gives its share back to live": (
        world("a LIVE, b QUARANTINED", WANT_A_CANARY_B, InForce(R2, A, canary=B)),
        Swap(InForce(R2, A)),
    ),
    "without a standby the last good version is loaded": (
        world("b QUARANTINED", WANT_B, InForce(R2), fallback=A),
        Load(A),
    ),
    "and routed": (
        world("a READY, b QUARANTINED", WANT_B, InForce(R2), fallback=A),
        Swap(InForce(R2, A, bake_until_s=NOW_S)),
    ),
    "a restart with a broken document loads the last good version": (
        world("b FAILED", WANT_B, fallback=A),
        Load(A),
    ),
    "a suspect is left alone while another can serve": (
        world("a STANDBY, b LIVE", WANT_B, B_OVER_A, suspected="b"),
        Swap(InForce(R2, A, bake_until_s=NOW_S)),
    ),
    "a suspect that is acquitted serves again": (
        world("a LIVE, b READY", WANT_B, InForce(R2, A, bake_until_s=NOW_S)),
        Swap(B_OVER_A),
    ),
    "a suspected standby is not given up": (
        world("a STANDBY, b LIVE", WANT_B, B_OVER_A, suspected="a"),
        None,
    ),
    "nor when it comes back as one": (
        world("a LIVE, b READY", WANT_B, InForce(R2, A, bake_until_s=NOW_S), suspected="a"),
        Swap(B_OVER_A),
    ),
    "two suspects stay as they are": (
        world("a STANDBY, b LIVE", WANT_B, B_OVER_A, suspected="a b"),
        None,
    ),
    "a suspect is better than nothing": (
        world("a STANDBY, b QUARANTINED", WANT_B, B_OVER_A, suspected="a"),
        Swap(InForce(R2, A, bake_until_s=B_OVER_A.bake_until_s)),
    ),
    "a deleted document takes the route away first": (
        world("a LIVE", None, A_IN_FORCE),
        Swap(InForce(R1)),
    ),
    "then drains": (world("a READY", None, InForce(R1)), Drain(A)),
    "too little memory: the standby goes first": (
        world("a STANDBY, b LIVE", Aspiration(Revision(3), C, bake_s=600), B_OVER_A, is_tight=True),
        Swap(InForce(R2, B, bake_until_s=B_OVER_A.bake_until_s)),
    ),
    "and its memory is waited for": (
        world(
            "a DRAINING, b LIVE",
            Aspiration(Revision(3), C, bake_s=600),
            InForce(R2, B, bake_until_s=B_OVER_A.bake_until_s),
            is_tight=True,
            in_flight=1,
        ),
        None,
    ),
    "what is prepared is loaded beside what serves": (
        world("a LIVE", WANT_A, A_IN_FORCE, prepared=WANT_B),
        Load(B),
    ),
    "and stays there, ready and without traffic": (
        world("a LIVE, b READY", WANT_A, A_IN_FORCE, prepared=WANT_B),
        None,
    ),
    "its canary too": (
        world("a LIVE", WANT_A, A_IN_FORCE, prepared=WANT_A_CANARY_B),
        Load(B),
    ),
    "the word makes it a change of pointer": (
        world("a LIVE, b READY", WANT_B, A_IN_FORCE),
        Swap(B_OVER_A),
    ),
    "what is prepared no more is drained": (
        world("a LIVE, b READY", WANT_A, A_IN_FORCE),
        Drain(B),
    ),
    "back to the document before is a change of pointer too": (
        world("a STANDBY, b LIVE", replace(WANT_A, bake_s=600), B_OVER_A),
        Swap(InForce(R1, A, bake_until_s=NOW_S + 600)),
    ),
    "what fails to get ready leaves traffic where it is": (
        world("a LIVE, b FAILED", WANT_A, A_IN_FORCE, prepared=WANT_B),
        None,
    ),
    "what is to serve is loaded before what is prepared": (
        world("", WANT_A, prepared=WANT_B),
        Load(A),
    ),
    "and waits for no such load where nothing serves": (
        world("b LOADING", WANT_A, prepared=WANT_B),
        Load(A),
    ),
    "while something serves, one load at a time": (
        world("a LIVE, b LOADING", WANT_A_CANARY_C, A_IN_FORCE, prepared=WANT_B),
        None,
    ),
    "a first document is prepared with nothing to serve": (
        world("", None, prepared=WANT_B),
        Load(B),
    ),
    "and not served": (world("b READY", None, prepared=WANT_B), None),
    "while its base is looked up, it leaves the memory alone": (
        world("", None, prepared=WANT_B, awaits_base=True),
        None,
    ),
    "but gives nothing back that is loaded already": (
        world("b READY", None, prepared=WANT_B, awaits_base=True),
        None,
    ),
    "what served last serves until the base is known": (
        world("", None, fallback=A, prepared=WANT_B, awaits_base=True),
        Load(A),
    ),
    "and is routed to": (
        world("a READY", None, fallback=A, prepared=WANT_B, awaits_base=True),
        Swap(InForce(Revision(0), A, bake_until_s=NOW_S)),
    ),
    "then the other one is prepared": (
        world("a LIVE", None, InForce(R1, A), fallback=A, prepared=WANT_B, awaits_base=True),
        Load(B),
    ),
    "what is prepared gives its memory to what is to serve": (
        world("a FETCHING, b READY", WANT_A, prepared=WANT_B, is_tight=True),
        Drain(B),
    ),
    "even while it is loading": (
        world("a FETCHING, b LOADING", WANT_A, prepared=WANT_B, is_tight=True),
        Abandon(B),
    ),
    "what may be taken back keeps its standby, bake or not": (
        world("a LIVE, b READY", Aspiration(R2, B), A_IN_FORCE, is_tentative=True),
        Swap(InForce(R2, B, standby=A, bake_until_s=NOW_S)),
    ),
    "for as long as that takes": (
        world("a STANDBY, b LIVE", Aspiration(R2, B), B_BAKED, is_tentative=True),
        None,
    ),
    "and gives it up when it stays": (
        world("a STANDBY, b LIVE", Aspiration(R2, B), B_BAKED),
        Swap(InForce(R2, B, bake_until_s=NOW_S - 100)),
    ),
    "what serves goes on where no document is to be in force": (
        world("a LIVE, b READY", None, A_IN_FORCE, keeps=True),
        Drain(B),
    ),
    "unless its document was deleted": (
        world("a LIVE", None, A_IN_FORCE),
        Swap(InForce(R1)),
    ),
    "a quarantined live falls back to its standby, not to what is prepared": (
        world("a STANDBY, b QUARANTINED, c READY", WANT_B, B_OVER_A, prepared=WANT_C),
        Swap(InForce(R2, A, bake_until_s=NOW_S)),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_next_action(name: str) -> None:
    given, wanted = CASES[name]
    assert next_action(given) == wanted


def test_what_may_be_taken_back_wakes_nobody() -> None:
    given = world("a STANDBY, b LIVE", WANT_B, B_BAKED, is_tentative=True)
    assert next_wake_s(given) is None


def test_the_next_wake_is_the_end_of_the_bake() -> None:
    assert next_wake_s(world("a STANDBY, b LIVE", WANT_B, B_OVER_A)) == NOW_S + 600
    assert next_wake_s(world("a LIVE", WANT_A, A_IN_FORCE)) is None
