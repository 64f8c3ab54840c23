"""What goes wrong, when, by the seed: links, leases, compactions, the ends of processes."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterable
from contextvars import Context
from functools import partial
from typing import TypeVar

from registry.keys import Keys
from registry.names import Revision
from registry.store import Put
from tests.sim.fleet import Fleet, SimGateway, SimNode
from tests.sim.history import Did
from tests.sim.network import Link, Weather

T = TypeVar("T")


class Chaos:
    """Until `stop`; from then on the weather is fine."""

    def __init__(self, fleet: Fleet, keys: Keys, rng: random.Random, *, events: int) -> None:
        self._fleet = fleet
        self._keys = keys
        self._rng = rng
        self._events = events
        self._tasks: set[asyncio.Task[None]] = set()
        self.is_over = False

    def climate(self) -> None:
        """How bad links are all the time: a property of the run."""
        rng = self._rng
        self._lost = rng.choice([0.0, 0.0, 0.02, 0.1])
        self._refused = rng.choice([0.0, 0.0, 0.02, 0.1])
        self._slow = rng.choice([0.0, 0.02, 0.1])
        for link in self._fleet.links:
            self.rough(link)

    def rough(self, link: Link) -> None:
        if self.is_over:
            return
        link.weather = Weather(
            slow_share=self._slow, refused_share=self._refused, lost_share=self._lost
        )

    async def run(self, span_s: float) -> None:
        """Spread the events over ``span_s``."""
        rng, loop = self._rng, asyncio.get_running_loop()
        start_s = loop.time()
        for at_s in sorted(rng.uniform(0.0, span_s) for _ in range(self._events)):
            await asyncio.sleep(max(0.0, start_s + at_s - loop.time()))
            rng.choices(
                [
                    self._kill_node, self._kill_in_step, self._stop_node, self._cut, self._freeze,
                    self._compact, self._end_leases, self._kill_gateway, self._kill_coordinator,
                    self._freeze_coordinator, self._all_away,
                ],
                [5, 6, 2, 4, 4, 3, 1, 2, 4, 3, 1],
            )[0]()  # fmt: skip

    def stop(self) -> None:
        """Mend everything, and bring back whoever is missing."""
        self.is_over = True
        for task in self._tasks:
            task.cancel()
        for link in self._fleet.links:
            if not link.is_dead:
                link.crash_in = 0
                link.mend()
        for node in self._fleet.nodes.values():
            node.start()
        for gateway in self._fleet.gateways.values():
            gateway.start()
        self._say("fine weather")

    # --- events -----------------------------------------------------------------------------------

    def _kill_node(self) -> None:
        for node in self._some(self._fleet.nodes.values()):
            if node.process is not None:
                node.kill()
                self._later(self._rng.uniform(0.5, 20.0), partial(self.restart, node))

    def _kill_in_step(self) -> None:
        for node in self._some(self._fleet.nodes.values()):
            if node.process is not None:
                node.process.link.crash_in = self._rng.randrange(1, 12)

    def crashed(self, node: SimNode) -> None:
        """Its link ended it (`Link.crash_in`)."""
        if node.process is not None:
            node.kill()
            self._later(self._rng.uniform(0.5, 20.0), lambda: self.restart(node))

    def _stop_node(self) -> None:
        for node in self._some(self._fleet.nodes.values()):
            node.stop()
            self._later(self._rng.uniform(3.0, 15.0), partial(self.restart, node))

    def restart(self, node: SimNode) -> None:
        if not node.is_running:
            node.start(with_disk=self._rng.random() < 0.7)
            assert node.process is not None
            self.rough(node.process.link)

    def _cut(self) -> None:
        links = self._some(self._alive())
        for link in links:
            link.cut()
            self._mend_later(link)
        self._say(f"cuts off {_names(links)}")

    def _freeze(self) -> None:
        links = self._some(self._alive())
        for link in links:
            link.freeze()
            self._mend_later(link)
        self._say(f"freezes {_names(links)}")

    def _all_away(self) -> None:
        self._say("etcd is away")
        span_s = self._rng.uniform(2.0, 25.0)
        for link in self._alive():
            link.cut()
            self._later(span_s, partial(self._mend, link))

    def _compact(self) -> None:
        etcd = self._fleet.etcd
        etcd.compact(Revision(max(etcd.compacted, etcd.revision - self._rng.randrange(3))))
        self._say(f"compacts at {etcd.compacted}")
        for link in self._some(self._alive(), 0.1):
            link.cut_watches()

    def _end_leases(self) -> None:
        etcd = self._fleet.etcd
        if self._rng.random() < 0.3:
            etcd.revoke_all()
            self._say("all leases end")
        else:
            for lease in self._some(list(etcd._leases)):
                etcd.revoke(lease)

    def _kill_gateway(self) -> None:
        gateway = self._rng.choice(list(self._fleet.gateways.values()))
        gateway.kill()
        self._later(self._rng.uniform(0.5, 5.0), lambda: self._restart_gateway(gateway))

    def _restart_gateway(self, gateway: SimGateway) -> None:
        gateway.start()
        if gateway.process is not None:
            self.rough(gateway.process.link)

    def _coordinator(self) -> SimNode | None:
        """The process that wrote the coordinator's key."""
        key = f"{self._keys.prefix}/coordinator"
        if self._fleet.etcd.get(key) is None:
            return None
        for written in reversed(self._fleet.etcd.journal):
            if isinstance(written.event, Put) and written.event.kv.key == key:
                for node in self._fleet.nodes.values():
                    if node.process is not None and node.process.name == written.writer:
                        return node
                return None
        return None

    def _kill_coordinator(self) -> None:
        node = self._coordinator()
        if node is not None and node.process is not None:
            self._say(f"kills the coordinator {node.id}")
            node.process.link.crash_in = self._rng.randrange(1, 6)

    def _freeze_coordinator(self) -> None:
        """Long enough for another one to be elected."""
        node = self._coordinator()
        if node is not None and node.process is not None:
            link = node.process.link
            self._say(f"freezes the coordinator {node.id}")
            link.freeze()
            self._later(self._rng.uniform(5.0, 30.0), lambda: self._mend(link))

    # --- small things -----------------------------------------------------------------------------

    def _alive(self) -> list[Link]:
        return [link for link in self._fleet.links if not link.is_dead]

    def _some(self, things: Iterable[T], share: float | None = None) -> list[T]:
        """One, a few, or many of them."""
        found = list(things)
        share = self._rng.choice([0.0, 0.01, 0.05, 0.3]) if share is None else share
        return self._rng.sample(found, min(len(found), max(1, int(len(found) * share))))

    def _mend_later(self, link: Link) -> None:
        self._later(self._rng.choice([0.5, 3.0, 20.0]), lambda: self._mend(link))

    def _mend(self, link: Link) -> None:
        if not link.is_dead and not self.is_over:
            link.mend()
            self.rough(link)
            self._say(f"mends {link.owner}")

    def _later(self, delay_s: float, do: Callable[[], None]) -> None:
        async def wait() -> None:
            await asyncio.sleep(delay_s)
            do()

        task = asyncio.get_running_loop().create_task(wait(), context=Context())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _say(self, what: str) -> None:
        self._fleet.history.note(Did(self._fleet.now_s(), "weather", what))


def _names(links: Iterable[Link]) -> str:
    return ", ".join(link.owner for link in links)
