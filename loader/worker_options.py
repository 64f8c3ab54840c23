"""Which predictor settings a document may ask for: one table, checked before Paddle sees them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from loader.errors import LoadFailed
from loader.recipe import Recipe


@dataclass(frozen=True, slots=True)
class Settings:
    """A recipe's predictor part, checked. What is ``None`` is left to Paddle."""

    gpu: int | None
    """The GPU's index, or ``None`` for the CPU."""
    threads: int
    precision: str
    onednn: bool
    onednn_cache: int | None
    """How many input shapes' primitives oneDNN keeps; ``None``: Paddle's own default."""
    ir_optim: bool
    optimization_level: int | None
    gpu_memory_mb: int
    passes_deleted: tuple[str, ...]


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool)


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 1


def _is_level(value: Any) -> bool:
    return type(value) is int and 0 <= value <= 3


def _is_names(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(name, str) for name in value)


_KNOWN: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "onednn": (_is_bool, "true or false"),
    "onednn_cache": (_is_count, "a whole number from 1"),
    "ir_optim": (_is_bool, "true or false"),
    "optimization_level": (_is_level, "0, 1, 2 or 3"),
    "gpu_memory_mb": (_is_count, "a whole number of MB from 1"),
    "passes_deleted": (_is_names, "a list of pass names"),
}

_REFUSED: Mapping[str, str] = {
    "memory_optim": "paddle 3.3.1 raises from it",
    "trt": "this build of Paddle has no TensorRT",
}

PRECISIONS: Mapping[str, frozenset[str]] = {
    "cpu": frozenset({"fp32", "bf16", "int8"}),
    "gpu": frozenset({"fp32", "fp16", "bf16", "int8"}),
}


def settings_of(recipe: Recipe) -> Settings:
    """Raises `LoadFailed` naming the option at fault."""
    for name, value in recipe.options.items():
        if name in _REFUSED:
            raise LoadFailed(f"predictor.options.{name}: refused, {_REFUSED[name]}")
        if name not in _KNOWN:
            raise LoadFailed(
                f"predictor.options.{name}: unknown option; known: {', '.join(sorted(_KNOWN))}"
            )
        fits, wanted = _KNOWN[name]
        if not fits(value):
            raise LoadFailed(f"predictor.options.{name}: want {wanted}, got {value!r}")
    kind, _, index = recipe.device.partition(":")
    if kind not in PRECISIONS or (kind == "gpu" and not (index or "0").isdecimal()):
        raise LoadFailed(f"placement.device: want cpu, gpu or gpu:<n>, got {recipe.device!r}")
    if recipe.precision not in PRECISIONS[kind]:
        raise LoadFailed(f"predictor.precision: {recipe.precision} is not possible on {kind}")
    options = recipe.options
    onednn = bool(options.get("onednn", kind == "cpu"))
    if kind == "cpu" and recipe.precision != "fp32" and not onednn:
        raise LoadFailed(f"predictor.precision: {recipe.precision} on the CPU needs oneDNN")
    return Settings(
        gpu=int(index or 0) if kind == "gpu" else None,
        threads=recipe.threads,
        precision=recipe.precision,
        onednn=onednn,
        onednn_cache=options.get("onednn_cache"),
        ir_optim=bool(options.get("ir_optim", True)),
        optimization_level=options.get("optimization_level"),
        gpu_memory_mb=int(options.get("gpu_memory_mb", 512)),
        passes_deleted=tuple(options.get("passes_deleted", ())),
    )
