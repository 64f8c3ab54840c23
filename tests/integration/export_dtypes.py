"""Export one model for each dtype and rank with Paddle itself. Run as a script: FOLDER."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import paddle

RANKS = {"scalar": 0, "vector": 1, "square": 2}
DTYPES = (
    "bool", "uint8", "int8", "int16", "int32", "int64", "float16", "bfloat16", "float32",
    "float64",
)  # fmt: skip


class Flatten(paddle.nn.Layer):
    """The input's own values, and the same as float32 (halved, so that something is computed)."""

    def forward(self, x: Any) -> Any:
        return paddle.reshape(x, [-1]), paddle.cast(x, "float32") * 0.5


def main(folder: Path) -> None:
    for dtype in DTYPES:
        for name, rank in RANKS.items():
            spec = paddle.static.InputSpec([-1] * rank, dtype, name="x")
            paddle.jit.save(Flatten(), str(folder / f"{dtype}-{name}" / "inference"), [spec])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
