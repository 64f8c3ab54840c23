"""Made the program templates of paddlewheel/models, once, with paddle 3.3.1 (needs Paddle):

    python -m tests.export_templates

Nothing runs it later: the templates are committed.
"""

from __future__ import annotations

import gzip
import tempfile
from collections.abc import Callable
from pathlib import Path

from loader import protobuf

TEMPLATES = Path(__file__).parent.parent / "paddlewheel" / "models"


def without_call_stacks(program: bytes) -> bytes:
    """Drop ``op_callstack`` from every operator: it holds the paths of the exporting machine."""
    return _rewrite(
        program, {1: lambda block: _rewrite(block, {4: lambda op: _rewrite(op, {4: _attribute})})}
    )


def _attribute(message: bytes) -> bytes | None:
    for number, value in protobuf.fields(memoryview(message)):
        if number == 1 and protobuf.text(value) == "op_callstack":
            return None
    return message


def _rewrite(message: bytes, changes: dict[int, Callable[[bytes], bytes | None]]) -> bytes:
    out = bytearray()
    for number, value in protobuf.fields(memoryview(message)):
        if isinstance(value, int):
            out += protobuf.encode_varint(number << 3) + protobuf.encode_varint(value)
            continue
        content: bytes | None = bytes(value)
        if number in changes:
            content = changes[number](bytes(value))
        if content is not None:
            out += protobuf.encode_varint(number << 3 | 2)
            out += protobuf.encode_varint(len(content)) + content
    return bytes(out)


def main() -> None:
    import paddle
    from paddle import nn
    from paddle.static import InputSpec

    class Mlp(nn.Layer):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(64, 128)
            self.last = nn.Linear(128, 10)

        def forward(self, x):  # type: ignore[no-untyped-def]
            return self.last(nn.functional.relu(self.first(x)))

    with tempfile.TemporaryDirectory() as folder:
        mlp, resnet = f"{folder}/mlp", f"{folder}/resnet"
        small = Mlp()
        with paddle.pir_utils.OldIrGuard():
            paddle.jit.save(small, mlp, input_spec=[InputSpec([None, 64], "float32", "x")])
        legacy = without_call_stacks(Path(f"{mlp}.pdmodel").read_bytes())
        net = paddle.vision.models.resnet50(num_classes=1000)
        net.eval()
        paddle.jit.save(net, resnet, input_spec=[InputSpec([None, 3, 224, 224], "float32", "x")])
        pir = Path(f"{resnet}.json").read_bytes()
    for name, program in (("mlp.pdmodel.gz", legacy), ("resnet50.json.gz", pir)):
        (TEMPLATES / name).write_bytes(gzip.compress(program, 9, mtime=0))


if __name__ == "__main__":
    main()
