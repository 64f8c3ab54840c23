"""The NVML watcher: the real binding over a stand-in library, and nothing there at all."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pynvml
import pytest

from loader.faults import FaultClass
from loader.nvml import GpuEvent, GpuWatcher, Nvml, visible_order
from tests.integration.fake_nvml import NOT_FOUND, UNKNOWN, FakeDriver, FakeGpu

GPUS = ("GPU-aaaa-0", "GPU-bbbb-1")


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> FakeDriver:
    """One library a process: the binding keeps the first that it finds."""
    driver = FakeDriver([])
    driver.install(tmp_path_factory.mktemp("nvml"))
    return driver


@pytest.fixture
def driver(installed: FakeDriver) -> Iterator[FakeDriver]:
    installed.gpus = [FakeGpu(uuid) for uuid in GPUS]
    installed.events.clear()
    installed.calls.clear()
    installed.init_result = 0
    yield installed
    assert installed.opened == 0, "the library was not given back"


async def next_event(watcher: GpuWatcher) -> GpuEvent:
    return await asyncio.wait_for(anext(watcher.events()), 5)


async def until(holds: Callable[[], bool], timeout_s: float = 5.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline_s, "never held"
        await asyncio.sleep(0.01)


@pytest.mark.parametrize("xid", [79, 94, 48, 95])
async def test_xid_of_the_device_arrives_classified(driver: FakeDriver, xid: int) -> None:
    watcher = GpuWatcher()
    assert await watcher.start()
    driver.raise_xid(1, xid)
    event = await next_event(watcher)
    assert (event.device, event.xid) == ("gpu:1", xid)
    assert event.fault is not None
    assert (event.fault.code, event.fault.fault_class) == (f"XID:{xid}", FaultClass.HARDWARE)
    await watcher.close()


async def test_a_program_s_xid_carries_no_fault_and_order_is_kept(driver: FakeDriver) -> None:
    watcher = GpuWatcher()
    await watcher.start()
    for gpu, xid in ((0, 13), (1, 79), (0, 31), (0, 94)):
        driver.raise_xid(gpu, xid)
    driver.raise_double_bit(0)
    seen = [await next_event(watcher) for _ in range(5)]
    assert [(e.device, e.xid, e.fault is not None) for e in seen] == [
        ("gpu:0", 13, False), ("gpu:1", 79, True), ("gpu:0", 31, False), ("gpu:0", 94, True),
        ("gpu:0", 48, True),
    ]  # fmt: skip
    await watcher.close()
    assert [event async for event in watcher.events()] == []


async def test_a_lost_card_is_noticed_without_an_event(driver: FakeDriver) -> None:
    watcher = GpuWatcher(read_every_s=0.01)
    await watcher.start()
    driver.gpus[0].is_lost = True
    event = await next_event(watcher)
    assert (event.device, event.xid) == ("gpu:0", 79)
    await until(lambda: [r.device for r in watcher.readings] == ["gpu:1"])
    await watcher.close()
    assert [event async for event in watcher.events()] == [], "it is lost once"


async def test_readings(driver: FakeDriver) -> None:
    driver.gpus[1] = FakeGpu("GPU-b", "Fake T4", total=8 << 30, used=3 << 30, ecc=None)
    watcher = GpuWatcher(read_every_s=0.01)
    await watcher.start()
    first, second = watcher.readings
    assert (first.memory_total_mb, first.memory_used_mb, first.temperature_c) == (16384, 1024, 40)
    assert (second.name, second.uuid, second.ecc_uncorrected) == ("Fake T4", "GPU-b", None)
    driver.gpus[0].used, driver.gpus[0].ecc, driver.gpus[0].temperature_c = 2 << 30, 7, 91
    await until(lambda: watcher.readings[0].memory_used_mb == 2048)
    assert (watcher.readings[0].ecc_uncorrected, watcher.readings[0].temperature_c) == (7, 91)
    await watcher.close()


async def test_devices_are_numbered_as_cuda_does(driver: FakeDriver) -> None:
    watcher = GpuWatcher(visible="1,0")
    await watcher.start()
    assert watcher.devices == ("gpu:0", "gpu:1")
    assert watcher.readings[0].uuid == GPUS[1]
    driver.raise_xid(1, 79)
    assert (await next_event(watcher)).device == "gpu:0"
    await watcher.close()
    hidden = GpuWatcher(visible="0")
    await hidden.start()
    driver.raise_xid(1, 79)
    driver.raise_xid(0, 94)
    assert (await next_event(hidden)).xid == 94, "another's device is not ours"
    await hidden.close()


@pytest.mark.parametrize(
    ("visible", "wanted"),
    [
        (None, (0, 1)), ("0,1", (0, 1)), ("1", (1,)), ("", ()), ("-1", ()), ("1,7,0", (1,)),
        ("GPU-bbbb", (1,)), ("GPU-bbbb-1,GPU-aaaa-0", (1, 0)), ("0,0", (0,)), ("none", ()),
    ],
)  # fmt: skip
def test_visible_order(visible: str | None, wanted: tuple[int, ...]) -> None:
    assert visible_order(visible, GPUS) == wanted


async def test_the_event_loop_is_never_blocked(driver: FakeDriver) -> None:
    watcher = GpuWatcher()
    await watcher.start()
    longest_s = 0.0
    for _ in range(50):
        began_s = time.monotonic()
        await asyncio.sleep(0.005)
        longest_s = max(longest_s, time.monotonic() - began_s)
    assert longest_s < 0.25, "a driver call of up to 0.5 s ran on the loop"
    await watcher.close()
    assert not [t for t in threading.enumerate() if t.name == "gpu-watcher"]


@pytest.mark.parametrize("result", [NOT_FOUND, UNKNOWN])
async def test_a_driver_that_will_not_start_is_absent(driver: FakeDriver, result: int) -> None:
    driver.init_result = result
    watcher = GpuWatcher()
    assert not await watcher.start()
    assert (watcher.devices, watcher.readings) == ((), ())
    await watcher.close()


async def test_a_driver_without_a_card_is_absent(driver: FakeDriver) -> None:
    driver.gpus = []
    watcher = GpuWatcher()
    assert not await watcher.start()
    await watcher.close()


@pytest.mark.parametrize("without", ["library", "package"])
def test_quietly_absent(without: str) -> None:
    """In a process of its own: this one has found a library already."""
    code = "import sys\n"
    if without == "package":
        code += "sys.modules['pynvml'] = None\n"
    else:
        code += "import pynvml, ctypes\n"
        code += "def missing(*args): raise OSError('not found')\n"
        code += "pynvml.CDLL = missing\n"
    code += "from loader.nvml import Nvml\nassert Nvml.open() is None\n"
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60,
        cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "", "")


def test_the_binding_is_the_real_one(driver: FakeDriver) -> None:
    nvml = Nvml.open()
    assert nvml is not None
    assert "nvmlEventSetCreate" in driver.calls
    assert pynvml.nvmlDeviceGetCount() == 2
    nvml.close()
