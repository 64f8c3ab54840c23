"""Whether a valid document can be taken by this very node: its sources, its device, its memory."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path

from loader.devices import DevicePool
from loader.lifecycle import LOADED, State
from loader.manager import Manager
from loader.memory import required_mb
from loader.plan import recipe_for
from loader.repository import is_allowed
from registry.names import Version
from registry.spec import FieldError, ModelDocument

Sizes = Mapping[str, int]
"""Source to the bytes of its files, where that could be told without fetching it."""


def local_sizes(document: ModelDocument) -> Sizes:
    """Look at the sources on this machine's disks. Blocking.

    What can't be looked at (a link to nothing, a path of 5000 characters) counts as nothing here:
    the fetch will say why it can't be read.
    """
    sizes = dict[str, int]()
    for entry in document.spec.versions:
        path = entry.source.removeprefix("file://")
        if "://" in path:
            continue
        with contextlib.suppress(OSError):
            sizes[entry.source] = sum(
                _size(Path(found))
                for found in os.scandir(path)
                if found.name.endswith((".json", ".pdmodel", ".pdiparams"))
            )
    return sizes


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


class DocumentAdmission:
    """Refuses, with the numbers, what could not be loaded beside what serves."""

    def __init__(
        self, allow_sources: tuple[str, ...], devices: DevicePool, manager: Manager
    ) -> None:
        self._allow_sources = allow_sources
        self._devices = devices
        self._manager = manager

    def check(self, document: ModelDocument, sizes: Sizes) -> tuple[FieldError, ...]:
        """Every reason against ``document`` on this node; empty: accepted."""
        return (*self._sources(document), *self._memory(document, sizes))

    def _sources(self, document: ModelDocument) -> tuple[FieldError, ...]:
        """Whatever the node would read on the document's word, golden data too."""
        if not self._allow_sources:
            return ()
        spec = document.spec
        sources = {f"spec.versions[{i}].source": one.source for i, one in enumerate(spec.versions)}
        if spec.warmup.golden is not None:
            sources["spec.warmup.golden"] = spec.warmup.golden
        return tuple(
            FieldError(
                path,
                None,
                f"{source!r} is under none of the allowed sources "
                f"({', '.join(self._allow_sources)})",
            )
            for path, source in sources.items()
            if not is_allowed(source, self._allow_sources)
        )

    def _memory(self, document: ModelDocument, sizes: Sizes) -> tuple[FieldError, ...]:
        """Live and canary of the document beside live and canary in force; a standby yields."""
        device = document.spec.placement.device
        usage = {each.id: each for each in self._devices.usage()}.get(device)
        if usage is None:
            have = ", ".join(each.id for each in self._devices.usage())
            message = f"this node has no device {device!r}, it has {have}"
            return (FieldError("spec.placement.device", None, message),)
        quota_mb = usage.quota_mb
        serving_mb, yielding_mb, needed_mb = 0, 0, 0
        loaded = set[tuple[Version, str]]()
        view = self._manager.view(document.metadata.name)
        for servable in view.servables if view is not None else ():
            if servable.recipe.device != device:
                continue
            if servable.state in (State.LIVE, State.CANARY):
                serving_mb += servable.memory_mb
            else:
                yielding_mb += servable.memory_mb
            if servable.state in LOADED:
                loaded.add((servable.id.version, servable.id.recipe))
        wanted = [document.spec.live]
        if document.spec.canary is not None:
            wanted.append(document.spec.canary.version)
        for version in dict.fromkeys(wanted):
            recipe = recipe_for(document, version)
            if (version, recipe.key()) not in loaded:
                needed_mb += required_mb(recipe, sizes.get(recipe.source, 0)) * recipe.replicas
        others_mb = usage.reserved_mb - serving_mb - yielding_mb
        free_mb = quota_mb - others_mb - serving_mb
        if needed_mb <= free_mb:
            return ()
        return (
            FieldError(
                "spec.placement.memoryMB",
                None,
                f"needs {needed_mb} MB beside the {serving_mb} MB of what serves now; of the "
                f"{quota_mb} MB of {device}, {others_mb} MB are other models', "
                f"{max(free_mb, 0)} MB are free",
            ),
        )
