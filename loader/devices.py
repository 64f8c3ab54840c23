"""The device pool: several models share a device's memory without overrunning or starving another.

A quota is a promise on paper: nobody may hold more of a device than its quota, whoever asks.
Reservations come before loading, so a refusal costs nothing and names the numbers. On a CPU the
device is the host's memory, under the same rules.
"""

from __future__ import annotations

import asyncio
import itertools
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from enum import IntEnum

from loader.errors import LoaderError
from loader.host_memory import HostMemory

CPU_SHARE = 0.8
"""The CPU's default quota, of the memory this process may use (SPEC section 8)."""
GPU_SHARE = 0.9
"""The default of a GPU's own memory: its contexts and the driver take the rest."""
WAITING_MAX = 64

_DEVICE = re.compile(r"(cpu|gpu:\d+)(?:,memoryMB=(\d+))?")


class Priority(IntEnum):
    """``placement.priority``. Larger is served first."""

    LOW = 0
    NORMAL = 1
    HIGH = 2

    @classmethod
    def parse(cls, text: str) -> Priority:
        return cls[text.upper()]


class BadDevice(LoaderError):
    """A ``--device`` that cannot be read, or a device that this node does not have."""


class OutOfQuota(LoaderError):
    """Not enough left of a device's quota now; with ``never``, not even of all of it."""

    def __init__(
        self, device: str, *, wanted_mb: int, reserved_mb: int, quota_mb: int, waiting: int = 0
    ) -> None:
        self.device = device
        self.wanted_mb = wanted_mb
        self.reserved_mb = reserved_mb
        self.quota_mb = quota_mb
        self.waiting = waiting
        self.never = wanted_mb > quota_mb
        free_mb = quota_mb - reserved_mb
        queue = f", {waiting} waiting" if waiting else ""
        super().__init__(
            f"{device}: {wanted_mb} MB wanted, {free_mb} MB free"
            f" ({reserved_mb} of {quota_mb} MB reserved{queue})"
        )


class Cordoned(LoaderError):
    """The device takes nothing new: it is at fault."""


@dataclass(frozen=True, slots=True)
class Cordon:
    """Why a device takes nothing new; the value of ``cordoned`` in the node's key."""

    code: str
    reason: str
    at: str
    """RFC 3339 UTC."""

    @property
    def is_hardware(self) -> bool:
        """Said by the driver: no run that succeeds disproves it."""
        return self.code.startswith("XID:")

    def as_json(self) -> dict[str, str]:
        return {"code": self.code, "reason": self.reason, "at": self.at}


@dataclass(frozen=True, slots=True)
class DeviceSpec:
    """One ``--device``: its id and its quota, ``None`` for the default."""

    id: str
    memory_mb: int | None = None

    @classmethod
    def parse(cls, text: str) -> DeviceSpec:
        """Read ``cpu``, ``gpu:0`` or ``gpu:0,memoryMB=16000``. Raises `BadDevice`."""
        match = _DEVICE.fullmatch(text.strip())
        if match is None or match[2] == "0":
            raise BadDevice(f"{text!r}: want cpu, gpu:N or either with ,memoryMB=N")
        return cls(match[1], int(match[2]) if match[2] else None)

    def quota_mb(self, *, host: HostMemory | None = None, gpu_total_mb: int | None = None) -> int:
        """The quota to use. ``gpu_total_mb``: from the driver, where there is one.

        Raises `BadDevice` when a GPU's memory is neither given nor known.
        """
        if self.memory_mb is not None:
            return self.memory_mb
        if self.id == "cpu":
            return int((host or HostMemory()).usable_mb() * CPU_SHARE)
        if gpu_total_mb is None:
            raise BadDevice(f"{self.id}: its memory is not known; say {self.id},memoryMB=N")
        return int(gpu_total_mb * GPU_SHARE)


@dataclass(frozen=True, slots=True)
class DeviceUsage:
    """One device as ``/metrics`` and the node's key show it."""

    id: str
    quota_mb: int
    reserved_mb: int
    waiting: int
    used_mb: int | None = None
    cordoned: Cordon | None = None

    def as_json(self) -> dict[str, object]:
        """The entry of ``devices`` in ``P/nodes/<node>`` (SPEC section 7)."""
        cordoned = None if self.cordoned is None else self.cordoned.as_json()
        return {
            "id": self.id, "memory_mb": self.quota_mb, "reserved_mb": self.reserved_mb,
            "used_mb": self.used_mb, "waiting": self.waiting, "cordoned": cordoned,
        }  # fmt: skip


@dataclass(frozen=True, slots=True)
class Reservation:
    owner: str
    device: str
    memory_mb: int


@dataclass(slots=True)
class _Waiter:
    order: tuple[int, int]
    """(-priority, arrival): the least is served first."""
    reservation: Reservation
    granted: Callable[[], None]


@dataclass(slots=True)
class _Device:
    quota_mb: int
    reserved_mb: int = 0
    waiting: list[_Waiter] = field(default_factory=list["_Waiter"])
    cordon: Cordon | None = None


class DevicePool:
    """Who holds how much of which device. One event loop's; nothing here blocks.

    An owner (a servable's replica, by an id of the caller's) holds or waits for one device at a
    time. Waiting is in order of priority, then of arrival, and the first in line is never passed
    by a smaller wish behind it: else a large model would starve.
    """

    def __init__(self, quotas_mb: Mapping[str, int], *, waiting_max: int = WAITING_MAX) -> None:
        self._devices = {id_: _Device(quota) for id_, quota in quotas_mb.items()}
        self._held: dict[str, Reservation] = {}
        self._waiting: dict[str, _Waiter] = {}
        self._waiting_max = waiting_max
        self._arrivals = itertools.count()
        self._on_freed: list[Callable[[], None]] = []

    def on_freed(self, callback: Callable[[], None]) -> None:
        """Call whenever memory was given back or a cordon lifted, after those in line had theirs.

        It must not reserve or release.
        """
        self._on_freed.append(callback)

    # --- reserve and release ----------------------------------------------------------------

    def reserve(
        self, owner: str, device: str, memory_mb: int, *, priority: Priority = Priority.NORMAL
    ) -> Reservation:
        """Take ``memory_mb`` of the quota now.

        The same wish of the same owner again changes nothing; another amount replaces the old one,
        or is refused with the old one kept. Raises `OutOfQuota` (also when somebody of the same or
        a higher priority waits for the device), `Cordoned`, `BadDevice`.
        """
        held = self._held.get(owner)
        wish = Reservation(owner, device, memory_mb)
        if held == wish:
            return wish
        if held is not None and held.device != device:
            raise BadDevice(f"{owner} holds {held.memory_mb} MB of {held.device}; release it first")
        if owner in self._waiting:
            raise BadDevice(f"{owner} waits in line already; release it first")
        on = self._open(device)
        before_mb = held.memory_mb if held is not None else 0
        grows = memory_mb > before_mb
        first_in_line = all(-waiter.order[0] < priority for waiter in on.waiting)
        if grows and not (first_in_line and self._fits(on, memory_mb - before_mb)):
            raise self._refusal(wish, on, before_mb)
        self._hold(wish, on, before_mb)
        if not grows:
            self._serve(on)
            self._tell_freed()
        return wish

    def release(self, owner: str) -> bool:
        """Give back what ``owner`` holds, and its place in line. False when it had neither."""
        waiter = self._waiting.pop(owner, None)
        if waiter is not None:
            on = self._devices[waiter.reservation.device]
            on.waiting.remove(waiter)
            self._serve(on)  # the one behind may fit where this one did not
        held = self._held.pop(owner, None)
        if held is not None:
            on = self._devices[held.device]
            on.reserved_mb -= held.memory_mb
            self._serve(on)
        if waiter is None and held is None:
            return False
        self._tell_freed()
        return True

    def enqueue(
        self,
        owner: str,
        device: str,
        memory_mb: int,
        granted: Callable[[], None],
        *,
        priority: Priority = Priority.NORMAL,
    ) -> bool:
        """Reserve, or wait in line for it; ``granted`` is called when the wait is over.

        True when it was reserved at once (``granted`` is not called then). `release` ends the
        wait. Raises `OutOfQuota` when it can never fit or the line is full, and `BadDevice`.
        A cordoned device is waited for.
        """
        on = self._known(device)
        if owner in self._held or owner in self._waiting:
            raise BadDevice(f"{owner} holds or waits already")
        wish = Reservation(owner, device, memory_mb)
        if memory_mb > on.quota_mb or len(on.waiting) >= self._waiting_max:
            raise self._refusal(wish, on)
        waiter = _Waiter((-priority, next(self._arrivals)), wish, granted)
        on.waiting.append(waiter)
        on.waiting.sort(key=lambda each: each.order)
        self._waiting[owner] = waiter
        self._serve(on, quietly=owner)
        return owner in self._held

    async def acquire(
        self, owner: str, device: str, memory_mb: int, *, priority: Priority = Priority.NORMAL
    ) -> Reservation:
        """Reserve, waiting in line as long as it takes; cancelling ends the wait and holds nothing.

        Raises as `enqueue` does.
        """
        turn = asyncio.get_running_loop().create_future()

        def granted() -> None:
            if not turn.done():
                turn.set_result(None)

        if not self.enqueue(owner, device, memory_mb, granted, priority=priority):
            try:
                await turn
            except asyncio.CancelledError:
                self.release(owner)
                raise
        return self._held[owner]

    # --- cordon -----------------------------------------------------------------------------

    def cordon(self, device: str, cordon: Cordon) -> bool:
        """Let nothing new onto ``device``; what is there stays. False when it was cordoned.

        What the driver says replaces what runs had led to: no good run lifts it.
        """
        on = self._known(device)
        if on.cordon is not None and (on.cordon.is_hardware or not cordon.is_hardware):
            return False
        on.cordon = cordon
        return True

    def uncordon(self, device: str) -> bool:
        on = self._known(device)
        if on.cordon is None:
            return False
        on.cordon = None
        self._serve(on)
        self._tell_freed()
        return True

    def cordoned(self, device: str) -> Cordon | None:
        return self._known(device).cordon

    # --- looking ----------------------------------------------------------------------------

    def held(self, owner: str) -> Reservation | None:
        return self._held.get(owner)

    def waiting(self, device: str) -> tuple[str, ...]:
        """Owners in line, the next one first."""
        return tuple(waiter.reservation.owner for waiter in self._known(device).waiting)

    def waiting_priority(self, device: str) -> Priority | None:
        """Of the first in line; ``None`` when nobody waits."""
        waiting = self._known(device).waiting
        return Priority(-waiting[0].order[0]) if waiting else None

    def free_mb(self, device: str) -> int:
        on = self._known(device)
        return on.quota_mb - on.reserved_mb

    def usage(self, used_mb: Mapping[str, int | None] | None = None) -> tuple[DeviceUsage, ...]:
        """Every device as it stands; ``used_mb``: what was measured, by device."""
        measured = used_mb or {}
        return tuple(
            DeviceUsage(
                id_, on.quota_mb, on.reserved_mb, len(on.waiting), measured.get(id_), on.cordon
            )
            for id_, on in self._devices.items()
        )

    # --- inside -----------------------------------------------------------------------------

    def _known(self, device: str) -> _Device:
        on = self._devices.get(device)
        if on is None:
            raise BadDevice(f"{device}: this node has {', '.join(self._devices) or 'no device'}")
        return on

    def _open(self, device: str) -> _Device:
        on = self._known(device)
        if on.cordon is not None:
            raise Cordoned(f"{device} is cordoned: {on.cordon.reason} (code {on.cordon.code})")
        return on

    def _fits(self, on: _Device, more_mb: int) -> bool:
        return on.reserved_mb + more_mb <= on.quota_mb

    def _hold(self, wish: Reservation, on: _Device, before_mb: int = 0) -> None:
        on.reserved_mb += wish.memory_mb - before_mb
        self._held[wish.owner] = wish

    def _refusal(self, wish: Reservation, on: _Device, own_mb: int = 0) -> OutOfQuota:
        return OutOfQuota(
            wish.device, wanted_mb=wish.memory_mb, reserved_mb=on.reserved_mb - own_mb,
            quota_mb=on.quota_mb, waiting=len(on.waiting),
        )  # fmt: skip

    def _tell_freed(self) -> None:
        for callback in self._on_freed:
            callback()

    def _serve(self, on: _Device, quietly: str = "") -> None:
        """Grant from the head of the line as long as it fits."""
        while on.waiting and on.cordon is None:
            waiter = on.waiting[0]
            if not self._fits(on, waiter.reservation.memory_mb):
                return
            del on.waiting[0]
            owner = waiter.reservation.owner
            del self._waiting[owner]
            self._hold(waiter.reservation, on)
            if owner != quietly:
                waiter.granted()


def parse_devices(texts: Iterable[str]) -> tuple[DeviceSpec, ...]:
    """All ``--device`` of a node; none means ``cpu``. Raises `BadDevice` for one said twice."""
    specs = tuple(DeviceSpec.parse(text) for text in texts) or (DeviceSpec("cpu"),)
    ids = [spec.id for spec in specs]
    twice = {id_ for id_ in ids if ids.count(id_) > 1}
    if twice:
        raise BadDevice(f"said twice: {', '.join(sorted(twice))}")
    return specs
