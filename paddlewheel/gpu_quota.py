"""The quota of each device of a node: given, or found out."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping

from loader.devices import parse_devices
from loader.nvml import Nvml


def quotas_mb(devices: Iterable[str]) -> Mapping[str, int]:
    """Device to quota, for ``--device`` texts.

    Asks the driver only when a GPU comes without ``memoryMB``. Raises `loader.devices.BadDevice`.
    """
    specs = parse_devices(devices)
    totals: dict[str, int | None] = {}
    if any(spec.id != "cpu" and spec.memory_mb is None for spec in specs):
        nvml = Nvml.open(os.environ.get("CUDA_VISIBLE_DEVICES"))
        if nvml is not None:
            totals = {reading.device: reading.memory_total_mb for reading in nvml.readings()}
            nvml.close()
    return {spec.id: spec.quota_mb(gpu_total_mb=totals.get(spec.id)) for spec in specs}
