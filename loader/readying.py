"""The effects behind "make this servable ready": fetching, memory, worker processes.

What it takes (a place in the device pool, a lease on the files) is noted on the servable itself
and given back from there, so that nobody gives back what is somebody else's.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable
from functools import partial
from pathlib import Path

from loader.courtesy import Courtesy
from loader.devices import BadDevice, Cordoned, DevicePool, OutOfQuota, Priority
from loader.errors import FetchFailed, NotAdmitted
from loader.loading import Loading, Predecessor, Ready
from loader.memory import required_mb
from loader.plan import Order
from loader.recipe import Recipe
from loader.repository import Fetched, ModelRepository
from loader.servable import Servable
from loader.zygote import Zygote
from registry.names import Digest


class Readying:
    """One a node. Everything raises `LoaderError` or `OSError`."""

    def __init__(
        self,
        *,
        zygote: Zygote,
        repository: ModelRepository,
        devices: DevicePool,
        load_timeout_s: float,
        fetch_timeout_s: float,
        load_slots: int,
        is_waited: Callable[[], bool],
    ) -> None:
        """is_waited: whether requests wait for a worker that is there, but busy."""
        self._zygote = zygote
        self._repository = repository
        self._devices = devices
        self._load_timeout_s = load_timeout_s
        self._fetch_timeout_s = fetch_timeout_s
        self._slots = asyncio.Semaphore(load_slots)
        self._courtesy = Courtesy(is_waited)
        self._owners = itertools.count(1)

    async def fetch(self, recipe: Recipe) -> Fetched:
        """The files of ``recipe`` on this machine."""
        try:
            async with asyncio.timeout(self._fetch_timeout_s):
                return await self._repository.fetch(recipe.source, sha256=recipe.sha256)
        except TimeoutError:
            raise FetchFailed("the source did not answer in time") from None

    async def cached(self, recipe: Recipe, digest: Digest) -> Fetched | None:
        """Files with this digest, if they are still on this machine."""
        return await self._repository.cached(recipe.source, digest)

    async def make(
        self,
        servable: Servable,
        order: Order,
        fetched: Fetched,
        *,
        predecessor: Callable[[], Predecessor | None],
        on_waiting: Callable[[str], None],
        on_loading: Callable[[], None],
        on_phase: Callable[[str, float], None],
    ) -> tuple[Loading, Ready]:
        """Warm workers of ``servable``, and what makes more of them.

        predecessor: asked when the load begins. on_waiting: told what is waited for, before the
        wait. on_loading: told when it is this one's turn.
        """
        self._repository.lease(fetched.digest)
        servable.leased = fetched.digest
        golden = await self._golden(order.recipe)
        await self._wait_for_memory(servable, fetched, on_waiting)
        async with self._slots:
            on_loading()
            loading = Loading(
                recipe=order.recipe,
                folder=fetched.folder,
                golden=golden,
                predecessor=predecessor(),
                compatibility=order.compatibility,
                spawn=self._zygote.spawn,
                reserve=partial(self.reserve, servable, fetched),
                restore=partial(self._restore, order.recipe, fetched),
                on_phase=on_phase,
                courtesy=self._courtesy,
                timeout_s=self._load_timeout_s,
            )
            return loading, await loading.run()

    async def _restore(self, recipe: Recipe, fetched: Fetched) -> None:
        """Bring the files back if somebody took them out of the cache behind our back.

        Paddle would load a program without its params, and answer with NaN.
        """
        if self._repository.has(fetched.digest):
            return
        again = await self.fetch(recipe)
        if again.digest != fetched.digest:
            raise FetchFailed("its files are gone from the cache, and the source has others now")

    async def _golden(self, recipe: Recipe) -> Path | None:
        if recipe.golden is None:
            return None
        try:
            async with asyncio.timeout(self._fetch_timeout_s):
                return await self._repository.fetch_file(recipe.golden)
        except TimeoutError:
            raise FetchFailed(f"{recipe.golden} did not come in time") from None

    # --- memory -------------------------------------------------------------------------------

    async def _wait_for_memory(
        self, servable: Servable, fetched: Fetched, on_waiting: Callable[[str], None]
    ) -> None:
        """Stand in line for the device, by priority, then arrival.

        What can never fit is not waited for: `reserve` refuses it when its turn among the checks
        comes.
        """
        recipe = servable.recipe
        memory_mb = total_mb(recipe, fetched)
        priority = Priority.parse(recipe.priority)
        owner = self._owner(servable)
        try:
            self._devices.reserve(owner, recipe.device, memory_mb, priority=priority)
        except BadDevice:
            return
        except (OutOfQuota, Cordoned) as exc:
            if isinstance(exc, OutOfQuota) and exc.never:
                return
            on_waiting(f"waiting for memory: {exc}")
            try:
                async with asyncio.timeout(self._load_timeout_s):
                    await self._devices.acquire(owner, recipe.device, memory_mb, priority=priority)
            except TimeoutError:
                raise NotAdmitted("memory", str(exc), may_heal=True) from None
            except (OutOfQuota, Cordoned, BadDevice) as refused:
                raise NotAdmitted("memory", str(refused), may_heal=True) from refused
        servable.memory_mb = memory_mb

    def reserve(self, servable: Servable, fetched: Fetched) -> None:
        """Book the memory now, or raise `NotAdmitted` with the numbers. Again is no harm."""
        recipe = servable.recipe
        memory_mb = total_mb(recipe, fetched)
        priority = Priority.parse(recipe.priority)
        try:
            self._devices.reserve(
                self._owner(servable), recipe.device, memory_mb, priority=priority
            )
        except (OutOfQuota, Cordoned, BadDevice) as exc:
            may_heal = isinstance(exc, Cordoned) or (isinstance(exc, OutOfQuota) and not exc.never)
            raise NotAdmitted("memory", str(exc), may_heal=may_heal) from exc
        servable.memory_mb = memory_mb

    def _owner(self, servable: Servable) -> str:
        # Not its name: the same version is loaded anew while an earlier servable of it still ends.
        if servable.owner is None:
            servable.owner = f"{servable.id}#{next(self._owners)}"
        return servable.owner

    def give_back(self, servable: Servable) -> None:
        """Its memory and its files may go to others. What it does not hold is left alone."""
        if servable.owner is not None:
            self._devices.release(servable.owner)
            servable.owner = None
        if servable.leased is not None:
            self._repository.release(servable.leased)
            servable.leased = None


def total_mb(recipe: Recipe, fetched: Fetched) -> int:
    """Memory of all replicas together."""
    return required_mb(recipe, fetched.bytes) * recipe.replicas
