"""How much memory a replica will take, before anything is allocated. Pure."""

from __future__ import annotations

from math import ceil

from loader.errors import NotAdmitted
from loader.recipe import Recipe

BASE_MB = 192
"""A worker with nothing loaded, Paddle's own buffers and the activations of a small input."""

MB_PER_MB_OF_FILES = 2.5
"""Weights once as loaded and, with oneDNN, once more in its own layout (measured on paddle 3.3.1,
private memory after warm-up: ResNet50 of 103 MB 273 MB, a 105 MB MLP 237 MB, PP-OCRv4 recognition
of 11 MB 190 MB at 1x3x48x320)."""


def required_mb(recipe: Recipe, files_bytes: int) -> int:
    """Memory of one replica: the document's ``memoryMB``, else an estimate from the files' size.

    The estimate knows nothing of large batches, whose activations can weigh more than everything
    else (PP-OCRv4 recognition at batch 8: 1.2 GB); a document that serves those should say.
    """
    if recipe.memory_mb is not None:
        return recipe.memory_mb
    return BASE_MB + ceil(files_bytes / (1 << 20) * MB_PER_MB_OF_FILES)


def check_memory(required_mb: int, available_mb: int, *, replicas: int = 1) -> None:
    """Raise `NotAdmitted` (memory) when ``replicas`` of them do not fit, with the numbers."""
    total_mb = required_mb * replicas
    if total_mb > available_mb:
        each = f" ({replicas} replicas of {required_mb} MB)" if replicas > 1 else ""
        raise NotAdmitted(
            "memory", f"needs {total_mb} MB{each}, {max(available_mb, 0)} MB are free"
        )
