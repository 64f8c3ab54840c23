"""Small real models, made without Paddle, for the bench, the demo and the tests."""

from paddlewheel.models.small import (
    make_large,
    make_mlp,
    make_resnet50,
    make_two_output,
    read_weights,
    reference,
    reference_two_output,
)

__all__ = [
    "make_large", "make_mlp", "make_resnet50", "make_two_output",
    "read_weights", "reference", "reference_two_output",
]  # fmt: skip
