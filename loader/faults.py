"""From exception, exit or XID to ``(code, class)``: one table, no state (docs/faults.md).

The worker classifies where the exception is raised and sends the structured `Fault` to the front;
the front classifies exits. Codes are text:

- a bare number is CUDA's (runtime and driver API agree on those numbers; HIP reuses them) or, when
  negative, one of our own: `HOST_ALLOCATION_FAILED`, `DEVICE_ALLOCATION_FAILED`,
  `KERNEL_NOT_SUPPORTED`;
- ``CUDNN:8``, ``NCCL:2`` are another GPU library's, ``XID:79`` the driver's;
- ``InvalidArgument``, ``NotFound`` ... are Paddle's own classes of error, by name because their
  numbers would collide with CUDA's;
- ``SIGSEGV``, ``EXIT:1``, ``HANG`` end a worker; ``NAN`` and ``SLA`` come from the output guard.
"""

from __future__ import annotations

import re
import signal
from collections.abc import Iterable
from dataclasses import dataclass

from loader.fault_tables import (
    CUDA,
    CUDA_NAMES,
    DEVICE_ALLOCATION_FAILED,
    EXCEPTIONS,
    HANDLING,
    HOST_ALLOCATION_FAILED,
    KERNEL_NOT_SUPPORTED,
    LIBRARY,
    OWN,
    PADDLE,
    STATUS,
    XID,
    FaultClass,
    Handling,
)

__all__ = [
    "DEFAULT_CODES", "DEVICE_ALLOCATION_FAILED", "HANDLING", "HOST_ALLOCATION_FAILED",
    "KERNEL_NOT_SUPPORTED", "Fault", "FaultClass", "Handling", "classify", "classify_cuda",
    "classify_exit", "classify_xid", "counts", "from_code", "summarize",
]  # fmt: skip

MESSAGE_MAX = 500
"""Characters of a `Fault.message`: enough for a status line, small enough for a key in etcd."""
DEFAULT_CODES: tuple[str, ...] = ("sticky", "memory", "unsupported")
"""``rollback.codes`` when the document does not say (SPEC section 3)."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One failure, classified. Small and plain: it crosses from the worker to the front."""

    code: str
    fault_class: FaultClass
    message: str = ""

    @property
    def handling(self) -> Handling:
        return HANDLING[self.fault_class]


_C = FaultClass
_LIBRARY_ERROR = re.compile(
    r"\b(CUDA|CUDNN|CUBLAS|CURAND|CUSPARSE|CUSOLVER|CUFFT|CU|NCCL|HIP)\s+error"
    r"(?:\s*\(\s*(\d+)\s*\)|\s+(\d{1,4})\b)",  # CUB writes its number without parentheses
    re.IGNORECASE,
)
_CUDA_NAME = re.compile(rf"\bcudaError({'|'.join(CUDA_NAMES)})\b")
_STATUS_NAME = re.compile(r"\b(CUDNN|CUBLAS|CURAND|CUSPARSE|CUSOLVER|CUFFT)_([A-Z][A-Z_]{3,})\b")
_NCCL_TEXT = re.compile(
    r"\bNCCL error\b.{0,200}?\b(unhandled \w+ error|internal error)", re.I | re.S
)
_NAMES = "|".join(PADDLE)
_PADDLE_MARK = re.compile(rf"(?:^|\n)\s*(?:\(({_NAMES})\)|({_NAMES})Error\s*:)")
_DEVICE_MEMORY = re.compile(
    r"out of memory error on (?:GPU|device|XPU|DCU|NPU)|\bGPU memory\b", re.I
)
_HOST_MEMORY = re.compile(
    r"\bbad_alloc\b|Fail(?:ed)? to alloc(?:ate)? memory|Cannot allocate memory|\[Errno 12\]", re.I
)
_NO_KERNEL = re.compile(
    r"The kernel (?:with key .{0,300}?|`[^`]*`) is not registered"
    r"|There are no kernels which are registered|no kernel image is available",
    re.S,
)
_HINT = re.compile(r"\n\s*\[(?:Hint|Advise|operator)\b.*", re.S)
_PREAMBLE = re.compile(r"\A.*?Error Message Summary:\s*-*\s*|\A\s*In user code:\s*", re.S)


def classify(exc_type: str, text: str) -> Fault:
    """Classify what ``run`` (or a load) raised.

    exc_type: the exception's class name, ``type(exc).__name__``; text: ``str(exc)``.
    What a GPU library said weighs more than the class that Paddle wrapped it in.
    """
    message = summarize(text)
    found = _library_error(text)
    if found is not None:
        return Fault(*found, message)
    mark = _PADDLE_MARK.search(text)
    name = (mark[1] or mark[2]) if mark else EXCEPTIONS.get(exc_type)
    if _NO_KERNEL.search(text):
        return Fault(KERNEL_NOT_SUPPORTED, _C.UNSUPPORTED, message)
    if name == "ResourceExhausted" and _DEVICE_MEMORY.search(text):
        return Fault(DEVICE_ALLOCATION_FAILED, _C.MEMORY, message)
    if mark is None and _HOST_MEMORY.search(text):
        return Fault(HOST_ALLOCATION_FAILED, _C.MEMORY, message)
    if name is None:
        return Fault(exc_type or "Unknown", _C.UNKNOWN, message)
    code, fault_class = PADDLE[name]
    return Fault(code, fault_class, message)


def classify_exit(ended: int | str) -> Fault:
    """Classify the end of a worker.

    ended: a return code as `subprocess` gives it (negative: the signal's number), or the text form
    of one: ``SIGSEGV``, ``EXIT:1``, ``HANG``. A worker that ends by itself with 0 while it serves
    is a crash too.
    """
    if isinstance(ended, int):
        code = f"EXIT:{ended}" if ended >= 0 else _signal_name(-ended)
    else:
        code = ended
    message = "worker hung and was ended" if code == "HANG" else f"worker ended: {code}"
    return Fault(code, _C.CRASH, message)


def classify_xid(xid: int) -> Fault | None:
    """Classify an XID event of the NVIDIA driver; ``None`` when it says nothing of the device.

    A program's own XIDs reach its process as a CUDA error, which is classified there.
    """
    meaning = XID.get(xid)
    return None if meaning is None else Fault(f"XID:{xid}", _C.HARDWARE, f"XID {xid}: {meaning}")


def classify_cuda(number: int) -> FaultClass:
    """The class of a CUDA error number; `FaultClass.UNKNOWN` when no rule holds it."""
    return next((c for c, numbers in CUDA.items() if number in numbers), _C.UNKNOWN)


def from_code(code: int | str, message: str = "") -> Fault:
    """The fault that ``code`` alone stands for: what a drill raises, what a document names."""
    text = str(code)
    if text in OWN:
        return Fault(text, OWN[text], message)
    if text.isdigit():
        return Fault(text, classify_cuda(int(text)), message)
    library, _, number = text.partition(":")
    if library == "XID" and number.isdigit():
        known = classify_xid(int(number))
        return known or Fault(text, _C.UNKNOWN, message)
    if library in LIBRARY and number.isdigit():
        return Fault(text, _by_number(library, int(number)), message)
    if text in PADDLE:
        return Fault(*PADDLE[text], message)
    if text == "HANG" or library == "EXIT" or text.startswith("SIG"):
        return classify_exit(text)
    return Fault(text, _C.UNKNOWN, message)


def counts(
    fault: Fault, codes: Iterable[int | str] = DEFAULT_CODES, *, proven: bool = False
) -> bool:
    """Whether ``fault`` counts towards a rollback of the version that raised it.

    codes: ``rollback.codes``, numbers or names of codes or classes.
    proven: another version answered the very same request (see `FaultClass.UNKNOWN`).
    """
    counted = fault.handling.counted
    if counted in ("always", "never"):
        return counted == "always"
    if counted == "proven" and proven:
        return True
    return any(str(c) == fault.code or str(c) == fault.fault_class for c in codes)


def summarize(text: str) -> str:
    """The one line of a Paddle error that a person needs, at most `MESSAGE_MAX` characters.

    Stack, hint and preamble go; so do line breaks, since the line ends up in a key of etcd.
    """
    line = " ".join(_HINT.sub("", _PREAMBLE.sub("", text, count=1), count=1).split())
    return line if len(line) <= MESSAGE_MAX else line[: MESSAGE_MAX - 1] + "…"


def _library_error(text: str) -> tuple[str, FaultClass] | None:
    numbered = _LIBRARY_ERROR.search(text)
    named = _STATUS_NAME.search(text)
    by_name = _by_status(named[2]) if named else _C.UNKNOWN
    if numbered is not None:
        library, number = numbered[1].upper(), int(numbered[2] or numbered[3])
        if library in ("CUDA", "CU", "HIP"):
            return str(number), classify_cuda(number)
        known = by_name if by_name is not _C.UNKNOWN else _by_number(library, number)
        return f"{library}:{number}", known
    if named is not None:
        return f"{named[1]}:{named[2].removeprefix('STATUS_')}", by_name
    cuda = _CUDA_NAME.search(text)
    if cuda is not None:
        number = CUDA_NAMES[cuda[1]]
        return str(number), classify_cuda(number)
    nccl = _NCCL_TEXT.search(text)
    if nccl is not None:
        return f"NCCL:{nccl[1]}", _C.STICKY
    return None


def _by_status(name: str) -> FaultClass:
    return next((c for c, parts in STATUS.items() if any(p in name for p in parts)), _C.UNKNOWN)


def _by_number(library: str, number: int) -> FaultClass:
    classes = LIBRARY.get(library, {})
    return next((c for c, spans in classes.items() if any(number in s for s in spans)), _C.UNKNOWN)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"SIG{number}"
