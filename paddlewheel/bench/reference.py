"""What models answer when Paddle runs them alone, in a process that ends with it.

``python -m paddlewheel.bench.reference INPUTS.npz OUTPUTS.npz NAME=FOLDER ...``
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from registry.errors import PaddlewheelError
from registry.inference import Array

_TIMEOUT_S = 300.0


class NoReference(PaddlewheelError):
    """Paddle did not run the model."""


async def run_alone(
    folders: Mapping[str, Path], inputs: Mapping[str, Array], scratch: Path
) -> dict[str, dict[str, Array]]:
    """Each model's outputs by name for these inputs, with the settings a document would default to.

    scratch: a folder for the files in between. Raises `NoReference` with what Paddle said.
    """
    given, made = scratch / "inputs.npz", scratch / "outputs.npz"
    named: dict[str, Any] = dict(inputs)
    np.savez(given, **named)
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "paddlewheel.bench.reference", str(given), str(made),
        *(f"{name}={folder}" for name, folder in folders.items()),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )  # fmt: skip
    try:
        async with asyncio.timeout(_TIMEOUT_S):
            said, _ = await process.communicate()
    except BaseException:
        process.kill()
        await process.wait()
        raise
    if process.returncode != 0:
        raise NoReference(said.decode(errors="replace")[-2000:])
    outputs: dict[str, dict[str, Array]] = {name: {} for name in folders}
    with np.load(made) as arrays:
        for key in arrays.files:
            name, _, output = key.partition("/")
            outputs[name][output] = arrays[key]
    return outputs


def _main(given: Path, made: Path, models: list[str]) -> None:
    from loader.model_files import choose_in
    from loader.program import read_program
    from loader.recipe import Recipe
    from loader.worker_main import Predictor
    from loader.worker_options import settings_of
    from registry.names import ModelName, Version

    with np.load(given) as arrays:
        feeds: dict[str, Array] = {name: arrays[name] for name in arrays.files}
    outputs: dict[str, Any] = {}
    for model in models:
        name, _, where = model.partition("=")
        folder = Path(where)
        settings = settings_of(Recipe(ModelName("reference"), Version(name), where))
        signature = read_program(folder / choose_in(folder).program).signature
        predictor = Predictor(folder, settings, signature)
        for output, array in predictor.run(feeds).items():
            outputs[f"{name}/{output}"] = array
    np.savez(made, **outputs)


if __name__ == "__main__":
    _main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
