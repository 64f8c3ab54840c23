"""`paddlewheel inspect`: what is in a params file, without loading it and without Paddle."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from loader.errors import LoaderError
from loader.params import TensorEntry, list_tensors
from loader.program import Program, read_program
from paddlewheel.cli.options import OutputFormat, output_option
from paddlewheel.cli.output import cell, fail, print_json, print_table, say
from registry.errors import PaddlewheelError
from registry.inference import TensorSpec

_PROGRAM_SUFFIXES = (".json", ".pdmodel")
"""In the order in which a node prefers them."""
_FORMATS = {"pir": "PIR (.json)", "legacy": "legacy (.pdmodel)"}


class NotAModel(PaddlewheelError):
    """There is no params file at the path."""


@dataclass(frozen=True, slots=True)
class Inspected:
    """One params file and, where one is beside it, the program it belongs to."""

    params: Path
    program_path: Path | None
    program: Program | None
    tensors: tuple[TensorEntry, ...]
    """Named when there is a program that fits."""
    problem: str | None
    """Why the program, or the file itself, does not hold together."""

    def mismatches(self) -> dict[int, str]:
        """For each tensor that is not what the program wants, what it wants."""
        if self.program is None or self.problem is not None:
            return {}
        found: dict[int, str] = {}
        for entry, wanted in zip(self.tensors, self.program.persistables, strict=True):
            # -1 where a legacy program does not say.
            fits = len(entry.dims) == len(wanted.dims) and all(
                want in (-1, have) for have, want in zip(entry.dims, wanted.dims, strict=True)
            )
            if not fits or entry.dtype != wanted.dtype:
                found[entry.index] = f"{wanted.dtype} {_dims(wanted.dims)}"
        return found


def look(path: Path) -> Inspected:
    """Read the headers of a params file, or of the one in a folder.

    Raises `NotAModel`, or `LoaderError` where the params file breaks off before its first tensor
    can be listed.
    """
    params = _params_file(path)
    program_path = next(
        (
            beside
            for suffix in _PROGRAM_SUFFIXES
            if (beside := params.with_suffix(suffix)).is_file()
        ),
        None,
    )
    program, problem = None, None
    if program_path is not None:
        try:
            program = read_program(program_path)
        except (LoaderError, OSError) as exc:
            problem = str(exc)
    if program is not None:
        try:
            names = [persistable.name for persistable in program.persistables]
            return Inspected(
                params, program_path, program, tuple(list_tensors(params, names)), None
            )
        except LoaderError as exc:
            problem = str(exc)
    try:
        tensors = tuple(list_tensors(params))
    except LoaderError as exc:
        tensors, problem = (), problem or str(exc)
    return Inspected(params, program_path, program, tensors, problem)


def _params_file(path: Path) -> Path:
    if path.is_dir():
        found = sorted(path.glob("*.pdiparams"))
        if len(found) != 1:
            names = ", ".join(each.name for each in found) or "none"
            raise NotAModel(f"{path}: want one .pdiparams file in the folder, found {names}")
        return found[0]
    if path.suffix in _PROGRAM_SUFFIXES:
        params = path.with_suffix(".pdiparams")
        if not params.is_file():
            raise NotAModel(f"{path}: there is no {params.name} beside it")
        return params
    return path


def _dims(dims: tuple[int, ...]) -> str:
    return "[" + ", ".join(map(str, dims)) + "]"


@click.command()
@click.argument("path", type=click.Path(exists=True, path_type=Path))
@output_option
def inspect(path: Path, output: OutputFormat) -> None:
    """List a params file's tensors without loading it.

    PATH is a .pdiparams file, the program beside it, or a model folder. Names come from the
    program (.json or .pdmodel) of the same name beside the file; without one the tensors are
    listed by position. Exits with 1 when the file is broken or is not what its program wants.
    """
    seen = look(path)
    mismatches = seen.mismatches()
    if output == "json":
        print_json(_as_json(seen, mismatches))
    else:
        _print(seen, mismatches)
    if seen.problem is not None:
        fail(seen.problem)
    if mismatches:
        fail(f"{len(mismatches)} tensors are not what the program wants")


def _as_json(seen: Inspected, mismatches: dict[int, str]) -> dict[str, Any]:
    program = seen.program
    return {
        "params": str(seen.params),
        "size_bytes": seen.params.stat().st_size,
        "program": None if seen.program_path is None else str(seen.program_path),
        "format": None if program is None else program.format,
        "op_count": None if program is None else program.op_count,
        "inputs": [] if program is None else [_tensor(t) for t in program.signature.inputs],
        "outputs": [] if program is None else [_tensor(t) for t in program.signature.outputs],
        "problem": seen.problem,
        "tensors": [
            {
                "index": entry.index,
                "name": entry.name,
                "dtype": entry.dtype,
                "dims": list(entry.dims),
                "offset_bytes": entry.offset,
                "size_bytes": entry.nbytes,
                "program_wants": mismatches.get(entry.index),
            }
            for entry in seen.tensors
        ],
    }


def _print(seen: Inspected, mismatches: dict[int, str]) -> None:
    rows = []
    for entry in seen.tensors:
        wanted = mismatches.get(entry.index)
        row = [
            entry.index,
            entry.name,
            entry.dtype,
            _dims(entry.dims),
            f"{entry.nbytes:,}",
            f"{entry.offset:,}",
        ]
        rows.append([*row, cell(f"program wants {wanted}", "red")] if wanted else [*row, cell(" ")])
    print_table(["#", "NAME", "DTYPE", "DIMS", "BYTES", "AT BYTE", ""], rows, empty="no tensors")
    program = seen.program
    if seen.problem is not None and not rows:
        return
    data_bytes = sum(entry.nbytes for entry in seen.tensors)
    say(f"{seen.params}: {len(seen.tensors)} tensors, {data_bytes:,} bytes of data")
    if program is None:
        if seen.program_path is None:
            say("no program beside it: names are not known")
        return
    say(f"{seen.program_path}: {_FORMATS[program.format]}, {program.op_count} operators")
    for what, tensors in (
        ("input", program.signature.inputs),
        ("output", program.signature.outputs),
    ):
        for tensor in tensors:
            say(f"  {what} {tensor.name}: {tensor.dtype} {_dims(tuple(tensor.shape))}")


def _tensor(tensor: TensorSpec) -> dict[str, Any]:
    return {"name": tensor.name, "dtype": tensor.dtype, "shape": list(tensor.shape)}
