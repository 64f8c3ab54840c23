"""What faults of running servables lead to, on a manager with played workers and virtual time."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path

import numpy as np
import pytest

from loader.errors import PredictorFault, WorkerDied
from loader.faults import from_code
from loader.worker import Outcome
from registry.inference import BadInput, Inference, InferenceError, Overloaded, Poisonous
from registry.names import Version
from tests.unit.manager_harness import MODEL, Answer, ManagedNode, document, managed

pytestmark = pytest.mark.looptime

ONE, TWO = "/models/1", "/models/2"
CONSECUTIVE = 3


def raised(code: str | int) -> Answer:
    """A run that raises what the code stands for."""
    fault = from_code(code, f"error {code}")
    return lambda: PredictorFault(fault.message, code=fault.code, fault_class=fault.fault_class)


def died(code: str) -> Answer:
    return lambda: WorkerDied(code)


def spoiled() -> Outcome:
    return Inference({"y": np.full(1, np.nan, np.float32)}, 0.0, 0.001)


async def pair(node: ManagedNode, **spec: object) -> None:
    """Version 2 live, version 1 its standby."""
    await node.put_and_settle(document("1", **spec), 5)
    await node.put_and_settle(document("2", "1", **spec), 6)
    assert node.states == "1 STANDBY, 2 LIVE"


async def ask(node: ManagedNode, times: int) -> list[str]:
    """One request after the other; who answered, or the error's name."""
    told: list[str] = []
    for _ in range(times):
        try:
            told.append((await node.infer()).choice.servable.version)
        except InferenceError as exc:
            told.append(type(exc).__name__)
        await node.passes(0.5)
    return told


def errors(node: ManagedNode, version: str) -> dict[str, int]:
    view = node.manager.view(MODEL)
    assert view is not None
    return next(dict(s.errors) for s in view.servables if s.id.version == Version(version))


COUNTED = ["700", "719", "2", "-101", "-102", "-204", "CUDNN:8", "CUBLAS:14"]


@pytest.mark.parametrize("code", COUNTED)
async def test_the_third_counted_fault_takes_the_version_out(tmp_path: Path, code: str) -> None:
    async with managed(tmp_path) as node:
        await pair(node)
        node.world.answers[TWO].extend([raised(code)] * CONSECUTIVE)
        assert await ask(node, CONSECUTIVE + 1) == ["1"] * (CONSECUTIVE + 1)
        assert node.live == "1"
        ((servable, quarantine),) = node.told.quarantines
        assert servable.version == "2"
        assert str(quarantine.code) == code
        assert f"code {code}" in quarantine.reason


async def test_two_are_not_enough(tmp_path: Path) -> None:
    async with managed(tmp_path) as node:
        await pair(node)
        node.world.answers[TWO].extend([raised(-101)] * (CONSECUTIVE - 1))
        assert await ask(node, CONSECUTIVE) == ["1", "1", "2"]
        assert node.live == "2"
        assert errors(node, "2") == {"-101": 2}


async def test_the_clients_errors_are_given_back_and_nothing_else(tmp_path: Path) -> None:
    async with managed(tmp_path) as node:
        await pair(node)
        node.world.answers[TWO].extend([lambda: BadInput("your own")] * 50)
        assert set(await ask(node, 50)) == {"BadInput"}
        assert errors(node, "2") == {}
        assert node.live == "2"


async def test_an_unknown_error_counts_once_the_standby_answered_the_request(
    tmp_path: Path,
) -> None:
    async with managed(tmp_path) as node:
        await pair(node)
        node.world.answers[TWO].extend([raised("NotFound")] * CONSECUTIVE)
        assert await ask(node, CONSECUTIVE) == ["1"] * CONSECUTIVE
        assert node.live == "1"


async def test_an_unknown_error_on_both_is_the_requests_own(tmp_path: Path) -> None:
    async with managed(tmp_path) as node:
        await pair(node)
        for content in (ONE, TWO):
            node.world.answers[content].extend([raised("NotFound")] * 10)
        assert set(await ask(node, 10)) == {"Overloaded"}
        assert node.live == "2"
        assert not node.told.quarantines


async def test_a_bad_device_is_cordoned_at_once_and_no_version_blamed(tmp_path: Path) -> None:
    async with managed(tmp_path) as node:
        await pair(node)
        node.world.answers[TWO].append(raised(46))
        await ask(node, 1)
        (usage,) = node.devices.usage()
        assert usage.cordoned is not None
        assert usage.cordoned.code == "46"
        # What fails on it now says nothing of a version.
        node.world.always[TWO] = raised(700)
        await ask(node, 5)
        assert not node.told.quarantines


async def test_the_same_code_on_both_is_the_device(tmp_path: Path) -> None:
    async with managed(tmp_path) as node:
        await pair(node)
        node.world.always[ONE] = node.world.always[TWO] = raised(700)
        await ask(node, 8)
        (usage,) = node.devices.usage()
        assert usage.cordoned is not None
        assert not node.told.quarantines


async def test_an_input_that_ends_workers_of_both_is_refused_for_a_while(tmp_path: Path) -> None:
    async with managed(tmp_path) as node:
        await pair(node, limits={"poison_s": 60})
        await ask(node, 20)
        node.world.answers[TWO].append(died("SIGSEGV"))
        node.world.answers[ONE].append(died("SIGSEGV"))
        with pytest.raises(Poisonous):
            await node.infer()
        deaths = len(node.world.workers) - len(node.world.alive())
        assert await ask(node, 3) == ["Poisonous"] * 3
        assert len(node.world.workers) - len(node.world.alive()) <= deaths, "no further worker"
        assert not node.told.quarantines
        assert node.live == "2"
        await node.passes(61)
        assert await ask(node, 1) == ["2"]


async def test_dead_workers_take_a_version_out_whatever_its_codes(tmp_path: Path) -> None:
    async with managed(tmp_path) as node:
        await pair(node, rollback={"codes": [700]})
        node.world.answers[TWO].extend([raised(-101)] * 10)
        assert set(await ask(node, 10)) == {"1"}
        assert node.live == "2"
        for _ in range(CONSECUTIVE):
            node.world.answers[TWO].append(died("SIGKILL"))
            await node.infer()
            await node.passes(5)
        assert node.live == "1"


async def test_nothing_to_roll_back_to_is_said_and_over_with_the_next_answer(
    tmp_path: Path,
) -> None:
    async with managed(tmp_path) as node:
        await node.put_and_settle(document("1"), 5)
        node.world.answers[ONE].extend([raised(-101)] * 6)
        assert set(await ask(node, 3)) == {"Overloaded"}
        assert "nothing to roll back to" in (node.told.statuses[-1].reason or "")
        assert node.live == "1"
        assert await ask(node, 1) == ["1"]
        await node.passes(2)
        assert node.told.statuses[-1].reason is None
        assert not node.told.quarantines


# --- the output guard -------------------------------------------------------------------------

GUARDED = {"rollback": {"on": {"nan_rate": 0.1, "min_samples": 10}}}


async def test_an_answer_with_nan_is_asked_for_elsewhere_first(tmp_path: Path) -> None:
    async with managed(tmp_path) as node:
        await pair(node, **GUARDED)
        node.world.answers[TWO].append(spoiled)
        answer = await node.infer()
        assert answer.choice.servable.version == "1"
        assert np.isfinite(answer.inference.outputs["y"]).all()
        assert node.live == "2"


async def test_what_both_say_is_the_answer(tmp_path: Path) -> None:
    """A log of zero, say: it is what the input leads to, and nobody is blamed."""
    async with managed(tmp_path) as node:
        await pair(node, **GUARDED)
        node.world.answers[TWO].append(spoiled)
        node.world.answers[ONE].append(spoiled)
        answer = await node.infer()
        assert np.isnan(answer.inference.outputs["y"]).all()
        assert errors(node, "2") == {}


async def test_without_the_guard_nobody_looks(tmp_path: Path) -> None:
    async with managed(tmp_path) as node:
        await pair(node)
        node.world.always[TWO] = spoiled
        assert set(await ask(node, 20)) == {"2"}


async def test_nan_that_only_the_live_version_gives_takes_it_out(tmp_path: Path) -> None:
    async with managed(tmp_path) as node:
        await pair(node, **GUARDED)
        await ask(node, 10)
        node.world.always[TWO] = spoiled
        assert set(await ask(node, 10)) == {"1"}
        assert node.live == "1"
        ((_, quarantine),) = node.told.quarantines
        assert quarantine.code == "NAN"


async def test_an_objective_missed_for_sure_takes_it_out(tmp_path: Path) -> None:
    async with managed(tmp_path) as node:
        await pair(node, rollback={"on": {"p95_ms": 100, "min_samples": 20}})
        assert set(await ask(node, 30)) == {"2"}
        node.world.run_s = 0.2
        told = await ask(node, 30)
        assert "Overloaded" not in told
        assert node.live == "1"
        ((_, quarantine),) = node.told.quarantines
        assert quarantine.code == "SLA"


async def test_a_few_slow_answers_are_no_proof(tmp_path: Path) -> None:
    async with managed(tmp_path) as node:
        await pair(node, rollback={"on": {"p95_ms": 100, "min_samples": 50}})
        node.world.run_s = 0.2
        await ask(node, 5)
        node.world.run_s = 0.001
        await ask(node, 60)
        assert node.live == "2"


# --- while it is judged -----------------------------------------------------------------------


@pytest.mark.parametrize(("code", "faults"), [(-101, CONSECUTIVE), (700, 1)])
async def test_of_many_requests_at_once_none_is_lost(
    tmp_path: Path, code: int, faults: int
) -> None:
    """One verdict falls where the worker goes on; a poisoned one fails for one of them only."""
    async with managed(tmp_path) as node:
        await pair(node)
        node.world.always[TWO] = raised(code)
        answers = await asyncio.gather(*(node.infer() for _ in range(50)))
        assert {answer.choice.servable.version for answer in answers} == {"1"}
        await node.passes(5)
        assert errors(node, "2")[str(code)] >= faults
        assert len(node.told.quarantines) == (faults >= CONSECUTIVE)
        assert node.live == ("1" if faults >= CONSECUTIVE else "2")


async def test_two_faults_before_a_new_document_do_not_count_after_other_limits(
    tmp_path: Path,
) -> None:
    async with managed(tmp_path) as node:
        await pair(node)
        node.world.answers[TWO].extend([raised(-101)] * 4)
        await ask(node, 2)
        await node.put_and_settle(document("2", "1", rollback={"consecutive": 4}), 7)
        assert await ask(node, 3) == ["1", "1", "2"]
        assert node.live == "2"


async def test_a_model_that_goes_while_it_is_judged_leaves_nothing(tmp_path: Path) -> None:
    async with managed(tmp_path) as node:
        await pair(node)
        node.world.always[ONE] = node.world.always[TWO] = raised(-101)
        with contextlib.suppress(Overloaded):
            for _ in range(CONSECUTIVE):
                with contextlib.suppress(Overloaded):
                    await node.infer()
        node.delete()
        await node.passes(60)
        assert node.manager.view(MODEL) is None
