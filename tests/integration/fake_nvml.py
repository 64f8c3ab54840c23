"""A stand-in ``libnvidia-ml.so.1``: a real shared library for the real binding, without a compiler.

`write_library` writes the ELF file itself: each exported function is one jump through a table in
the library's data, and `FakeDriver` fills the table with Python callbacks. No C compiler is needed
(a fresh machine has none), and what the driver does can change while the test runs.

The library's SONAME makes the loader hand it out for ``libnvidia-ml.so.1`` once it is loaded, so
the binding finds it without a search path. To use it in another process, run there:
``FakeDriver(...).install(folder)`` before anything asks for the driver; `FakeDriver.events_file`
then lets the test raise events from outside.
"""

from __future__ import annotations

import ctypes
import platform
import struct
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SONAME = "libnvidia-ml.so.1"
PAGE = 0x1000
SUCCESS, NOT_SUPPORTED, NOT_FOUND, TIMEOUT, GPU_IS_LOST, UNKNOWN = 0, 3, 6, 10, 15, 999
XID_CRITICAL, DOUBLE_BIT_ECC = 8, 2

FUNCTIONS = (
    "nvmlInitWithFlags", "nvmlInit_v2", "nvmlShutdown", "nvmlErrorString", "nvmlDeviceGetCount_v2",
    "nvmlDeviceGetHandleByIndex_v2", "nvmlDeviceGetUUID", "nvmlDeviceGetName",
    "nvmlDeviceGetMemoryInfo", "nvmlDeviceGetTemperature", "nvmlDeviceGetTotalEccErrors",
    "nvmlDeviceGetSupportedEventTypes", "nvmlDeviceRegisterEvents", "nvmlEventSetCreate",
    "nvmlEventSetWait_v2", "nvmlEventSetFree",
)  # fmt: skip


def write_library(path: Path, functions: tuple[str, ...] = FUNCTIONS, soname: str = SONAME) -> None:
    """Write an ELF shared library for this machine; ``table`` is its exported data.

    Two pages: headers, dynamic symbols and code (read, execute); dynamic section and table
    (read, write). Source: System V ABI, "Object Files" and "Dynamic Linking".
    """
    machine, stub = {"x86_64": (62, _stub_x86_64), "aarch64": (183, _stub_aarch64)}[
        platform.machine()
    ]
    names = (soname, "table", *functions)
    strings, at = b"\0", dict[str, int]()
    for name in names:
        at[name] = len(strings)
        strings += name.encode() + b"\0"
    headers = 64 + 3 * 56
    symbols_at = headers
    hash_at = symbols_at + 24 * (len(functions) + 2)
    strings_at = hash_at + 4 * (2 + 1 + len(functions) + 2)
    code_at = (strings_at + len(strings) + 15) & ~15
    assert code_at + 16 * len(functions) <= PAGE * 8
    data_at = (code_at + 16 * len(functions) + PAGE - 1) & ~(PAGE - 1)
    table_at = data_at + 16 * 8
    end = table_at + 8 * len(functions)

    symbols = bytes(24)
    symbols += struct.pack("<IBBHQQ", at["table"], 0x11, 0, 1, table_at, 8 * len(functions))
    code = b""
    for n, name in enumerate(functions):
        here = code_at + 16 * n
        symbols += struct.pack("<IBBHQQ", at[name], 0x12, 0, 1, here, 16)
        code += stub(table_at + 8 * n - here).ljust(16, b"\0")
    # One bucket, all symbols in one chain: slow, valid, and short.
    count = len(functions) + 2
    chain = [*(n + 1 for n in range(1, count - 1)), 0]
    hashes = struct.pack(f"<{3 + count}I", 1, count, 1, 0, *chain)
    dynamic = b"".join(
        struct.pack("<QQ", tag, value)
        for tag, value in (
            (14, at[soname]), (4, hash_at), (5, strings_at), (6, symbols_at),
            (10, len(strings)), (11, 24), (0, 0), (0, 0),
        )
    )  # fmt: skip
    header = struct.pack(
        "<16sHHIQQQIHHHHHH", b"\x7fELF\x02\x01\x01".ljust(16, b"\0"), 3, machine, 1, 0, 64, 0, 0,
        64, 56, 3, 0, 0, 0,
    )  # fmt: skip
    text_size, data_size = code_at + len(code), end - data_at
    header += struct.pack("<IIQQQQQQ", 1, 5, 0, 0, 0, text_size, text_size, PAGE)
    header += struct.pack("<IIQQQQQQ", 1, 6, data_at, data_at, data_at, data_size, data_size, PAGE)
    header += struct.pack(
        "<IIQQQQQQ", 2, 6, data_at, data_at, data_at, len(dynamic), len(dynamic), 8
    )
    image = bytearray(end)
    for offset, part in (
        (0, header), (symbols_at, symbols), (hash_at, hashes), (strings_at, strings),
        (code_at, code), (data_at, dynamic),
    ):  # fmt: skip
        image[offset : offset + len(part)] = part
    path.write_bytes(bytes(image))


def _stub_x86_64(distance: int) -> bytes:
    """``jmp *[rip + distance]``"""
    return b"\xff\x25" + struct.pack("<i", distance - 6)


def _stub_aarch64(distance: int) -> bytes:
    """``ldr x16, [pc, distance]; br x16``"""
    return struct.pack("<II", 0x58000010 | ((distance // 4) & 0x7FFFF) << 5, 0xD61F0200)


@dataclass
class FakeGpu:
    uuid: str
    name: str = "Fake A100"
    total: int = 16 << 30
    used: int = 1 << 30
    temperature_c: int = 40
    ecc: int | None = 0
    """``None``: no ECC on this card."""
    is_lost: bool = False


@dataclass
class FakeDriver:
    """The driver behind the library. Fields may be changed at any time."""

    gpus: list[FakeGpu]
    events: deque[tuple[int, int, int]] = field(default_factory=deque[tuple[int, int, int]])
    """(gpu, event type, data) not yet handed out."""
    events_file: Path | None = None
    """Lines ``<gpu> <xid>`` appended here are events too: for a driver in another process."""
    init_result: int = SUCCESS
    calls: list[str] = field(default_factory=list[str])
    opened: int = 0
    _read: int = 0
    _wake: threading.Event = field(default_factory=threading.Event)
    _callbacks: list[Any] = field(default_factory=list[Any])
    _library: Any = None

    def raise_xid(self, gpu: int, xid: int) -> None:
        self.events.append((gpu, XID_CRITICAL, xid))
        self._wake.set()

    def raise_double_bit(self, gpu: int) -> None:
        self.events.append((gpu, DOUBLE_BIT_ECC, 0))
        self._wake.set()

    def install(self, folder: Path) -> None:
        """Write the library, load it, and put this driver behind it."""
        path = folder / SONAME
        write_library(path)
        self._library = ctypes.CDLL(str(path))
        table = (ctypes.c_void_p * len(FUNCTIONS)).in_dll(self._library, "table")
        for n, name in enumerate(FUNCTIONS):
            kind = ctypes.c_char_p if name == "nvmlErrorString" else ctypes.c_int
            callback = ctypes.CFUNCTYPE(kind, *[ctypes.c_void_p] * 4)(self._answer(name))
            self._callbacks.append(callback)
            table[n] = ctypes.cast(callback, ctypes.c_void_p).value

    def _answer(self, name: str) -> Callable[[Any, Any, Any, Any], Any]:
        function = getattr(self, "_" + name)

        def answer(*args: Any) -> Any:
            self.calls.append(name)
            return function(*args)

        return answer

    # --- the functions; arguments come as addresses or integers, ``None`` for 0 ---------------

    def _nvmlInitWithFlags(self, *_: Any) -> int:  # noqa: N802
        self.opened += self.init_result == SUCCESS
        return self.init_result

    _nvmlInit_v2 = _nvmlInitWithFlags  # noqa: N815

    def _nvmlShutdown(self, *_: Any) -> int:  # noqa: N802
        self.opened -= 1
        return SUCCESS

    def _nvmlErrorString(self, *_: Any) -> bytes:  # noqa: N802
        return b"fake error"

    def _nvmlDeviceGetCount_v2(self, out: int, *_: Any) -> int:  # noqa: N802
        ctypes.c_uint.from_address(out).value = len(self.gpus)
        return SUCCESS

    def _nvmlDeviceGetHandleByIndex_v2(self, index: int | None, out: int, *_: Any) -> int:  # noqa: N802
        ctypes.c_void_p.from_address(out).value = 0x1000 * ((index or 0) + 1)
        return SUCCESS

    def _gpu(self, handle: int) -> FakeGpu:
        return self.gpus[handle // 0x1000 - 1]

    def _nvmlDeviceGetUUID(self, handle: int, out: int, *_: Any) -> int:  # noqa: N802
        return self._text(handle, out, self._gpu(handle).uuid)

    def _nvmlDeviceGetName(self, handle: int, out: int, *_: Any) -> int:  # noqa: N802
        return self._text(handle, out, self._gpu(handle).name)

    def _text(self, handle: int, out: int, text: str) -> int:
        if self._gpu(handle).is_lost:
            return GPU_IS_LOST
        ctypes.memmove(out, text.encode() + b"\0", len(text) + 1)
        return SUCCESS

    def _nvmlDeviceGetMemoryInfo(self, handle: int, out: int, *_: Any) -> int:  # noqa: N802
        gpu = self._gpu(handle)
        if gpu.is_lost:
            return GPU_IS_LOST
        numbers = (ctypes.c_ulonglong * 3).from_address(out)
        numbers[0], numbers[1], numbers[2] = gpu.total, gpu.total - gpu.used, gpu.used
        return SUCCESS

    def _nvmlDeviceGetTemperature(self, handle: int, _sensor: Any, out: int, *_: Any) -> int:  # noqa: N802
        ctypes.c_uint.from_address(out).value = self._gpu(handle).temperature_c
        return GPU_IS_LOST if self._gpu(handle).is_lost else SUCCESS

    def _nvmlDeviceGetTotalEccErrors(self, handle: int, _type: Any, _kind: Any, out: int) -> int:  # noqa: N802
        errors = self._gpu(handle).ecc
        if errors is None:
            return NOT_SUPPORTED
        ctypes.c_ulonglong.from_address(out).value = errors
        return SUCCESS

    def _nvmlDeviceGetSupportedEventTypes(self, handle: int, out: int, *_: Any) -> int:  # noqa: N802
        kinds = XID_CRITICAL | (DOUBLE_BIT_ECC if self._gpu(handle).ecc is not None else 0)
        ctypes.c_ulonglong.from_address(out).value = kinds
        return SUCCESS

    def _nvmlDeviceRegisterEvents(self, handle: int, kinds: int, *_: Any) -> int:  # noqa: N802
        known = XID_CRITICAL | (DOUBLE_BIT_ECC if self._gpu(handle).ecc is not None else 0)
        return NOT_SUPPORTED if kinds & ~known else SUCCESS

    def _nvmlEventSetCreate(self, out: int, *_: Any) -> int:  # noqa: N802
        ctypes.c_void_p.from_address(out).value = 0xE000
        return SUCCESS

    def _nvmlEventSetFree(self, *_: Any) -> int:  # noqa: N802
        return SUCCESS

    def _nvmlEventSetWait_v2(self, _set: Any, out: int, timeout_ms: int | None, *_: Any) -> int:  # noqa: N802
        self._take_from_file()
        if not self.events:
            if any(gpu.is_lost for gpu in self.gpus):
                return GPU_IS_LOST
            # Short turns, because a line in the file wakes nobody.
            self._wake.wait(min((timeout_ms or 0) / 1000, 0.05))
            self._wake.clear()
            self._take_from_file()
        if not self.events:
            return TIMEOUT
        gpu, kind, data = self.events.popleft()
        ctypes.c_void_p.from_address(out).value = 0x1000 * (gpu + 1)
        numbers = (ctypes.c_ulonglong * 2).from_address(out + 8)
        numbers[0], numbers[1] = kind, data
        return SUCCESS

    def _take_from_file(self) -> None:
        if self.events_file is None or not self.events_file.exists():
            return
        lines = self.events_file.read_text().splitlines()
        for line in lines[self._read :]:
            gpu, xid = line.split()
            self.events.append((int(gpu), XID_CRITICAL, int(xid)))
        self._read = len(lines)
