"""How the tensors of a pipeline's steps fit together, given the versions chosen (pure)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from registry.inference import Signature, TensorSpec
from registry.pipeline_spec import PipelineInput, PipelineOutput, Reference
from router.pipeline.errors import PipelineBroken
from router.pipeline.plan import Plan
from router.tensors import DATATYPES, DTYPE_OF


@dataclass(frozen=True, slots=True)
class Wiring:
    """A plan with every reference looked up in the signatures at hand."""

    signature: Signature
    """Of the pipeline as a whole: what requests bring and what answers hold."""
    steps: Mapping[str, Signature | None]
    """What each step takes and returns; ``None`` for a step elsewhere."""
    sources: Mapping[str, Mapping[str, Reference]]
    """For each step, its input to where that comes from, positions turned into names."""
    outputs: Mapping[str, Reference]
    """The same for the outputs of the whole."""


def wire(plan: Plan, signatures: Mapping[str, Signature | None]) -> Wiring:
    """Look everything up.

    signatures: of each step, ``None`` for one elsewhere, of which nothing is known.
    Raises `PipelineBroken` that names the step whose tensors do not fit.
    """
    try:
        sources = {
            name: {
                name_in: _named(source, signatures) for name_in, source in planned.inputs.items()
            }
            for name, planned in plan.steps.items()
        }
        spec = plan.document.spec
        outputs = {each.name: _named(each.reference, signatures) for each in spec.outputs}
        for name, by_input in sources.items():
            _check_step(name, by_input, signatures)
        signature = Signature(
            tuple(_input(each, sources, signatures) for each in spec.inputs),
            tuple(_output(each, outputs[each.name], signatures) for each in spec.outputs),
        )
    except _Misfit as exc:
        raise PipelineBroken(plan.name, str(exc)) from None
    return Wiring(signature, signatures, sources, outputs)


def check_known(plan: Plan, transforms: Mapping[str, Signature]) -> None:
    """Look up what can be known without any model: how transforms are wired.

    transforms: all that the plan names. Raises `PipelineBroken`.
    """
    signatures = {
        name: None if planned.step.transform is None else transforms[planned.step.transform]
        for name, planned in plan.steps.items()
    }
    try:
        for name, planned in plan.steps.items():
            by_input = {key: _named(ref, signatures) for key, ref in planned.inputs.items()}
            _check_step(name, by_input, signatures)
        for each in plan.document.spec.outputs:
            _named(each.reference, signatures)
    except _Misfit as exc:
        raise PipelineBroken(plan.name, str(exc)) from None


class _Misfit(Exception):
    """Said without the pipeline's name."""


def _named(source: Reference, signatures: Mapping[str, Signature | None]) -> Reference:
    """The reference by name: an output may be referred to by its position."""
    signature = None if source.is_request else signatures[source.step]
    if signature is None or signature.output(source.name) is not None:
        return source
    if source.name.isascii() and source.name.isdigit():
        at = int(source.name[:4])
        if at < len(signature.outputs):
            return source._replace(name=signature.outputs[at].name)
    known = ", ".join(repr(spec.name) for spec in signature.outputs)
    raise _Misfit(f"step {source.step!r} has no output {source.name!r}; it returns {known}")


def _check_step(
    name: str, sources: Mapping[str, Reference], signatures: Mapping[str, Signature | None]
) -> None:
    signature = signatures[name]
    if signature is None:
        return
    for spec in signature.inputs:
        if spec.name not in sources:
            raise _Misfit(f"step {name!r} takes {spec.name!r}, which nothing gives it")
    for name_in, source in sources.items():
        wanted = signature.input(name_in)
        if wanted is None:
            known = ", ".join(repr(spec.name) for spec in signature.inputs)
            raise _Misfit(f"step {name!r} has no input {name_in!r}; it takes {known}")
        given = None if source.is_request else signatures[source.step]
        made = None if given is None else given.output(source.name)
        if made is not None and not _fits(made, wanted):
            raise _Misfit(
                f"step {name!r} takes {name_in!r} as {_shown(wanted)}, {source} is {_shown(made)}"
            )


def _fits(made: TensorSpec, wanted: TensorSpec) -> bool:
    return (
        made.dtype == wanted.dtype
        and len(made.shape) == len(wanted.shape)
        and all(-1 in (a, b) or a == b for a, b in zip(made.shape, wanted.shape, strict=True))
    )


def _shown(spec: TensorSpec) -> str:
    return f"{DATATYPES.get(spec.dtype, spec.dtype)} {list(spec.shape)}"


def _input(
    declared: PipelineInput,
    sources: Mapping[str, Mapping[str, Reference]],
    signatures: Mapping[str, Signature | None],
) -> TensorSpec:
    """Its type is what the steps take, narrowed by what the document says."""
    found: TensorSpec | None = None
    for step, by_input in sources.items():
        for name_in, source in by_input.items():
            signature = signatures[step]
            if not source.is_request or source.name != declared.name or signature is None:
                continue
            spec = signature.input(name_in)
            assert spec is not None  # checked before
            if found is None:
                found = replace(spec, name=declared.name)
            elif not _fits(spec, found):
                raise _Misfit(
                    f"step {step!r} takes {source} as {_shown(spec)}, "
                    f"another step as {_shown(found)}"
                )
            else:
                found = replace(found, shape=_narrowed(found.shape, spec.shape))
    return _declared(declared, found)


def _narrowed(one: tuple[int, ...], other: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(b if a == -1 else a for a, b in zip(one, other, strict=True))


def _output(
    declared: PipelineOutput, source: Reference, signatures: Mapping[str, Signature | None]
) -> TensorSpec:
    signature = signatures[source.step]
    found = None if signature is None else signature.output(source.name)
    return _declared(declared, None if found is None else replace(found, name=declared.name))


def _declared(declared: PipelineInput | PipelineOutput, found: TensorSpec | None) -> TensorSpec:
    dtype = None if declared.datatype is None else DTYPE_OF[declared.datatype]
    if found is None:
        # A document without either was refused: nobody else knows.
        assert dtype is not None
        assert declared.shape is not None
        return TensorSpec(declared.name, dtype, declared.shape)
    said = TensorSpec(
        declared.name,
        found.dtype if dtype is None else dtype,
        found.shape if declared.shape is None else declared.shape,
    )
    if not _fits(said, found):
        raise _Misfit(f"{declared.name!r} is declared {_shown(said)}, and is {_shown(found)}")
    return replace(said, shape=_narrowed(said.shape, found.shape))
