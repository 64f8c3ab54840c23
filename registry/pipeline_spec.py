"""A parsed pipeline document: frozen values, or every error in it at once (pure).

A pipeline is a graph of steps. Each step is a model of the fleet or a transform that is installed
on the node; its inputs come from the request or from the outputs of other steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple

from annotated_types import Ge, Le, MaxLen
from pydantic import AfterValidator, Field, StringConstraints, ValidationError

from registry.document import Document, read
from registry.document_tree import ConfigError, FieldError, Path, Scalar, show_path
from registry.document_tree import Mapping as MappingNode
from registry.document_tree import Sequence as SequenceNode
from registry.names import ModelName, is_model_name
from registry.spec_errors import explain, in_order
from registry.spec_rules import Value
from registry.spec_values import (
    FrozenDict,
    Labels,
    Megabytes,
    ModelNameText,
    PositiveSeconds,
    Text,
    VersionText,
    frozen,
    wants,
    wrong,
)

__all__ = [
    "REQUEST",
    "PipelineDocument",
    "PipelineInput",
    "PipelineLimits",
    "PipelineOutput",
    "PipelineSpec",
    "Reference",
    "Step",
    "parse_pipeline",
]

REQUEST = "request"
"""What a step's input names as its source when it comes with the request."""

STEPS_MAX = 64
_STEP_PATTERN = r"[A-Za-z][A-Za-z0-9_-]{0,63}"
_REFERENCE = r"^[A-Za-z][A-Za-z0-9_-]{0,63}\.[^\s].{0,255}$"

DATATYPES = (
    "BOOL", "UINT8", "UINT16", "UINT32", "UINT64", "INT8", "INT16", "INT32", "INT64",
    "FP16", "BF16", "FP32", "FP64", "BYTES",
)  # fmt: skip


class Reference(NamedTuple):
    """Where a value comes from: ``det.boxes``, ``request.image``."""

    step: str
    """A step's name, or `REQUEST`."""
    name: str
    """Of the output or input there; a number is a position, where no output is called that."""

    def __str__(self) -> str:
        return f"{self.step}.{self.name}"

    @property
    def is_request(self) -> bool:
        return self.step == REQUEST


def _reference(text: str) -> Reference:
    """``<step>.<name>``: a step's name holds no dot, a tensor's may."""
    step, _, name = text.partition(".")
    return Reference(step, name)


def _endpoint(value: str) -> str:
    from urllib.parse import urlsplit

    try:
        parts = urlsplit(value)
        port = parts.port
    except ValueError:
        raise wrong(_WANT_ENDPOINT) from None
    is_whole = parts.scheme in ("http", "https") and bool(parts.hostname) and port != 0
    if not is_whole or parts.query or parts.fragment or "@" in parts.netloc or "?" in value:
        raise wrong(_WANT_ENDPOINT)
    if any(char <= " " or char == "\x7f" for char in value) or not value.isascii():
        raise wrong(_WANT_ENDPOINT)
    return value.rstrip("/")


_WANT_ENDPOINT = "a URL such as http://10.0.0.7:8600, without user, query or fragment"
_WANT_REFERENCE = "request.<input> or <step>.<output>"

StepName = Annotated[
    str,
    StringConstraints(pattern=f"^{_STEP_PATTERN}$"),
    wants("a name of letters, digits, '_' and '-' (at most 64, a letter first)"),
]
ReferenceText = Annotated[str, StringConstraints(pattern=_REFERENCE), wants(_WANT_REFERENCE)]
Endpoint = Annotated[str, MaxLen(1024), AfterValidator(_endpoint), wants(_WANT_ENDPOINT)]
Datatype = Annotated[
    Literal[
        "BOOL", "UINT8", "UINT16", "UINT32", "UINT64", "INT8", "INT16", "INT32", "INT64",
        "FP16", "BF16", "FP32", "FP64", "BYTES",
    ],
    wants(f"one of {', '.join(DATATYPES)}"),
]  # fmt: skip
TensorDim = Annotated[int, Ge(-1), Le(1 << 31), wants("a size, or -1 where it may vary")]
TensorShape = Annotated[tuple[TensorDim, ...], MaxLen(16)]


class Metadata(Value):
    """What the document is about."""

    name: ModelNameText
    """The pipeline's name, the same as the last part of the document's key; no model's name."""
    labels: Labels = Field(default_factory=FrozenDict[str, str])
    """Free text for people and tools."""


class PipelineInput(Value):
    """A tensor that comes with the request."""

    name: Text
    """What requests call it."""
    datatype: Datatype | None = None
    """As of the step that takes it, where this is not given."""
    shape: TensorShape | None = None
    """-1 for a dimension that may vary; as of the step that takes it, where this is not given."""


class PipelineOutput(Value):
    """A tensor of the answer."""

    name: Text
    """What answers call it."""
    source: ReferenceText = Field(validation_alias="from", serialization_alias="from")
    """``step.output``; an output's position will do: ``det.0``."""
    datatype: Datatype | None = None
    """As of the step that makes it, where this is not given."""
    shape: TensorShape | None = None
    """As of the step that makes it, where this is not given."""

    @property
    def reference(self) -> Reference:
        return _reference(self.source)


class Step(Value):
    """One model or one transform."""

    name: StepName
    """By which others refer to it."""
    model: ModelNameText | None = None
    """A model of the fleet; by its own routing rules, unless a version or label is given."""
    version: VersionText | None = None
    """This version of the model and no other."""
    label: Annotated[Literal["stable", "canary"], wants("stable or canary")] | None = None
    """The model's stable or canary version, whatever its rules say."""
    endpoint: Endpoint | None = None
    """Another node or gateway that is asked for the model, by the Open Inference Protocol."""
    transform: Text | None = None
    """An installed Python function, by its entry point's name in ``paddlewheel.transforms``."""
    inputs: Annotated[Mapping[Text, ReferenceText], frozen] = Field(
        default_factory=FrozenDict[str, str]
    )
    """Its input to where that comes from: ``request.input`` or ``step.output``."""
    timeout_s: PositiveSeconds | None = None
    """Seconds for this step alone, within those of the request."""

    def references(self) -> Mapping[str, Reference]:
        """Its inputs with their sources taken apart."""
        return {name: _reference(text) for name, text in self.inputs.items()}

    @property
    def is_local_model(self) -> bool:
        return self.model is not None and self.endpoint is None


class PipelineLimits(Value):
    """How long and how much."""

    timeout_s: PositiveSeconds = 10.0
    """Seconds a request may take, all steps together."""
    max_body_mb: Megabytes = 64
    """Size of a request's body, unpacked."""


class PipelineSpec(Value):
    """Which steps, and how they hang together."""

    inputs: Annotated[tuple[PipelineInput, ...], Field(min_length=1)]
    """What comes with a request."""
    outputs: Annotated[tuple[PipelineOutput, ...], Field(min_length=1)]
    """What is answered."""
    steps: Annotated[tuple[Step, ...], Field(min_length=1, max_length=STEPS_MAX)]
    """In any order: a step begins when all that it takes is there, beside others."""
    limits: PipelineLimits = PipelineLimits()
    """How long and how much."""


class PipelineDocument(Value):
    """A whole document, as it stands under ``P/configs/pipelines/<name>``."""

    api_version: Annotated[Literal["paddlewheel/v1"], wants("paddlewheel/v1")] = Field(
        validation_alias="apiVersion", serialization_alias="apiVersion"
    )
    """``paddlewheel/v1``"""
    kind: Annotated[Literal["Pipeline"], wants("Pipeline")]
    """``Pipeline``"""
    metadata: Metadata
    """What the document is about."""
    spec: PipelineSpec
    """Which steps, and how they hang together."""

    @property
    def name(self) -> ModelName:
        """Models and pipelines share one space of names: both answer ``/v2/models/<name>``."""
        return self.metadata.name


def parse_pipeline(text: bytes | str, *, name: ModelName | None) -> PipelineDocument:
    """Parse one pipeline document of YAML or JSON.

    name: the last part of the key it stands under; ``None`` when there is no key yet.
    Raises `ConfigError` with all that is wrong, in the text's order. As slow as `parse_model`: not
    for an event loop that serves.
    """
    document = read(text)
    errors = list(document.errors)
    parsed: PipelineDocument | None = None
    try:
        parsed = PipelineDocument.model_validate(document.value, by_alias=True, by_name=False)
    except ValidationError as exc:
        errors += explain(exc, document, PipelineDocument)
    at_fault = {error.path for error in errors}
    errors += [error for error in _Across(document, name).errors if error.path not in at_fault]
    if errors or parsed is None:
        raise ConfigError(in_order(errors))
    return parsed


class _Across:
    """What no field shows alone. As `registry.spec` does, it looks at what is written."""

    def __init__(self, document: Document, name: ModelName | None) -> None:
        self.errors: list[FieldError] = []
        self._document = document
        self._name_of_key(name)
        inputs = self._names("inputs")
        self._names("outputs")
        steps = self._names("steps")
        self._steps(inputs, steps)

    def _refuse(self, path: Path, message: str) -> None:
        self.errors.append(FieldError(show_path(path), self._document.line(path), message))

    def _written(self, *path: str | int) -> str:
        node = self._document.node(path)
        return node.raw if isinstance(node, Scalar) else ""

    def _has(self, *path: str | int) -> bool:
        node = self._document.node(path)
        return node is not None and not (isinstance(node, Scalar) and node.value is None)

    def _count(self, *path: str | int) -> int:
        node = self._document.node(path)
        return len(node.items) if isinstance(node, SequenceNode) else 0

    def _name_of_key(self, name: ModelName | None) -> None:
        own = self._written("metadata", "name")
        if name is not None and is_model_name(own) and own != name:
            path = ("metadata", "name")
            self._refuse(path, f"want {name!r}, the last part of the key, got {own!r}")

    def _names(self, part: str) -> dict[str, int]:
        """The entries of a list by their names; what is named twice is refused."""
        first_at: dict[str, int] = {}
        for at in range(self._count("spec", part)):
            path: Path = ("spec", part, at, "name")
            name = self._written(*path)
            if name in first_at:
                first = show_path(("spec", part, first_at[name], "name"))
                self._refuse(path, f"{name!r} is taken already, by {first}")
            elif name:
                first_at[name] = at
        return first_at

    def _steps(self, inputs: Mapping[str, int], steps: Mapping[str, int]) -> None:
        used: set[tuple[str, str]] = set()
        waits_for: dict[str, list[tuple[str, Path]]] = {name: [] for name in steps}
        taken_by_typed: set[str] = set()
        """Request inputs whose type a step of this very node knows."""
        for at in range(self._count("spec", "steps")):
            self._kind_of_step(at)
            name = self._written("spec", "steps", at, "name")
            if name == REQUEST:
                self._refuse(("spec", "steps", at, "name"), f"{REQUEST!r} stands for what is asked")
            wired = self._document.node(("spec", "steps", at, "inputs"))
            entries = wired.entries if isinstance(wired, MappingNode) else ()
            if not entries and self._document.node(("spec", "steps", at)) is not None:
                where: Path = ("spec", "steps", at, "inputs")
                if wired is None or isinstance(wired, MappingNode):
                    self._refuse(where, "a step that takes nothing has nothing to wait for")
            for entry in entries:
                path: Path = ("spec", "steps", at, "inputs", entry.key)
                found = self._refers(path, self._written(*path), inputs, steps)
                if found is None:
                    continue
                used.add((found.step, found.name))
                if not found.is_request:
                    waits_for.get(name, []).append((found.step, path))
                elif not self._has("spec", "steps", at, "endpoint"):
                    taken_by_typed.add(found.name)
        for at in range(self._count("spec", "outputs")):
            path = ("spec", "outputs", at, "from")
            found = self._refers(path, self._written(*path), inputs, steps)
            if found is None:
                continue
            if found.is_request:
                self._refuse(path, "want an output of a step, <step>.<output>")
                continue
            used.add((found.step, found.name))
            if self._has("spec", "steps", steps[found.step], "endpoint"):
                self._wants_type("outputs", at, "only a step elsewhere knows it")
        self._unused(inputs, steps, used, taken_by_typed)
        self._cycles(waits_for)

    def _kind_of_step(self, at: int) -> None:
        path: Path = ("spec", "steps", at)
        if not isinstance(self._document.node(path), MappingNode):
            return
        kinds = [kind for kind in ("model", "transform") if self._has(*path, kind)]
        if len(kinds) != 1:
            got = " and ".join(kinds) or "neither"
            self._refuse(path, f"want either model or transform, got {got}")
        if kinds == ["transform"]:
            for field in ("version", "label", "endpoint"):
                if self._has(*path, field):
                    self._refuse((*path, field), "is for steps that are models")
        if self._has(*path, "version") and self._has(*path, "label"):
            self._refuse((*path, "label"), "want either version or label, got both")
        if self._has(*path, "endpoint") and self._has(*path, "label"):
            self._refuse((*path, "label"), "is for models of this fleet: name a version, or none")

    def _refers(
        self, path: Path, text: str, inputs: Mapping[str, int], steps: Mapping[str, int]
    ) -> Reference | None:
        """What ``text`` refers to, where that exists; its shape is checked by the field itself."""
        if "." not in text:
            return None
        found = _reference(text)
        known = inputs if found.is_request else steps
        asked = found.name if found.is_request else found.step
        if asked in known:
            return found
        if asked and known:
            what = "spec.inputs" if found.is_request else "the steps"
            self._refuse(path, f"{asked!r} is none of {what} ({_list(list(known))})")
        return None

    def _unused(
        self,
        inputs: Mapping[str, int],
        steps: Mapping[str, int],
        used: set[tuple[str, str]],
        typed: set[str],
    ) -> None:
        for name, at in inputs.items():
            if (REQUEST, name) not in used:
                self._refuse(("spec", "inputs", at, "name"), f"no step takes {name!r}")
            elif name not in typed:
                self._wants_type("inputs", at, "only steps elsewhere take it")
        useful = {step for step, _ in used}
        for name, at in steps.items():
            if name not in useful and name != REQUEST:
                self._refuse(
                    ("spec", "steps", at, "name"),
                    f"nothing uses {name!r}: neither a step nor spec.outputs",
                )

    def _wants_type(self, part: str, at: int, why: str) -> None:
        for field in ("datatype", "shape"):
            if not self._has("spec", part, at, field):
                self._refuse(("spec", part, at), f"{field} is missing: {why}")

    def _cycles(self, waits_for: Mapping[str, Sequence[tuple[str, Path]]]) -> None:
        """Each circle of steps once, at the input that closes it."""
        state: dict[str, int] = {}
        for start in waits_for:
            trail: list[str] = []
            stack: list[tuple[str, int]] = [(start, 0)]
            while stack:
                step, at = stack.pop()
                if at == 0:
                    if state.get(step):
                        continue
                    state[step] = 1
                    trail.append(step)
                edges = waits_for.get(step, ())
                if at == len(edges):
                    state[step] = 2
                    trail.pop()
                    continue
                stack.append((step, at + 1))
                before, path = edges[at]
                if state.get(before) == 1:
                    circle = [*trail[trail.index(before) :], before]
                    self._refuse(path, f"steps wait for each other: {' <- '.join(circle)}")
                elif before in waits_for:
                    stack.append((before, 0))


def _list(names: Sequence[Any]) -> str:
    return ", ".join(map(str, names[:8])) + (", ..." if len(names) > 8 else "")
