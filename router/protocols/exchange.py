"""What every protocol turns a request into, and what it is given to make the answer of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import orjson

from registry.inference import Array, BadInput, Signature
from registry.names import ModelName, Version


@dataclass(frozen=True, slots=True)
class Answer:
    """The outputs of one inference and the servable whose weights made them."""

    model: ModelName
    version: Version
    signature: Signature
    outputs: Mapping[str, Array]


@dataclass(frozen=True, slots=True)
class Rendered:
    """A response body as it goes on the wire."""

    body: bytes
    header_length: int | None = None
    """Length of the JSON before the raw tensors, or ``None`` when all of it is JSON."""


class Exchange(Protocol):
    """One understood request, which also knows the form its answer takes."""

    @property
    def feeds(self) -> Mapping[str, Array]: ...

    @property
    def timeout_s(self) -> float | None:
        """The client's own limit, when it gave one."""
        ...

    def render(self, answer: Answer) -> Rendered: ...


def parse_json(body: bytes | memoryview) -> object:
    """Return the document in ``body``. Raises `BadInput` with the place of the fault."""
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError as exc:
        raise BadInput(f"the body is not JSON: {exc}") from exc
