"""A servable's life: the states seen from outside and the moves between them (SPEC section 4)."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum

from registry.errors import Bug


class State(StrEnum):
    NEW = "NEW"
    FETCHING = "FETCHING"
    LOADING = "LOADING"
    WARMING = "WARMING"
    READY = "READY"
    """Loaded, warmed and checked, without user traffic: the shadow."""
    CANARY = "CANARY"
    LIVE = "LIVE"
    STANDBY = "STANDBY"
    DRAINING = "DRAINING"
    GONE = "GONE"
    FAILED = "FAILED"
    """Could not be made ready."""
    QUARANTINED = "QUARANTINED"
    """Was serving and was taken out, here or on another node."""


_S = State
_SERVING = {_S.READY, _S.CANARY, _S.LIVE, _S.STANDBY}

TRANSITIONS: Mapping[State, frozenset[State]] = {
    _S.NEW: frozenset({_S.FETCHING, _S.FAILED, _S.QUARANTINED, _S.GONE}),
    _S.FETCHING: frozenset({_S.LOADING, _S.FAILED, _S.GONE}),
    _S.LOADING: frozenset({_S.WARMING, _S.FAILED, _S.GONE}),
    _S.WARMING: frozenset({_S.READY, _S.FAILED, _S.GONE}),
    _S.READY: frozenset({_S.CANARY, _S.LIVE, _S.STANDBY, _S.DRAINING, _S.QUARANTINED}),
    _S.CANARY: frozenset({_S.READY, _S.LIVE, _S.STANDBY, _S.DRAINING, _S.QUARANTINED}),
    _S.LIVE: frozenset({_S.READY, _S.CANARY, _S.STANDBY, _S.DRAINING, _S.QUARANTINED}),
    _S.STANDBY: frozenset({_S.READY, _S.CANARY, _S.LIVE, _S.DRAINING, _S.QUARANTINED}),
    _S.DRAINING: frozenset({_S.GONE}),
    _S.FAILED: frozenset({_S.NEW, _S.GONE}),
    _S.QUARANTINED: frozenset({_S.READY, _S.DRAINING, _S.GONE}),
    _S.GONE: frozenset(),
}
"""The truth; the diagram in docs/architecture.md is drawn from it."""

LOADED = frozenset(_SERVING)
"""States in which a servable can answer a request."""

UNDERWAY = frozenset({_S.NEW, _S.FETCHING, _S.LOADING, _S.WARMING})
"""States of a servable that may become ready by itself."""


class IllegalTransition(Bug):
    """A move that `TRANSITIONS` does not allow."""


def transition(old: State, new: State) -> State:
    """Return ``new`` when the move is legal.

    Raises `IllegalTransition` otherwise; staying in a state is not a move.
    """
    if new not in TRANSITIONS[old]:
        raise IllegalTransition(f"{old} -> {new}")
    return new
