"""May this signature take the other's place? Pure; the rules of SPEC section 3."""

from __future__ import annotations

from registry.errors import Bug
from registry.inference import Signature, TensorSpec


def breach(old: Signature, new: Signature, mode: str) -> str | None:
    """Why ``new`` may not replace ``old``, or ``None`` when it may. The reason names the tensor.

    strict: the same inputs and outputs: names, dtypes, ranks, dims. loose: what the old one
    accepted is still accepted, what it returned is still returned. none: anything goes.
    The order of the tensors never counts: requests name them.
    """
    match mode:
        case "none":
            return None
        case "strict":
            return _different("input", old.inputs, new.inputs) or _different(
                "output", old.outputs, new.outputs
            )
        case "loose":
            return _accepts_less(old.inputs, new.inputs) or _returns_less(old.outputs, new.outputs)
        case _:
            raise Bug(f"no such compatibility: {mode!r}")


def _different(kind: str, old: tuple[TensorSpec, ...], new: tuple[TensorSpec, ...]) -> str | None:
    olds, news = _by_name(old), _by_name(new)
    for name, was in olds.items():
        now = news.get(name)
        if now is None:
            return f"{kind} {name!r} is gone"
        changed = _type_change(kind, was, now)
        if changed is not None:
            return changed
        if now.shape != was.shape:
            return f"{kind} {name!r} was {_dims(was)}, is {_dims(now)}"
    return next((f"{kind} {name!r} is new" for name in news if name not in olds), None)


def _accepts_less(old: tuple[TensorSpec, ...], new: tuple[TensorSpec, ...]) -> str | None:
    olds, news = _by_name(old), _by_name(new)
    for name, was in olds.items():
        now = news.get(name)
        if now is None:
            return f"input {name!r} is gone, requests that send it would be refused"
        changed = _type_change("input", was, now)
        if changed is not None:
            return changed
        if any(dim not in (-1, before) for before, dim in zip(was.shape, now.shape, strict=True)):
            return f"input {name!r} took {_dims(was)}, takes only {_dims(now)}"
    return next(
        (f"input {name!r} is new, requests do not send it" for name in news if name not in olds),
        None,
    )


def _returns_less(old: tuple[TensorSpec, ...], new: tuple[TensorSpec, ...]) -> str | None:
    news = _by_name(new)
    for was in old:
        now = news.get(was.name)
        if now is None:
            return f"output {was.name!r} is gone"
        changed = _type_change("output", was, now)
        if changed is not None:
            return changed
        if any(before not in (-1, dim) for before, dim in zip(was.shape, now.shape, strict=True)):
            return f"output {was.name!r} was {_dims(was)}, is {_dims(now)}"
    return None


def _type_change(kind: str, was: TensorSpec, now: TensorSpec) -> str | None:
    if now.dtype != was.dtype:
        return f"{kind} {was.name!r} was {was.dtype}, is {now.dtype}"
    if len(now.shape) != len(was.shape):
        return f"{kind} {was.name!r} had rank {len(was.shape)}, has {len(now.shape)}"
    return None


def _by_name(specs: tuple[TensorSpec, ...]) -> dict[str, TensorSpec]:
    return {spec.name: spec for spec in specs}


def _dims(spec: TensorSpec) -> str:
    return str(list(spec.shape))
