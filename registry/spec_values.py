"""The kinds of value a document is made of, each with the words that say what it wants (pure).

Every kind is checked strictly and fails with one error of its own, ``want``, so that what a user
reads never depends on how the checking library words things.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Generic, NoReturn, TypeVar

from annotated_types import Ge, Gt, Le, MaxLen, MinLen
from pydantic import (
    AfterValidator,
    AllowInfNan,
    PlainSerializer,
    PlainValidator,
    StringConstraints,
    ValidationError,
    WithJsonSchema,
    WrapValidator,
)
from pydantic_core import PydanticCustomError

from registry.names import MODEL_NAME_PATTERN, VERSION_PATTERN, ModelName, Version

K = TypeVar("K")
V = TypeVar("V")

YEAR_S = 365 * 24 * 3600
"""The longest duration a document may ask for; event loops overflow on much longer timers."""

SHAPE_ELEMENTS_MAX = 1 << 31
FAULT_CLASSES = ("sticky", "memory", "unsupported")
"""Classes of error codes that may count toward a rollback (DESIGN section 3)."""

_DRIVE_OR_ROOT = re.compile(r"[/\\]|[A-Za-z]:")


class FrozenDict(dict[K, V], Generic[K, V]):
    """A dict that can't be changed: hashable, picklable, and JSON like any dict.

    Not ``MappingProxyType``, which neither pickles (specs travel to worker processes) nor hashes.
    """

    def _refuse(self, *_args: Any, **_kwargs: Any) -> NoReturn:
        raise TypeError("a document's values are frozen")

    if not TYPE_CHECKING:  # their real types are overloads that no one method has
        __setitem__ = __delitem__ = __ior__ = _refuse
        clear = pop = popitem = setdefault = update = _refuse

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(frozenset(self.items()))

    def __reduce__(self) -> tuple[type[FrozenDict[K, V]], tuple[dict[K, V]]]:
        return FrozenDict, (dict(self),)

    def __copy__(self) -> FrozenDict[K, V]:
        return self

    def __deepcopy__(self, _memo: dict[int, Any]) -> FrozenDict[K, V]:
        return self  # keys and values are immutable too


def wrong(want: str) -> PydanticCustomError:
    """The one error a value fails with; ``want`` goes after "want "."""
    return PydanticCustomError("want", "{want}", {"want": want})


def wants(want: str) -> WrapValidator:
    """Whatever is wrong with the value, say ``want``."""

    def check(value: Any, handler: Any) -> Any:
        try:
            return handler(value)
        except ValidationError as exc:
            raise wrong(want) from exc

    return WrapValidator(check)


def _freeze(value: Mapping[K, V]) -> FrozenDict[K, V]:
    return value if isinstance(value, FrozenDict) else FrozenDict(value)


frozen = AfterValidator(_freeze)

Text = Annotated[str, MinLen(1), MaxLen(1024), wants("text of 1 to 1024 characters")]
AnyText = Annotated[str, MaxLen(1024), wants("text of at most 1024 characters")]
Bool = Annotated[bool, wants("true or false")]
Labels = Annotated[Mapping[Text, AnyText], frozen]

ModelNameText = Annotated[
    ModelName,
    StringConstraints(pattern=f"^{MODEL_NAME_PATTERN}$"),
    wants("a name of letters, digits, '.', '_' and '-' (at most 128, a letter or digit first)"),
]
VersionText = Annotated[
    Version,
    StringConstraints(pattern=f"^{VERSION_PATTERN}$"),
    wants(
        "a version as text: letters, digits, '.', '_', '+' and '-' (at most 64, a letter or digit "
        "first)"
    ),
]
HeaderName = Annotated[
    str,
    StringConstraints(pattern=r"^[!#$%&'*+.^_`|~0-9A-Za-z-]{1,128}$"),
    wants("an HTTP header's name"),
]
Device = Annotated[
    str,
    StringConstraints(pattern=r"^(cpu|gpu|gpu:(0|[1-9][0-9]{0,3}))$"),
    wants('"cpu", "gpu" or "gpu:N"'),
]


def _source(value: str) -> str:
    if value != value.strip() or any(char < " " for char in value):
        raise wrong("a path or URL without spaces around it")
    return value


Source = Annotated[
    str,
    MinLen(1),
    MaxLen(4096),
    AfterValidator(_source),
    wants("a folder's path or fsspec URL, such as file:///models/ocr/1"),
]
GoldenSource = Annotated[
    str,
    MinLen(1),
    MaxLen(4096),
    AfterValidator(_source),
    wants("a path or fsspec URL of a .npz file"),
]


def _lower(value: str) -> str:
    return value.lower()


Sha256 = Annotated[
    str,
    StringConstraints(pattern=r"^[0-9a-fA-F]{64}$"),
    AfterValidator(_lower),
    wants("the 64 hex digits of a sha256"),
]


def _relative(value: str) -> str:
    if _DRIVE_OR_ROOT.match(value) or ".." in re.split(r"[/\\]", value):
        raise wrong("a file's name inside the source folder")
    return value


FileName = Annotated[
    str,
    MinLen(1),
    MaxLen(255),
    AfterValidator(_relative),
    wants("a file's name inside the source folder"),
]
Digests = Annotated[Mapping[FileName, Sha256], frozen]


Replicas = Annotated[int, Ge(1), Le(256), wants("a whole number in 1..256")]
Threads = Annotated[int, Ge(1), Le(1024), wants("a whole number in 1..1024")]
Count = Annotated[int, Ge(1), Le(1_000_000), wants("a whole number in 1..1000000")]
Megabytes = Annotated[int, Ge(1), Le(1 << 30), wants("megabytes, a whole number of 1 or more")]
Percent = Annotated[float, Ge(0), Le(100), AllowInfNan(False), wants("a number in 0..100")]
Share = Annotated[float, Ge(0), Le(1), AllowInfNan(False), wants("a share in 0..1")]
Tolerance = Annotated[float, Ge(0), AllowInfNan(False), wants("a number of 0 or more")]
Seconds = Annotated[float, Ge(0), Le(YEAR_S), AllowInfNan(False), wants("seconds, 0 up to a year")]
PositiveSeconds = Annotated[
    float, Gt(0), Le(YEAR_S), AllowInfNan(False), wants("seconds, more than 0 and up to a year")
]
PositiveMilliseconds = Annotated[
    float, Gt(0), Le(YEAR_S * 1000), AllowInfNan(False), wants("milliseconds, more than 0")
]


def _shape(value: tuple[int, ...]) -> tuple[int, ...]:
    if math.prod(value) > SHAPE_ELEMENTS_MAX:
        raise wrong(f"a shape of at most {SHAPE_ELEMENTS_MAX} elements")
    return value


Dim = Annotated[int, Ge(1), Le(SHAPE_ELEMENTS_MAX), wants("a whole number of 1 or more")]
Shape = Annotated[tuple[Dim, ...], MaxLen(16), AfterValidator(_shape)]
Shapes = Annotated[Mapping[Text, Shape], frozen]


def _code(value: Any) -> int | str:
    if isinstance(value, str):
        if value in FAULT_CLASSES:
            return value
    elif isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1 << 31:
        return value
    raise wrong(f"a code's number or one of {', '.join(FAULT_CLASSES)}")


Code = Annotated[
    int | str,
    PlainValidator(_code),
    WithJsonSchema({"anyOf": [{"type": "integer"}, {"enum": list(FAULT_CLASSES)}]}),
]
OptionScalar = str | int | float | bool
OptionValue = OptionScalar | tuple[OptionScalar, ...]


def _option(value: Any) -> OptionValue:
    items: tuple[Any, ...] = value if isinstance(value, tuple) else (value,)
    for item in items:
        if not isinstance(item, str | int | float | bool):
            raise wrong("text, a number, true or false, or a list of those")
        if isinstance(item, float) and not math.isfinite(item):
            raise wrong("a finite number")
        if isinstance(item, int) and abs(item) >= 1 << 63:
            raise wrong("a number of at most 64 bits")
    return value  # type: ignore[no-any-return]


def _plain(value: OptionValue) -> Any:
    return list(value) if isinstance(value, tuple) else value


_OPTION_SCALAR = {"type": ["string", "number", "boolean"]}
Option = Annotated[
    OptionValue,
    PlainValidator(_option),
    PlainSerializer(_plain, return_type=Any),
    WithJsonSchema({"anyOf": [_OPTION_SCALAR, {"type": "array", "items": _OPTION_SCALAR}]}),
]
Options = Annotated[Mapping[Text, Option], frozen]
