"""The user: puts documents good and bad, deletes them, releases versions, changes their mind."""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass, field
from typing import Any

import orjson

from registry.keys import Keys
from registry.names import ModelName, Revision, Version
from registry.store import DeleteOp, PutOp
from tests.sim.history import Did, History
from tests.sim.machine import Nature
from tests.sim.network import Etcd

STRATEGIES = ("immediate", "immediate", "waves", "barrier", "barrier", "acked")


@dataclass
class Wish:
    """One model as the user last wrote it."""

    number: int = 0
    """The last version's."""
    live: Version | None = None
    before: Version | None = None
    revision: Revision = Revision(0)
    is_good: bool = True
    """Whether the document last put parses."""
    has_faulty: bool = False
    """Whether one of its versions was."""
    labels: dict[str, str] = field(default_factory=dict[str, str])


class User:
    """Writes with a steady hand: the store's faults are other processes'."""

    def __init__(
        self, etcd: Etcd, keys: Keys, history: History, rng: random.Random, *, gated: bool
    ) -> None:
        self._etcd = etcd
        self._keys = keys
        self._history = history
        self._rng = rng
        self._gated = gated
        self.natures: dict[str, Nature] = {}
        self.wishes: dict[ModelName, Wish] = {}

    def nature(self, source: str) -> Nature:
        return self.natures[source]

    def act(self, model: ModelName) -> None:
        """Do one thing to ``model``."""
        wish = self.wishes.setdefault(model, Wish())
        roll = self._rng.random()
        if wish.live is None or roll < 0.62:
            self.put(model)
        elif roll < 0.72:
            self.put_broken(model)
        elif roll < 0.80:
            self.delete(model)
        elif roll < 0.88:
            self.put(model)
            self.put(model)
            self.put_broken(model) if self._rng.random() < 0.3 else None
        elif roll < 0.94:
            self.delete(model)
            self.put(model)
        else:
            self.go_back(model)

    def put(self, model: ModelName, *, nature: Nature | None = None, **rollout: Any) -> None:
        """The next version, of whatever nature."""
        wish = self.wishes.setdefault(model, Wish())
        wish.number += 1
        version = Version(str(wish.number))
        if nature is None:
            nature = self._some_nature(wish.number == 1)
            if nature.faulty_on and wish.has_faulty:
                # Two that fail in the same way are the device's fault, and nobody repairs it here.
                nature = Nature(nature.load_s)
        wish.has_faulty = wish.has_faulty or nature.faulty_on > 0
        self.natures[f"/models/{model}/{version}"] = nature
        if wish.live is not None:
            wish.before = wish.live
        wish.live = version
        self._write(model, wish, rollout or self._some_rollout())

    def go_back(self, model: ModelName) -> None:
        """The version before, as live again."""
        wish = self.wishes[model]
        if wish.before is not None:
            wish.live, wish.before = wish.before, wish.live
        self._write(model, wish, self._some_rollout())

    def _write(self, model: ModelName, wish: Wish, rollout: dict[str, Any]) -> None:
        assert wish.live is not None
        versions = [wish.live, *([wish.before] if wish.before else [])]
        rng = self._rng
        document = {
            "apiVersion": "paddlewheel/v1",
            "kind": "Model",
            "metadata": {"name": model},
            "spec": {
                "live": wish.live,
                "versions": [
                    {"version": v, "source": f"/models/{model}/{v}", "compatibility": "none"}
                    for v in versions
                ],
                "placement": {"labels": wish.labels},
                "rollback": {
                    "consecutive": 2, "bake_s": rng.choice([0, 3, 8]),
                    "quorum": rng.choice([1, 1, 2]),
                },
                "limits": {"timeout_s": 5, "drain_s": 1},
                **({"rollout": rollout} if rollout else {}),
            },
        }  # fmt: skip
        wish.is_good = True
        self._put(model, wish, orjson.dumps(document), f"puts {wish.live} {rollout or ''}")

    def put_broken(self, model: ModelName) -> None:
        wish = self.wishes.setdefault(model, Wish())
        wish.is_good = False
        text = self._rng.choice(
            [b"kind: [", b"{}", b"\xff\xfe", b'{"kind": "Model", "spec": {"x": 1}}']
        )
        self._put(model, wish, text + b" " * self._rng.randrange(9), "puts what is no document")

    def delete(self, model: ModelName) -> None:
        wish = self.wishes[model]
        wish.live = wish.before = None
        wish.revision = Revision(0)
        self._as_user([DeleteOp(self._keys.model(model))], f"deletes {model}")

    def release(self, model: ModelName, version: Version) -> None:
        """As the command does: the quarantine and the faults behind it."""
        faults = self._etcd.list_prefix(self._keys.faults_prefix(model, version)).kvs
        self._as_user(
            [DeleteOp(self._keys.quarantine(model, version)), *(DeleteOp(kv.key) for kv in faults)],
            f"releases {model}/{version}",
        )

    def order(self, model: ModelName, order: str, revision: Revision) -> None:
        value = orjson.dumps(
            {"order": order, "revision": revision, "at": "2024-05-21T00:00:00.000Z", "by": "user"}
        )
        self._as_user(
            [PutOp(f"{self._keys.prefix}/orders/{model}", value)], f"orders {order} of {model}"
        )

    def _put(self, model: ModelName, wish: Wish, text: bytes, what: str) -> None:
        self._as_user([PutOp(self._keys.model(model), text)], f"{what} as {model}")
        wish.revision = self._etcd.revision

    def _as_user(self, ops: list[Any], what: str) -> None:
        self._etcd.writer = "user"
        try:
            self._etcd.apply(ops)
        finally:
            self._etcd.writer = ""
        now_s = asyncio.get_running_loop().time()
        self._history.note(Did(now_s, "user", f"{what} at {self._etcd.revision}"))

    def _some_nature(self, is_first: bool) -> Nature:
        rng = self._rng
        load_s = rng.choice([0.2, 0.5, 2.0])
        roll = rng.random()
        if is_first or roll < 0.6:
            return Nature(load_s)
        if roll < 0.7:
            return Nature(load_s, breaks_on=1.0)
        if roll < 0.8:
            return Nature(load_s, breaks_on=0.02)
        if roll < 0.88:
            return Nature(load_s, stumbles=0.05)
        return Nature(load_s, faulty_on=rng.choice([1.0, 1.0, 0.5]))

    def _some_rollout(self) -> dict[str, Any]:
        if not self._gated:
            return {}
        rng = self._rng
        timeout_s = rng.choice([10, 30])
        match rng.choice(STRATEGIES):
            case "waves":
                waves: list[dict[str, Any]] = [{"percent": rng.choice([2, 10, 50]), "bake_s": 2}]
                if rng.random() < 0.5:
                    waves.append({"labels": {"zone": "a"}, "bake_s": 1})
                return {"strategy": "waves", "waves": waves, "timeout_s": timeout_s}
            case "barrier":
                return {
                    "strategy": "barrier",
                    "require_ack": rng.choice([100, 100, 90]),
                    "timeout_s": timeout_s,
                }
            case "acked":
                return {"strategy": "immediate", "require_ack": 80, "timeout_s": timeout_s}
            case _:
                return {}
