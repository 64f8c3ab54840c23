"""Paddle 3's program: PIR as JSON.

Shape of the file (paddle/fluid/pir/serialize_deserialize): ``program.regions[0].blocks[0].ops``,
each op ``{"#": kind, "A": attributes, "I": operands, "O": results}``; a parameter is the short form
``{"#": "p", "A": [.., .., .., name], "O": result}``. Dialects are numbered: ``0.`` builtin, ``1.``
the operators.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import orjson

from loader.program import Persistable, Program, ProgramError, in_file_order
from loader.tensor_desc import MAX_RANK, TensorDesc
from registry.inference import DTYPES, Signature, TensorSpec

_DTYPE_OF_TYPE: Mapping[str, str] = {
    "t_bool": "bool", "t_i8": "int8", "t_ui8": "uint8", "t_i16": "int16", "t_i32": "int32",
    "t_i64": "int64", "t_f16": "float16", "t_bf16": "bfloat16", "t_f32": "float32",
    "t_f64": "float64", "t_c64": "complex64", "t_c128": "complex128",
}  # fmt: skip

_Json = Mapping[str, Any]


def parse_pir(data: bytes, path: Path) -> Program:
    """Raises `ProgramError` naming the place, such as ``ops[3].O``."""
    try:
        document = orjson.loads(data)
    except orjson.JSONDecodeError as exc:
        raise ProgramError(path, where=f"line {exc.lineno}", reason=f"not JSON: {exc.msg}") from exc
    except RecursionError as exc:
        raise ProgramError(path, where="", reason="nested too deep") from exc
    return _Reader(path).program(document)


class _Reader:
    """Walks the top block once. Every look-up that fails says where."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def program(self, document: Any) -> Program:
        magic = self._get(self._dict(document, ""), "base_code", "")
        if self._get(self._dict(magic, "base_code"), "magic", "base_code") != "pir":
            raise self._error("base_code.magic", "want 'pir'")
        ops = self._ops(document)
        wanted: list[Persistable] = []
        inputs: list[TensorSpec] = []
        outputs: list[tuple[int, TensorSpec]] = []
        for index, op in enumerate(ops):
            where = f"ops[{index}]"
            kind = self._text(self._get(self._dict(op, where), "#", where), f"{where}.#")
            match kind.split(".", 1)[-1]:
                case "p":
                    wanted.append(self._parameter(op, where))
                case "data" | "feed":
                    inputs.append(self._spec(op, where))
                case "fetch":
                    column = self._attribute(op, "col", where)
                    outputs.append((self._int(column, where), self._spec(op, where)))
                case _:
                    pass
        if not outputs:
            raise self._error("", "the program returns nothing: no fetch operator")
        self._distinct([spec.name for spec in inputs], "inputs")
        outputs.sort(key=lambda pair: pair[0])
        self._distinct([spec.name for _, spec in outputs], "outputs")
        signature = Signature(tuple(inputs), tuple(spec for _, spec in outputs))
        return Program("pir", in_file_order(wanted, self._path), signature, len(ops))

    def _ops(self, document: _Json) -> Sequence[Any]:
        program = self._dict(self._get(document, "program", ""), "program")
        region = self._first(program, "regions", "program")
        block = self._first(region, "blocks", "program.regions[0]")
        return self._list(self._get(block, "ops", "program.regions[0].blocks[0]"), "ops")

    def _parameter(self, op: _Json, where: str) -> Persistable:
        attributes = self._list(self._get(op, "A", where), f"{where}.A")
        name = self._text(attributes[-1] if attributes else None, f"{where}.A[-1]")
        desc = self._result(op, where)
        if any(dim < 0 for dim in desc.dims):
            raise self._error(f"{where}.O", f"parameter {name!r} has dims {list(desc.dims)}")
        return Persistable(name, desc.dtype, desc.dims)

    def _spec(self, op: _Json, where: str) -> TensorSpec:
        name = self._text(self._attribute(op, "name", where), f"{where}.name")
        desc = self._result(op, where)
        if desc.dtype not in DTYPES:
            raise self._error(where, f"{name!r} is {desc.dtype}, which no request can carry")
        return TensorSpec(name, desc.dtype, desc.dims)

    def _attribute(self, op: _Json, wanted: str, where: str) -> Any:
        for at, entry in enumerate(self._list(self._get(op, "A", where), f"{where}.A")):
            attribute = self._dict(entry, f"{where}.A[{at}]")
            if attribute.get("N") == wanted:
                return self._dict(attribute.get("AT"), f"{where}.A[{at}].AT").get("D")
        raise self._error(where, f"no attribute {wanted!r}")

    def _result(self, op: _Json, where: str) -> TensorDesc:
        results = self._get(op, "O", where)
        if isinstance(results, list):
            several = cast("Sequence[Any]", results)
            if len(several) != 1:
                raise self._error(f"{where}.O", "want one result")
            results = several[0]
        place = f"{where}.O.TT"
        kind = self._dict(self._get(self._dict(results, f"{where}.O"), "TT", where), place)
        name = self._text(kind.get("#"), f"{place}.#")
        if name.split(".", 1)[-1] != "t_dtensor":
            raise self._error(place, f"a {name}, want a dense tensor")
        parts = self._list(kind.get("D"), f"{place}.D")
        if len(parts) < 2:
            raise self._error(f"{place}.D", "want an element type and dims")
        element = self._text(self._dict(parts[0], f"{place}.D[0]").get("#"), f"{place}.D[0].#")
        dtype = _DTYPE_OF_TYPE.get(element.split(".", 1)[-1])
        if dtype is None:
            raise self._error(f"{place}.D[0]", f"unknown element type {element!r}")
        dims = tuple(
            self._dim(dim, f"{place}.D[1]") for dim in self._list(parts[1], f"{place}.D[1]")
        )
        if len(dims) > MAX_RANK:
            raise self._error(f"{place}.D[1]", f"{len(dims)} dims, more than {MAX_RANK}")
        return TensorDesc(dtype, dims)

    def _distinct(self, names: list[str], what: str) -> None:
        if len(set(names)) < len(names):
            raise self._error(what, f"a name is there twice: {names}")

    # --- look-ups -----------------------------------------------------------------------------

    def _get(self, mapping: _Json, key: str, where: str) -> Any:
        try:
            return mapping[key]
        except KeyError as exc:
            raise self._error(where, f"no {key!r}") from exc

    def _first(self, mapping: _Json, key: str, where: str) -> _Json:
        found = self._list(self._get(mapping, key, where), f"{where}.{key}")
        if not found:
            raise self._error(f"{where}.{key}", "is empty")
        return self._dict(found[0], f"{where}.{key}[0]")

    def _dict(self, value: Any, where: str) -> _Json:
        if not isinstance(value, dict):
            raise self._error(where, f"want an object, got {_kind(value)}")
        return cast("_Json", value)

    def _list(self, value: Any, where: str) -> Sequence[Any]:
        if not isinstance(value, list):
            raise self._error(where, f"want a list, got {_kind(value)}")
        return cast("Sequence[Any]", value)

    def _text(self, value: Any, where: str) -> str:
        if not isinstance(value, str):
            raise self._error(where, f"want text, got {_kind(value)}")
        return value

    def _int(self, value: Any, where: str) -> int:
        if not isinstance(value, int) or isinstance(value, bool):
            raise self._error(where, f"want a whole number, got {_kind(value)}")
        return value

    def _dim(self, value: Any, where: str) -> int:
        dim = self._int(value, where)
        if not -1 <= dim < 1 << 48:
            raise self._error(where, f"a dim of {dim}")
        return dim

    def _error(self, where: str, reason: str) -> ProgramError:
        return ProgramError(self._path, where=where, reason=reason)


def _kind(value: Any) -> str:
    return "nothing" if value is None else type(value).__name__
