"""Whether tensors fit a signature: said before any worker is touched."""

from __future__ import annotations

from collections.abc import Mapping

from registry.inference import Array, BadInput, Signature, numpy_dtype


def check_feeds(signature: Signature, feeds: Mapping[str, Array]) -> None:
    """Raises `BadInput` naming the input that is missing, unknown, or of wrong type or shape."""
    for spec in signature.inputs:
        array = feeds.get(spec.name)
        if array is None:
            raise BadInput(f"input {spec.name!r} is missing")
        if array.dtype != numpy_dtype(spec.dtype):
            raise BadInput(f"input {spec.name!r}: want {spec.dtype}, got {array.dtype.name}")
        shape = array.shape
        if shape != spec.shape and (
            len(shape) != len(spec.shape)
            or any(want not in (-1, have) for want, have in zip(spec.shape, shape, strict=True))
        ):
            raise BadInput(f"input {spec.name!r}: want shape {list(spec.shape)}, got {list(shape)}")
    if len(feeds) != len(signature.inputs):
        known = {spec.name for spec in signature.inputs}
        unknown = next(name for name in feeds if name not in known)
        raise BadInput(f"input {unknown!r} is unknown; inputs: {', '.join(sorted(known))}")
