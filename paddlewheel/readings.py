"""Gauges and counters that `/metrics` shows of the node behind the front door."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import UTC, datetime

from loader.devices import DevicePool
from loader.host_memory import HostMemory
from loader.lifecycle import State
from loader.manager import Manager
from loader.nvml import GpuReading
from paddlewheel.follower import Follower
from registry.session import Session
from router.metrics import Reading

MB = float(1 << 20)


def readings(
    manager: Manager,
    session: Session,
    follower: Follower,
    devices: DevicePool,
    gpus: Sequence[GpuReading],
) -> Iterator[Reading]:
    """What is now; called for each scrape."""
    yield from _models(manager, follower)
    yield from _servables(manager)
    yield from _devices(devices, gpus)
    yield from _gpus(gpus)
    counters = session.counters
    yield Reading("lease_held", "1 while this node's lease is held.", (({}, session.has_lease),))
    yield Reading(
        "lease_remaining_seconds", "Until the lease ends without a renewal.",
        (({}, session.lease_remaining_s),),
    )  # fmt: skip
    yield Reading(
        "lease_losses", "Leases that ended against our will.", (({}, counters.losses),),
        is_counter=True,
    )  # fmt: skip
    if follower.last_event_at is not None:
        staleness_s = (datetime.now(UTC) - follower.last_event_at).total_seconds()
        yield Reading(
            "config_staleness_seconds", "Since etcd last sent a change.", (({}, staleness_s),)
        )


def _models(manager: Manager, follower: Follower) -> Iterator[Reading]:
    views = manager.views()
    wanted = [
        ({"model": model, "kind": "desired"}, float(seen.revision))
        for model, seen in follower.seen.items()
    ]
    applied = [
        ({"model": view.name, "kind": "applied"}, float(view.in_force.revision)) for view in views
    ]
    yield Reading(
        "config_revision", "Document revision seen (desired) and in force (applied).",
        tuple(wanted + applied),
    )  # fmt: skip
    yield Reading(
        "swap_duration_seconds", "How long the last swap of routing took.",
        tuple(({"model": view.name}, view.swap_s) for view in views),
    )  # fmt: skip
    yield Reading(
        "swaps", "Swaps of routing.",
        tuple(({"model": view.name}, view.swaps) for view in views), is_counter=True,
    )  # fmt: skip
    rollbacks = [
        ({"model": view.name, "reason": code}, float(count))
        for view in views
        for code, count in view.rollbacks.items()
    ]
    yield Reading(
        "rollback", "Rollbacks, by the code of the fault.", tuple(rollbacks), is_counter=True
    )
    results = [
        ({"model": view.name, "result": result}, float(count))
        for view in views
        for result, count in view.reloads.items()
    ]
    yield Reading("reload", "Servables made ready, or not.", tuple(results), is_counter=True)


def _servables(manager: Manager) -> Iterator[Reading]:
    servables = [servable for view in manager.views() for servable in view.servables]
    states = [
        ({"model": s.id.model, "version": s.id.version, "state": str(state)}, s.state is state)
        for s in servables
        for state in State
        if state is not State.GONE
    ]
    yield Reading("servable_state", "1 for the state that a servable is in.", tuple(states))
    phases = [
        ({"model": s.id.model, "version": s.id.version, "phase": phase}, ms / 1000)
        for s in servables
        for phase, ms in s.phases_ms.items()
    ]
    yield Reading(
        "reload_duration_seconds", "How long each phase of the last load took.", tuple(phases)
    )
    labels = [({"model": s.id.model, "version": s.id.version}, s.pool) for s in servables if s.pool]
    yield Reading(
        "queue_length", "Requests that wait for a worker.",
        tuple((label, float(pool.stats.queued)) for label, pool in labels),
    )  # fmt: skip
    yield Reading(
        "worker_restarts", "Workers that were replaced.",
        tuple((label, float(pool.stats.restarts)) for label, pool in labels), is_counter=True,
    )  # fmt: skip
    yield Reading(
        "busy_seconds", "Time inside predictors.",
        tuple((label, pool.stats.busy_s) for label, pool in labels), is_counter=True,
    )  # fmt: skip
    errors = [
        ({"model": s.id.model, "version": s.id.version, "code": code}, float(count))
        for s in servables
        for code, count in s.errors.items()
    ]
    yield Reading("gpu_error", "Faults of servables, by code.", tuple(errors), is_counter=True)


def _devices(devices: DevicePool, gpus: Sequence[GpuReading]) -> Iterator[Reading]:
    """Of a GPU, used is what the driver says; of the CPU, what counts against its memory."""
    usage = devices.usage()
    used_mb = {gpu.device: gpu.memory_used_mb for gpu in gpus}
    used_mb["cpu"] = HostMemory().used_mb()
    yield Reading(
        "device_quota_bytes", "Memory that models may take.",
        tuple(({"device": each.id}, each.quota_mb * MB) for each in usage),
    )  # fmt: skip
    yield Reading(
        "device_reserved_bytes", "Memory that loaded models have booked.",
        tuple(({"device": each.id}, each.reserved_mb * MB) for each in usage),
    )  # fmt: skip
    yield Reading(
        "device_waiting", "Loads that wait for memory.",
        tuple(({"device": each.id}, float(each.waiting)) for each in usage),
    )  # fmt: skip
    yield Reading(
        "device_used_bytes", "Memory in use on the device, by whomever.",
        tuple(
            ({"device": each.id}, used * MB)
            for each in usage
            if (used := used_mb.get(each.id)) is not None
        ),
    )  # fmt: skip
    yield Reading(
        "device_cordoned", "1 while the device takes nothing new.",
        tuple(({"device": each.id}, each.cordoned is not None) for each in usage),
    )  # fmt: skip


def _gpus(gpus: Sequence[GpuReading]) -> Iterator[Reading]:
    yield Reading(
        "gpu_temperature_celsius", "As the driver says.",
        tuple(
            ({"device": gpu.device}, float(gpu.temperature_c))
            for gpu in gpus
            if gpu.temperature_c is not None
        ),
    )  # fmt: skip
    yield Reading(
        "gpu_ecc_uncorrected", "Uncorrected memory errors since the driver was loaded.",
        tuple(
            ({"device": gpu.device}, float(gpu.ecc_uncorrected))
            for gpu in gpus
            if gpu.ecc_uncorrected is not None
        ),
    )  # fmt: skip
