"""What of a path routing needs to know: the model, and a version or label that pins (pure)."""

from __future__ import annotations

from typing import NamedTuple

_VERBS = (":predict", ":classify", ":regress", ":explain")


class ModelPath(NamedTuple):
    """A path about one model, whatever it asks of it."""

    model: str
    version: str | None = None
    label: str | None = None
    is_inference: bool = False
    is_pipeline: bool = False
    """Whether only a pipeline can be meant; the other paths may be about one too."""


def model_path(segments: tuple[str, ...]) -> ModelPath | None:
    """Understand ``/v1/models/...``, ``/v2/models/...`` and ``/v1/pipelines/...``.

    ``None`` for any other path.

    Endpoints below a model are the nodes' business: what none of them knows, they answer 404.
    """
    if segments[:2] == ("v1", "pipelines") and len(segments) > 2:
        is_call = segments[3:] == ("predict",)
        return ModelPath(segments[2], is_inference=is_call, is_pipeline=True)
    if len(segments) < 3 or segments[1] != "models" or segments[0] not in ("v1", "v2"):
        return None
    match segments[2:]:
        case (model, "versions", version, *rest):
            version, is_call = _call(version)
            return ModelPath(model, version, None, is_call or _is_inference(rest))
        case (model, "labels", label, *rest):
            label, is_call = _call(label)
            return ModelPath(model, None, label, is_call or _is_inference(rest))
        case (model, *rest):
            model, is_call = _call(model)
            return ModelPath(model, None, None, is_call or _is_inference(rest))
        case _:
            return None


def _is_inference(rest: list[str]) -> bool:
    return rest == ["infer"] or rest == ["predict"]


def _call(segment: str) -> tuple[str, bool]:
    """TensorFlow Serving's ``name:verb``."""
    for verb in _VERBS:
        if segment.endswith(verb):
            return segment.removesuffix(verb), True
    return segment, False
