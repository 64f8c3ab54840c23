"""What the NVIDIA driver says of the GPUs: XID events, memory, ECC, temperature. Optional.

Through nvidia-ml-py (the ``gpu`` extra). Without that package, without a driver or without a GPU
there is nothing to watch: `Nvml.open` returns ``None`` and nobody complains.

NVML calls block, some for seconds when a card is failing, so `GpuWatcher` makes all of them in a
thread of its own and hands events to the event loop.
Source: NVIDIA "NVML API Reference Guide", event handling methods.
"""

from __future__ import annotations

import asyncio
import ctypes
import threading
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

from loader.faults import Fault, classify_xid

FALLEN_OFF_THE_BUS = 79
DOUBLE_BIT_ECC = 48
WAIT_S = 0.5
READ_EVERY_S = 5.0
MIB = 1024 * 1024


@dataclass(frozen=True, slots=True)
class GpuEvent:
    """One XID of one device."""

    device: str
    """``gpu:0``, numbered as this process sees the devices."""
    xid: int
    fault: Fault | None
    """``None``: the event is a program's own doing and says nothing of the device."""


@dataclass(frozen=True, slots=True)
class GpuReading:
    """One look at a device. ``None``: this device does not tell."""

    device: str
    name: str
    uuid: str
    memory_total_mb: int | None
    memory_used_mb: int | None
    temperature_c: int | None
    ecc_uncorrected: int | None
    """Uncorrected errors since the driver was loaded."""


@dataclass(frozen=True, slots=True)
class _Gpu:
    device: str
    handle: Any
    uuid: str
    name: str


class Nvml:
    """The library, opened. Every call blocks; for one thread at a time."""

    def __init__(self, library: Any, gpus: tuple[_Gpu, ...], event_set: Any) -> None:
        self._nvml = library
        self._gpus = gpus
        self._events = event_set
        self._lost: set[str] = set()

    @classmethod
    def open(cls, visible: str | None = None) -> Nvml | None:
        """Open the driver's library and ask for events; ``None`` when there is nothing to watch.

        visible: ``CUDA_VISIBLE_DEVICES``, which decides what ``gpu:0`` means to CUDA and Paddle
            while NVML always counts all devices; ``None`` or what it cannot read: all of them.
            The order assumes ``CUDA_DEVICE_ORDER=PCI_BUS_ID`` where cards of several kinds are
            mixed.
        """
        try:
            import pynvml as library
        except ImportError:
            return None
        try:
            library.nvmlInit()
        except library.NVMLError:
            return None
        try:
            gpus = _visible(_all(library), visible)
            event_set = library.nvmlEventSetCreate()
            for gpu in gpus:
                _register(library, gpu, event_set)
        except library.NVMLError:
            library.nvmlShutdown()
            return None
        if not gpus:
            library.nvmlEventSetFree(event_set)
            library.nvmlShutdown()
            return None
        return cls(library, gpus, event_set)

    @property
    def devices(self) -> tuple[str, ...]:
        return tuple(gpu.device for gpu in self._gpus)

    def wait(self, timeout_s: float) -> tuple[GpuEvent, ...]:
        """Wait for the next event, at most ``timeout_s``; empty when there was none."""
        nvml = self._nvml
        try:
            data = nvml.nvmlEventSetWait_v2(self._events, max(1, int(timeout_s * 1000)))
        except nvml.NVMLError_Timeout:
            return ()
        except nvml.NVMLError as error:
            # A card that fell off the bus may never say so in an event: ask each one.
            time.sleep(min(timeout_s, WAIT_S))  # such an error comes at once, for ever
            return self._newly_lost(error)
        device = self._device_of(data.device)
        if device is None:
            return ()
        xid = int(data.eventData)
        if data.eventType == nvml.nvmlEventTypeDoubleBitEccError:
            xid = DOUBLE_BIT_ECC
        if xid == FALLEN_OFF_THE_BUS:
            self._lost.add(device)
        return (GpuEvent(device, xid, classify_xid(xid)),)

    def readings(self) -> tuple[GpuReading, ...]:
        """Every device that can still be asked."""
        return tuple(self._read(gpu) for gpu in self._gpus if gpu.device not in self._lost)

    def close(self) -> None:
        """Give the library back; a driver that is going away as well is no error."""
        for release in (lambda: self._nvml.nvmlEventSetFree(self._events), self._nvml.nvmlShutdown):
            try:
                release()
            except self._nvml.NVMLError:
                continue

    def _read(self, gpu: _Gpu) -> GpuReading:
        nvml = self._nvml
        memory = self._ask(lambda: nvml.nvmlDeviceGetMemoryInfo(gpu.handle))
        heat = self._ask(
            lambda: nvml.nvmlDeviceGetTemperature(gpu.handle, nvml.NVML_TEMPERATURE_GPU)
        )
        ecc = self._ask(
            lambda: nvml.nvmlDeviceGetTotalEccErrors(
                gpu.handle, nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, nvml.NVML_VOLATILE_ECC
            )
        )
        return GpuReading(
            gpu.device, gpu.name, gpu.uuid,
            None if memory is None else int(memory.total) // MIB,
            None if memory is None else int(memory.used) // MIB,
            None if heat is None else int(heat),
            None if ecc is None else int(ecc),
        )  # fmt: skip

    def _ask(self, question: Callable[[], Any]) -> Any:
        """A value, or ``None`` for a device that does not support the question."""
        try:
            return question()
        except self._nvml.NVMLError:
            return None

    def _device_of(self, handle: Any) -> str | None:
        """By the handle's address, which a lost card still has, else by UUID."""
        address = _address(handle)
        for gpu in self._gpus:
            if _address(gpu.handle) == address:
                return gpu.device
        uuid = self._ask(lambda: _text(self._nvml.nvmlDeviceGetUUID(handle)))
        return next((gpu.device for gpu in self._gpus if gpu.uuid == uuid), None)

    def _newly_lost(self, error: Exception) -> tuple[GpuEvent, ...]:
        nvml, lost = self._nvml, list[GpuEvent]()
        for gpu in self._gpus:
            if gpu.device in self._lost:
                continue
            try:
                nvml.nvmlDeviceGetMemoryInfo(gpu.handle)
            except nvml.NVMLError_GpuIsLost:
                self._lost.add(gpu.device)
                fault = classify_xid(FALLEN_OFF_THE_BUS)
                lost.append(GpuEvent(gpu.device, FALLEN_OFF_THE_BUS, fault))
            except nvml.NVMLError:
                continue
        return tuple(lost)


class GpuWatcher:
    """`Nvml` in a thread of its own: events for the event loop, the last readings for metrics."""

    def __init__(self, *, visible: str | None = None, read_every_s: float = READ_EVERY_S) -> None:
        self._visible = visible
        self._read_every_s = read_every_s
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._events: asyncio.Queue[GpuEvent | None] = asyncio.Queue()
        self.readings: tuple[GpuReading, ...] = ()
        """As of at most ``read_every_s`` ago; empty without a GPU."""
        self.devices: tuple[str, ...] = ()

    async def start(self) -> bool:
        """Open the library and watch. False (and no thread) when there is nothing to watch."""
        loop = asyncio.get_running_loop()
        opened: asyncio.Future[bool] = loop.create_future()
        self._thread = threading.Thread(
            target=self._run, args=(loop, opened), name="gpu-watcher", daemon=True
        )
        self._thread.start()
        return await opened

    async def events(self) -> AsyncIterator[GpuEvent]:
        """Every event from `start` on, in order; ends after `close`. For one reader."""
        while True:
            event = await self._events.get()
            if event is None:
                return
            yield event

    async def close(self) -> None:
        """Stop the thread; waits for the call under way, at most about `WAIT_S`."""
        self._stop.set()
        thread, self._thread = self._thread, None
        if thread is not None:
            # Not for ever: a driver call on a dying card may never return; the thread is a daemon.
            await asyncio.to_thread(thread.join, 4 * WAIT_S)
        self._events.put_nowait(None)

    def _run(self, loop: asyncio.AbstractEventLoop, opened: asyncio.Future[bool]) -> None:
        nvml = Nvml.open(self._visible)
        if nvml is not None:
            self.devices = nvml.devices
            self.readings = nvml.readings()
        if not _tell(loop, _resolve, opened, nvml is not None) or nvml is None:
            return
        read_at_s = time.monotonic()
        try:
            while not self._stop.is_set():
                for event in nvml.wait(WAIT_S):
                    if not _tell(loop, self._events.put_nowait, event):
                        return
                if time.monotonic() - read_at_s >= self._read_every_s:
                    self.readings = nvml.readings()
                    read_at_s = time.monotonic()
        finally:
            nvml.close()


def visible_order(visible: str | None, uuids: tuple[str, ...]) -> tuple[int, ...]:
    """NVML's indexes in the order in which CUDA numbers the visible devices.

    As CUDA reads the list: numbers or (beginnings of) UUIDs, up to the first that does not exist.
    """
    if visible is None:
        return tuple(range(len(uuids)))
    order: list[int] = []
    for word in (part.strip() for part in visible.split(",")):
        if word.isdigit():
            index = int(word)
        else:
            index = next((i for i, u in enumerate(uuids) if word and u.startswith(word)), -1)
        if not 0 <= index < len(uuids) or index in order:
            break
        order.append(index)
    return tuple(order)


def _all(library: Any) -> tuple[_Gpu, ...]:
    gpus: list[_Gpu] = []
    for index in range(library.nvmlDeviceGetCount()):
        handle = library.nvmlDeviceGetHandleByIndex(index)
        uuid, name = library.nvmlDeviceGetUUID(handle), library.nvmlDeviceGetName(handle)
        gpus.append(_Gpu(f"gpu:{index}", handle, _text(uuid), _text(name)))
    return tuple(gpus)


def _visible(gpus: tuple[_Gpu, ...], visible: str | None) -> tuple[_Gpu, ...]:
    order = visible_order(visible, tuple(gpu.uuid for gpu in gpus))
    return tuple(
        _Gpu(f"gpu:{n}", gpus[index].handle, gpus[index].uuid, gpus[index].name)
        for n, index in enumerate(order)
    )


def _register(library: Any, gpu: _Gpu, event_set: Any) -> None:
    """Older cards know few kinds of events; asking for one they do not know refuses them all."""
    wanted = library.nvmlEventTypeXidCriticalError | library.nvmlEventTypeDoubleBitEccError
    try:
        known = library.nvmlDeviceGetSupportedEventTypes(gpu.handle)
        if wanted & known:
            library.nvmlDeviceRegisterEvents(gpu.handle, wanted & known, event_set)
    except library.NVMLError:
        return  # its readings are still worth having


def _address(handle: Any) -> int | None:
    return ctypes.cast(handle, ctypes.c_void_p).value


def _text(value: str | bytes) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else value


def _resolve(future: asyncio.Future[bool], value: bool) -> None:
    if not future.done():
        future.set_result(value)


def _tell(loop: asyncio.AbstractEventLoop, call: Callable[..., object], *args: object) -> bool:
    """Call on the loop's thread; False when the loop is closed."""
    try:
        loop.call_soon_threadsafe(call, *args)
    except RuntimeError:
        return False
    return True
