"""Paddle 2's program: a ``ProgramDesc`` message in a ``.pdmodel``.

Field numbers from Paddle's framework.proto. What is persistable is decided as
``AnalysisPredictor::LoadParameters`` does it: variables of the first block that are marked so and
are not feed, fetch or raw.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from loader import protobuf
from loader.program import Persistable, Program, ProgramError, in_file_order
from loader.tensor_desc import TensorDesc, parse_tensor_desc
from registry.inference import DTYPES, Signature, TensorSpec

_DENSE_TENSOR = 7
_FEED, _FETCH, _READER, _RAW = 9, 10, 15, 17


@dataclass(slots=True)
class _Variable:
    name: str = ""
    kind: int = 0
    desc: TensorDesc | None = None
    is_persistable: bool = False


@dataclass(slots=True)
class _Operator:
    kind: str = ""
    inputs: dict[str, list[str]] = field(default_factory=dict[str, list[str]])
    outputs: dict[str, list[str]] = field(default_factory=dict[str, list[str]])
    column: int = 0


def parse_legacy(data: bytes, path: Path) -> Program:
    """Raises `ProgramError` naming the variable or operator."""
    try:
        # All of it is read: a file cut behind the blocks is a broken one too.
        everything = list(protobuf.fields(memoryview(data)))
        blocks = [protobuf.submessage(value) for number, value in everything if number == 1]
        if blocks:  # the first is the global one
            return _program(blocks[0], path)
    except protobuf.WireError as exc:
        raise ProgramError(path, where="", reason=f"not a program: {exc}") from exc
    raise ProgramError(path, where="", reason="not a program: no block")


def _program(block: protobuf.Buffer, path: Path) -> Program:
    variables: dict[str, _Variable] = {}
    feeds: list[_Operator] = []
    fetches: list[_Operator] = []
    op_count = 0
    for number, value in protobuf.fields(block):
        if number == 3:
            variable = _variable(protobuf.submessage(value), path)
            variables[variable.name] = variable
        elif number == 4:
            op_count += 1
            operator = _operator(protobuf.submessage(value))
            if operator.kind == "feed":
                feeds.append(operator)
            elif operator.kind == "fetch":
                fetches.append(operator)
    if not fetches:
        raise ProgramError(path, where="", reason="the program returns nothing: no fetch operator")
    feeds.sort(key=lambda operator: operator.column)
    fetches.sort(key=lambda operator: operator.column)
    signature = Signature(
        tuple(_spec(one.outputs.get("Out", []), variables, "feed", path) for one in feeds),
        tuple(_spec(one.inputs.get("X", []), variables, "fetch", path) for one in fetches),
    )
    wanted = [_persistable(one, path) for one in variables.values() if _is_loaded(one)]
    return Program("legacy", in_file_order(wanted, path), signature, op_count)


def _is_loaded(variable: _Variable) -> bool:
    return variable.is_persistable and variable.kind not in (_FEED, _FETCH, _READER, _RAW)


def _persistable(variable: _Variable, path: Path) -> Persistable:
    if variable.kind != _DENSE_TENSOR or variable.desc is None:
        raise ProgramError(
            path, where=variable.name, reason=f"a parameter of kind {variable.kind}, not a tensor"
        )
    return Persistable(variable.name, variable.desc.dtype, variable.desc.dims)


def _spec(
    names: list[str], variables: Mapping[str, _Variable], kind: str, path: Path
) -> TensorSpec:
    if len(names) != 1:
        raise ProgramError(path, where=kind, reason=f"want one variable, got {names}")
    variable = variables.get(names[0])
    if variable is None or variable.desc is None:
        raise ProgramError(path, where=names[0], reason=f"{kind} of a variable that is no tensor")
    desc = variable.desc
    if desc.dtype not in DTYPES:
        raise ProgramError(
            path, where=names[0], reason=f"is {desc.dtype}, which no request can carry"
        )
    return TensorSpec(names[0], desc.dtype, tuple(max(dim, -1) for dim in desc.dims))


def _variable(message: protobuf.Buffer, path: Path) -> _Variable:
    found = _Variable()
    for number, value in protobuf.fields(message):
        if number == 1:
            found.name = protobuf.text(value)
        elif number == 2:
            for inner, content in protobuf.fields(protobuf.submessage(value)):
                if inner == 1:
                    found.kind = protobuf.number(content)
                elif inner == 3:  # dense_tensor
                    found.desc = _dense_tensor(protobuf.submessage(content), found.name, path)
        elif number == 3:
            found.is_persistable = bool(protobuf.number(value))
    return found


def _dense_tensor(message: protobuf.Buffer, name: str, path: Path) -> TensorDesc | None:
    for number, value in protobuf.fields(message):
        if number == 1:
            try:
                return parse_tensor_desc(protobuf.submessage(value))
            except protobuf.WireError as exc:
                raise ProgramError(path, where=name, reason=exc.reason) from exc
    return None


def _operator(message: protobuf.Buffer) -> _Operator:
    found = _Operator()
    for number, value in protobuf.fields(message):
        if number == 1:
            _slot(protobuf.submessage(value), found.inputs)
        elif number == 2:
            _slot(protobuf.submessage(value), found.outputs)
        elif number == 3:
            found.kind = protobuf.text(value)
        elif number == 4:
            name, integer = _attribute(protobuf.submessage(value))
            if name == "col":
                found.column = integer
    return found


def _slot(message: protobuf.Buffer, into: dict[str, list[str]]) -> None:
    parameter, arguments = "", list[str]()
    for number, value in protobuf.fields(message):
        if number == 1:
            parameter = protobuf.text(value)
        elif number == 2:
            arguments.append(protobuf.text(value))
    into[parameter] = arguments


def _attribute(message: protobuf.Buffer) -> tuple[str, int]:
    name, integer = "", 0
    for number, value in protobuf.fields(message):
        if number == 1:
            name = protobuf.text(value)
        elif number == 3:
            integer = protobuf.signed(protobuf.number(value))
    return name, integer
