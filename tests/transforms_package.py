"""An installed package of transforms, some of which misbehave, for processes that a test starts.

A folder with a module and its ``.dist-info`` on the path is all that installing comes to.
"""

from __future__ import annotations

from pathlib import Path

_MODULE = '''
import os, signal, time
import numpy as np
from registry.transforms import transform

ROWS = {"x": ("float32", [-1, 64])}


@transform(inputs=ROWS, outputs=ROWS)
def double(x):
    return {"x": x * np.float32(2)}


@transform(inputs=ROWS, outputs=ROWS)
def keep_positive(x):
    """The rows whose first value is positive: perhaps none."""
    return {"x": np.ascontiguousarray(x[x[:, 0] > 0])}


@transform(inputs={"raw": ("bytes", [1])}, outputs=ROWS)
def decode(raw):
    """A row of 64 float32 for each 256 bytes."""
    data = raw[0]
    if not data or len(data) % 256:
        raise ValueError(f"want rows of 256 bytes, got {len(data)} bytes")
    return {"x": np.frombuffer(data, np.float32).reshape(-1, 64)}


@transform(inputs={"y": ("float32", [-1, -1])}, outputs={"texts": ("bytes", [-1])})
def tag(y):
    """The last column, in words."""
    texts = np.empty(len(y), object)
    texts[:] = [f"tag {row[-1]:g}".encode() for row in y]
    return {"texts": texts}


@transform(inputs=ROWS, outputs={**ROWS, "pid": ("int64", [])})
def naughty(x):
    """The first value of the first row says what to do."""
    match int(x[0, 0]):
        case 1:
            while True:
                pass
        case 2:
            os.kill(os.getpid(), signal.SIGSEGV)
        case 3:
            raise RuntimeError("it went wrong")
        case 4:
            return {"x": x.astype(np.float64), "pid": np.array(os.getpid())}
        case 5:
            return {"x": x}
        case 6:
            time.sleep(float(x[0, 1]) or 0.3)
        case 7:
            print("said to nobody")
    return {"x": x, "pid": np.array(os.getpid(), np.int64)}


def no_transform(x):
    return {"x": x}
'''

_ENTRY_POINTS = """[paddlewheel.transforms]
double = pw_test_transforms:double
keep-positive = pw_test_transforms:keep_positive
decode = pw_test_transforms:decode
tag = pw_test_transforms:tag
naughty = pw_test_transforms:naughty
not-declared = pw_test_transforms:no_transform
not-there = pw_test_transforms:missing
broken-import = pw_test_transforms_broken:anything
"""

USABLE = frozenset({"double", "keep-positive", "decode", "tag", "naughty"})


def write_package(folder: Path) -> Path:
    """Returns ``folder``, to be put on PYTHONPATH."""
    info = folder / "pw_test_transforms-1.0.dist-info"
    info.mkdir(parents=True)
    (folder / "pw_test_transforms.py").write_text(_MODULE)
    (folder / "pw_test_transforms_broken.py").write_text("raise SystemExit('no')\n")
    (info / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: pw-test-transforms\nVersion: 1.0\n"
    )
    (info / "entry_points.txt").write_text(_ENTRY_POINTS)
    return folder
