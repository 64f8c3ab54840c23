"""Small real models, made without Paddle: for the bench, the demo and the tests.

Each writes ``inference.json`` (or ``.pdmodel``) and ``inference.pdiparams`` into a folder. In each
the last column of the first output is exactly ``tag``, whatever the input: an answer says by itself
which weights gave it. The other columns depend on the rest of the weights. A tag that float32 does
not hold exactly (a whole number above 2**24, say) is a `ValueError`.
"""

from __future__ import annotations

import gzip
import itertools
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Literal

import numpy as np

from loader.params import ParamsFile, write_params
from loader.program import read_program
from paddlewheel.models.pir import ProgramWriter
from registry.inference import Array

PARAMS = "inference.pdiparams"
PIR = "inference.json"
LEGACY = "inference.pdmodel"

LEGACY_SHAPE = (64, 128, 10)
"""Features, hidden and classes of the one legacy program that comes with the package."""


def make_mlp(
    folder: Path | str,
    *,
    seed: int = 0,
    tag: float = 0.0,
    features: int = 64,
    hidden: int = 128,
    classes: int = 10,
    layers: int = 2,
    format: Literal["pir", "legacy"] = "pir",
) -> Path:
    """``x: float32 (batch, features)`` to ``float32 (batch, classes)``; relu between the layers.

    The legacy form (Paddle 2's) exists for the default sizes only, `LEGACY_SHAPE`.
    """
    where = _folder(folder)
    widths = [features, *[hidden] * (layers - 1), classes]
    if format == "legacy":
        if (features, hidden, classes) != LEGACY_SHAPE or layers != 2:
            raise ValueError(f"the legacy program has features, hidden, classes {LEGACY_SHAPE}")
        (where / LEGACY).write_bytes(_template("mlp.pdmodel.gz"))
    else:
        _save_mlp(widths, where / PIR)
    write_params(where / PARAMS, _dense_weights(widths, seed=seed, tag=tag))
    return where


def make_large(folder: Path | str, *, mb: int = 100, seed: int = 0, tag: float = 0.0) -> Path:
    """A deep MLP of about ``mb`` MB in 1 MB layers: many parameters, cheap to load.

    ``x: float32 (batch, 512)`` to ``float32 (batch, 512)``.
    """
    return make_mlp(
        folder, seed=seed, tag=tag, features=512, hidden=512, classes=512, layers=max(mb, 1)
    )


def make_two_output(folder: Path | str, *, seed: int = 0, tag: float = 0.0) -> Path:
    """Two inputs of different types, three outputs.

    ``x: float32 (batch, 32)`` and ``ids: int64 (batch, 6)`` (each 0 to 49) to ``scores: float32
    (batch, 8)``, scores and mean embedding together ``float32 (batch, 24)``, ``argmax(scores):
    int64 (batch,)``.
    """
    where = _folder(folder)
    program = ProgramWriter()
    bias = program.parameter("linear_0.b_0", [8])
    weight = program.parameter("linear_0.w_0", [32, 8])
    table = program.parameter("embedding_0.w_0", [50, 16])
    x = program.data("x", [-1, 32])
    ids = program.data("ids", [-1, 6], "int64")
    scores = program.add(program.matmul(x, weight), bias)
    meaning = program.mean(program.embedding(ids, table), axis=1)
    program.fetch(scores)
    program.fetch(program.concat([scores, meaning]))
    program.fetch(program.argmax(scores))
    program.save(where / PIR)
    weights = _dense_weights([32, 8], seed=seed, tag=tag)
    rng = np.random.default_rng([seed, 1])
    weights["embedding_0.w_0"] = rng.standard_normal((50, 16), dtype=np.float32)
    write_params(where / PARAMS, weights)
    return where


def make_resnet50(folder: Path | str, *, seed: int = 0, tag: float = 0.0) -> Path:
    """ResNet50 as paddle.vision builds it, with random weights: 267 tensors, 102 MB.

    ``x: float32 (batch, 3, 224, 224)`` to ``float32 (batch, 1000)``.
    """
    where = _folder(folder)
    (where / PIR).write_bytes(_template("resnet50.json.gz"))
    rng = np.random.default_rng(seed)
    weights: dict[str, Array] = {}
    for wanted in read_program(where / PIR).persistables:
        dims = wanted.dims
        if len(dims) > 1:
            fan_in = int(np.prod(dims[1:])) if len(dims) == 4 else dims[0]
            scale = np.float32(np.sqrt(1.0 / fan_in))
            weights[wanted.name] = rng.standard_normal(dims, dtype=np.float32) * scale
        else:  # batch norm: scale w_0, shift b_0, mean w_1, variance w_2
            ones = wanted.name.endswith((".w_0", ".w_2"))
            weights[wanted.name] = np.full(dims, 1.0 if ones else 0.0, np.float32)
    (last,) = (name for name in weights if weights[name].shape == (2048, 1000))
    weights[last][:, -1] = 0.0
    bias = np.zeros(1000, np.float32)
    bias[-1] = _exact(tag)
    weights[last.replace(".w_0", ".b_0")] = bias
    write_params(where / PARAMS, weights)
    return where


def read_weights(folder: Path | str) -> Mapping[str, Array]:
    """The weights of such a folder by name, as views of the file."""
    where = Path(folder)
    program = where / (PIR if (where / PIR).exists() else LEGACY)
    names = [wanted.name for wanted in read_program(program).persistables]
    return ParamsFile.open(where / PARAMS, names)


def reference(folder: Path | str, x: Array) -> Array:
    """What `make_mlp` or `make_large` should answer, by numpy. Equal within rounding (1e-5)."""
    weights = read_weights(folder)
    value = x
    layers = len(weights) // 2
    for layer in range(layers):
        value = value @ weights[f"linear_{layer}.w_0"] + weights[f"linear_{layer}.b_0"]
        if layer < layers - 1:
            value = np.maximum(value, 0)
    return value


def reference_two_output(folder: Path | str, x: Array, ids: Array) -> tuple[Array, Array, Array]:
    """What `make_two_output` should answer, in the order of its outputs."""
    weights = read_weights(folder)
    scores = x @ weights["linear_0.w_0"] + weights["linear_0.b_0"]
    meaning = weights["embedding_0.w_0"][ids].mean(axis=1)
    return scores, np.concatenate([scores, meaning], axis=1), scores.argmax(axis=1)


def _dense_weights(widths: list[int], *, seed: int, tag: float) -> dict[str, Array]:
    rng = np.random.default_rng(seed)
    weights: dict[str, Array] = {}
    for layer, (rows, columns) in enumerate(itertools.pairwise(widths)):
        scale = np.float32(np.sqrt(2.0 / rows))
        matrix = rng.standard_normal((rows, columns), dtype=np.float32) * scale
        bias = rng.standard_normal(columns, dtype=np.float32) * np.float32(0.1)
        if layer == len(widths) - 2:
            matrix[:, -1] = 0.0  # 0 * h + tag is tag itself
            bias[-1] = _exact(tag)
        weights[f"linear_{layer}.w_0"] = matrix
        weights[f"linear_{layer}.b_0"] = bias
    return weights


def _save_mlp(widths: list[int], path: Path) -> None:
    program = ProgramWriter()
    layers = len(widths) - 1
    parameters = [
        (
            program.parameter(f"linear_{layer}.w_0", widths[layer : layer + 2]),
            program.parameter(f"linear_{layer}.b_0", [widths[layer + 1]]),
        )
        for layer in range(layers)
    ]
    value = program.data("x", [-1, widths[0]])
    for layer, (weight, bias) in enumerate(parameters):
        value = program.add(program.matmul(value, weight), bias)
        if layer < layers - 1:
            value = program.relu(value)
    program.fetch(value)
    program.save(path)


def _exact(tag: float) -> np.float32:
    if float(np.float32(tag)) != tag:
        raise ValueError(f"float32 does not hold the tag {tag} exactly")
    return np.float32(tag)


def _folder(folder: Path | str) -> Path:
    where = Path(folder)
    where.mkdir(parents=True, exist_ok=True)
    return where


def _template(name: str) -> bytes:
    return gzip.decompress(resources.files("paddlewheel.models").joinpath(name).read_bytes())
