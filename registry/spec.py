"""A parsed model document: frozen values, or every error in it at once (pure)."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from registry.document import Document, read
from registry.document_tree import (
    ConfigError,
    FieldError,
    Path,
    Scalar,
    Sequence,
    show_path,
)
from registry.names import ModelName, Version, is_model_name, is_version
from registry.spec_canary import CanarySpec
from registry.spec_errors import explain, in_order
from registry.spec_rollout import Rollout, WaveSpec
from registry.spec_rules import (
    HeaderRule,
    PercentRule,
    RegionRule,
    Rule,
    UserRule,
    Value,
    rule_document,
)
from registry.spec_values import (
    Code,
    Count,
    Device,
    Digests,
    FrozenDict,
    GoldenSource,
    Labels,
    Megabytes,
    ModelNameText,
    Options,
    OptionValue,
    PositiveMilliseconds,
    PositiveSeconds,
    Replicas,
    Seconds,
    Shapes,
    Source,
    Threads,
    Tolerance,
    VersionText,
    wants,
)

__all__ = [
    "CanarySpec",
    "ConfigError",
    "FieldError",
    "FrozenDict",
    "HeaderRule",
    "Limits",
    "Metadata",
    "ModelDocument",
    "ModelSpec",
    "PercentRule",
    "Placement",
    "PredictorSpec",
    "RegionRule",
    "Rollback",
    "Rollout",
    "Rule",
    "UserRule",
    "VersionSpec",
    "Warmup",
    "WaveSpec",
    "parse_model",
    "rule_document",
]

Compatibility = Literal["strict", "loose", "none"]
Priority = Literal["low", "normal", "high"]
Precision = Literal["fp32", "fp16", "bf16", "int8"]


class Metadata(Value):
    """What the document is about."""

    name: ModelNameText
    """The model's name, the same as the last part of the document's key."""
    labels: Labels = Field(default_factory=FrozenDict[str, str])
    """Free text for people and tools."""


class VersionSpec(Value):
    """A version that may be served."""

    version: VersionText
    """The version's name: text, a semver or a date. Quote it when it looks like a number."""
    source: Source
    """fsspec URL or path of a folder with one program (*.json or *.pdmodel) and its *.pdiparams."""
    sha256: Digests = Field(default_factory=FrozenDict[str, str])
    """File name to its sha256 in hex, checked before the version is loaded."""
    compatibility: Annotated[Compatibility, wants("strict, loose or none")] = "none"
    """How close its inputs and outputs have to be to those of the version it would replace."""


class Placement(Value):
    """Where the model runs, and with how much."""

    device: Device = "cpu"
    """``cpu``, ``gpu`` (any) or ``gpu:N``."""
    replicas: Replicas = 1
    """Worker processes of each version on a node."""
    memory_mb: Megabytes | None = Field(
        default=None, validation_alias="memoryMB", serialization_alias="memoryMB"
    )
    """Memory of one replica; estimated from the files when it is not given."""
    priority: Annotated[Priority, wants("low, normal or high")] = "normal"
    """Who yields when there is too little of something."""
    labels: Labels = Field(default_factory=FrozenDict[str, str])
    """Only nodes with all these labels take the model."""


class PredictorSpec(Value):
    """Passed to Paddle Inference."""

    threads: Threads = 1
    """CPU threads of one run."""
    precision: Annotated[Precision, wants("fp32, fp16, bf16 or int8")] = "fp32"
    """What the predictor computes in."""
    options: Options = Field(default_factory=FrozenDict[str, OptionValue])
    """Switches of ``paddle.inference.Config``."""


class Warmup(Value):
    """What is run before a version is READY."""

    requests: Count = 3
    """Runs for each input shape."""
    shapes: Shapes = Field(default_factory=FrozenDict[str, tuple[int, ...]])
    """Input name to its shape; what is not here comes from the program."""
    golden: GoldenSource | None = None
    """A .npz of inputs and the outputs expected of them."""
    rtol: Tolerance = 1e-3
    """Relative tolerance of the golden outputs."""
    atol: Tolerance = 1e-5
    """Absolute tolerance of the golden outputs."""


class RollbackOn(Value):
    """Further reasons to roll back."""

    codes: tuple[Code, ...] = ()
    """As ``rollback.codes``, which it replaces when it is not empty."""
    nan_rate: Annotated[float, Field(ge=0, le=1), wants("a share in 0..1")] | None = None
    """Share of answers that may hold NaN or Inf. Such an answer is tried on the standby first."""
    p95_ms: PositiveMilliseconds | None = None
    """Milliseconds that 95 % of the answers must not exceed, queue included."""
    min_samples: Count = 50
    """Answers before either is judged."""


class Rollback(Value):
    """When the version before takes over by itself."""

    codes: tuple[Code, ...] = ("sticky", "memory", "unsupported")
    """Error codes, or classes of them, that count; a worker that dies always counts."""
    consecutive: Count = 3
    """How many in a row, or within ``window_s``."""
    window_s: PositiveSeconds = 30.0
    """Seconds within which errors count together."""
    quorum: Count = 1
    """How many nodes must have seen it before the whole fleet rolls back."""
    bake_s: Seconds = 600.0
    """Seconds for which the version before stays loaded as the standby; 0: no standby."""
    on: RollbackOn | None = None
    """Further reasons: the rate of NaN answers, a latency objective."""


def _half_of_timeout(given: dict[str, Any]) -> float:
    timeout_s: float = given.get("timeout_s", 10.0)  # absent when it is wrong itself
    return timeout_s / 2


class Limits(Value):
    """How long and how much."""

    timeout_s: PositiveSeconds = 10.0
    """Seconds a request may take, queue included."""
    hang_s: PositiveSeconds = Field(default_factory=_half_of_timeout)
    """Seconds after which a run counts as hung and its worker is ended; half of ``timeout_s``."""
    queue: Count = 256
    """Requests that may wait; one more is answered 503."""
    max_body_mb: Megabytes = 64
    """Size of a request's body, unpacked."""
    drain_s: Seconds = 30.0
    """Seconds that requests under way get when a version is unloaded."""
    poison_s: Seconds = 600.0
    """Seconds for which an input that ended two workers is refused."""


class ModelSpec(Value):
    """What should be served."""

    live: VersionText
    """The aspired version for default traffic, one of ``versions``."""
    versions: Annotated[tuple[VersionSpec, ...], Field(min_length=1)]
    """The versions that may be served."""
    canary: CanarySpec | None = None
    """A second version for some of the traffic."""
    placement: Placement = Placement()
    """Where the model runs, and with how much."""
    predictor: PredictorSpec = PredictorSpec()
    """Passed to Paddle Inference."""
    warmup: Warmup = Warmup()
    """What is run before a version is READY."""
    rollback: Rollback = Rollback()
    """When the version before takes over by itself."""
    rollout: Rollout = Rollout()
    """How a new document takes effect across the fleet."""
    limits: Limits = Limits()
    """How long and how much."""

    def lists(self, version: Version) -> bool:
        """Whether ``version`` is one of ``versions``."""
        return any(listed.version == version for listed in self.versions)

    def version(self, version: Version) -> VersionSpec:
        """The entry of ``version``; `KeyError` when the document does not list it."""
        for listed in self.versions:
            if listed.version == version:
                return listed
        raise KeyError(version)


class ModelDocument(Value):
    """A whole document, as it stands under ``P/configs/models/<model>``."""

    api_version: Annotated[Literal["paddlewheel/v1"], wants("paddlewheel/v1")] = Field(
        validation_alias="apiVersion", serialization_alias="apiVersion"
    )
    """``paddlewheel/v1``"""
    kind: Annotated[Literal["Model"], wants("Model")]
    """``Model``"""
    metadata: Metadata
    """What the document is about."""
    spec: ModelSpec
    """What should be served."""

    @property
    def name(self) -> ModelName:
        return self.metadata.name


def parse_model(text: bytes | str, *, name: ModelName | None) -> ModelDocument:
    """Parse one model document of YAML or JSON.

    name: the last part of the key it stands under; ``None`` when there is no key yet.
    Raises `ConfigError` with all that is wrong, in the text's order (at most 50 errors). Takes up
    to 0.3 s for the largest documents allowed: not for an event loop that serves.
    """
    document = read(text)
    errors = list(document.errors)
    parsed: ModelDocument | None = None
    try:
        parsed = ModelDocument.model_validate(document.value, by_alias=True, by_name=False)
    except ValidationError as exc:
        errors += explain(exc, document, ModelDocument)
    at_fault = {error.path for error in errors}
    errors += [error for error in _across(document, name) if error.path not in at_fault]
    if errors or parsed is None:
        raise ConfigError(in_order(errors))
    return parsed


def _across(document: Document, name: ModelName | None) -> list[FieldError]:
    """What no field shows alone.

    Looks at what is written, quoted or not, so that other errors neither hide these nor make
    them up: with ``version: 1`` the one error is the missing quotes, not that "1" is not listed.
    """
    errors: list[FieldError] = []

    def written(*path: str | int) -> str:
        node = document.node(path)
        return node.raw if isinstance(node, Scalar) else ""

    def refuse(path: Path, message: str) -> None:
        errors.append(FieldError(show_path(path), document.line(path), message))

    own = written("metadata", "name")
    if name is not None and is_model_name(own) and own != name:
        refuse(("metadata", "name"), f"want {name!r}, the last part of the key, got {own!r}")

    first_at: dict[str, Path] = {}
    versions = document.node(("spec", "versions"))
    for at in range(len(versions.items) if isinstance(versions, Sequence) else 0):
        path: Path = ("spec", "versions", at, "version")
        listed = written(*path)
        if listed in first_at:
            refuse(path, f"{listed!r} is listed already, in {show_path(first_at[listed])}")
        elif is_version(listed):
            first_at[listed] = path
    known = ", ".join(list(first_at)[:5]) + (", ..." if len(first_at) > 5 else "")
    for path in (("spec", "live"), ("spec", "canary", "version")):
        aspired = written(*path)
        if first_at and is_version(aspired) and aspired not in first_at:
            refuse(path, f"want a version listed under spec.versions ({known}), got {aspired!r}")
    return errors
