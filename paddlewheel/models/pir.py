"""Write Paddle 3 programs (PIR as JSON) without Paddle, as paddle 3.3.1 itself would save them.

Only the operators that the small models here are made of. Each method returns the number of the
value it makes; operands are such numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import orjson

_TYPE_OF_DTYPE: Mapping[str, str] = {
    "bool": "0.t_bool", "int8": "0.t_i8", "uint8": "0.t_ui8", "int16": "0.t_i16",
    "int32": "0.t_i32", "int64": "0.t_i64", "float16": "0.t_f16", "bfloat16": "0.t_bf16",
    "float32": "0.t_f32", "float64": "0.t_f64",
}  # fmt: skip

_Json = dict[str, Any]


class ProgramWriter:
    """One block of operators, in the order of the calls."""

    def __init__(self) -> None:
        self._ops: list[_Json] = []
        self._types: list[_Json] = []
        self._dims: list[tuple[int, ...]] = []
        self._fetched = 0

    def parameter(self, name: str, dims: Sequence[int], dtype: str = "float32") -> int:
        """A tensor of the params file. All parameters come before anything else."""
        value = self._value(dtype, dims)
        self._ops.append(
            {"#": "p", "A": [0, 1, 1, name], "DA": [], "O": self._ref(value, typed=True),
             "OA": [1, 0, 1], "QA": []}
        )  # fmt: skip
        return value

    def data(self, name: str, dims: Sequence[int], dtype: str = "float32") -> int:
        """An input; -1 for a dim that varies."""
        attributes = [
            _text("name", name), _attribute("shape", "1.a_intarray", list(dims)),
            _attribute("dtype", "1.a_dtype", dtype), _attribute("place", "1.a_place", [0, 0, ""]),
        ]  # fmt: skip
        return self._operator("1.data", [], attributes, dtype, dims)

    def matmul(self, left: int, right: int) -> int:
        attributes = [_flag("transpose_x", False), _flag("transpose_y", False)]
        dims = (*self._dims[left][:-1], self._dims[right][-1])
        return self._operator("1.matmul", [left, right], attributes, "float32", dims)

    def add(self, left: int, right: int) -> int:
        """``right`` is broadcast over the leading dims of ``left``."""
        return self._operator("1.add", [left, right], [], "float32", self._dims[left])

    def relu(self, value: int) -> int:
        return self._operator("1.relu", [value], [], "float32", self._dims[value])

    def embedding(self, ids: int, table: int) -> int:
        attributes = [_attribute("padding_idx", "0.a_i64", -1), _flag("sparse", False)]
        dims = (*self._dims[ids], self._dims[table][-1])
        return self._operator("1.embedding", [ids, table], attributes, "float32", dims)

    def mean(self, value: int, axis: int) -> int:
        axes = self._int_array([axis])
        dims = self._dims[value][:axis] + self._dims[value][axis + 1 :]
        return self._operator("1.mean", [value, axes], [_flag("keepdim", False)], "float32", dims)

    def concat(self, values: Sequence[int]) -> int:
        """Along the last of two axes."""
        axis = self._scalar(1.0, "int32")
        combined = len(self._types)
        kind = {"#": "0.t_vec", "D": [self._types[value] for value in values]}
        self._types.append(kind)
        self._dims.append(())
        self._append("0.combine", values, [], combined)
        dims = (self._dims[values[0]][0], sum(self._dims[value][-1] for value in values))
        return self._operator("1.concat", [combined, axis], [], "float32", dims)

    def argmax(self, value: int) -> int:
        """The position of the largest along the last axis, int64."""
        axis = self._scalar(-1.0, "int64")
        attributes = [
            _flag("keepdims", False), _flag("flatten", False),
            _attribute("dtype", "1.a_dtype", "int64"),
        ]  # fmt: skip
        return self._operator(
            "1.argmax", [value, axis], attributes, "int64", self._dims[value][:-1]
        )

    def fetch(self, value: int) -> str:
        """Make ``value`` the next output; returns its name, ``fetch_name_<n>`` as Paddle has it."""
        name = f"fetch_name_{self._fetched}"
        attributes = [_text("name", name), _attribute("col", "0.a_i32", self._fetched)]
        self._fetched += 1
        result = len(self._types)
        self._types.append(self._types[value])
        self._dims.append(self._dims[value])
        self._append("1.fetch", [value], attributes, result, persistable=True)
        return name

    def save(self, path: Path) -> None:
        block = {"#": "block_0", "args": [], "ops": self._ops}
        program = {"regions": [{"#": "region_0", "blocks": [block]}]}
        code = {"magic": "pir", "trainable": True, "version": 4}
        path.write_bytes(orjson.dumps({"base_code": code, "program": program}))

    # --- inside -------------------------------------------------------------------------------

    def _scalar(self, value: float, dtype: str) -> int:
        attributes = [
            _attribute("shape", "1.a_intarray", [1]), _attribute("value", "0.a_f64", value),
            _attribute("dtype", "1.a_dtype", dtype), _attribute("place", "1.a_place", [1, 0, ""]),
        ]  # fmt: skip
        return self._operator("1.full", [], attributes, dtype, [1])

    def _int_array(self, values: Sequence[int]) -> int:
        attributes = [
            _attribute("value", "0.a_array", [{"#": "0.a_i64", "D": value} for value in values]),
            _attribute("dtype", "1.a_dtype", "int64"),
            _attribute("place", "1.a_place", [1, 0, ""]),
        ]
        return self._operator("1.full_int_array", [], attributes, "int64", [len(values)])

    def _operator(
        self,
        kind: str,
        operands: Sequence[int],
        attributes: Sequence[_Json],
        dtype: str,
        dims: Sequence[int],
    ) -> int:
        result = self._value(dtype, dims)
        self._append(kind, operands, attributes, result)
        return result

    def _append(
        self,
        kind: str,
        operands: Sequence[int],
        attributes: Sequence[_Json],
        result: int,
        *,
        persistable: bool = False,
    ) -> None:
        marks = [_flags("persistable", True)] if persistable else []
        self._ops.append(
            {
                "#": kind,
                "A": list(attributes),
                "I": [self._ref(value) for value in operands],
                "O": [self._ref(result, typed=True)],
                "OA": [*marks, _flags("stop_gradient", False)],
            }
        )

    def _value(self, dtype: str, dims: Sequence[int]) -> int:
        tensor = [{"#": _TYPE_OF_DTYPE[dtype]}, list(dims), "NCHW", [], 0]
        self._types.append({"#": "0.t_dtensor", "D": tensor})
        self._dims.append(tuple(dims))
        return len(self._types) - 1

    def _ref(self, value: int, *, typed: bool = False) -> _Json:
        number = {"%": value + 1}  # Paddle counts from 1
        return {**number, "TT": self._types[value]} if typed else number


def _attribute(name: str, kind: str, value: Any) -> _Json:
    return {"AT": {"#": kind, "D": value}, "N": name}


def _text(name: str, value: str) -> _Json:
    return _attribute(name, "0.a_str", value)


def _flag(name: str, value: bool) -> _Json:
    return _attribute(name, "0.a_bool", value)


def _flags(name: str, value: bool) -> _Json:
    return _attribute(name, "0.a_array", [{"#": "0.a_bool", "D": value}])
