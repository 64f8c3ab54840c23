"""The tables of faults: classes, what is done about each, and the numbers and names they hold.

`loader.faults` reads them; docs/faults.md shows them (a test keeps the two equal).

Sources: ``paddle/common/errors.h`` and ``paddle/fluid/pybind/exception.cc`` for Paddle's classes,
NVIDIA's "CUDA Runtime API: cudaError", "cuDNN: cudnnStatus_t", "cuBLAS: cublasStatus_t",
"NCCL: ncclResult_t", "XID Errors".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

HOST_ALLOCATION_FAILED = "-101"
DEVICE_ALLOCATION_FAILED = "-102"
KERNEL_NOT_SUPPORTED = "-204"


class FaultClass(StrEnum):
    """What a fault means for the request, the worker, the version and the device."""

    REQUEST = "request"
    """The client's fault. Never counted, whatever ``rollback.codes`` says."""
    MEMORY = "memory"
    STICKY = "sticky"
    """The process's device context is poisoned; only a new process helps."""
    UNSUPPORTED = "unsupported"
    CRASH = "crash"
    """The worker is gone, or was ended because it hung. Always counted."""
    HARDWARE = "hardware"
    """The device is bad: cordon it; never counted against the version."""
    GUARD = "guard"
    """The output guard's verdict (NAN, SLA). Counted: the guard was asked for and is sure."""
    UNKNOWN = "unknown"
    """An error that no rule knows: the request's fault or the version's, the text does not say.

    Counted only once the standby has answered the very same request: then it was the version.
    Counting at once was turned down (an empty batch makes oneDNN raise a bare ``std::exception``:
    a client could roll a good version back), and so was never counting (a version that fails
    every request would stay).
    """


@dataclass(frozen=True, slots=True)
class Handling:
    """What is done about a class of fault; the wiring reads it, docs/faults.md shows it."""

    counted: str
    """``always``, ``never``, ``proven``, or ``by default``: unless ``rollback.codes`` omits it."""
    replaces_worker: bool
    rerun: bool
    """Whether the same request is worth running again elsewhere."""


HANDLING: Mapping[FaultClass, Handling] = {
    FaultClass.REQUEST: Handling("never", replaces_worker=False, rerun=False),
    FaultClass.MEMORY: Handling("by default", replaces_worker=False, rerun=True),
    FaultClass.STICKY: Handling("by default", replaces_worker=True, rerun=True),
    FaultClass.UNSUPPORTED: Handling("by default", replaces_worker=False, rerun=True),
    FaultClass.CRASH: Handling("always", replaces_worker=True, rerun=True),
    FaultClass.HARDWARE: Handling("never", replaces_worker=True, rerun=True),
    FaultClass.GUARD: Handling("always", replaces_worker=False, rerun=True),
    FaultClass.UNKNOWN: Handling("proven", replaces_worker=False, rerun=True),
}

_C = FaultClass

CUDA: Mapping[FaultClass, frozenset[int]] = {
    # 2 out of memory
    _C.MEMORY: frozenset({2}),
    # 4 unloading, 201 invalid context, 214 uncorrectable ECC, 226 contained, 700 illegal address,
    # 702 launch timeout, 709 context destroyed, 710 assert, 714 to 720 launch and address errors,
    # 721 tensor memory leak
    _C.STICKY: frozenset({4, 201, 214, 226, 700, 702, 709, 710, *range(714, 722)}),
    # 98 invalid device function, 200 invalid image, 209 no kernel image, 218 invalid PTX,
    # 221 to 223 no JIT for it, 701 out of launch resources, 801 not supported
    _C.UNSUPPORTED: frozenset({98, 200, 209, 218, 221, 222, 223, 701, 801}),
    # 3 initialisation, 35 driver too old, 46 devices unavailable, 100 no device, 101 invalid
    # device, 220 NVLink uncorrectable, 802 to 804 driver not ready or mismatched
    _C.HARDWARE: frozenset({3, 35, 46, 100, 101, 220, 802, 803, 804}),
}

CUDA_NAMES: Mapping[str, int] = {
    "MemoryAllocation": 2, "InitializationError": 3, "InsufficientDriver": 35,
    "DevicesUnavailable": 46, "InvalidDeviceFunction": 98, "NoDevice": 100, "InvalidDevice": 101,
    "NoKernelImageForDevice": 209, "ECCUncorrectable": 214, "IllegalAddress": 700,
    "LaunchOutOfResources": 701, "LaunchTimeout": 702, "Assert": 710, "HardwareStackError": 714,
    "IllegalInstruction": 715, "MisalignedAddress": 716, "InvalidAddressSpace": 717,
    "InvalidPc": 718, "LaunchFailure": 719, "CooperativeLaunchTooLarge": 720,
}  # fmt: skip
"""``cudaError<name>``, as Thrust writes it into its own exceptions, without a number."""

STATUS: Mapping[FaultClass, tuple[str, ...]] = {
    _C.MEMORY: ("ALLOC_FAILED", "ALLOCATION_FAILED", "INSUFFICIENT_RESOURCES"),
    _C.STICKY: ("EXECUTION_FAILED", "EXEC_FAILED", "LAUNCH_FAILURE", "PREEXISTING_FAILURE",
                "MAPPING_ERROR", "INTERNAL_ERROR", "NOT_INITIALIZED", "INITIALIZATION_FAILED"),
    _C.UNSUPPORTED: ("NOT_SUPPORTED", "ARCH_MISMATCH", "VERSION_MISMATCH", "LICENSE_ERROR",
                     "RUNTIME_PREREQUISITE_MISSING", "SUBLIBRARY_LOADING_FAILED"),
}  # fmt: skip
"""A GPU library's status by a part of its name: the names are stable, the numbers were not
(cuDNN 8 called EXECUTION_FAILED 8, cuDNN 9 calls it 5000)."""

LIBRARY: Mapping[str, Mapping[FaultClass, tuple[range, ...]]] = {
    "CUDNN": {
        _C.MEMORY: (range(2, 3), range(4003, 4005)),
        _C.STICKY: (range(1, 2), range(4, 5), range(7, 9), range(1001, 1002), range(4000, 6000)),
        _C.UNSUPPORTED: (range(6, 7), range(9, 12), range(1002, 1009), range(3000, 4000)),
    },
    "CUBLAS": {
        _C.MEMORY: (range(3, 4),),
        _C.STICKY: (range(1, 2), range(11, 15)),
        _C.UNSUPPORTED: (range(8, 9), range(15, 17)),
    },
    "CURAND": {
        _C.MEMORY: (range(102, 103),),
        _C.STICKY: (range(101, 102), range(201, 204), range(999, 1000)),
        _C.UNSUPPORTED: (range(100, 101), range(204, 205)),
    },
    "CUSPARSE": {
        _C.MEMORY: (range(2, 3), range(11, 12)),
        _C.STICKY: (range(1, 2), range(5, 8)),
        _C.UNSUPPORTED: (range(4, 5), range(8, 11)),
    },
    "CUSOLVER": {
        _C.MEMORY: (range(2, 3),),
        _C.STICKY: (range(1, 2), range(5, 8)),
        _C.UNSUPPORTED: (range(4, 5), range(8, 10)),
    },
    "CUFFT": {
        _C.MEMORY: (range(2, 3),),
        _C.STICKY: (range(5, 8),),
        _C.UNSUPPORTED: (range(14, 17),),
    },
    # A communicator that failed can only be made again, and that is a new process for us.
    "NCCL": {_C.STICKY: (range(1, 4), range(6, 7))},
}
"""For a text that names no status: the library's numbers, the first class that holds one wins."""

XID: Mapping[int, str] = {
    48: "double bit ECC error", 63: "row remapping event", 64: "row remapping failure",
    74: "NVLink error", 79: "GPU has fallen off the bus", 94: "contained ECC error",
    95: "uncontained ECC error",
}  # fmt: skip
"""The driver's events that speak of the device itself; others (13, 31, 43 ...) are a program's."""

PADDLE: Mapping[str, tuple[str, FaultClass]] = {
    "InvalidArgument": ("InvalidArgument", _C.REQUEST),
    "OutOfRange": ("OutOfRange", _C.REQUEST),
    "InvalidType": ("InvalidType", _C.REQUEST),
    "ResourceExhausted": (HOST_ALLOCATION_FAILED, _C.MEMORY),
    "Unimplemented": (KERNEL_NOT_SUPPORTED, _C.UNSUPPORTED),
    "NotFound": ("NotFound", _C.UNKNOWN),
    "AlreadyExists": ("AlreadyExists", _C.UNKNOWN),
    "PreconditionNotMet": ("PreconditionNotMet", _C.UNKNOWN),
    "PermissionDenied": ("PermissionDenied", _C.UNKNOWN),
    "ExecutionTimeout": ("ExecutionTimeout", _C.UNKNOWN),
    "Unavailable": ("Unavailable", _C.UNKNOWN),
    "Fatal": ("Fatal", _C.UNKNOWN),
    "External": ("External", _C.UNKNOWN),
}
"""Paddle's classes of error, as the text names them, before what the rest of the text adds."""

EXCEPTIONS: Mapping[str, str] = {
    "ValueError": "InvalidArgument", "IndexError": "OutOfRange", "TypeError": "InvalidType",
    "MemoryError": "ResourceExhausted", "_ArrayMemoryError": "ResourceExhausted",
    "NotImplementedError": "Unimplemented", "SystemError": "Fatal", "OSError": "External",
}  # fmt: skip
"""For a text without Paddle's mark: the builtin exception that Paddle uses for that class.

``RuntimeError`` stands for six classes and for other libraries' errors: it tells nothing.
"""

OWN: Mapping[str, FaultClass] = {
    HOST_ALLOCATION_FAILED: _C.MEMORY,
    DEVICE_ALLOCATION_FAILED: _C.MEMORY,
    KERNEL_NOT_SUPPORTED: _C.UNSUPPORTED,
    "NAN": _C.GUARD,
    "SLA": _C.GUARD,
}
"""This project's own codes: three stable numbers and the output guard's two verdicts."""
