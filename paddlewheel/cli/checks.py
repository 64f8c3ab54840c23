"""The single checks of `paddlewheel doctor`: what each found and, if need be, what to do."""

from __future__ import annotations

import ctypes
import importlib.metadata
import json
import os
import platform
import re
import resource
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Finding = Literal["ok", "warn", "fail"]

_GB = 1 << 30
_MB = 1 << 20
_SHM = "/dev/shm"  # noqa: S108
PADDLE_IMPORT_TIMEOUT_S = 120.0
FREE_DISK_WANTED_BYTES = 2 * _GB
SHM_WANTED_BYTES = 256 * _MB
OPEN_FILES_WANTED = 4096


@dataclass(frozen=True, slots=True)
class Check:
    """One thing looked at."""

    name: str
    finding: Finding
    detail: str
    hint: str | None = None
    """What to do about it; ``None`` when there is nothing to do."""

    def as_json(self) -> dict[str, str | None]:
        return {
            "name": self.name,
            "finding": self.finding,
            "detail": self.detail,
            "hint": self.hint,
        }


# --- this machine -----------------------------------------------------------------------------


def host_checks() -> list[Check]:
    return [_python(), _memory(), _shared_memory(), _open_files(), _pidfd()]


def _python() -> Check:
    version = platform.python_version()
    if platform.system() != "Linux":
        return Check("python", "fail", f"{version} on {platform.system()}", "nodes need Linux")
    return Check("python", "ok", f"{version} at {sys.executable}")


def _memory() -> Check:
    import psutil

    memory = psutil.virtual_memory()
    detail = f"{memory.available / _GB:.1f} GB of {memory.total / _GB:.1f} GB available"
    detail += f", {os.cpu_count()} CPUs"
    if memory.available < _GB:
        return Check("memory", "warn", detail, "a worker with Paddle takes about 0.5 GB")
    return Check("memory", "ok", detail)


def _shared_memory() -> Check:
    """Tensors travel in anonymous shared memory, which is charged like a tmpfs."""
    try:
        descriptor = os.memfd_create("paddlewheel-doctor")
        try:
            os.posix_fallocate(descriptor, 0, _MB)
        finally:
            os.close(descriptor)
    except OSError as exc:
        return Check("shared memory", "fail", f"memfd_create: {exc.strerror}")
    try:
        free = shutil.disk_usage(_SHM).free
    except OSError as exc:
        return Check("shared memory", "warn", f"{_SHM}: {exc.strerror}", "Paddle may want it")
    detail = f"memfd works, {free / _MB:.0f} MB free in /dev/shm"
    if free < SHM_WANTED_BYTES:
        return Check("shared memory", "warn", detail, "in a container: --shm-size 1g")
    return Check("shared memory", "ok", detail)


def _open_files() -> Check:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    detail = f"{soft} (hard limit {hard})"
    if hard != resource.RLIM_INFINITY and hard < OPEN_FILES_WANTED:  # nodes raise the soft one
        return Check("open files", "warn", detail, f"ulimit -n {OPEN_FILES_WANTED} or more")
    return Check("open files", "ok", detail)


def _pidfd() -> Check:
    """A worker's death is noticed through its pidfd (Linux 5.3 and later)."""
    try:
        os.close(os.pidfd_open(os.getpid()))
    except OSError as exc:
        return Check("kernel", "warn", f"{platform.release()}: pidfd_open: {exc.strerror}")
    return Check("kernel", "ok", platform.release())


# --- packages and Paddle ----------------------------------------------------------------------


def package_checks() -> list[Check]:
    """Whether what this distribution says it needs is there; extras are not asked for."""
    try:
        requirements = importlib.metadata.requires("paddlewheel") or []
    except importlib.metadata.PackageNotFoundError:
        return [Check("packages", "warn", "not installed, run from a checkout", "pip install -e .")]
    names = [re.split(r"[^A-Za-z0-9._-]", each)[0] for each in requirements if "extra" not in each]
    missing = [name for name in names if _installed(name) is None]
    if missing:
        hint = f"pip install {' '.join(missing)}"
        return [Check("packages", "fail", f"missing: {', '.join(missing)}", hint)]
    return [Check("packages", "ok", f"{len(names)} runtime packages installed")]


def _installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


_IMPORT_PADDLE = """
import json, time
started = time.monotonic()
import paddle
print(json.dumps({
    "version": paddle.__version__,
    "cuda": paddle.version.cuda() if paddle.is_compiled_with_cuda() else None,
    "import_s": time.monotonic() - started,
}))
"""


def paddle_checks() -> list[Check]:
    """Import Paddle in a process of its own: it may be slow, or take the process with it."""
    found = [name for name in ("paddlepaddle", "paddlepaddle-gpu") if _installed(name)]
    if not found:
        return [Check("paddle", "fail", "not installed", "pip install 'paddlewheel[cpu]' or [gpu]")]
    hints = []
    if len(found) == 2:
        hints.append("paddlepaddle and paddlepaddle-gpu overwrite each other: keep one")
    try:
        done = subprocess.run(
            [sys.executable, "-c", _IMPORT_PADDLE],
            capture_output=True,
            text=True,
            timeout=PADDLE_IMPORT_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return [Check("paddle", "fail", f"import took more than {PADDLE_IMPORT_TIMEOUT_S:.0f} s")]
    if done.returncode != 0:
        said = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        hint = "pip install setuptools" if "setuptools" in said else None
        return [Check("paddle", "fail", f"import failed: {said}", hint)]
    told: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    kind = "CPU only" if told["cuda"] is None else f"CUDA {told['cuda']}"
    detail = f"{told['version']} ({kind}), imported in {told['import_s']:.1f} s"
    return [Check("paddle", "warn" if hints else "ok", detail, "; ".join(hints) or None)]


def gpu_checks() -> list[Check]:
    """Ask the driver's NVML, without a Python package: it comes with every NVIDIA driver."""
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return [Check("gpu", "ok", "no NVIDIA driver here: CPU only")]
    code = int(nvml.nvmlInit_v2())
    if code != 0:
        return [Check("gpu", "warn", f"NVML: error {code}", "look at nvidia-smi and dmesg")]
    try:
        count = ctypes.c_uint(0)
        driver = ctypes.create_string_buffer(96)
        nvml.nvmlDeviceGetCount_v2(ctypes.byref(count))
        nvml.nvmlSystemGetDriverVersion(driver, ctypes.c_uint(len(driver)))
    finally:
        nvml.nvmlShutdown()
    detail = f"{count.value} found, driver {driver.value.decode(errors='replace')}"
    if count.value and _installed("paddlepaddle-gpu") is None:
        return [Check("gpu", "warn", detail, "paddlepaddle-gpu is not installed")]
    return [Check("gpu", "ok", detail)]


# --- disk -------------------------------------------------------------------------------------


def cache_checks(folder: Path) -> list[Check]:
    """Write, sync and rename as a node does, in the folder or where it would be made."""
    at = folder
    while not at.exists() and at != at.parent:
        at = at.parent
    try:
        with tempfile.NamedTemporaryFile(dir=at, prefix=".paddlewheel-doctor") as file:
            file.write(b"x")
            file.flush()
            os.fsync(file.fileno())
        free = shutil.disk_usage(at).free
    except OSError as exc:
        return [Check("cache", "fail", f"{folder}: {exc.strerror}", "choose one with --cache")]
    detail = f"{folder}: writable, {free / _GB:.1f} GB free"
    if free < FREE_DISK_WANTED_BYTES:
        return [Check("cache", "warn", detail, "models are copied there before they are loaded")]
    return [Check("cache", "ok", detail)]
