"""What the loader offers and the router calls: tensors, signatures, one inference, its errors.

It lives in `registry` because the two siblings above may not know each other.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from registry.errors import PaddlewheelError
from registry.names import ServableId

Array = npt.NDArray[Any]

DTYPES: Mapping[str, str] = {
    "bool": "BOOL", "uint8": "UINT8", "int8": "INT8", "int16": "INT16", "int32": "INT32",
    "int64": "INT64", "float16": "FP16", "bfloat16": "BF16", "float32": "FP32", "float64": "FP64",
}  # fmt: skip
"""Our dtype names (numpy's, plus ``bfloat16``) and the Open Inference Protocol's for the same.

A bfloat16 tensor travels as a numpy ``uint16`` array of its bits.
"""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One input or output of a program."""

    name: str
    dtype: str
    """A key of `DTYPES`."""
    shape: tuple[int, ...]
    """-1 for a dimension that may vary."""


@dataclass(frozen=True, slots=True)
class Signature:
    """What a program accepts and returns, in the program's own order."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    def input(self, name: str) -> TensorSpec | None:
        return next((spec for spec in self.inputs if spec.name == name), None)

    def output(self, name: str) -> TensorSpec | None:
        return next((spec for spec in self.outputs if spec.name == name), None)


@dataclass(frozen=True, slots=True)
class Inference:
    """The answer to one request. The arrays belong to the caller."""

    outputs: Mapping[str, Array]
    queue_s: float = 0.0
    run_s: float = 0.0
    """Time in the worker, predictor only."""


class InferenceError(PaddlewheelError):
    """Why one request got no answer. The router turns each kind into one status code."""


class BadInput(InferenceError):
    """The request's fault: a name, dtype, rank or value. Never counted against a model."""


class Overloaded(InferenceError):
    """The queue is full or nothing can serve now; come back after ``retry_after_s``."""

    def __init__(self, message: str, *, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class DeadlineExceeded(InferenceError):
    """No answer within the time the request had."""


class Poisonous(InferenceError):
    """This input ended workers of this model before and is refused for a while."""


RETIRED = "RETIRED"
"""`ServableFailed.code` of a servable that was taken out."""

HANDED_BACK = "retired"
"""`ServableFailed.fault_class` of a request that no worker began with: nothing failed on it."""


class ServableFailed(InferenceError):
    """The servable (not the request) failed; the same request may be run again elsewhere.

    ``code`` and ``fault_class`` are those of `loader.faults`: ``"700"``, ``"sticky"``.
    ``answer``: what it answered, where that was held back (a NaN); given after all when every
    other version answers the same.
    """

    def __init__(
        self, message: str, *, code: str, fault_class: str, answer: Inference | None = None
    ) -> None:
        super().__init__(message)
        self.code = code
        self.fault_class = fault_class
        self.answer = answer

    @property
    def is_final(self) -> bool:
        """Whether this servable will never answer again: it was taken out."""
        return self.code == RETIRED

    @property
    def was_run(self) -> bool:
        """Whether a worker began with the request; else it was handed back as it came."""
        return self.fault_class != HANDED_BACK


class Predictor(Protocol):
    """A loaded servable as the router sees it."""

    @property
    def id(self) -> ServableId: ...

    @property
    def signature(self) -> Signature: ...

    @property
    def is_manned(self) -> bool:
        """Whether a worker is there now; without one a request waits for a replacement."""
        ...

    @property
    def in_flight(self) -> int:
        """Requests accepted and not answered: waiting or running."""
        ...

    async def infer(self, feeds: Mapping[str, Array], *, deadline_s: float) -> Inference:
        """Run one request.

        feeds: one C-contiguous array for each input of the signature.
        deadline_s: the event loop's time (``loop.time()``) after which nobody waits any more.
        Raises `InferenceError` only; any number of calls may be under way at once.
        """
        ...

    def held(self) -> AbstractContextManager[None]:
        """Count as a request in flight inside the block: a drain waits for its end.

        For who chose this servable and will ask it only later.
        """
        ...

    def answered_after(self, failure: ServableFailed, *, by_other: bool) -> None:
        """Say that the very request that ``failure`` was raised for was answered after all.

        by_other: by another version; else by this one, on another worker.
        """
        ...


def numpy_dtype(dtype: str) -> np.dtype[Any]:
    """The numpy dtype that carries ``dtype`` (a key of `DTYPES`); bfloat16 travels as uint16."""
    return np.dtype("uint16" if dtype == "bfloat16" else dtype)
