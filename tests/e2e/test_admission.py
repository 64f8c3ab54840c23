"""Broken versions on a real node: each refused with its own reason, and the old one serves on."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import signal
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
import pytest_asyncio

from loader.params import write_params
from paddlewheel.bench.checks import infer_body, outputs_of_version
from paddlewheel.bench.load import Headers, Request, Verify, http_request
from paddlewheel.demo import ocr
from paddlewheel.demo.models import find_published
from paddlewheel.models import make_mlp, make_two_output, reference
from paddlewheel.models.pir import ProgramWriter
from tests import models
from tests.e2e.running import (
    OUTPUT,
    RunningNode,
    Status,
    Traffic,
    document,
    is_alive,
    mlp_requests,
    reason_of,
    rows,
    running_node,
    states_of,
    traffic_to,
)
from tests.etcd import EtcdCluster, etcd_cluster
from tests.eventually import eventually

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest.fixture(scope="module")
def etcd() -> Iterator[EtcdCluster]:
    with etcd_cluster() as cluster:
        yield cluster


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """Two good versions."""
    root = tmp_path_factory.mktemp("good")
    return {v: make_mlp(root / v, seed=int(v), tag=int(v)) for v in ("1", "2")}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def node(
    etcd: EtcdCluster, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[RunningNode]:
    async with running_node(etcd, tmp_path_factory.mktemp("node")) as node:
        yield node


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def traffic(node: RunningNode, folders: Mapping[str, Path]) -> AsyncIterator[Traffic]:
    """Judged requests to the model ``m`` through all the tests of this module.

    The good versions take turns; an answer of any other version is a failure.
    """
    await node.apply("m", document("m", "1", folders))
    async with traffic_to(node, mlp_requests("m", folders), rate_per_s=80) as traffic:
        yield traffic


@dataclass(frozen=True, slots=True)
class Broken:
    """A version that must not become READY."""

    make: Callable[[Path, Path], Path]
    """From a good folder and where to write to the folder that is given as the source."""
    reason: str
    """A pattern that all of the reason matches."""
    entry: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Of the version, besides version and source."""
    spec: Callable[[Path, Path], Mapping[str, Any]] = lambda good, bad: {}
    """Of the document, from the good folder and the broken one."""


def _same(good: Path, out: Path) -> Path:
    return models.copy(good, out)


def _two_outputs(good: Path, out: Path) -> Path:
    """Takes what an MLP takes, returns what it returns, and one tensor more."""
    out.mkdir()
    program = ProgramWriter()
    weight = program.parameter("linear_0.w_0", [64, 10])
    y = program.matmul(program.data("x", [-1, 64]), weight)
    program.fetch(y)
    program.fetch(program.argmax(y))
    program.save(out / "inference.json")
    write_params(out / "inference.pdiparams", {"linear_0.w_0": rows(64, 10)})
    return out


def _other_program(good: Path, out: Path) -> Path:
    """The params of the good one under the program of another net."""
    make_two_output(out, seed=3)
    shutil.copyfile(good / "inference.pdiparams", out / "inference.pdiparams")
    return out


def _fifo(name: str) -> Callable[[Path, Path], Path]:
    def make(good: Path, out: Path) -> Path:
        models.copy(good, out)
        (out / name).unlink()
        os.mkfifo(out / name)
        return out

    return make


def _folder_for_params(good: Path, out: Path) -> Path:
    models.copy(good, out)
    (out / "inference.pdiparams").unlink()
    (out / "inference.pdiparams").mkdir()
    return out


def _link(target: str) -> Callable[[Path, Path], Path]:
    """The params are a symbolic link to ``target``."""

    def make(good: Path, out: Path) -> Path:
        models.copy(good, out)
        (out / "inference.pdiparams").unlink()
        (out / "inference.pdiparams").symlink_to(target)
        return out

    return make


def _empty_params(good: Path, out: Path) -> Path:
    models.copy(good, out)
    (out / "inference.pdiparams").write_bytes(b"")
    return out


def _empty_folder(good: Path, out: Path) -> Path:
    out.mkdir()
    return out


def _a_file(good: Path, out: Path) -> Path:
    out.write_bytes(b"no folder")
    return out


def _two_programs(good: Path, out: Path) -> Path:
    models.copy(good, out)
    for name in ("inference.json", "inference.pdiparams"):
        shutil.copyfile(out / name, out / name.replace("inference", "other"))
    return out


def _golden(good: Path, bad: Path, *, off_by: float = 0.0, **outputs: Any) -> Mapping[str, Any]:
    """Golden data of the good version: its own inputs and outputs."""
    x = rows(2, seed=11)
    path = bad.with_name(f"{bad.name}-golden.npz")
    wanted = outputs or {OUTPUT: reference(good, x)}
    models.write_golden(path, {"x": x}, wanted, off_by=off_by)
    return {"warmup": {"golden": str(path)}}


def _missing_params(what: str = "4 tensors") -> str:
    return rf"params: inference\.pdiparams is missing, the program wants {what}"


BROKEN: Mapping[str, Broken] = {
    # --- what Paddle loads without a word ---
    "params missing": Broken(models.without_params, _missing_params()),
    "last tensor cut by 4 bytes": Broken(
        models.cut_last_tensor,
        r"params: .* cut short: .* of 'linear_1\.w_0' needs 5120 bytes, 5116 left",
    ),
    "last tensor cut by half": Broken(
        models.half_last_tensor,
        r"params: .* cut short: .* of 'linear_1\.w_0' needs 5120 bytes, 2560 left",
    ),
    "NaN in a hidden layer": Broken(
        models.non_finite_weight, r"finite: weight 'linear_0\.w_0' \[64, 128\] holds .*NaN.*"
    ),
    "Inf in a hidden layer": Broken(
        lambda good, out: models.non_finite_weight(good, out, value=float("inf")),
        r"finite: weight 'linear_0\.w_0' \[64, 128\] holds .*[Ii]nf.*",
    ),
    "params of another architecture": Broken(
        models.of_another_architecture, r"params: inference\.pdiparams: tensor \d is .* wants .*"
    ),
    "the program of another net": Broken(
        _other_program, r"params: inference\.pdiparams: tensor \d is .* wants .*"
    ),
    "4 KB of zeros": Broken(
        models.zeroed_block, rf"golden: .*{OUTPUT}.*", spec=_golden
    ),
    "a flipped bit": Broken(models.flipped_bit, rf"golden: .*{OUTPUT}.*", spec=_golden),
    # --- what Paddle would refuse itself ---
    "the last tensor gone": Broken(models.cut_at_boundary, r"params: inference\.pdiparams: .*"),
    "a trailing byte": Broken(models.trailing_byte, r"params: inference\.pdiparams: .* 1 byte.*"),
    "another dtype": Broken(models.other_dtype, r"params: inference\.pdiparams: .*float64.*"),
    "half a program": Broken(models.broken_program, r"params: inference\.json: .*"),
    "empty params": Broken(_empty_params, r"params: inference\.pdiparams: .*"),
    # --- what the document itself says against it ---
    "a wrong digest": Broken(
        _same, r"digest: inference\.pdiparams is sha256 \w{64}, the document says 0{64}",
        {"sha256": {"inference.pdiparams": "0" * 64}},
    ),
    "the digest of a file that is not there": Broken(
        _same, r"digest: 'weights\.bin' is not a file of the model, .*",
        {"sha256": {"weights.bin": "0" * 64}},
    ),
    "a golden mismatch": Broken(
        _same, rf"golden: .*{OUTPUT}.*",
        spec=lambda good, bad: _golden(good, bad, off_by=0.5),
    ),
    "golden data of another output": Broken(
        _same, r"golden: .*nonsense.*",
        spec=lambda good, bad: _golden(good, bad, nonsense=np.zeros((2, 10), np.float32)),
    ),
    "golden data that is not there": Broken(
        _same, r".*nowhere\.npz.* does not exist",
        spec=lambda good, bad: {"warmup": {"golden": str(bad / "nowhere.npz")}},
    ),
    "a signature breach under strict": Broken(
        lambda good, out: make_mlp(out, features=32),
        r"signature: not strictly compatible with [12]: input 'x'.*",
        {"compatibility": "strict"},
    ),
    "one output more under strict": Broken(
        _two_outputs, r"signature: not strictly compatible with [12]: .*output.*",
        {"compatibility": "strict"},
    ),
    "a signature breach under loose": Broken(
        lambda good, out: make_mlp(out, classes=12),
        rf"signature: not loosely compatible with [12]: output '{OUTPUT}'.*",
        {"compatibility": "loose"},
    ),
    # --- sources that are no model ---
    "a source that does not exist": Broken(
        lambda good, out: out, r".*does not exist"
    ),
    "an empty folder": Broken(
        _empty_folder, r".*/bad: no program \(.*\) in the folder, only nothing"
    ),
    "a file as the folder": Broken(_a_file, r".*: Not a directory"),
    "a name longer than any": Broken(
        lambda good, out: out.with_name("x" * 300), r".*/x{300}: File name too long"
    ),
    "two programs": Broken(_two_programs, r".*/bad: more than one program in the folder: .*"),
    "a FIFO as params": Broken(_fifo("inference.pdiparams"), _missing_params()),
    "a FIFO as the program": Broken(_fifo("inference.json"), r".*/bad: no program .*"),
    "a folder as params": Broken(_folder_for_params, _missing_params()),
    "a link to nothing": Broken(_link("nowhere"), _missing_params()),
    "a link to itself": Broken(
        _link("inference.pdiparams"), r".*/bad: Too many levels of symbolic links"
    ),
    "a link to an endless device": Broken(_link("/dev/zero"), _missing_params()),
}  # fmt: skip


async def _old_serves_on(
    node: RunningNode, traffic: Traffic, before: Status, failed: Status, version: str
) -> None:
    """What SPEC section 8 says of an accepted document whose version cannot be made READY."""
    assert failed["accepted"] is True
    assert failed["error"] is None
    assert failed["applied_revision"] == before["applied_revision"]
    assert failed["live"] == before["live"]
    assert failed["intent"]["live"] == version
    assert failed["reason"] == f"{version} failed: {reason_of(failed, version)}"
    assert states_of(failed, before["live"]) == ["LIVE"]
    routes = (await node.get("/admin/routes")).json["models"][failed["model"]]
    assert routes["live"] == before["live"]
    assert routes["config_revision"] == before["applied_revision"]
    pinned = await node.infer(failed["model"], {"x": rows(1)}, version=version)
    assert pinned.status == 404
    assert reason_of(failed, version) in pinned.error
    assert "loaded versions: " in pinned.error
    await traffic.goes_on()
    assert (await node.get("/readyz")).status == 200


@pytest.mark.parametrize("case", BROKEN)
async def test_a_broken_version_is_refused_with_its_own_reason(
    node: RunningNode,
    traffic: Traffic,
    folders: Mapping[str, Path],
    tmp_path: Path,
    case: str,
) -> None:
    broken = BROKEN[case]
    before = await node.status("m")
    good = folders[before["live"]]
    bad = broken.make(good, tmp_path / "bad")
    entry = {"source": str(bad), **broken.entry}
    text = document("m", "bad", {**folders, "bad": entry}, **broken.spec(good, bad))
    failed = await node.failed("m", await node.put("m", text), "bad")
    assert re.fullmatch(broken.reason, reason_of(failed, "bad"), re.DOTALL)
    await _old_serves_on(node, traffic, before, failed, "bad")
    # A good document after it is applied, and the failure is forgotten.
    live = "2" if before["live"] == "1" else "1"
    status = await node.apply("m", document("m", live, folders))
    assert status["live"] == live
    assert states_of(status, "bad") == []
    await traffic.goes_on()


async def test_the_command_line_says_why(
    node: RunningNode, traffic: Traffic, folders: Mapping[str, Path], tmp_path: Path
) -> None:
    bad = models.cut_last_tensor(folders["1"], tmp_path / "bad")
    before = await node.status("m")
    file = tmp_path / "m.json"
    file.write_bytes(document("m", "bad", {**folders, "bad": bad}))
    applied = await _paddlewheel(node, "apply", "-f", str(file), "--wait", "--timeout", "20")
    assert applied.status == 1
    assert "needs 5120 bytes, 5116 left" in applied.said
    shown = await _paddlewheel(node, "status", "-o", "json")
    (model,) = [each for each in orjson.loads(shown.out)["models"] if each["model"] == "m"]
    assert model["converged"] is False
    assert model["intent"]["live"] == "bad"
    assert model["nodes"][0]["applied_revision"] == before["applied_revision"]
    file.write_bytes(document("m", "1", folders))
    applied = await _paddlewheel(node, "apply", "-f", str(file), "--wait", "--timeout", "20")
    assert applied.status == 0, applied.said
    shown = await _paddlewheel(node, "status", "-o", "json")
    (model,) = [each for each in orjson.loads(shown.out)["models"] if each["model"] == "m"]
    assert model["converged"] is True
    await traffic.goes_on()


@dataclass(frozen=True, slots=True)
class _Ran:
    status: int
    out: bytes
    said: str


async def _paddlewheel(node: RunningNode, *arguments: str) -> _Ran:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "paddlewheel", *arguments, "--etcd", ",".join(node.etcd.endpoints),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    out, err = await process.communicate()
    assert process.returncode is not None
    return _Ran(process.returncode, out, " ".join((out + err).decode().split()))


async def test_what_loose_and_none_let_through(
    node: RunningNode, traffic: Traffic, folders: Mapping[str, Path], tmp_path: Path
) -> None:
    """The counterpart of the refusals: what they must not refuse."""
    narrow, wide = _same(folders["1"], tmp_path / "1"), _two_outputs(folders["1"], tmp_path / "2")
    other = make_mlp(tmp_path / "3", features=32)
    await node.apply("fits", document("fits", "1", {"1": narrow}))
    loose = {"source": str(wide), "compatibility": "loose"}
    status = await node.apply("fits", document("fits", "2", {"2": loose}))
    assert status["live"] == "2"
    assert len((await node.infer("fits", {"x": rows(1)})).outputs()) == 2
    none = {"source": str(other), "compatibility": "none"}
    await node.apply("fits", document("fits", "3", {"3": none}))
    assert (await node.infer("fits", {"x": rows(1, 32)})).status == 200
    good = _golden(folders["2"], tmp_path / "4")
    await node.apply("fits", document("fits", "4", {"4": folders["2"]}, **good))
    digests = {path.name: sha256(path.read_bytes()).hexdigest() for path in folders["1"].iterdir()}
    right = {"source": str(folders["1"]), "sha256": digests}
    await node.apply("fits", document("fits", "5", {"5": right}))
    link = tmp_path / "link"
    link.symlink_to(folders["2"])
    linked = tmp_path / "linked"
    linked.mkdir()
    for name in ("inference.json", "inference.pdiparams"):
        (linked / name).symlink_to(folders["2"] / name)
    for version, folder in (("6", link), ("7", linked)):
        await node.apply("fits", document("fits", version, {version: folder}))
        await check_tag(node, "fits", 2.0)
    await gone(node, "fits")
    await traffic.goes_on()


async def check_tag(node: RunningNode, model: str, tag: float) -> None:
    """Whose weights answer, by the last column."""
    answer = await node.infer(model, {"x": rows(1)})
    assert answer.outputs()[OUTPUT][0, -1] == tag


async def gone(node: RunningNode, model: str) -> None:
    """Delete the document and wait until nothing of the model is left."""
    await node.delete(model)

    async def is_gone() -> bool:
        return (
            not await node.status(model) and (await node.infer(model, {"x": rows(1)})).status == 404
        )

    await eventually(is_gone, within_s=20, what=f"{model} gone")


# --- the worker that loads -----------------------------------------------------------------------


async def test_a_worker_killed_while_it_loads(
    node: RunningNode, traffic: Traffic, folders: Mapping[str, Path], tmp_path: Path
) -> None:
    third = make_mlp(tmp_path / "3", seed=3, tag=3)
    before, workers = await node.status("m"), node.worker_pids()
    revision = await node.put("m", document("m", "bad", {**folders, "bad": third}))
    os.kill(await node.next_worker(workers), signal.SIGKILL)
    failed = await node.failed("m", revision, "bad")
    assert re.fullmatch(r".*SIGKILL.*", reason_of(failed, "bad"))
    await _old_serves_on(node, traffic, before, failed, "bad")
    status = await node.apply("m", document("m", "1", folders))
    assert states_of(status, "bad") == []
    await traffic.goes_on()


async def test_a_killed_load_is_tried_again(node: RunningNode, tmp_path: Path) -> None:
    """Nothing is wrong with the version, so the node tries again by itself."""
    folder = make_mlp(tmp_path / "1", seed=1, tag=1)
    workers = node.worker_pids()
    revision = await node.put("again", document("again", "1", {"1": folder}))
    os.kill(await node.next_worker(workers), signal.SIGKILL)
    await node.failed("again", revision, "1")
    # Never loaded so far: known, but nothing to serve it with, and why.
    answer = await node.infer("again", {"x": rows(1)})
    assert answer.status == 503
    assert int(answer.headers["Retry-After"]) >= 1
    assert "again" in answer.error
    await node.applied("again", revision)
    await check_tag(node, "again", 1.0)
    await gone(node, "again")


async def test_a_newer_document_supersedes_a_load(
    node: RunningNode, traffic: Traffic, folders: Mapping[str, Path], tmp_path: Path
) -> None:
    """The half-loaded worker is ended, even one that hangs; its version is never routed to."""
    third = make_mlp(tmp_path / "3", seed=3, tag=3)
    workers = node.worker_pids()
    await node.put("m", document("m", "3", {**folders, "3": third}))
    half_loaded = await node.next_worker(workers)
    os.kill(half_loaded, signal.SIGSTOP)
    await node.until("m", lambda s: states_of(s, "3") == ["LOADING"], what="3 LOADING")
    pinned = await node.infer("m", {"x": rows(1)}, version="3")
    assert pinned.status == 404
    live = "2" if (await node.status("m"))["live"] == "1" else "1"
    status = await node.apply("m", document("m", live, folders))
    assert status["live"] == live
    assert states_of(status, "3") == []
    await eventually(lambda: not is_alive(half_loaded), within_s=5, what="half-loaded worker gone")
    await traffic.goes_on()


async def test_many_documents_in_a_row_end_at_the_last(
    node: RunningNode, traffic: Traffic, folders: Mapping[str, Path], tmp_path: Path
) -> None:
    before = len(node.worker_pids())
    extra = {str(n): make_mlp(tmp_path / str(n), seed=n, tag=n) for n in range(3, 9)}
    for live in extra:
        await node.put("m", document("m", live, {**folders, **extra}))
    status = await node.apply("m", document("m", "1", folders))
    assert status["live"] == "1"
    await eventually(lambda: len(node.worker_pids()) <= before, within_s=10, what="workers gone")
    await traffic.goes_on()


# --- bytes and identities ------------------------------------------------------------------------


def tags_judge(x: Any, *folders: Path) -> Verify:
    """The answer must be that of one of these folders, whatever version it names."""
    wanted = [outputs_of_version({"1": {OUTPUT: reference(folder, x)}}) for folder in folders]

    def verify(status: int, headers: Headers, body: bytes) -> str | None:
        verdicts = [judge(status, headers, body) for judge in wanted]
        return None if None in verdicts else verdicts[0]

    return verify


async def test_other_bytes_under_the_same_version(node: RunningNode, tmp_path: Path) -> None:
    """A servable is version and digest: new bytes are loaded beside the old ones and swapped."""
    source = make_mlp(tmp_path / "source", seed=20, tag=20)
    old = models.copy(source, tmp_path / "old")
    new = make_mlp(tmp_path / "new", seed=21, tag=21)
    text = document("same", "1", {"1": source})
    first = await node.apply("same", text)
    x = rows(2)
    headers, body = infer_body({"x": x}, binary=True)
    request = Request(
        "binary",
        http_request("POST", "/v2/models/same/infer", body, headers=headers),
        tags_judge(x, old, new),
    )
    async with traffic_to(node, [request]) as traffic:
        await check_tag(node, "same", 20.0)
        # The same document again: nothing to load.
        workers = node.worker_pids()
        await node.apply("same", text)
        assert node.worker_pids() == workers
        # Other bytes at the source do nothing until a document says so.
        for name in ("inference.json", "inference.pdiparams"):
            shutil.copyfile(new / name, source / name)
        await traffic.goes_on()
        await check_tag(node, "same", 20.0)
        second = await node.apply("same", text)
        await check_tag(node, "same", 21.0)
        assert digest_of(first, "LIVE") != digest_of(second, "LIVE")
        # Broken bytes under the same version: the good ones of that version serve on.
        models.params_path(source).write_bytes(b"nothing")
        revision = await node.put("same", text)
        failed = await node.failed("same", revision, "1")
        assert sorted(s for s in states_of(failed, "1") if s != "STANDBY") == ["FAILED", "LIVE"]
        assert failed["applied_revision"] == second["applied_revision"]
        assert digest_of(failed, "LIVE") == digest_of(second, "LIVE")
        assert reason_of(failed, "1").startswith("params: ")
        assert (await node.infer("same", {"x": x}, version="1")).status == 200
        await traffic.goes_on()
        # And by another source, back to the first bytes: they are still loaded.
        third = await node.apply("same", document("same", "1", {"1": old}))
        assert digest_of(third, "LIVE") == digest_of(first, "LIVE")
        await check_tag(node, "same", 20.0)
        await traffic.goes_on()
    await gone(node, "same")


def digest_of(status: Status, state: str) -> str:
    (digest,) = [s["digest"] for s in status["servables"] if s["state"] == state]
    return str(digest)


async def test_deleting_a_document_drains_and_then_404(node: RunningNode, tmp_path: Path) -> None:
    """Every request is answered: by the model, then (while it drains) 503, then 404 for ever."""
    folder = make_mlp(tmp_path / "1", seed=5, tag=5)
    before = node.worker_pids()
    await node.apply("brief", document("brief", "1", {"1": folder}))
    statuses: list[int] = []

    def verify(status: int, headers: Headers, body: bytes) -> str | None:
        statuses.append(status)
        drains = status == 503 and b"deleted" in body and "retry-after" in headers
        return None if status in (200, 404) or drains else f"status {status}: {body[:200]!r}"

    headers, body = infer_body({"x": rows(1)}, binary=True)
    data = http_request("POST", "/v2/models/brief/infer", body, headers=headers)
    async with traffic_to(node, [Request("binary", data, verify)], rate_per_s=150) as traffic:
        await traffic.goes_on()
        await gone(node, "brief")
        await traffic.goes_on()
    order = [(200, 503, 404).index(status) for status in statuses]
    assert order == sorted(order), "refused, and then answered again"
    assert {200, 404} <= set(statuses)
    await eventually(lambda: not node.worker_pids() - before, within_s=10, what="its worker ended")
    assert "brief" not in (await node.get("/admin/routes")).json["models"]
    assert (await node.get("/readyz")).status == 200


# --- a node with little: sources, memory, time ---------------------------------------------------


@dataclass(frozen=True, slots=True)
class Small:
    """A node that allows one folder, has little memory, and little patience."""

    node: RunningNode
    allowed: Path
    traffic: Traffic
    folders: Mapping[str, Path]


QUOTA_MB = 700
LOAD_TIMEOUT_S = 3


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def small(
    etcd: EtcdCluster, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Small]:
    root = tmp_path_factory.mktemp("small")
    allowed = root / "models"
    folders = {v: make_mlp(allowed / v, seed=int(v), tag=int(v)) for v in ("1", "2", "3")}
    flags = ("--allow-source", str(allowed), "--device", f"cpu,memoryMB={QUOTA_MB}")
    async with running_node(
        etcd, root / "node", *flags, "--load-timeout", str(LOAD_TIMEOUT_S), prefix="/small"
    ) as node:
        await node.apply("m", small_document("1", folders))
        async with traffic_to(node, mlp_requests("m", folders)) as traffic:
            yield Small(node, allowed, traffic, folders)


def small_document(live: str, folders: Mapping[str, Any], **spec: Any) -> bytes:
    return document("m", live, folders, **{"placement": {"memoryMB": 100}, **spec})


async def _refused(small: Small, text: bytes, path: str, message: str) -> None:
    """Not accepted, with this error; what was in force stays so, and a good one is applied."""
    before = await small.node.status("m")
    status = await small.node.refused("m", await small.node.put("m", text))
    assert re.fullmatch(message, status["errors"][0]["message"])
    assert status["errors"][0]["path"] == path
    line = status["errors"][0]["line"]
    assert path.rpartition(".")[2] in text.decode().splitlines()[line - 1]
    assert status["error"] == f"line {line}: {path}: {status['errors'][0]['message']}"
    assert status["applied_revision"] == before["applied_revision"]
    assert status["live"] == before["live"]
    assert {s["state"] for s in status["servables"]} <= {"LIVE", "STANDBY"}
    await small.traffic.goes_on()
    live = "2" if before["live"] == "1" else "1"
    assert (await small.node.apply("m", small_document(live, small.folders)))["accepted"] is True
    await small.traffic.goes_on()


async def test_a_source_outside_the_allowed_ones(small: Small, tmp_path: Path) -> None:
    outside = make_mlp(tmp_path / "3", seed=3, tag=3)
    beside = small.allowed.with_name("models-too")
    shutil.copytree(small.folders["1"], beside)
    for source in (
        str(outside),
        outside.as_uri(),
        str(beside),
        f"{small.allowed}/../models-too",
        f"{small.allowed}/1/../../models-too",
        "s3://bucket/models",
    ):
        text = small_document("1", {**small.folders, "3": {"source": source}})
        await _refused(
            small, text, "spec.versions[2].source",
            rf"'{re.escape(source)}' is under none of the allowed sources \(.*\)",
        )  # fmt: skip
    golden = _golden(small.folders["1"], tmp_path / "3")
    await _refused(
        small, small_document("1", small.folders, **golden), "spec.warmup.golden",
        r"'.*\.npz' is under none of the allowed sources \(.*\)",
    )  # fmt: skip


async def test_a_link_out_of_the_allowed_sources(small: Small, tmp_path: Path) -> None:
    outside = make_mlp(tmp_path / "3", seed=3, tag=3)
    links = small.allowed / "links"
    links.mkdir()
    for name in ("inference.json", "inference.pdiparams"):
        (links / name).symlink_to(outside / name)
    folder = small.allowed / "link"
    folder.symlink_to(outside)
    inside = small.allowed / "inside"
    inside.symlink_to(small.folders["2"])
    for source in (links, folder):
        before = await small.node.status("m")
        revision = await small.node.put("m", small_document("bad", {"bad": source}))
        failed = await small.node.failed("m", revision, "bad")
        assert "outside the allowed prefixes" in reason_of(failed, "bad")
        await _old_serves_on(small.node, small.traffic, before, failed, "bad")
    status = await small.node.apply("m", small_document("2", {"2": inside}))
    assert status["live"] == "2"
    await small.traffic.goes_on()


async def test_more_memory_than_the_quota(small: Small) -> None:
    """Refused before anything is allocated, with the numbers."""
    for placement, needed_mb in (
        ({"memoryMB": 5000}, 5000),
        ({"memoryMB": QUOTA_MB - 99}, QUOTA_MB - 99),
        ({"memoryMB": 100, "replicas": 7}, 700),
    ):
        text = small_document("3", small.folders, placement=placement)
        await _refused(
            small, text, "spec.placement.memoryMB",
            rf"needs {needed_mb} MB beside the 100 MB of what serves now; of the {QUOTA_MB} MB of "
            rf"cpu, 0 MB are other models', {QUOTA_MB - 100} MB are free",
        )  # fmt: skip
    await _refused(
        small, small_document("3", small.folders, placement={"device": "gpu:3"}),
        "spec.placement.device", r"this node has no device 'gpu:3', it has cpu",
    )  # fmt: skip


async def test_what_fits_once_the_standby_has_gone(small: Small) -> None:
    """Live and the next one fit, the standby with them does not: the standby yields."""
    await small.node.apply("m", small_document("1", small.folders))
    await small.node.apply("m", small_document("2", small.folders))
    text = small_document("3", small.folders, placement={"memoryMB": QUOTA_MB - 150})
    status = await small.node.apply("m", text)
    assert status["live"] == "3"
    (live,) = [s for s in status["servables"] if s["state"] == "LIVE"]
    assert live["memory_mb"] == QUOTA_MB - 150
    await small.traffic.goes_on()
    # And back: nothing is left of what it took.
    await small.node.apply("m", small_document("2", small.folders, rollback={"bake_s": 0}))
    await small.node.until("m", lambda s: len(s["servables"]) == 1, what="only the live one left")

    async def reserves_100_mb() -> bool:
        (device,) = (await small.node.registration())["devices"]
        return (device["memory_mb"], device["reserved_mb"]) == (QUOTA_MB, 100)

    await eventually(reserves_100_mb, within_s=10, what="the memory of what was unloaded is free")


async def test_a_load_that_hangs(small: Small) -> None:
    """Stopped in the middle of it; another model is loaded meanwhile."""
    fourth = make_mlp(small.allowed / "4", seed=4, tag=4)
    before, workers = await small.node.status("m"), small.node.worker_pids()
    revision = await small.node.put("m", small_document("bad", {**small.folders, "bad": fourth}))
    hung = await small.node.next_worker(workers)
    os.kill(hung, signal.SIGSTOP)
    other = document("other", "1", {"1": fourth}, placement={"memoryMB": 50})
    await small.node.apply("other", other, within_s=2.5)
    assert (await small.node.status("m"))["applied_revision"] == before["applied_revision"]
    assert is_alive(hung)
    failed = await small.node.failed("m", revision, "bad")
    assert reason_of(failed, "bad") == f"not ready within the load deadline of {LOAD_TIMEOUT_S} s"
    await eventually(lambda: not is_alive(hung), within_s=5, what="the hung worker ended")
    await _old_serves_on(small.node, small.traffic, before, failed, "bad")
    await gone(small.node, "other")
    live = "2" if before["live"] == "1" else "1"
    await small.node.apply("m", small_document(live, small.folders))
    await small.traffic.goes_on()


# --- starts --------------------------------------------------------------------------------------


async def test_a_node_that_starts_with_broken_documents(etcd: EtcdCluster, tmp_path: Path) -> None:
    """It serves what the others serve, the one before, with what it remembers and without."""
    good = make_mlp(tmp_path / "1", seed=1, tag=1)
    bad = models.cut_last_tensor(good, tmp_path / "2")
    async with running_node(etcd, tmp_path / "node", prefix="/start") as node:
        before = {
            model: await node.apply(model, document(model, "1", {"1": good}))
            for model in ("unreadable", "failing")
        }
        unreadable = await node.put("unreadable", "spec: {live: 1}\n")
        failing = await node.put("failing", document("failing", "2", {"1": good, "2": bad}))
        for cache in ("cache", "nothing-known"):
            await node.refused("unreadable", unreadable)
            await node.failed("failing", failing, "2")
            await node.stop()
            await node.start(cache=cache)
            for model in before:
                status = await node.until(
                    model,
                    lambda s: s["live"] == "1" and s["revision"] in (unreadable, failing),
                    what=f"{model}: the good version after a restart with {cache}",
                )
                await check_tag(node, model, 1.0)
                assert status["applied_revision"] == before[model]["applied_revision"]
                assert status["accepted"] is (model == "failing")
        third = make_mlp(tmp_path / "3", seed=3, tag=3)
        for model in before:
            await node.apply(model, document(model, "3", {"3": third}))
            await check_tag(node, model, 3.0)


# --- a real model --------------------------------------------------------------------------------


async def test_pp_ocr_recognition(node: RunningNode, tmp_path: Path) -> None:
    """PP-OCRv4: cut or with NaN it is refused, and reads on; rounded to bfloat16 it is good."""
    good = models.ocr_rec()
    versions = {
        "1": good,
        "cut": models.cut_last_tensor(good, tmp_path / "cut"),
        "nan": models.non_finite_weight(good, tmp_path / "nan"),
        "bf16": models.to_bfloat16(good, tmp_path / "bf16"),
    }
    spec = {"warmup": {"requests": 1, "shapes": {"x": [1, 3, 48, 320]}}}
    first = await node.apply("rec", document("rec", "1", versions, **spec), within_s=60)
    alphabet = ocr.read_alphabet(find_published().alphabet)
    inputs = {"x": ocr.rec_input(ocr.render("Paddlewheel"))}

    async def read(version: str) -> None:
        answer = await node.infer("rec", inputs)
        (scores,) = answer.outputs().values()
        assert ocr.decode_text(scores, alphabet).strip() == "Paddlewheel"
        assert answer.version == version

    await read("1")
    for version, reason in (("cut", r"params: .* cut short: .*"), ("nan", r"finite: weight .*")):
        revision = await node.put("rec", document("rec", version, versions, **spec))
        failed = await node.failed("rec", revision, version, within_s=60)
        assert re.fullmatch(reason, reason_of(failed, version))
        assert failed["applied_revision"] == first["applied_revision"]
        await read("1")
    # A worker killed in its first run, which takes the longest of all.
    workers = node.worker_pids()
    revision = await node.put("rec", document("rec", "bf16", versions, **spec))
    loading = await node.next_worker(workers)
    await node.until("rec", lambda s: states_of(s, "bf16") == ["WARMING"], what="bf16 WARMING")
    os.kill(loading, signal.SIGKILL)
    failed = await node.failed("rec", revision, "bf16")
    assert "SIGKILL" in reason_of(failed, "bf16")
    await read("1")
    await node.apply("rec", document("rec", "bf16", versions, **spec), within_s=60)
    await read("bf16")
    await node.delete("rec")
