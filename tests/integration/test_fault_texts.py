"""Provoke on the installed Paddle what tests/unit/test_faults.py has recorded of it.

Each group of cases runs in a process of its own: a limit of memory or a crash stays there.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from loader.faults import FaultClass, classify

PROVOKE = """
import json, os, resource, sys
import numpy as np
import paddle
from paddle.static import InputSpec

folder, group = sys.argv[1], sys.argv[2]

class Mlp(paddle.nn.Layer):
    def __init__(self):
        super().__init__()
        self.a = paddle.nn.Linear(4, 8)
        self.b = paddle.nn.Linear(8, 2)
    def forward(self, x):
        return self.b(paddle.nn.functional.relu(self.a(x)))

class Embedding(paddle.nn.Layer):
    def __init__(self):
        super().__init__()
        self.a = paddle.nn.Embedding(10, 4)
    def forward(self, x):
        return self.a(x)

class Gather(paddle.nn.Layer):
    def forward(self, x, i):
        return paddle.gather(x, i)

class Big(paddle.nn.Layer):
    def forward(self, x):
        return paddle.tile(x, [100000, 5000])

f32 = np.float32
def save(name, layer, *specs):
    paddle.jit.save(layer, f"{folder}/{name}", input_spec=[InputSpec(*s) for s in specs])

def predictor(name):
    config = paddle.inference.Config(f"{folder}/{name}.json", f"{folder}/{name}.pdiparams")
    config.disable_glog_info()
    return paddle.inference.create_predictor(config)

def run(name, **feeds):
    p = predictor(name)
    for key, value in feeds.items():
        p.get_input_handle(key).copy_from_cpu(value)
    p.run()

def limit(more_mb):
    now = int(open("/proc/self/statm").read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (now + more_mb * 2**20,) * 2)

def out_of_memory():
    p = predictor("big")
    p.get_input_handle("x").copy_from_cpu(np.ones((1, 4), f32))
    limit(300)
    p.run()

def numpy_out_of_memory():
    limit(100)
    np.ones((1 << 30,), f32)

x44 = ([None, 4], "float32", "x")
if group == "errors":
    save("mlp", Mlp(), x44)
    save("embedding", Embedding(), ([None], "int64", "x"))
    save("gather", Gather(), x44, ([None], "int64", "i"))
    cases = {
        "wrong shape": lambda: run("mlp", x=np.ones((2, 5), f32)),
        "wrong rank": lambda: run("mlp", x=np.ones((5,), f32)),
        "wrong dtype": lambda: run("mlp", x=np.ones((2, 4), np.int64)),
        "missing input": lambda: run("mlp"),
        "value out of range": lambda: run("embedding", x=np.array([99])),
        "index out of range": lambda: run("gather", x=np.ones((3, 4), f32), i=np.array([50])),
        "no array": lambda: run("mlp", x=np.ones((2, 4), np.complex64)),
        "unimplemented": lambda: run("embedding", x=np.array([1.0], f32)),
        "no such kernel": lambda: paddle._C_ops.relu6(paddle.ones([2, 2], dtype="complex64")),
        "no such input": lambda: run("mlp", zz=np.ones((2, 4), f32)),
        "no such file": lambda: predictor("nothing"),
    }
elif group == "memory":
    save("big", Big(), x44)
    cases = {"out of memory": out_of_memory}
else:
    cases = {"numpy out of memory": numpy_out_of_memory}

for name, case in cases.items():
    try:
        case()
        print(json.dumps([name, "", "no error"]))
    except BaseException as exc:
        print(json.dumps([name, type(exc).__name__, str(exc)]))
"""

WANTED: dict[str, dict[str, tuple[str, FaultClass]]] = {
    "errors": {
        "wrong shape": ("InvalidArgument", FaultClass.REQUEST),
        "wrong rank": ("InvalidArgument", FaultClass.REQUEST),
        "wrong dtype": ("InvalidArgument", FaultClass.REQUEST),
        "missing input": ("InvalidArgument", FaultClass.REQUEST),
        "value out of range": ("InvalidArgument", FaultClass.REQUEST),
        "index out of range": ("OutOfRange", FaultClass.REQUEST),
        "no array": ("InvalidType", FaultClass.REQUEST),
        "unimplemented": ("-204", FaultClass.UNSUPPORTED),
        "no such kernel": ("-204", FaultClass.UNSUPPORTED),
        "no such input": ("PreconditionNotMet", FaultClass.UNKNOWN),
        "no such file": ("NotFound", FaultClass.UNKNOWN),
    },
    "memory": {"out of memory": ("-101", FaultClass.MEMORY)},
    "numpy": {"numpy out of memory": ("-101", FaultClass.MEMORY)},
}


@pytest.mark.parametrize("group", WANTED)
def test_texts_of_the_installed_paddle(group: str, tmp_path: Path) -> None:
    script = tmp_path / "provoke.py"  # a file: Paddle reads the source of what it exports
    script.write_text(PROVOKE)
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", str(script), str(tmp_path), group],
        capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    lines = [json.loads(line) for line in ran.stdout.splitlines() if line.startswith("[")]
    assert ran.returncode == 0, ran.stderr[-2000:]
    raised = {name: (exc_type, text) for name, exc_type, text in lines}
    assert set(raised) == set(WANTED[group])
    for name, wanted in WANTED[group].items():
        fault = classify(*raised[name])
        assert (fault.code, fault.fault_class) == wanted, (name, raised[name])
