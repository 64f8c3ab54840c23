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
from paddlewheel.demo import ocr
from paddlewheel.demo.models import find_published
from paddlewheel.models import make_mlp, make_two_output
from paddlewheel.models.pir import ProgramWriter
from tests import models
from tests.e2e.expected import check_tag, golden_for, gone, old_serves_on
from tests.e2e.running import (
    OUTPUT,
    RunningNode,
    document,
    reason_of,
    running_node,
    states_of,
)
from tests.e2e.traffic import Traffic, mlp_requests, rows, traffic_to
from tests.etcd import EtcdCluster, etcd_cluster

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
        models.zeroed_block, rf"golden: .*{OUTPUT}.*", spec=golden_for
    ),
    "a flipped bit": Broken(models.flipped_bit, rf"golden: .*{OUTPUT}.*", spec=golden_for),
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
        spec=lambda good, bad: golden_for(good, bad, off_by=0.5),
    ),
    "golden data of another output": Broken(
        _same, r"golden: .*nonsense.*",
        spec=lambda good, bad: golden_for(good, bad, nonsense=np.zeros((2, 10), np.float32)),
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
    await old_serves_on(node, traffic, before, failed, "bad")
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
    good = golden_for(folders["2"], tmp_path / "4")
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
