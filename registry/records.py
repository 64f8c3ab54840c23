"""The JSON values that nodes write, with the field names of SPEC section 7.

Written canonically (sorted keys, no spaces), so that equal records are equal bytes and "on change
only" is a comparison. Read tolerantly: unknown fields are ignored, missing ones have defaults.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Annotated, Any, Self

import orjson
from pydantic import (
    AfterValidator,
    AwareDatetime,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationError,
)

from registry.document_tree import FieldError, shorten
from registry.errors import PaddlewheelError
from registry.names import Digest, ModelName, NodeId, Revision, Version
from registry.spec_values import FrozenDict, frozen


class BadRecord(PaddlewheelError):
    """Bytes that are not the record they should be. One line, fit for a log."""


def rfc3339_ms(at: datetime) -> str:
    """``2024-05-21T08:00:00.123Z``. ``at`` must be aware; `ValueError` otherwise."""
    if at.tzinfo is None:
        raise ValueError("want an aware datetime, got a naive one")
    return at.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _to_ms(at: datetime) -> datetime:
    return at.astimezone(UTC).replace(microsecond=at.microsecond // 1000 * 1000)


At = Annotated[
    AwareDatetime,
    AfterValidator(_to_ms),
    PlainSerializer(rfc3339_ms, return_type=str),
]
"""Cut to milliseconds on the way in, so that a record equals itself read back."""


def _numeric(code: Any) -> Any:
    if isinstance(code, str):
        digits = code.removeprefix("-")
        if digits.isascii() and digits.isdigit() and len(digits) < 10:
            return int(code)
    return code


def _sendable(value: Any) -> Any:
    """JSON that every reader takes: a message caught from elsewhere may hold half a surrogate
    pair, a measurement may be NaN (it is left out), and neither may cost a node its status."""
    match value:
        case str() if not value.isascii():
            return value.encode("utf-8", "replace").decode("utf-8")
        case dict():
            return {
                _sendable(key): _sendable(held)
                for key, held in value.items()
                if not (isinstance(held, float) and not math.isfinite(held))
            }
        case list() | tuple():
            return [_sendable(held) for held in value]
        case _:
            return value


ErrorCode = Annotated[int | str, BeforeValidator(_numeric)]
"""A number where the code is one (``700``, also when given as text), else ``SIGSEGV``, ``NAN``."""

Labels = Annotated[Mapping[str, str], frozen]


class Record(BaseModel):
    """A frozen value with a canonical JSON form."""

    model_config = ConfigDict(
        frozen=True,
        extra="ignore",
        validate_by_name=True,
        validate_by_alias=True,
        hide_input_in_errors=True,
    )

    def to_json(self) -> bytes:
        """Canonical: equal records give equal bytes."""
        return orjson.dumps(_sendable(self.to_dict()), option=orjson.OPT_SORT_KEYS)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values under the names of SPEC section 7."""
        return self.model_dump(mode="json", by_alias=True)

    @classmethod
    def from_json(cls, raw: bytes | str) -> Self:
        """Raises `BadRecord` for whatever is not this record; never anything else."""
        try:
            return cls.model_validate(orjson.loads(raw))
        except orjson.JSONDecodeError as exc:
            raise BadRecord(f"{cls.__name__}: not JSON: {shorten(str(exc), 120)}") from exc
        except ValidationError as exc:
            first = exc.errors(include_url=False, include_input=False)[0]
            where = ".".join(str(part) for part in first["loc"])
            more = exc.error_count() - 1
            message = f"{cls.__name__}: want an object of its fields"
            if where:
                message = f"{cls.__name__}: {shorten(where)}: {first['msg'].lower()}"
            raise BadRecord(message + (f"; and {more} more" if more else "")) from exc


class Cordon(Record):
    """Why a device takes no work."""

    code: ErrorCode
    reason: str
    at: At


class DeviceRecord(Record):
    id: str
    """``cpu`` or ``gpu:N``."""
    memory_mb: int
    """The quota."""
    reserved_mb: int = 0
    cordoned: Cordon | None = None


class NodeRecord(Record):
    """``P/nodes/<node>``, under the node's lease."""

    id: NodeId
    http: str
    """``http://host:port``, reachable by gateways."""
    grpc: str | None = None
    started_at: At
    devices: tuple[DeviceRecord, ...] = ()
    labels: Labels = Field(default_factory=FrozenDict[str, str])
    version: str = ""
    """Of Paddlewheel."""
    draining: bool = False
    lease_ttl_s: float = 10
    uid: str | None = None
    """Of the node's folder: it survives a restart, and tells two nodes under one id apart."""


class WorkerStatus(Record):
    pid: int
    alive: bool
    restarts: int = 0


class ServableStatus(Record):
    """One servable, in a status key and in ``GET /admin/servables``."""

    model: ModelName
    version: Version
    state: str
    """A name of `loader.lifecycle.State`."""
    reason: str | None = None
    digest: Digest | None = None
    """``None`` until it is fetched."""
    device: str | None = None
    memory_mb: int | None = None
    workers: tuple[WorkerStatus, ...] = ()
    loaded_at: At | None = None
    phases_ms: Annotated[Mapping[str, float], frozen] = Field(
        default_factory=FrozenDict[str, float]
    )
    """``fetch``, ``check``, ``load``, ``warm``: those that are over."""
    errors: Annotated[Mapping[str, int], frozen] = Field(default_factory=FrozenDict[str, int])
    """Code to the number of errors counted since it was loaded."""


class Intent(Record):
    """What the last document seen asks for."""

    live: Version | None = None
    canary: Version | None = None


class ErrorRecord(Record):
    """One error of a refused document."""

    path: str
    line: int | None = None
    message: str

    @classmethod
    def of(cls, error: FieldError) -> ErrorRecord:
        return cls(path=error.path, line=error.line, message=error.message)


class ModelStatus(Record):
    """``P/status/<model>/<node>``: what this node makes of a model's document."""

    model: ModelName
    node: NodeId
    revision: Revision | None = None
    """Of the last document seen."""
    accepted: bool = True
    """Whether that one was accepted."""
    applied_revision: Revision | None = None
    """Of the document in force."""
    prepared_revision: Revision | None = None
    """Of the newest document of which every aspired servable is loaded and warmed here, whether it
    is in force or waits for the fleet."""
    error: str | None = None
    errors: tuple[ErrorRecord, ...] = ()
    live: Version | None = None
    canary: Version | None = None
    standby: Version | None = None
    intent: Intent = Intent()
    reason: str | None = None
    """Why what is differs from what is meant: ``quarantined: code 700 ...``."""
    servables: tuple[ServableStatus, ...] = ()


class HistoryEntry(Record):
    """``P/history/models/<model>/<revision>``: a document as it was."""

    revision: Revision
    sha256: str
    """Of the document's bytes, in hex."""
    document: str
    seen_at: At

    @classmethod
    def of(cls, revision: Revision, document: bytes, seen_at: datetime) -> HistoryEntry:
        """Bytes that are not UTF-8 are kept as replacement characters; the digest is exact."""
        return cls(
            revision=revision,
            sha256=hashlib.sha256(document).hexdigest(),
            document=document.decode("utf-8", "replace"),
            seen_at=seen_at,
        )


class FaultRecord(Record):
    """``P/faults/<model>/<version>/<node>``: errors that count, as one node saw them."""

    code: ErrorCode
    fault_class: str = Field(validation_alias="class", serialization_alias="class")
    count: int
    first_at: At
    last_at: At
    message: str = ""


class Quarantine(Record):
    """``P/quarantine/<model>/<version>``: a version taken out of service in the whole fleet."""

    reason: str
    code: ErrorCode
    nodes: tuple[NodeId, ...] = ()
    """Who saw it."""
    at: At
    digest: Digest | None = None
    """The bytes that failed; a version with other bytes is another servable."""


class Good(Record):
    """A version that served through a whole bake."""

    version: Version
    revision: Revision
    """Of the document that asked for it."""
    at: At
    digest: Digest | None = None


class LastGood(Good):
    """``P/lastgood/<model>``: the version that last served through a whole bake.

    Its revision only grows.
    """

    previous: Good | None = None
    """The one before, with another version: what is left when this one fails after all."""

    def after(self, before: LastGood) -> LastGood:
        """This record in the place of ``before``."""
        if (self.version, self.digest) == (before.version, before.digest):
            return self.model_copy(update={"previous": before.previous})
        kept = Good(
            version=before.version, revision=before.revision, at=before.at, digest=before.digest
        )
        return self.model_copy(update={"previous": kept})

    def other_than(self, version: Version) -> Good | None:
        """The latest good version that is not ``version``."""
        if self.version != version:
            return self
        return self.previous
