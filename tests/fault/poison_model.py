"""A real model that a real input kills: the remainder of the smallest int64 by -1.

Paddle's kernel guards against a zero divisor and leaves this one to the processor, whose ``idiv``
traps on the overflow: SIGFPE, every time, on x86_64 (Intel SDM, vol. 2, IDIV: #DE).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from loader.params import write_params
from paddlewheel.models.pir import ProgramWriter
from registry.inference import Array

WIDTH = 4
SMALLEST = np.iinfo(np.int64).min


class _Writer(ProgramWriter):
    def integers(self, kind: str, left: int, right: int, dims: Sequence[int]) -> int:
        return self._operator(kind, [left, right], [], "int64", dims)


def make_remainder(folder: Path, tag: int) -> Path:
    """``a, b: int64 (batch, 4)`` to ``a mod b + tag: int64 (batch, 4)``."""
    folder.mkdir(parents=True)
    program, dims = _Writer(), (-1, WIDTH)
    bias = program.parameter("bias_0", [WIDTH], "int64")
    a, b = program.data("a", dims, "int64"), program.data("b", dims, "int64")
    rest = program.integers("1.remainder", a, b, dims)
    program.fetch(program.integers("1.add", rest, bias, dims))
    program.save(folder / "inference.json")
    write_params(folder / "inference.pdiparams", {"bias_0": np.full(WIDTH, tag, np.int64)})
    return folder


def feeds(seed: int, *, deadly: bool = False) -> dict[str, Array]:
    """Good for one request, the same for the same seed; a deadly one differs in two numbers."""
    rng = np.random.default_rng(seed)
    a = rng.integers(-1000, 1000, (2, WIDTH), np.int64)
    b = rng.integers(1, 100, (2, WIDTH), np.int64)
    if deadly:
        a[1, 2], b[1, 2] = SMALLEST, -1
    return {"a": a, "b": b}


def remainder(given: dict[str, Array], tag: int) -> Array:
    """What the model should answer; Paddle's remainder has the divisor's sign, as numpy's has."""
    return np.remainder(given["a"], given["b"]) + tag
