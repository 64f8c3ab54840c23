"""Golden inputs and outputs: the check that sees what no other does (two tensors swapped, bits
flipped in a weight, an activation changed)."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from loader.errors import NotAdmitted
from loader.finite import as_floats
from loader.recipe import Recipe
from registry.inference import Array, Signature, numpy_dtype

_MAX_BYTES = 1 << 30
"""Of all arrays together, unpacked."""


@dataclass(frozen=True, slots=True)
class Golden:
    inputs: Mapping[str, Array]
    outputs: Mapping[str, Array]
    """By name, or by position as text: ``"0"``."""


def load_golden(path: Path, signature: Signature | None = None) -> Golden:
    """Read an npz of arrays ``inputs/<name>`` and ``outputs/<name>`` or ``outputs/<position>``.

    With a ``signature`` the inputs are held against it: each there, of its dtype and rank.
    Raises `NotAdmitted` (golden) for anything that is not such a file. Nothing is unpickled.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(info.file_size for info in archive.infolist())
        if unpacked > _MAX_BYTES:
            raise NotAdmitted("golden", f"{path.name}: {unpacked} bytes unpacked, more than 1 GiB")
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: np.asarray(archive[name]) for name in archive.files}
    except FileNotFoundError as exc:
        raise NotAdmitted("golden", f"{path.name} is missing") from exc
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error,
            NotImplementedError, MemoryError, SyntaxError) as exc:  # fmt: skip
        raise NotAdmitted("golden", f"{path.name} is not a readable npz: {exc}") from exc
    inputs: dict[str, Array] = {}
    outputs: dict[str, Array] = {}
    for key, array in arrays.items():
        side, _, name = key.partition("/")
        if side not in ("inputs", "outputs") or not name:
            raise NotAdmitted(
                "golden", f"{path.name}: {key!r}, want inputs/<name> or outputs/<name>"
            )
        # A predictor reads C-contiguous memory; npz keeps Fortran order.
        (inputs if side == "inputs" else outputs)[name] = np.asarray(array, order="C")
    if not outputs:
        raise NotAdmitted("golden", f"{path.name}: no array outputs/<name>")
    if signature is not None:
        _fit_inputs(inputs, signature, path)
    return Golden(inputs, outputs)


def check_golden(golden: Golden, outputs: Mapping[str, Array], recipe: Recipe) -> None:
    """Hold ``outputs`` (in the program's order) against the golden ones.

    Floats may differ by ``atol + rtol * |golden|``, whatever the width of either; integers and
    booleans not at all. Outputs that the file does not have are not looked at.
    Raises `NotAdmitted` (golden) naming the output and its worst element.
    """
    by_position = list(outputs.values())
    for name, want in golden.outputs.items():
        got = outputs.get(name)
        if got is None and name.isdecimal() and int(name) < len(by_position):
            got = by_position[int(name)]
        if got is None:
            raise NotAdmitted("golden", f"no output {name!r}, the outputs are {list(outputs)}")
        _compare(name, got, want, recipe)


def _compare(name: str, got: Array, want: Array, recipe: Recipe) -> None:
    if got.shape != want.shape:
        raise NotAdmitted(
            "golden", f"output {name!r} is {list(got.shape)}, golden {list(want.shape)}"
        )
    left, right = as_floats(got), as_floats(want)
    if left is None or right is None:
        _compare_exactly(name, got, want)
        return
    error = np.abs(left - right)
    excess = error - (recipe.atol + recipe.rtol * np.abs(right))
    bad = ~(excess <= 0)  # a NaN on either side is bad
    if not bad.any():
        return
    worst = int(np.argmax(np.where(np.isnan(excess), np.inf, excess)))
    at = _index(worst, got.shape)
    raise NotAdmitted(
        "golden",
        f"output {name!r}{at} is {left.flat[worst]:.7g}, golden {right.flat[worst]:.7g} "
        f"(off by {error.flat[worst]:.3g}; rtol {recipe.rtol:g}, atol {recipe.atol:g}); "
        f"{int(bad.sum())} of {bad.size} elements differ",
    )


def _compare_exactly(name: str, got: Array, want: Array) -> None:
    if got.dtype != want.dtype:
        raise NotAdmitted("golden", f"output {name!r} is {got.dtype}, golden {want.dtype}")
    bad = np.asarray(got != want)
    if bad.any():
        worst = int(np.argmax(bad))
        raise NotAdmitted(
            "golden",
            f"output {name!r}{_index(worst, got.shape)} is {got.flat[worst]}, golden "
            f"{want.flat[worst]}; {int(bad.sum())} of {bad.size} elements differ",
        )


def _fit_inputs(inputs: Mapping[str, Array], signature: Signature, path: Path) -> None:
    for spec in signature.inputs:
        array = inputs.get(spec.name)
        if array is None:
            raise NotAdmitted("golden", f"{path.name}: no array inputs/{spec.name}")
        if array.dtype != numpy_dtype(spec.dtype):
            raise NotAdmitted(
                "golden", f"{path.name}: inputs/{spec.name} is {array.dtype}, want {spec.dtype}"
            )
        if len(array.shape) != len(spec.shape) or any(
            fixed not in (-1, dim) for fixed, dim in zip(spec.shape, array.shape, strict=True)
        ):
            raise NotAdmitted(
                "golden",
                f"{path.name}: inputs/{spec.name} is {list(array.shape)}, want {list(spec.shape)}",
            )
    for name in inputs:
        if signature.input(name) is None:
            raise NotAdmitted("golden", f"{path.name}: the program has no input {name!r}")


def _index(flat: int, shape: tuple[int, ...]) -> str:
    return str([int(axis) for axis in np.unravel_index(flat, shape)]) if shape else ""
