"""Quotas, refusals with numbers, waiting in order, cordons, and the host's memory."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from loader.devices import (
    BadDevice,
    Cordon,
    Cordoned,
    DevicePool,
    DeviceSpec,
    OutOfQuota,
    Priority,
    parse_devices,
)
from loader.host_memory import HostMemory

LOW, NORMAL, HIGH = Priority.LOW, Priority.NORMAL, Priority.HIGH
BROKEN = Cordon("XID:79", "XID 79: GPU has fallen off the bus", "2024-06-10T00:00:00.000Z")


def pool(quota_mb: int = 1000, **more: int) -> DevicePool:
    return DevicePool({"gpu:0": quota_mb}, **more)


def held_mb(devices: DevicePool) -> int:
    (usage,) = devices.usage()
    return usage.reserved_mb


# --- specs ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("cpu", DeviceSpec("cpu")), ("gpu:0", DeviceSpec("gpu:0")),
        ("gpu:12,memoryMB=16000", DeviceSpec("gpu:12", 16000)),
        ("cpu,memoryMB=512", DeviceSpec("cpu", 512)),
    ],
)  # fmt: skip
def test_spec(text: str, wanted: DeviceSpec) -> None:
    assert DeviceSpec.parse(text) == wanted


@pytest.mark.parametrize(
    "text",
    ["", "gpu", "gpu:", "gpu:x", "GPU:0", "cpu:0", "cpu,memoryMB=", "cpu,memoryMB=-1",
     "cpu,memoryMB=0", "cpu,memoryMB=1.5", "cpu,memory=1", "cpu,memoryMB=1,memoryMB=2"],
)  # fmt: skip
def test_bad_spec(text: str) -> None:
    with pytest.raises(BadDevice, match="memoryMB"):
        DeviceSpec.parse(text)


def test_devices_of_a_node() -> None:
    assert parse_devices([]) == (DeviceSpec("cpu"),)
    assert [spec.id for spec in parse_devices(["gpu:1", "cpu"])] == ["gpu:1", "cpu"]
    with pytest.raises(BadDevice, match="twice: gpu:0"):
        parse_devices(["gpu:0", "gpu:0,memoryMB=5"])


def test_default_quotas(tmp_path: Path) -> None:
    host = machine(tmp_path, total_kb=10_000 * 1024)
    assert DeviceSpec("cpu").quota_mb(host=host) == 8000
    assert DeviceSpec("cpu", 77).quota_mb(host=host) == 77
    assert DeviceSpec("gpu:0").quota_mb(gpu_total_mb=16_000) == 14_400
    with pytest.raises(BadDevice, match="gpu:0,memoryMB=N"):
        DeviceSpec("gpu:0").quota_mb()
    assert 0 < DeviceSpec("cpu").quota_mb() < 10**8


# --- reserve and release ----------------------------------------------------------------------


def test_refusal_says_the_numbers_and_reserves_nothing() -> None:
    devices = pool()
    devices.reserve("a", "gpu:0", 700)
    with pytest.raises(OutOfQuota) as refused:
        devices.reserve("b", "gpu:0", 301)
    error = refused.value
    assert (error.wanted_mb, error.reserved_mb, error.quota_mb, error.never) == (
        301,
        700,
        1000,
        False,
    )
    assert str(error) == "gpu:0: 301 MB wanted, 300 MB free (700 of 1000 MB reserved)"
    assert devices.held("b") is None
    devices.reserve("b", "gpu:0", 300)
    assert devices.free_mb("gpu:0") == 0


def test_reserve_and_release_are_idempotent() -> None:
    devices = pool()
    assert devices.reserve("a", "gpu:0", 600) == devices.reserve("a", "gpu:0", 600)
    assert held_mb(devices) == 600
    assert devices.release("a")
    assert not devices.release("a")
    assert not devices.release("never seen")
    assert held_mb(devices) == 0


def test_another_amount_replaces_the_old_or_is_refused_with_the_old_kept() -> None:
    devices = pool()
    devices.reserve("a", "gpu:0", 600)
    devices.reserve("a", "gpu:0", 900)
    assert held_mb(devices) == 900
    devices.reserve("a", "gpu:0", 200)
    devices.reserve("b", "gpu:0", 700)
    with pytest.raises(OutOfQuota, match="400 MB wanted, 300 MB free"):
        devices.reserve("a", "gpu:0", 400)
    assert devices.held("a") is not None
    assert held_mb(devices) == 900


def test_never_fits() -> None:
    with pytest.raises(OutOfQuota) as refused:
        pool().reserve("a", "gpu:0", 1001)
    assert refused.value.never


def test_unknown_device() -> None:
    devices = pool()
    with pytest.raises(BadDevice, match="this node has gpu:0"):
        devices.reserve("a", "gpu:1", 1)
    devices = DevicePool({"gpu:0": 10, "cpu": 10})
    devices.reserve("a", "gpu:0", 1)
    with pytest.raises(BadDevice, match="release it first"):
        devices.reserve("a", "cpu", 1)


# --- waiting ----------------------------------------------------------------------------------


def test_waiting_is_by_priority_then_arrival_and_nobody_passes_the_head() -> None:
    devices, served = pool(), list[str]()
    devices.reserve("holder", "gpu:0", 1000)
    for owner, mb, priority in (
        ("low", 100, LOW), ("big", 900, NORMAL), ("small", 100, NORMAL), ("high", 200, HIGH),
        ("small2", 50, NORMAL),
    ):  # fmt: skip
        devices.enqueue(
            owner, "gpu:0", mb, lambda owner=owner: served.append(owner), priority=priority
        )
    assert devices.waiting("gpu:0") == ("high", "big", "small", "small2", "low")
    devices.reserve("holder", "gpu:0", 500)
    assert served == ["high"], "500 free: small would fit, but big is before it"
    devices.release("holder")
    assert served == ["high"], "800 free, big wants 900"
    devices.release("high")
    assert served == ["high", "big", "small"]
    devices.release("small")
    assert served == ["high", "big", "small", "small2"], "50 left: low wants 100"
    devices.release("big")
    assert served[-1] == "low"
    assert held_mb(devices) == 150


def test_reserve_does_not_pass_those_who_wait() -> None:
    devices = pool()
    devices.reserve("a", "gpu:0", 600)
    devices.enqueue("b", "gpu:0", 600, lambda: None)
    with pytest.raises(OutOfQuota, match=r"400 MB free .*1 waiting"):
        devices.reserve("c", "gpu:0", 100)
    devices.reserve("d", "gpu:0", 100, priority=HIGH)
    devices.release("a")
    assert devices.held("b") is not None
    devices.reserve("c", "gpu:0", 100)


def test_giving_up_lets_the_next_one_in() -> None:
    devices, served = pool(), list[str]()
    devices.reserve("a", "gpu:0", 600)
    devices.enqueue("b", "gpu:0", 600, lambda: served.append("b"))
    devices.enqueue("c", "gpu:0", 300, lambda: served.append("c"))
    assert devices.release("b")
    assert served == ["c"]


def test_the_line_is_bounded_and_one_owner_waits_once() -> None:
    devices = pool(waiting_max=1)
    devices.reserve("a", "gpu:0", 1000)
    devices.enqueue("b", "gpu:0", 1, lambda: None)
    with pytest.raises(BadDevice, match="already"):
        devices.enqueue("b", "gpu:0", 1, lambda: None)
    with pytest.raises(OutOfQuota, match="1 waiting"):
        devices.enqueue("c", "gpu:0", 1, lambda: None)


async def test_acquire_waits_and_cancelling_holds_nothing() -> None:
    devices = pool()
    await devices.acquire("a", "gpu:0", 1000)
    first = asyncio.ensure_future(devices.acquire("b", "gpu:0", 500))
    second = asyncio.ensure_future(devices.acquire("c", "gpu:0", 500))
    gone = asyncio.ensure_future(devices.acquire("d", "gpu:0", 500, priority=HIGH))
    await asyncio.sleep(0)
    assert devices.waiting("gpu:0") == ("d", "b", "c")
    gone.cancel()
    with pytest.raises(asyncio.CancelledError):
        await gone
    devices.release("a")
    assert [r.owner for r in await asyncio.gather(first, second)] == ["b", "c"]
    assert devices.held("d") is None
    assert held_mb(devices) == 1000


async def test_cancelled_in_the_very_turn_it_was_granted() -> None:
    devices = pool()
    await devices.acquire("a", "gpu:0", 1000)
    waiting = asyncio.ensure_future(devices.acquire("b", "gpu:0", 500))
    await asyncio.sleep(0)
    devices.release("a")  # granted, not yet resumed
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert held_mb(devices) == 0


# --- cordon -----------------------------------------------------------------------------------


def test_a_cordoned_device_takes_nothing_new() -> None:
    devices, served = pool(), list[str]()
    devices.reserve("a", "gpu:0", 500)
    assert devices.cordon("gpu:0", BROKEN)
    assert not devices.cordon("gpu:0", BROKEN), "the first reason stays"
    with pytest.raises(Cordoned, match=r"XID 79: GPU has fallen off the bus \(code XID:79\)"):
        devices.reserve("b", "gpu:0", 1)
    assert not devices.enqueue("b", "gpu:0", 1, lambda: served.append("b"))
    assert devices.held("a") is not None
    (usage,) = devices.usage({"gpu:0": 321})
    assert usage.as_json() == {
        "id": "gpu:0", "memory_mb": 1000, "reserved_mb": 500, "used_mb": 321, "waiting": 1,
        "cordoned": {"code": "XID:79", "reason": BROKEN.reason, "at": BROKEN.at},
    }  # fmt: skip
    assert devices.uncordon("gpu:0")
    assert not devices.uncordon("gpu:0")
    assert served == ["b"]
    assert devices.cordoned("gpu:0") is None


# --- the host's memory ------------------------------------------------------------------------


def machine(
    root: Path, *, total_kb: int = 16_000 * 1024, available_kb: int = 4_000 * 1024,
    cgroup: str = "", files: dict[str, str] | None = None,
) -> HostMemory:  # fmt: skip
    proc, groups = root / "proc", root / "cgroup"
    (proc / "self").mkdir(parents=True)
    groups.mkdir()
    (proc / "meminfo").write_text(f"MemTotal: {total_kb} kB\nMemAvailable:  {available_kb} kB\n")
    (proc / "self" / "cgroup").write_text(cgroup)
    for name, text in (files or {}).items():
        (groups / name).parent.mkdir(parents=True, exist_ok=True)
        (groups / name).write_text(text)
    return HostMemory(proc, groups)


MIB = 1024 * 1024


def test_no_limit_means_the_machine(tmp_path: Path) -> None:
    host = machine(tmp_path, cgroup="0::/a\n", files={"a/memory.max": "max\n"})
    assert (host.usable_mb(), host.used_mb()) == (16_000, 12_000)


def test_v2_the_least_on_the_way_up_counts(tmp_path: Path) -> None:
    host = machine(tmp_path, cgroup="0::/pod/box\n", files={
        "pod/memory.max": f"{2_000 * MIB}\n", "pod/memory.current": f"{900 * MIB}\n",
        "pod/memory.stat": f"anon 1\ninactive_file {100 * MIB}\n",
        "pod/box/memory.max": f"{3_000 * MIB}\n", "pod/box/memory.current": f"{1 * MIB}\n",
    })  # fmt: skip
    assert (host.usable_mb(), host.used_mb()) == (2_000, 800)


def test_v1_with_the_hosts_path_that_does_not_exist_here(tmp_path: Path) -> None:
    host = machine(tmp_path, cgroup="5:devices:/\n4:memory,hugetlb:/docker/abc\n0::/\n", files={
        "memory/memory.limit_in_bytes": f"{1_000 * MIB}\n",
        "memory/memory.usage_in_bytes": f"{600 * MIB}\n",
        "memory/memory.stat": f"inactive_file 1\ntotal_inactive_file {200 * MIB}\n",
    })  # fmt: skip
    assert (host.usable_mb(), host.used_mb()) == (1_000, 400)


def test_v1_unlimited_is_a_huge_number(tmp_path: Path) -> None:
    host = machine(tmp_path, cgroup="4:memory:/\n", files={
        "memory/memory.limit_in_bytes": "9223372036854771712\n",
        "memory/memory.usage_in_bytes": "5\n",
    })  # fmt: skip
    assert (host.usable_mb(), host.used_mb()) == (16_000, 12_000)


def test_this_machine_can_be_read() -> None:
    host = HostMemory()
    assert 0 < host.used_mb() <= host.usable_mb()


# --- who is told ------------------------------------------------------------------------------


def test_whoever_asked_is_told_of_freed_memory() -> None:
    devices = pool(1000)
    told: list[int] = []
    devices.on_freed(lambda: told.append(devices.free_mb("gpu:0")))
    devices.reserve("a", "gpu:0", 600)
    assert told == []
    devices.enqueue("b", "gpu:0", 500, lambda: None)
    devices.release("a")
    assert told == [500], "those in line had theirs first"
    devices.reserve("b", "gpu:0", 300)
    devices.reserve("b", "gpu:0", 400)
    assert told == [500, 700]
    assert not devices.release("nobody")
    devices.cordon("gpu:0", BROKEN)
    devices.uncordon("gpu:0")
    assert told == [500, 700, 600]


def test_the_priority_of_the_first_in_line() -> None:
    devices = pool(1000)
    assert devices.waiting_priority("gpu:0") is None
    devices.reserve("a", "gpu:0", 1000)
    devices.enqueue("b", "gpu:0", 1, lambda: None, priority=LOW)
    assert devices.waiting_priority("gpu:0") is LOW
    devices.enqueue("c", "gpu:0", 1, lambda: None, priority=HIGH)
    assert devices.waiting_priority("gpu:0") is HIGH
    devices.release("a")
    assert devices.waiting_priority("gpu:0") is None


def test_what_the_driver_says_replaces_what_runs_had_led_to() -> None:
    devices = pool()
    assert devices.cordon("gpu:0", Cordon("700", "both versions", "2024-06-10T00:00:00.000Z"))
    assert devices.cordon("gpu:0", BROKEN)
    assert devices.cordoned("gpu:0") == BROKEN
    assert not devices.cordon("gpu:0", Cordon("700", "again", "2024-06-10T00:00:00.000Z"))
    assert devices.cordoned("gpu:0") == BROKEN
