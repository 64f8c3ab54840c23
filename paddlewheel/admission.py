"""Whether a valid document can be taken by this very node: its sources, its device, its memory."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from loader.devices import DevicePool, Priority
from loader.lifecycle import LOADED, State
from loader.manager import Manager
from loader.memory import required_mb
from loader.plan import recipe_for
from loader.recipe import Recipe
from loader.repository import is_allowed
from registry.names import ModelName, Version
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


@dataclass(frozen=True, slots=True)
class _Shortage:
    """Why a document does not fit."""

    device: str
    needed_mb: int
    serving_mb: int
    """Of the document's own model."""
    others_mb: int
    quota_mb: int

    @property
    def free_mb(self) -> int:
        return self.quota_mb - self.others_mb - self.serving_mb

    @property
    def is_for_ever(self) -> bool:
        """Not even alone on the device."""
        return self.needed_mb + self.serving_mb > self.quota_mb

    def error(self) -> FieldError:
        return FieldError(
            "spec.placement.memoryMB",
            None,
            f"needs {self.needed_mb} MB beside the {self.serving_mb} MB of what serves now; of the "
            f"{self.quota_mb} MB of {self.device}, {self.others_mb} MB are other models', "
            f"{max(self.free_mb, 0)} MB are free",
        )


@dataclass(frozen=True, slots=True)
class _NoDevice:
    device: str
    have: tuple[str, ...]

    def error(self) -> FieldError:
        message = f"this node has no device {self.device!r}, it has {', '.join(self.have)}"
        return FieldError("spec.placement.device", None, message)


@dataclass(frozen=True, slots=True)
class _Wish:
    """A document that there was no room for, with what is needed to ask again."""

    document: ModelDocument
    sizes: Sizes
    arrival: int

    @property
    def order(self) -> tuple[int, int]:
        return (-Priority.parse(self.document.spec.placement.priority), self.arrival)


class DocumentAdmission:
    """Refuses, with the numbers, what could not be loaded beside what serves.

    Memory is judged by how things will be once every accepted document is in force: what other
    models are promised counts as taken, and a swap of theirs that needs more for a moment does
    not; the load stands in line for that (`loader.devices`). Called on the event loop.
    """

    def __init__(
        self, allow_sources: tuple[str, ...], devices: DevicePool, manager: Manager
    ) -> None:
        self._allow_sources = allow_sources
        self._devices = devices
        self._manager = manager
        self._promised: dict[ModelName, Mapping[str, int]] = {}
        """By model: device to MB for live and canary of the document accepted last."""
        self._wishes: dict[ModelName, _Wish] = {}
        self._arrivals = itertools.count()
        self.room = asyncio.Event()
        """Set when there may be room for a document that was refused (`now_fitting`)."""
        devices.on_freed(self.room.set)

    def check(
        self, document: ModelDocument, sizes: Sizes, *, is_newest: bool = True
    ) -> tuple[FieldError, ...]:
        """Every reason against ``document`` on this node; empty: accepted, and room is kept.

        is_newest: of its model. An older one does not end the wait of the newest for room.
        """
        name = document.metadata.name
        before = self._wishes.pop(name, None) if is_newest else None
        sources, shortage = self._sources(document), self._shortage(document, sizes)
        if not sources and shortage is None:
            self._promised[name] = {document.spec.placement.device: _total_mb(document, sizes)}
            self.room.set()  # it may be promised less than before
        may_fit_later = isinstance(shortage, _Shortage) and not shortage.is_for_ever
        if is_newest and not sources and may_fit_later:
            is_same = before is not None and before.document == document
            arrival = before.arrival if before and is_same else next(self._arrivals)
            self._wishes[name] = _Wish(document, sizes, arrival)
        errors = () if shortage is None else (shortage.error(),)
        return (*sources, *errors)

    def forget(self, name: ModelName) -> None:
        """The document was deleted, or is placed elsewhere now."""
        self._promised.pop(name, None)
        self._wishes.pop(name, None)
        self.room.set()

    def withdraw(self, name: ModelName) -> None:
        """Do not ask again for the refused document of ``name``."""
        self._wishes.pop(name, None)

    def now_fitting(self) -> ModelName | None:
        """A model whose refused document there is room for now.

        On each device by priority, then arrival, and only the first: a small wish behind a large
        one does not take the room that comes together for it.
        """
        first: dict[str, _Wish] = {}
        for wish in sorted(self._wishes.values(), key=lambda each: each.order):
            first.setdefault(wish.document.spec.placement.device, wish)
        for wish in first.values():
            if self._shortage(wish.document, wish.sizes) is None:
                return wish.document.metadata.name
        return None

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

    def _shortage(self, document: ModelDocument, sizes: Sizes) -> _Shortage | _NoDevice | None:
        """Live and canary of the document beside live and canary in force; a standby yields."""
        device, name = document.spec.placement.device, document.metadata.name
        quotas_mb = {usage.id: usage.quota_mb for usage in self._devices.usage()}
        if device not in quotas_mb:
            return _NoDevice(device, tuple(quotas_mb))
        serving_mb = needed_mb = 0
        loaded = set[tuple[Version, str]]()
        view = self._manager.view(name)
        for servable in view.servables if view is not None else ():
            if servable.recipe.device != device:
                continue
            if servable.state in (State.LIVE, State.CANARY):
                serving_mb += servable.memory_mb
            if servable.state in LOADED:
                loaded.add((servable.id.version, servable.id.recipe))
        for recipe in _recipes(document):
            if (Version(recipe.version), recipe.key()) not in loaded:
                needed_mb += _required_mb(recipe, sizes)
        others_mb = self._others_mb(document)
        shortage = _Shortage(device, needed_mb, serving_mb, others_mb, quotas_mb[device])
        return None if needed_mb <= shortage.free_mb else shortage

    def _others_mb(self, document: ModelDocument) -> int:
        """What other models take of the document's device, or were promised.

        A standby counts unless its model is of a lower priority: then it yields.
        """
        device, name = document.spec.placement.device, document.metadata.name
        priority = Priority.parse(document.spec.placement.priority)
        taken: dict[ModelName, int] = {}
        standbys_mb = 0
        for view in self._manager.views():
            if view.name == name:
                continue
            for servable in view.servables:
                if servable.recipe.device != device:
                    continue
                if servable.state in (State.LIVE, State.CANARY):
                    taken[view.name] = taken.get(view.name, 0) + servable.memory_mb
                elif (
                    servable.state is State.STANDBY
                    and Priority.parse(servable.recipe.priority) >= priority
                ):
                    standbys_mb += servable.memory_mb
        for other, promised in self._promised.items():
            if other != name:
                taken[other] = max(taken.get(other, 0), promised.get(device, 0))
        return standbys_mb + sum(taken.values())


def _recipes(document: ModelDocument) -> tuple[Recipe, ...]:
    """Of the live version and of the canary."""
    spec = document.spec
    versions = [spec.live] if spec.canary is None else [spec.live, spec.canary.version]
    return tuple(recipe_for(document, version) for version in dict.fromkeys(versions))


def _required_mb(recipe: Recipe, sizes: Sizes) -> int:
    return required_mb(recipe, sizes.get(recipe.source, 0)) * recipe.replicas


def _total_mb(document: ModelDocument, sizes: Sizes) -> int:
    return sum(_required_mb(recipe, sizes) for recipe in _recipes(document))
