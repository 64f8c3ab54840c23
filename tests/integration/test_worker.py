"""Real worker processes: their phases, their runs, their many ways to end."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import textwrap
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import psutil
import pytest
import pytest_asyncio

from loader.errors import LoadFailed, NotAdmitted, WorkerDied
from loader.params import ParamsFile, write_params
from loader.program import read_program
from loader.zygote import Zygote, ZygoteFailed
from paddlewheel.models.small import make_large, make_mlp, make_two_output
from registry.inference import Array, BadInput
from tests.eventually import eventually
from tests.integration.workers import Peer, is_running, open_fds, recipe_of, rows, serving

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def zygote() -> AsyncIterator[Zygote]:
    zygote = Zygote()
    await zygote.start()
    yield zygote
    await zygote.close()


@pytest.fixture(scope="module")
def mlp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_mlp(tmp_path_factory.mktemp("mlp"), seed=1)


def reference(folder: Path, x: Array) -> Array:
    """The MLP in numpy."""
    names = [one.name for one in read_program(folder / "inference.json").persistables]
    weights = ParamsFile.open(folder / "inference.pdiparams", names)
    for index in range(2):
        x = x @ weights[f"linear_{index}.w_0"] + weights[f"linear_{index}.b_0"]
        x = np.maximum(x, 0) if index == 0 else x
    return x


# --- phases -----------------------------------------------------------------------------------


async def test_phases_then_runs(zygote: Zygote, mlp: Path):
    recipe = recipe_of(mlp)
    worker = await zygote.spawn()
    signature = await worker.check(mlp, recipe)
    loaded = await worker.load(mlp, recipe)
    assert loaded.signature == signature
    assert loaded.device == "cpu"
    assert loaded.rss_bytes > 10 << 20
    assert (await worker.warm(recipe, None)).runs == recipe.warmup_requests
    await worker.serve()
    for n in (1, 4, 300, 1, 5000, 2):
        x = rows(n, seed=n)
        answer = await worker.run({"x": x}, timeout_s=10)
        np.testing.assert_allclose(answer.outputs["fetch_name_0"], reference(mlp, x), atol=1e-4)
        assert 0 < answer.run_s < 10
    await worker.close()
    assert worker.died.result() == "EXIT:0"
    assert not is_running(worker.pid)


async def test_answers_belong_to_the_caller(zygote: Zygote, mlp: Path):
    worker = await serving(zygote, mlp)
    first = await worker.run({"x": rows(seed=1)}, timeout_s=10)
    before = first.outputs["fetch_name_0"].copy()
    for seed in range(2, 6):
        await worker.run({"x": rows(seed=seed)}, timeout_s=10)
    assert np.array_equal(first.outputs["fetch_name_0"], before)
    await worker.close()
    assert np.array_equal(first.outputs["fetch_name_0"], before)


async def test_two_runs_under_way_keep_their_order(zygote: Zygote, mlp: Path):
    worker = await serving(zygote, mlp)
    xs = [rows(seed=seed) for seed in range(20)]
    for left, right in zip(xs[::2], xs[1::2], strict=True):
        answers = await asyncio.gather(
            worker.run({"x": left}, timeout_s=10), worker.run({"x": right}, timeout_s=10)
        )
        for x, answer in zip((left, right), answers, strict=True):
            np.testing.assert_allclose(answer.outputs["fetch_name_0"], reference(mlp, x), atol=1e-4)
    await worker.close()


async def test_several_inputs_and_outputs(zygote: Zygote, tmp_path: Path):
    folder = make_two_output(tmp_path / "two")
    worker = await serving(zygote, folder)
    feeds = {"x": rows(3, 32), "ids": np.arange(18, dtype=np.int64).reshape(3, 6)}
    outputs = (await worker.run(feeds, timeout_s=10)).outputs
    assert [array.shape for array in outputs.values()] == [(3, 8), (3, 24), (3,)]
    scores = outputs["fetch_name_0"]
    assert np.array_equal(scores.argmax(1), outputs["fetch_name_2"])
    assert np.array_equal(scores, outputs["fetch_name_1"][:, :8])
    await worker.close()


async def test_legacy_programs_give_the_same_answers(zygote: Zygote, mlp: Path, tmp_path: Path):
    legacy = make_mlp(tmp_path / "legacy", seed=1, format="legacy")
    answers = []
    for folder in (mlp, legacy):
        worker = await serving(zygote, folder)
        (answer,) = (await worker.run({"x": rows()}, timeout_s=10)).outputs.values()
        answers.append(answer)
        await worker.close()
    np.testing.assert_allclose(answers[0], answers[1], atol=1e-5)


async def test_a_check_that_fails_names_itself_and_the_worker_lives(zygote: Zygote, tmp_path: Path):
    folder = make_mlp(tmp_path / "bad")
    params = folder / "inference.pdiparams"
    whole = params.read_bytes()
    worker = await zygote.spawn()
    with pytest.raises(NotAdmitted) as caught:
        await worker.check(folder, recipe_of(folder, sha256={params.name: "00" * 32}))
    assert caught.value.check == "digest"
    params.write_bytes(whole[:-4])
    with pytest.raises(NotAdmitted) as caught:
        await worker.check(folder, recipe_of(folder))
    assert caught.value.check == "params"
    names = [one.name for one in read_program(folder / "inference.json").persistables]
    params.write_bytes(whole)
    weights = {name: array.copy() for name, array in ParamsFile.open(params, names).items()}
    weights["linear_0.w_0"][3, 3] = np.nan
    write_params(params, weights)
    with pytest.raises(NotAdmitted) as caught:
        await worker.check(folder, recipe_of(folder))
    assert caught.value.check == "finite"
    params.write_bytes(whole)
    assert await worker.check(folder, recipe_of(folder)) is not None
    await worker.close()


async def test_golden_outputs_are_held_against(zygote: Zygote, mlp: Path, tmp_path: Path):
    x = rows()
    right, wrong = tmp_path / "right.npz", tmp_path / "wrong.npz"
    np.savez(right, **{"inputs/x": x, "outputs/0": reference(mlp, x)})
    np.savez(wrong, **{"inputs/x": x, "outputs/0": reference(mlp, x) + 1})
    recipe = recipe_of(mlp, rtol=1e-3, atol=1e-3)
    worker = await zygote.spawn()
    await worker.load(mlp, recipe)
    assert (await worker.warm(recipe, right)).runs == recipe.warmup_requests + 1
    with pytest.raises(NotAdmitted) as caught:
        await worker.warm(recipe, wrong)
    assert caught.value.check == "golden"
    await worker.close()


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"device": "gpu:0"}, "no CUDA"),
        ({"options": {"memory_optim": True}}, "memory_optim"),
        ({"options": {"fast": True}}, "predictor.options.fast"),
    ],
)
async def test_what_cannot_be_loaded_says_why(
    zygote: Zygote, mlp: Path, fields: dict[str, object], named: str
):
    worker = await zygote.spawn()
    with pytest.raises(LoadFailed, match=named):
        await worker.load(mlp, recipe_of(mlp, **fields))
    await worker.close()


async def test_every_known_option_loads_and_answers_alike(zygote: Zygote, mlp: Path):
    x = rows()
    for options in (
        {"onednn": True, "onednn_cache": 4},
        {"onednn": False},
        {"ir_optim": False},
        {"optimization_level": 1},
        {"passes_deleted": ["fc_fuse_pass"]},
    ):
        worker = await serving(zygote, mlp, options=options)
        (answer,) = (await worker.run({"x": x}, timeout_s=10)).outputs.values()
        np.testing.assert_allclose(answer, reference(mlp, x), atol=1e-4)
        await worker.close()


async def test_a_program_that_is_none_is_a_failed_load(zygote: Zygote, tmp_path: Path):
    (tmp_path / "inference.json").write_text('{"base_code":{"magic":"pir"},"program":{}}')
    (tmp_path / "inference.pdiparams").write_bytes(b"")
    worker = await zygote.spawn()
    with pytest.raises((LoadFailed, WorkerDied)):
        await worker.load(tmp_path, recipe_of(tmp_path))
    await worker.close()


async def test_a_phase_past_its_deadline_ends_the_worker(zygote: Zygote, mlp: Path):
    worker = await zygote.spawn()
    os.kill(worker.pid, signal.SIGSTOP)
    with pytest.raises(LoadFailed, match="deadline"):
        await worker.load(mlp, recipe_of(mlp), deadline_s=asyncio.get_running_loop().time() + 0.1)
    assert await asyncio.wait_for(worker.died, 5) == "HANG"


async def test_a_cancelled_load_ends_the_worker(zygote: Zygote, tmp_path: Path):
    folder = make_large(tmp_path / "large", mb=40)
    worker = await zygote.spawn()
    load = asyncio.create_task(worker.load(folder, recipe_of(folder)))
    await asyncio.sleep(0.01)
    load.cancel()
    with pytest.raises(asyncio.CancelledError):
        await load
    assert await asyncio.wait_for(worker.died, 5) == "SIGKILL"


# --- runs that fail -----------------------------------------------------------------------------


async def test_a_bad_request_does_not_disturb_the_worker(zygote: Zygote, mlp: Path):
    worker = await serving(zygote, mlp)
    for bad in ({"x": rows(2, 3)}, {"x": rows().astype(np.float64)}, {"z": rows()}, {}):
        with pytest.raises(BadInput):
            await worker.run(bad, timeout_s=10)
        x = rows(seed=9)
        answer = await worker.run({"x": x}, timeout_s=10)
        np.testing.assert_allclose(answer.outputs["fetch_name_0"], reference(mlp, x), atol=1e-4)
    await worker.close()


async def test_too_large_for_an_arena_is_the_requests_fault(mlp: Path):
    small = Zygote(arena_limit_bytes=256 * 1024)
    worker = await serving(small, mlp)
    with pytest.raises(BadInput):
        await worker.run({"x": rows(2000)}, timeout_s=10)
    assert (await worker.run({"x": rows()}, timeout_s=10)).outputs
    await small.close()


async def test_a_cancelled_run_keeps_its_slot_until_the_worker_answers(zygote: Zygote, mlp: Path):
    worker = await serving(zygote, mlp)
    for _ in range(5):
        task = asyncio.create_task(worker.run({"x": rows(2000)}, timeout_s=10))
        await asyncio.sleep(0)
        task.cancel()
        assert worker.in_flight == 1
        await eventually(lambda: worker.in_flight == 0, within_s=5, what="slot free")
    assert (await worker.run({"x": rows()}, timeout_s=10)).outputs
    await worker.close()


# --- ends ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGKILL])
async def test_death_by_signal_is_noticed_and_named(zygote: Zygote, mlp: Path, number: int):
    worker = await serving(zygote, mlp)
    loop = asyncio.get_running_loop()
    started_s = loop.time()
    os.kill(worker.pid, number)
    assert await asyncio.wait_for(worker.died, 5) == signal.Signals(number).name
    assert loop.time() - started_s < 1
    with pytest.raises(WorkerDied):
        await worker.run({"x": rows()}, timeout_s=10)


async def test_a_run_under_way_learns_of_the_death(zygote: Zygote, mlp: Path):
    worker = await serving(zygote, mlp)
    os.kill(worker.pid, signal.SIGSTOP)
    run = asyncio.create_task(worker.run({"x": rows()}, timeout_s=10))
    await asyncio.sleep(0.02)
    os.kill(worker.pid, signal.SIGKILL)
    with pytest.raises(WorkerDied) as caught:
        await asyncio.wait_for(run, 5)
    assert caught.value.code == "SIGKILL"


async def test_a_run_that_hangs_ends_the_worker(zygote: Zygote, mlp: Path):
    worker = await serving(zygote, mlp)
    await worker.run({"x": rows()}, timeout_s=0.2)
    os.kill(worker.pid, signal.SIGSTOP)
    with pytest.raises(WorkerDied) as caught:
        await asyncio.wait_for(worker.run({"x": rows()}, timeout_s=0.2), 5)
    assert caught.value.code == "HANG"
    await eventually(lambda: not is_running(worker.pid), within_s=2, what="killed")


async def test_interrupts_are_for_the_front_alone(zygote: Zygote, mlp: Path):
    worker = await serving(zygote, mlp)
    assert zygote.pid is not None
    for pid in (zygote.pid, worker.pid):
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            os.kill(pid, number)
    assert (await worker.run({"x": rows()}, timeout_s=10)).outputs
    await worker.close()


@pytest.mark.parametrize(
    "data",
    {
        "no json": b"\x80\x04\x95pickle",
        "an answer nobody asked for": b'{"id":99,"ok":{}}',
        "tensors outside the arena": b'{"id":1,"ok":{"outputs":[["y","float32",[99999999],0]],'
        b'"run_s":0.1,"arena_bytes":65536}}',
        "a size that is no int": b'{"id":1,"ok":{"outputs":[],"run_s":0.1,"arena_bytes":1e9}}',
        "an arena larger than it is": b'{"id":1,"ok":{"outputs":[],"run_s":0,"arena_bytes":99999}}',
        "a class of fault unknown to us": b'{"id":1,"failure":["fault","7","odd","?"]}',
    }.values(),
)
async def test_a_worker_that_talks_nonsense_is_killed(data: bytes):
    peer = Peer()
    run = asyncio.create_task(peer.worker.run({"x": rows()}, timeout_s=10))
    await peer.next()
    peer.sock.send(data)
    await eventually(lambda: peer.process.poll() is not None, within_s=5, what="killed")
    peer.close()
    with pytest.raises(WorkerDied):
        await asyncio.wait_for(run, 5)


# --- the zygote ---------------------------------------------------------------------------------


async def test_start_does_not_block_the_loop():
    zygote = Zygote()
    loop = asyncio.get_running_loop()
    longest_s, last_s = 0.0, loop.time()
    start = asyncio.create_task(zygote.start())
    while not start.done():
        await asyncio.sleep(0.005)
        longest_s, last_s = max(longest_s, loop.time() - last_s), loop.time()
    await start
    assert zygote.import_s > 0
    assert longest_s < zygote.import_s / 2
    await zygote.close()
    with pytest.raises(ZygoteFailed):
        await zygote.start()


async def test_a_python_without_paddle_is_an_error(tmp_path: Path):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexit 3\n")
    python.chmod(0o755)
    for path in (python, tmp_path / "missing"):
        zygote = Zygote(str(path))
        with pytest.raises(ZygoteFailed):
            await zygote.spawn()
        await zygote.close()


async def test_workers_outlive_their_zygote_and_it_is_started_again(mlp: Path):
    before = open_fds()
    zygote = Zygote()
    worker, other = await serving(zygote, mlp), await serving(zygote, mlp)
    first = zygote.pid
    assert first is not None
    os.kill(first, signal.SIGKILL)
    await eventually(lambda: zygote.pid is None, within_s=5, what="zygote's end seen")
    assert (await worker.run({"x": rows()}, timeout_s=10)).outputs
    again = await serving(zygote, mlp)
    assert zygote.pid not in (None, first)
    for one in (worker, again):
        assert (await one.run({"x": rows()}, timeout_s=10)).outputs
    # how an adopted worker ended is seen as before, and it is reaped
    os.kill(other.pid, signal.SIGSEGV)
    assert await asyncio.wait_for(other.died, 5) == "SIGSEGV"
    os.kill(worker.pid, signal.SIGSTOP)  # closed, not waited for: nothing of it is left either
    await zygote.close()
    for one in (worker, other, again):
        assert not psutil.pid_exists(one.pid)
    assert open_fds() == before


async def test_a_death_shortly_before_the_zygotes_is_told_apart(mlp: Path):
    """The zygote has no time to report it: the front reaps it."""
    zygote = Zygote()
    worker = await serving(zygote, mlp)
    first = zygote.pid
    assert first is not None
    os.kill(first, signal.SIGSTOP)
    os.kill(worker.pid, signal.SIGABRT)
    os.kill(first, signal.SIGKILL)
    assert await asyncio.wait_for(worker.died, 5) == "SIGABRT"
    assert not psutil.pid_exists(worker.pid)
    await zygote.close()


async def test_a_zygote_that_answers_no_more_is_replaced(
    mlp: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("loader.zygote.SPAWN_TIMEOUT_S", 0.3)
    zygote = Zygote()
    worker = await serving(zygote, mlp)
    first = zygote.pid
    assert first is not None
    os.kill(first, signal.SIGSTOP)
    with pytest.raises(ZygoteFailed):
        await zygote.spawn()
    assert not is_running(first)
    monkeypatch.undo()
    assert (await (await serving(zygote, mlp)).run({"x": rows()}, timeout_s=10)).outputs
    assert (await worker.run({"x": rows()}, timeout_s=10)).outputs
    await zygote.close()


async def test_a_worker_holds_only_its_own_descriptors(zygote: Zygote, mlp: Path):
    others = [await serving(zygote, mlp) for _ in range(2)]
    worker = await serving(zygote, mlp)
    links = [os.readlink(path) for path in os.scandir(f"/proc/{worker.pid}/fd")]  # noqa: PTH115
    assert sum(link.startswith("socket:") for link in links) == 1
    assert sum("memfd:" in link for link in links) == 8  # 4 arenas, each held by its mapping too
    # the end of a worker is seen although later ones were forked while it lived
    os.kill(others[0].pid, signal.SIGKILL)
    assert await asyncio.wait_for(others[0].died, 5) == "SIGKILL"
    for one in (others[1], worker):
        await one.close()


async def test_many_workers_leave_nothing_in_the_front(zygote: Zygote, mlp: Path):
    recipe = recipe_of(mlp)
    await (await zygote.spawn()).close()
    before = open_fds()
    for turn in range(50):
        worker = await zygote.spawn()
        if turn % 10 == 0:
            await worker.load(mlp, recipe)
        if turn % 3 == 0:
            worker.kill()
        await worker.close()
    assert open_fds() == before
    assert zygote.pid is not None
    assert psutil.Process(zygote.pid).num_fds() < 12
    assert not psutil.Process(zygote.pid).children()


@pytest.mark.parametrize("has_zygote", [True, False], ids=["", "its zygote ended before"])
async def test_nothing_outlives_a_front_that_is_killed(mlp: Path, has_zygote: bool):
    script = textwrap.dedent("""
        import asyncio, sys
        from pathlib import Path
        from loader.zygote import Zygote
        from tests.integration.workers import rows, serving
        async def main():
            zygote = Zygote()
            workers = [await serving(zygote, Path(sys.argv[1])) for _ in range(2)]
            print(zygote.pid, *(worker.pid for worker in workers), flush=True)
            while True:
                await workers[0].run({"x": rows(3000)}, timeout_s=10)
        asyncio.run(main())
    """)
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", script, str(mlp), stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    line = await asyncio.wait_for(process.stdout.readline(), 60)
    pids = [int(pid) for pid in line.split()]
    assert len(pids) == 3
    assert all(is_running(pid) for pid in pids)
    for pid in pids:  # no shared memory that has a name, so none that could stay
        maps = Path(f"/proc/{pid}/maps").read_text()  # noqa: ASYNC240
        assert "/dev/shm/" not in maps
    os.kill(pids[2], signal.SIGSTOP)  # not even one that cannot run
    if not has_zygote:
        os.kill(pids[0], signal.SIGKILL)
        await eventually(lambda: not is_running(pids[0]), within_s=2, what="zygote gone")
        assert all(is_running(pid) for pid in pids[1:])
    process.kill()
    await process.wait()
    await eventually(lambda: not any(map(is_running, pids)), within_s=2, what="all gone")
