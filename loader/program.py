"""A program file read without Paddle: what it wants from the params file, accepts and returns.

`read_program` knows both formats; `loader.program_pir` and `loader.program_legacy` read them.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from loader.errors import LoaderError
from registry.inference import Signature

MAX_PROGRAM_BYTES = 256 << 20
"""Far above any real program (ResNet50: 0.2 MB); a file beyond it is not one."""


class ProgramError(LoaderError):
    """The file is not a program that we, or Paddle, could run. ``where`` is a place inside it."""

    def __init__(self, path: Path | str, *, where: str, reason: str) -> None:
        name = Path(path).name
        super().__init__(f"{name}: {where}: {reason}" if where else f"{name}: {reason}")
        self.where = where
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Persistable:
    """A tensor that the program takes from the params file."""

    name: str
    dtype: str
    """A value of `loader.tensor_desc.DTYPE_OF_CODE`."""
    dims: tuple[int, ...]
    """-1 where the program does not say (legacy programs may)."""


@dataclass(frozen=True, slots=True)
class Program:
    format: Literal["pir", "legacy"]
    persistables: tuple[Persistable, ...]
    """Sorted by the bytes of their names: the order of the params file."""
    signature: Signature
    """In the order in which Paddle's predictor names its inputs and outputs."""
    op_count: int = 0


def read_program(path: Path | str) -> Program:
    """Read a PIR ``.json`` or a legacy ``.pdmodel``, told apart by content.

    Raises `ProgramError`; `OSError` when the file can't be read. Needs memory of about 20 times
    the file's size for a moment.
    """
    # Imported here: both readers build on this module's types.
    from loader.program_legacy import parse_legacy
    from loader.program_pir import parse_pir

    where = Path(path)
    if where.stat().st_size > MAX_PROGRAM_BYTES:
        raise ProgramError(where, where="", reason=f"more than {MAX_PROGRAM_BYTES} bytes")
    data = where.read_bytes()
    if data.lstrip()[:1] == b"{":
        return parse_pir(data, where)
    return parse_legacy(data, where)


def in_file_order(wanted: list[Persistable], path: Path | str) -> tuple[Persistable, ...]:
    """Sort by name as Paddle does (``std::sort`` over bytes). Raises for a name that is twice."""
    ordered = sorted(wanted, key=lambda one: one.name.encode())
    for left, right in itertools.pairwise(ordered):
        if left.name == right.name:
            raise ProgramError(path, where=left.name, reason="two parameters of this name")
    return tuple(ordered)
