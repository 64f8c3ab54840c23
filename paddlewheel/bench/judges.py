"""Judges that a plan names, made anew in the load generator's own process."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from paddlewheel.bench.checks import outputs_of_version
from paddlewheel.bench.load import Verify
from registry.inference import Array


def version_answers(expected: str, rtol: float, atol: float) -> Verify:
    """Whatever version the answer names, its numbers must be that version's.

    expected: an npz file of arrays named ``version/output``
    (`paddlewheel.bench.subjects.Subject.save_expected`).
    """
    outputs: dict[str, dict[str, Array]] = {}
    with np.load(Path(expected)) as arrays:
        for key in arrays.files:
            version, _, name = key.partition("/")
            outputs.setdefault(version, {})[name] = arrays[key]
    return outputs_of_version(outputs, rtol=rtol, atol=atol)
