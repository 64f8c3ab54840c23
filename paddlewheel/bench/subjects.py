"""Models to measure with: several versions whose answers tell them apart."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from paddlewheel.models import make_mlp, reference
from registry.errors import PaddlewheelError
from registry.inference import Array

MODEL = "bench"
VERSIONS = ("1", "2", "3", "4")
HEADER = ("X-Canary", "1")
"""Carried by the requests that a canary is to take."""


class TooAlike(PaddlewheelError):
    """Two versions answer the same within the tolerance: a mixed-up answer could not be seen."""


@dataclass(frozen=True, slots=True)
class Subject:
    """A model's versions, one input, and what each version must answer to it."""

    folders: Mapping[str, Path]
    inputs: Mapping[str, Array]
    expected: Mapping[str, Mapping[str, Array]]
    rtol: float = 1e-4
    atol: float = 1e-5
    json_every: int = 2
    """One request in so many has JSON tensors, the others have binary ones."""

    def __post_init__(self) -> None:
        """Raise `TooAlike`."""
        for (one, first), (other, second) in itertools.combinations(self.expected.items(), 2):
            if all(
                np.allclose(first[name], second[name], rtol=10 * self.rtol, atol=10 * self.atol)
                for name in first
            ):
                raise TooAlike(f"versions {one} and {other} answer alike")

    def save_expected(self, path: Path) -> None:
        """Write what `paddlewheel.bench.judges.version_answers` reads."""
        arrays: dict[str, Any] = {
            f"{version}/{name}": array
            for version, outputs in self.expected.items()
            for name, array in outputs.items()
        }
        np.savez(path, **arrays)

    def document(self, live: str, canary: str | None = None) -> str:
        """The document that asks for this; ``bake_s: 0``, so that what is replaced is unloaded."""
        lines = [
            "apiVersion: paddlewheel/v1",
            "kind: Model",
            f"metadata: {{name: {MODEL}}}",
            "spec:",
            f'  live: "{live}"',
            "  versions:",
            *(
                f'    - {{version: "{version}", source: "{folder.as_uri()}"}}'
                for version, folder in self.folders.items()
            ),
        ]
        if canary is not None:
            name, value = HEADER
            rule = f'{{header: {{name: {name}, equals: "{value}"}}}}'
            lines.append(f'  canary: {{version: "{canary}", rules: [{rule}]}}')
        shapes = ", ".join(f"{name}: {list(a.shape)}" for name, a in self.inputs.items())
        lines += [f"  warmup: {{shapes: {{{shapes}}}}}", "  rollback: {bake_s: 0}", ""]
        return "\n".join(lines)


def one_version(model: str, source: Path) -> str:
    """A document of one version and nothing else."""
    return (
        f"apiVersion: paddlewheel/v1\nkind: Model\nmetadata: {{name: {model}}}\nspec:\n"
        f'  live: "1"\n  versions: [{{version: "1", source: "{source.as_uri()}"}}]\n'
        f"  rollback: {{bake_s: 0}}\n"
    )


def mlp_subject(folder: Path) -> Subject:
    """A small MLP, ``x: float32 (1, 64)``; the last output column is the version's number."""
    inputs = {"x": np.random.default_rng(7).standard_normal((1, 64), dtype=np.float32)}
    folders = {
        version: make_mlp(folder / version, seed=int(version), tag=float(version))
        for version in VERSIONS
    }
    expected = {
        version: {"fetch_name_0": reference(where, inputs["x"])}
        for version, where in folders.items()
    }
    return Subject(folders, inputs, expected)
