"""Judges that a plan names, made anew in the load generator's own process."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from paddlewheel.bench.checks import outputs_of_version
from paddlewheel.bench.load import Verify


def version_answers(expected: Mapping[str, Mapping[str, Any]], rtol: float = 1e-4) -> Verify:
    """Whatever version the answer names, its numbers must be that version's.

    expected: version to output name to nested lists of float32.
    """
    arrays = {
        version: {name: np.asarray(values, np.float32) for name, values in outputs.items()}
        for version, outputs in expected.items()
    }
    return outputs_of_version(arrays, rtol=rtol)
