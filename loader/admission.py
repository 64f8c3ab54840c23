"""The checks a servable passes before READY. Each raises `NotAdmitted` with its own reason.

They run inside the worker process, in the order of `CHECKS`; "signature" is
`loader.compatibility` and "memory" `loader.memory`, both decided by the front. Why each of them:
Paddle loads all of these broken files without a word (docs/decisions/0006).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from loader.errors import NotAdmitted
from loader.finite import find_non_finite
from loader.golden import Golden, check_golden, load_golden
from loader.model_files import ModelFiles, NoSuchModel, choose_in, digest_breach, file_sha256
from loader.params import ParamsError, ParamsFile, TensorEntry, scan_tensors
from loader.program import Persistable, Program, ProgramError, read_program
from loader.warmup import warmup_feeds
from registry.inference import Array

__all__ = [
    "CHECKS", "Golden", "check_digest", "check_finite", "check_golden", "check_outputs_finite",
    "check_params", "load_golden", "warmup_feeds",
]  # fmt: skip

CHECKS = ("digest", "params", "finite", "signature", "memory", "warmup", "golden")
"""In the order in which they are made."""


def check_digest(folder: Path, sha256: Mapping[str, str]) -> None:
    """Hold the model's files against the digests of the document, where it gives any."""
    if not sha256:
        return
    try:
        found = {
            name: file_sha256(folder / name) if name in sha256 else ""
            for name in choose_in(folder).names()
        }
    except (NoSuchModel, OSError) as exc:
        raise NotAdmitted("digest", str(exc)) from exc
    reason = digest_breach(found, sha256)
    if reason is not None:
        raise NotAdmitted("digest", reason)


def check_params(folder: Path) -> Program:
    """Read program and params whole and hold them against each other.

    Every tensor that the program wants is there, in order, with its dtype and dims; none is cut,
    no byte is left over. Returns the program.
    """
    try:
        files = choose_in(folder)
        program = read_program(folder / files.program)
        _match(folder, files, program)
    except (NoSuchModel, ProgramError, ParamsError, OSError) as exc:
        raise NotAdmitted("params", str(exc)) from exc
    return program


def check_finite(folder: Path, program: Program) -> None:
    """No NaN and no Inf in any floating weight (a ReLU can hide them from the outputs)."""
    files = choose_in(folder)
    if files.params is None:
        return
    weights = ParamsFile.open(folder / files.params, [one.name for one in program.persistables])
    for entry in weights.entries:
        if entry.dtype.startswith(("float", "bfloat", "complex")):
            found = find_non_finite(weights.view(entry))
            if found is not None:
                raise NotAdmitted(
                    "finite", f"weight {entry.name!r} {list(entry.dims)} holds {found}"
                )


def check_outputs_finite(outputs: Mapping[str, Array]) -> None:
    """No NaN and no Inf in what a warm-up run returned."""
    for name, array in outputs.items():
        found = find_non_finite(array)
        if found is not None:
            raise NotAdmitted("warmup", f"output {name!r} {list(array.shape)} holds {found}")


def _match(folder: Path, files: ModelFiles, program: Program) -> None:
    wanted = program.persistables
    if files.params is None:
        if wanted:
            raise NotAdmitted(
                "params",
                f"{files.wanted_params} is missing, the program wants {len(wanted)} tensors",
            )
        return
    # Held against the program one by one: of another architecture the first tensor that differs
    # says more than the bytes left over at the end.
    for entry in scan_tensors(folder / files.params, [one.name for one in wanted]):
        _match_one(files.params, entry, wanted[entry.index])


def _match_one(file: str, entry: TensorEntry, wanted: Persistable) -> None:
    fits = len(entry.dims) == len(wanted.dims) and all(
        want in (-1, dim) for want, dim in zip(wanted.dims, entry.dims, strict=True)
    )
    if entry.dtype != wanted.dtype or not fits:
        raise NotAdmitted(
            "params",
            f"{file}: tensor {entry.index} is {entry.dtype} {list(entry.dims)}, the program wants "
            f"{wanted.name!r} {wanted.dtype} {list(wanted.dims)}",
        )
