"""`--wait`: until every node has the written documents in force, or one refuses."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, Self

from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from paddlewheel.cli.connection import Connection
from paddlewheel.cli.fleet_view import Fleet, follow_fleet
from paddlewheel.cli.output import console, say, visible
from paddlewheel.cli.verdict import BAD, ModelView, Standing, view
from registry.errors import PaddlewheelError
from registry.names import ModelName, NodeId, Revision
from registry.rollouts import Phase, RolloutRecord

SETTLE_S = 0.5
"""How long a bad standing must last to be believed: a node says that it has seen a document before
it has acted on it, so what it last said about a failed version may be about the one before."""


class NotConverged(PaddlewheelError):
    """A node refused, a version failed, or the time was over."""


@dataclass(slots=True)
class _Goal:
    model: ModelName
    revision: Revision
    bad_since_s: float | None = None
    """Loop time since when a node's standing is one that waiting does not mend."""


class Reporter(Protocol):
    """Shows how far it is."""

    def __enter__(self) -> Self: ...
    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None: ...
    def show(self, seen: ModelView) -> None: ...


async def wait_until_converged(
    connection: Connection, goals: Mapping[ModelName, Revision], *, timeout_s: float
) -> int:
    """Wait until every registered node has each model's ``revision`` in force.

    Returns how many nodes there are; with none registered there is nobody to wait for, and 0 comes
    back at once.
    Raises `NotConverged` with the reason: a node's own, or who is missing after ``timeout_s``.
    """
    open_goals = {model: _Goal(model, revision) for model, revision in goals.items()}
    fleet = Fleet(connection.keys)
    with _reporter() as reporter:
        try:
            async with asyncio.timeout(timeout_s):
                async with aclosing(follow_fleet(connection)) as looks:
                    fleet = await anext(looks)
                    if not fleet.nodes:
                        return 0
                    await _watch(looks, fleet, open_goals, reporter)
                    return len(fleet.nodes)
        except TimeoutError:
            raise NotConverged(_missing(fleet, open_goals, timeout_s)) from None


async def _watch(
    looks: AsyncGenerator[Fleet, None],
    fleet: Fleet,
    goals: dict[ModelName, _Goal],
    reporter: Reporter,
) -> None:
    loop = asyncio.get_running_loop()
    pending = asyncio.create_task(_next(looks))
    try:
        while True:
            for goal in list(goals.values()):
                if _reached(fleet, goal, reporter, loop.time()):
                    del goals[goal.model]
            if not goals:
                return
            # Woken by a change, or in time to believe a bad standing.
            await asyncio.wait({pending}, timeout=SETTLE_S / 5 if _settling(goals) else None)
            if pending.done():
                fleet = pending.result()
                pending = asyncio.create_task(_next(looks))
    finally:
        pending.cancel()
        await asyncio.gather(pending, return_exceptions=True)


async def _next(looks: AsyncGenerator[Fleet, None]) -> Fleet:
    return await anext(looks)


def _settling(goals: Mapping[ModelName, _Goal]) -> bool:
    return any(goal.bad_since_s is not None for goal in goals.values())


def _reached(fleet: Fleet, goal: _Goal, reporter: Reporter, now_s: float) -> bool:
    """Whether every node is there. Raises `NotConverged` for what waiting does not mend."""
    seen = view(fleet, goal.model, goal.revision)
    if seen.revision is None:
        raise NotConverged(f"{goal.model}: the document was deleted meanwhile")
    if seen.revision > goal.revision:
        raise NotConverged(
            f"{goal.model}: revision {seen.revision} came before {goal.revision} was everywhere"
        )
    reporter.show(seen)
    # The documents' watch may lag behind our own write: then it is too early to judge.
    is_current = seen.revision == goal.revision
    left_behind: frozenset[NodeId] = frozenset()
    if is_current and seen.is_gated:
        record = seen.decided
        if record is None or not record.has_ended:
            goal.bad_since_s = None
            return False  # the coordinator judges what stands in its way
        if record.phase is Phase.ABORTED:
            raise NotConverged(_aborted(record))
        left_behind = frozenset(refusal.node for refusal in record.refused)
    asked = {node: v for node, v in seen.verdicts.items() if node not in left_behind}
    bad = [f"{node}: {v.detail}" for node, v in asked.items() if v.standing in BAD]
    if not bad:
        goal.bad_since_s = None
        return (
            is_current
            and bool(asked)
            and all(verdict.standing is Standing.CONVERGED for verdict in asked.values())
        )
    if goal.bad_since_s is None:
        goal.bad_since_s = now_s
    if now_s - goal.bad_since_s >= SETTLE_S:
        raise NotConverged("; ".join(f"{goal.model}: {each}" for each in bad))
    return False


def _aborted(record: RolloutRecord) -> str:
    said = f"{record.model}: rollout aborted: {record.reason}"
    others = [
        f"{each.node}: {each.reason}"
        for each in record.refused
        if each.reason not in (record.reason or "")
    ]
    return "; ".join([said, *others])


def _missing(fleet: Fleet, goals: Mapping[ModelName, _Goal], timeout_s: float) -> str:
    missing: list[str] = []
    for goal in goals.values():
        seen = view(fleet, goal.model, goal.revision)
        verdicts = seen.verdicts
        if seen.is_gated and not (seen.decided is not None and seen.decided.has_ended):
            missing.append(f"{goal.model}@{goal.revision}: {_undecided(seen)}")
            continue
        late = [f"{n} {v}" for n, v in verdicts.items() if v.standing is not Standing.CONVERGED]
        missing.append(f"{goal.model}@{goal.revision}: {', '.join(late) or 'no node has it'}")
    return f"not converged after {timeout_s:g} s: {'; '.join(missing)}"


def _undecided(seen: ModelView) -> str:
    record = seen.decided
    if record is None:
        return "its rollout was not begun: no coordinator among the nodes"
    late = [f"{n} {v}" for n, v in seen.verdicts.items() if v.standing is not Standing.CONVERGED]
    paused = " (paused)" if record.paused else ""
    return f"the rollout is {record.phase}{paused}: {', '.join(late) or 'no node takes it'}"


def _reporter() -> Reporter:
    return _Bars() if sys.stderr.isatty() else _Lines()


class _Lines:
    """A line on stderr whenever a node's standing changes."""

    def __init__(self) -> None:
        self._shown: dict[tuple[ModelName, NodeId], str] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        return None

    def show(self, seen: ModelView) -> None:
        for node, verdict in seen.verdicts.items():
            line = str(verdict)
            if self._shown.get((seen.model, node)) != line:
                self._shown[seen.model, node] = line
                say(f"{seen.model}: {node} {line}")


class _Bars:
    """A bar a model on the terminal: nodes that have it, of nodes there are."""

    def __init__(self) -> None:
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            TextColumn("{task.completed:.0f}/{task.total:.0f} nodes", markup=False),
            TimeElapsedColumn(),
            TextColumn("{task.fields[detail]}", markup=False),
            console=console(stderr=True),
        )
        self._tasks: dict[ModelName, TaskID] = {}

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self._progress.stop()

    def show(self, seen: ModelView) -> None:
        if seen.model not in self._tasks:
            self._tasks[seen.model] = self._progress.add_task(seen.model, detail="")
        late = [
            f"{node} {verdict}"
            for node, verdict in seen.verdicts.items()
            if verdict.standing is not Standing.CONVERGED
        ]
        self._progress.update(
            self._tasks[seen.model],
            total=len(seen.verdicts),
            completed=len(seen.verdicts) - len(late),
            detail=visible(late[0]) if late else "",
        )
