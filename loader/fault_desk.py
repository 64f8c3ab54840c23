"""Faults of running servables: counted, judged, and turned into one of four deeds.

Leave a version alone (suspect), take it out (quarantine), take the device out (cordon), or refuse
an input. The order of events on the path of a request: the pool reports a fault here before the
request learns of it, so when the n-th fault arrives, routing has changed by the time the request
is run again, and the next request never sees the failing version.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from typing import Protocol

import structlog

from loader.blame import SEVERE, Blame, Verdict
from loader.counting import Seen, Tripped
from loader.devices import Cordon
from loader.drills import DrillBox
from loader.faults import Fault, FaultClass
from loader.guards import Objectives, OutputGuard, all_finite
from loader.model import Model
from loader.oversight import FaultReport, Feeds, Finding, Oversight
from loader.poison import PoisonSet, input_digest
from loader.pool import WorkerPool
from loader.servable import Servable
from loader.triage import Limits, Triage
from loader.warmup import warmup_feeds
from registry.inference import DeadlineExceeded, Inference, InferenceError, Overloaded
from registry.names import ModelName, ServableId
from registry.records import rfc3339_ms
from registry.spec import Rollback

log = structlog.get_logger(__name__)

JUDGE_AGAIN_S = (0.01, 0.03, 0.1, 0.3, 1.0, 2.0)
"""After a suspicion: when to look again whether the evidence is in."""
CONTROL_S = 5.0
"""How long the control may take to answer the request that failed."""


class Deeds(Protocol):
    """What the desk can have done; the manager does it."""

    def suspect(self, model: Model, id: ServableId) -> None:
        """Route around ``id`` while another version can serve, without giving it up."""
        ...

    def acquit(self, model: Model, id: ServableId) -> None:
        """It was not the version: route as the document says again."""
        ...

    def quarantine(self, model: Model, servable: Servable, fault: Fault, reason: str) -> None:
        """Take the version out, here now and in the fleet by quorum."""
        ...

    def cordon(self, device: str, cordon: Cordon) -> None: ...

    def is_cordoned(self, device: str) -> bool:
        """Whether the device was found guilty: what fails on it says nothing of a version."""
        ...

    def noted(self, model: Model) -> None:
        """A fault was counted: the status may tell."""
        ...

    def troubled(self, model: Model, reason: str | None) -> None:
        """Say why requests fail while there is nothing to roll back to; ``None``: no longer."""
        ...


@dataclass(slots=True)
class _Case:
    """One model's faults."""

    triage: Triage
    poison: PoisonSet = field(default_factory=PoisonSet)
    open: set[ServableId] = field(default_factory=set[ServableId])
    """Suspected, and being judged."""


class FaultDesk:
    """One a node; all on the event loop."""

    def __init__(self, deeds: Deeds, *, drills: DrillBox | None = None) -> None:
        self._deeds = deeds
        self._drills = drills
        self._cases: dict[ModelName, _Case] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self.refused_inputs = 0

    # --- for the manager ----------------------------------------------------------------------

    def oversight(self, model: Model, servable: Servable, rollback: Rollback) -> Oversight:
        """What the pool of ``servable`` reports to."""
        guard = _guard_of(rollback)
        drills = self._drills
        id = servable.id
        return Oversight(
            on_fault=partial(self._on_fault, model, servable),
            on_answered=partial(self._on_answered, model, servable),
            has_control=lambda: model.control_of(id) is not None,
            refuses=partial(self._refused_s, self._case(model)),
            drill=None if drills is None else partial(drills.order_for, id.model, id.version),
            inspect=None if guard is None else partial(_inspect, guard),
        )

    def configure(self, model: Model, rollback: Rollback) -> None:
        """Take a document's new limits."""
        self._case(model).triage.configure(_limits_of(rollback))

    def forget(self, model: Model, id: ServableId) -> None:
        """``id`` is gone, released, or starts anew."""
        case = self._case(model)
        case.triage.forget([id])
        case.open.discard(id)

    def drop(self, name: ModelName) -> None:
        """The model is gone."""
        self._cases.pop(name, None)

    def errors(self, name: ModelName, id: ServableId) -> dict[str, int]:
        """Faults by code, for the servable's status."""
        case = self._cases.get(name)
        return {} if case is None else case.triage.errors(id)

    def seen(self, name: ModelName, id: ServableId) -> Mapping[str, Seen]:
        """The same with first and last time (loop time) and message."""
        case = self._cases.get(name)
        return {} if case is None else case.triage.seen(id)

    def close(self) -> None:
        for task in self._tasks:
            task.cancel()

    # --- from the pools -----------------------------------------------------------------------

    def _on_fault(self, model: Model, servable: Servable, report: FaultReport) -> bool:
        """Returns whether the input itself is to blame."""
        fault = report.fault
        log.warning(
            "servable_fault",
            servable=str(servable.id),
            code=fault.code,
            fault_class=fault.fault_class,
            message=fault.message,
            pid=report.pid,
        )
        control = model.control_of(servable.id)
        if fault.fault_class is FaultClass.HARDWARE:
            self._cordon(servable.recipe.device, fault.code, fault.message)
            return False
        if self._deeds.is_cordoned(servable.recipe.device):
            return False
        if control is not None and fault.handling.counted == "proven":
            return False  # unless the control answers it: `_on_answered`
        if report.is_breach:
            self._breached(model, servable, fault)
            return False
        if fault.code == "NAN":
            return False  # as an error that says not whose: `_on_answered`, or the rate of them
        return self._count(model, servable, report, proven=False)

    def _on_answered(
        self, model: Model, servable: Servable, report: FaultReport, by_other: bool
    ) -> None:
        if report.feeds is not None and report.fault.fault_class in SEVERE:
            self._case(model).triage.exonerate(input_digest(report.feeds))
        if not by_other or self._deeds.is_cordoned(servable.recipe.device):
            return
        if report.fault.handling.counted == "proven" or report.fault.code == "NAN":
            self._count(model, servable, report, proven=True)

    def _count(
        self, model: Model, servable: Servable, report: FaultReport, *, proven: bool
    ) -> bool:
        case, fault, id = self._case(model), report.fault, servable.id
        now_s = asyncio.get_running_loop().time()
        digest = ""
        if fault.fault_class in SEVERE and report.feeds is not None:
            digest = input_digest(report.feeds)
        ruling = case.triage.fault(
            now_s,
            id,
            fault,
            control=model.control_of(id),
            device=servable.recipe.device,
            input_digest=digest,
            incident=(report.pid, fault.code) if fault.fault_class is FaultClass.CRASH else None,
            answers=servable.pool.answered if servable.pool is not None else 0,
            answers_of_all=model.answered,
            proven=proven,
        )
        servable.errors.clear()
        servable.errors.update(case.triage.errors(id))
        self._deeds.noted(model)
        verdict = ruling.verdict
        if verdict is not None and verdict.blame is Blame.INPUT:
            self._refuse(model, case, verdict.reason, *verdict.inputs)
            return digest in verdict.inputs
        if ruling.tripped is not None:
            self._tripped(model, servable, report, ruling.tripped, verdict)
        return False

    def _refused_s(self, case: _Case, feeds: Feeds) -> float:
        if not case.poison:
            return 0.0
        now_s = asyncio.get_running_loop().time()
        refused_s = case.poison.remaining_s(input_digest(feeds), now_s)
        self.refused_inputs += refused_s > 0
        return refused_s

    # --- what follows -------------------------------------------------------------------------

    def _tripped(
        self,
        model: Model,
        servable: Servable,
        report: FaultReport,
        tripped: Tripped,
        verdict: Verdict | None,
    ) -> None:
        id, case = servable.id, self._case(model)
        if not servable.is_loaded or id in case.open:
            return
        control = model.control_of(id)
        if control is None:
            self._without_control(model, servable, tripped)
            return
        if verdict is not None and self._settle(model, servable, tripped, verdict):
            return
        # Not settled: the requests that failed are being run on the control just now. Until that
        # is known nobody else is sent to the version that keeps failing.
        case.open.add(id)
        self._deeds.suspect(model, id)
        task = asyncio.create_task(self._judge(model, servable, report, tripped))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _breached(self, model: Model, servable: Servable, fault: Fault) -> None:
        """An objective is not met, for sure: nothing more is counted."""
        has_other = model.usable_fallback(servable.id) is not None
        if servable.is_loaded and (has_other or model.control_of(servable.id) is not None):
            self._deeds.quarantine(model, servable, fault, fault.message)
        elif servable.is_loaded:
            self._deeds.troubled(model, f"{fault.message}; nothing to roll back to")

    def _without_control(self, model: Model, servable: Servable, tripped: Tripped) -> None:
        if model.usable_fallback(servable.id) is not None:
            self._deeds.quarantine(model, servable, tripped.fault, str(tripped))
            return
        # Nothing to roll back to: taking it out would only turn some failures into all of them.
        self._deeds.troubled(model, f"{tripped} of {servable.id.version}, nothing to roll back to")

    async def _judge(
        self, model: Model, servable: Servable, report: FaultReport, tripped: Tripped
    ) -> None:
        id, case, loop = servable.id, self._case(model), asyncio.get_running_loop()
        started_s = loop.time()
        try:
            for after_s in JUDGE_AGAIN_S:
                await asyncio.sleep(max(0.0, started_s + after_s - loop.time()))
                if id not in case.open or not servable.is_loaded:
                    self._deeds.acquit(model, id)
                    return
                verdict = case.triage.judge(
                    loop.time(), id, control=model.control_of(id), answers_of_all=model.answered
                )
                if self._settle(model, servable, tripped, verdict):
                    return
            # No traffic to tell by: make the experiment ourselves.
            blame = await self._experiment(model, id, report.feeds)
            if not servable.is_loaded:
                return
            match blame:
                case Blame.VERSION:
                    self._deeds.quarantine(model, servable, tripped.fault, str(tripped))
                case Blame.INPUT if report.feeds is not None:
                    self._refuse(model, case, str(tripped), input_digest(report.feeds))
                case _:
                    self._cordon(servable.recipe.device, tripped.fault.code, str(tripped))
            self._deeds.acquit(model, id)
        finally:
            case.open.discard(id)

    def _settle(self, model: Model, servable: Servable, tripped: Tripped, verdict: Verdict) -> bool:
        """Do what the verdict asks for; ``False`` while there is none."""
        id, case = servable.id, self._case(model)
        match verdict.blame:
            case Blame.VERSION:
                self._deeds.quarantine(model, servable, tripped.fault, str(tripped))
            case Blame.DEVICE:
                for digest in verdict.inputs:
                    case.poison.lift(digest)
                self._cordon(servable.recipe.device, verdict.code, verdict.reason)
                self._deeds.acquit(model, id)
            case Blame.INPUT:
                self._refuse(model, case, verdict.reason, *verdict.inputs)
                self._deeds.acquit(model, id)
            case Blame.UNDECIDED:
                return False
        return True

    async def _experiment(self, model: Model, id: ServableId, feeds: Feeds | None) -> Blame:
        """Run what failed on the control, and the warm-up input where it fails there too."""
        control = model.control_of(id)
        servable = model.servables[control] if control is not None else None
        if servable is None or servable.pool is None:
            return Blame.DEVICE
        if feeds is not None and await _answers(servable.pool, feeds):
            return Blame.VERSION
        warmup = warmup_feeds(servable.pool.signature, servable.recipe)[0]
        if not await _answers(servable.pool, warmup):
            return Blame.DEVICE
        return Blame.INPUT if feeds is not None else Blame.VERSION

    def _refuse(self, model: Model, case: _Case, reason: str, *digests: str) -> None:
        document = model.document or model.aspired
        for_s = document.spec.limits.poison_s if document is not None else 600.0
        now_s = asyncio.get_running_loop().time()
        for digest in digests:
            case.poison.refuse(digest, now_s=now_s, for_s=for_s)
        log.warning("input_refused", model=model.name, reason=reason, for_s=for_s)

    def _cordon(self, device: str, code: str, reason: str) -> None:
        self._deeds.cordon(device, Cordon(code, reason, rfc3339_ms(datetime.now(UTC))))

    def _case(self, model: Model) -> _Case:
        case = self._cases.get(model.name)
        if case is None:
            document = model.aspired or model.document
            rollback = document.spec.rollback if document is not None else Rollback()
            case = self._cases[model.name] = _Case(Triage(_limits_of(rollback)))
        return case


async def _answers(pool: WorkerPool, feeds: Feeds) -> bool:
    deadline_s = asyncio.get_running_loop().time() + CONTROL_S
    try:
        await pool.infer(feeds, deadline_s=deadline_s)
    except (Overloaded, DeadlineExceeded):
        return pool.can_serve  # busy answering others
    except InferenceError as exc:
        log.info("control_failed", servable=str(pool.id), error=str(exc))
        return False
    return True


def _limits_of(rollback: Rollback) -> Limits:
    codes = rollback.on.codes if rollback.on is not None and rollback.on.codes else rollback.codes
    return Limits(codes, rollback.consecutive, rollback.window_s)


# --- the output guard -------------------------------------------------------------------------

_Guard = tuple[OutputGuard, bool]


def _guard_of(rollback: Rollback) -> _Guard | None:
    on = rollback.on
    if on is None or (on.nan_rate is None and on.p95_ms is None):
        return None
    objectives = Objectives(nan_rate=on.nan_rate, p95_ms=on.p95_ms, min_samples=on.min_samples)
    return OutputGuard(objectives), on.nan_rate is not None


def _inspect(guard: _Guard, answer: Inference, latency_s: float) -> Finding | None:
    """A breach of an objective, or an answer with NaN in it, to be tried elsewhere first."""
    output, wants_finite = guard
    is_finite = not wants_finite or all_finite(answer.outputs.values())
    breach = output.observe(latency_ms=latency_s * 1000, is_finite=is_finite)
    if breach is not None:
        output.reset()
        return Finding(breach, is_breach=True, is_held=not is_finite)
    if not is_finite:
        held = Fault("NAN", FaultClass.GUARD, "the answer holds NaN or Inf")
        return Finding(held, is_breach=False, is_held=True)
    return None
