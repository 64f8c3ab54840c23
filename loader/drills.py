"""Fault drills: which runs are to fail, and how. Armed on the front, performed in the worker.

The front only marks a run; the worker raises, ends, hangs or spoils its outputs where a real fault
would, and everything after that is the real path. A drill's count lives here, so it survives the
workers that it ends.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from loader.errors import LoaderError
from loader.fault_tables import PADDLE
from loader.faults import (
    DEVICE_ALLOCATION_FAILED,
    HOST_ALLOCATION_FAILED,
    KERNEL_NOT_SUPPORTED,
    FaultClass,
    from_code,
)
from registry.names import ModelName, Version

Kind = Literal["code", "crash", "hang", "slow", "nan", "oom"]
KINDS: tuple[Kind, ...] = ("code", "crash", "hang", "slow", "nan", "oom")
CRASH_SIGNALS = ("SIGSEGV", "SIGABRT", "SIGBUS", "SIGKILL", "SIGTERM", "SIGILL", "SIGFPE")
COUNT_MAX = 1_000_000
DELAY_MAX_MS = 600_000
ARMED_MAX = 256


class BadDrill(LoaderError):
    """A drill that makes no sense; the text names the field."""


@dataclass(frozen=True, slots=True)
class Order:
    """What one run is to do instead of, or besides, running. Crosses to the worker."""

    kind: Kind
    code: str
    delay_ms: int

    def as_json(self) -> dict[str, Any]:
        number = self.code.removeprefix("-").isdigit()
        code = int(self.code) if number else self.code
        return {"kind": self.kind, "code": code, "delay_ms": self.delay_ms}


@dataclass(slots=True)
class Drill:
    """One armed drill."""

    id: str
    model: ModelName
    version: Version
    order: Order
    share: float
    """Of the runs, at random, until ``left`` is used up."""
    count: int
    left: int

    def as_json(self) -> dict[str, Any]:
        return {
            "id": self.id, "model": self.model, "version": self.version, **self.order.as_json(),
            "share": self.share, "count": self.count, "left": self.left, "armed": self.left > 0,
        }  # fmt: skip


class DrillBox:
    """The armed drills of one node. One event loop's."""

    def __init__(self, *, chance: Callable[[], float] = random.random) -> None:
        self._drills: dict[str, Drill] = {}
        self._chance = chance
        self._ids = itertools.count(1)

    def arm(self, document: Mapping[str, Any], *, live: Version | None) -> Drill:
        """Arm what ``document`` (the body of ``POST /admin/drill``) asks for.

        live: the version meant when it names none. Raises `BadDrill`.
        """
        self._sweep()
        if len(self._drills) >= ARMED_MAX:
            raise BadDrill(f"{ARMED_MAX} drills are armed already")
        unknown = set(document) - {
            "model", "version", "kind", "code", "count", "share", "delay_ms", "node",
        }  # fmt: skip
        if unknown:
            raise BadDrill(f"unknown fields: {', '.join(sorted(map(str, unknown)))}")
        version = document.get("version")
        if version is None:
            version = live
        if version is None:
            raise BadDrill("version: none is live, so name one")
        if not isinstance(version, str):
            raise BadDrill("version: want text")
        model = document.get("model")
        if not isinstance(model, str) or not model:
            raise BadDrill("model: want a model's name")
        count = _integer(document, "count", 1, 1, COUNT_MAX)
        drill = Drill(
            id=f"drill-{next(self._ids)}",
            model=ModelName(model),
            version=Version(version),
            order=_order(document),
            share=_share(document),
            count=count,
            left=count,
        )
        self._drills[drill.id] = drill
        return drill

    def order_for(self, model: ModelName, version: Version) -> Order | None:
        """What the next run of this version is to do; ``None``: simply run."""
        for drill in self._drills.values():
            if drill.left > 0 and drill.version == version and drill.model == model:
                if drill.share < 1.0 and self._chance() >= drill.share:
                    continue
                drill.left -= 1
                return drill.order
        return None

    def __bool__(self) -> bool:
        """False while nothing was ever armed: then no run need be looked at."""
        return bool(self._drills)

    def armed(self) -> tuple[Drill, ...]:
        self._sweep()
        return tuple(self._drills.values())

    def disarm(self, id: str) -> bool:
        """Return whether there was such a drill."""
        return self._drills.pop(id, None) is not None

    def _sweep(self) -> None:
        for id in [id for id, drill in self._drills.items() if drill.left <= 0]:
            del self._drills[id]


def _order(document: Mapping[str, Any]) -> Order:
    raw_code = document.get("code")
    if raw_code is not None and (isinstance(raw_code, bool) or not isinstance(raw_code, int | str)):
        raise BadDrill("code: want a number or text")
    code = "" if raw_code is None else str(raw_code)
    kind = document.get("kind")
    if kind is None:
        kind = _kind_of(code)
    if kind not in KINDS:
        raise BadDrill(f"kind: want one of {', '.join(KINDS)}")
    delay_ms = _integer(document, "delay_ms", 0, 0, DELAY_MAX_MS)
    match kind:
        case "code":
            if not code:
                raise BadDrill("code: want a number or text")
            error_for(code)  # says what is wrong with it
        case "crash":
            code = code or "SIGSEGV"
            if code not in CRASH_SIGNALS and not code.startswith("EXIT:"):
                raise BadDrill(f"code: want {', '.join(CRASH_SIGNALS)} or EXIT:n for a crash")
        case "oom":
            code = code or HOST_ALLOCATION_FAILED
        case "slow":
            if not delay_ms:
                raise BadDrill("delay_ms: want how much slower")
        case _:
            pass
    return Order(kind, code, delay_ms)


def _kind_of(code: str) -> Kind:
    if code.startswith(("SIG", "EXIT:")):
        return "hang" if code == "SIGSTOP" else "crash"
    return {"HANG": "hang", "NAN": "nan"}.get(code, "code")  # type: ignore[return-value]


def _integer(document: Mapping[str, Any], name: str, default: int, least: int, most: int) -> int:
    value = document.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise BadDrill(f"{name}: want an integer in {least}..{most}")
    return value


def _share(document: Mapping[str, Any]) -> float:
    value = document.get("share", 1.0)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
        raise BadDrill("share: want a number above 0, at most 1")
    return float(value)


def error_for(code: str) -> tuple[type[Exception], str]:
    """The exception that Paddle would raise for ``code``: its builtin type and its text.

    Sources of the texts: tests/integration/test_fault_texts.py. Raises `BadDrill` for a code that
    no error carries.
    """
    if code == HOST_ALLOCATION_FAILED:
        return MemoryError, "std::bad_alloc"
    if code == DEVICE_ALLOCATION_FAILED:
        return MemoryError, (
            "(ResourceExhausted) \n\nOut of memory error on GPU 0. Cannot allocate 2.000000GB "
            "memory on GPU 0, 15.0GB memory has been allocated.\n"
        )
    if code == KERNEL_NOT_SUPPORTED:
        return RuntimeError, (
            "(NotFound) The kernel with key (GPU, Undefined(AnyLayout), bfloat16) of kernel "
            "`conv2d` is not registered. Selected wrong Backend `GPU`."
        )
    library, _, number = code.partition(":")
    if library.isdigit():
        return OSError, f"(External) CUDA error({library}), injected by a drill. \n"
    if number.isdigit() and library in ("CUDNN", "CUBLAS", "NCCL", "CURAND", "CUSPARSE"):
        return OSError, f"(External) {library} error({number}), injected by a drill. \n"
    is_known = code in PADDLE or from_code(code).fault_class is not FaultClass.UNKNOWN
    if not is_known or number:
        raise BadDrill(f"code: no error carries {code!r}")
    return RuntimeError, f"({code}) injected by a drill. \n"
