"""A node's pipelines between a store in memory and an endpoint: what is seen, kept and told."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from paddlewheel import pipelines as pipelines_module
from paddlewheel.pipelines import PipelineKeeper
from paddlewheel.transforms.pool import TransformPool
from registry.inference import Signature
from registry.keys import Keys
from registry.memory_store import MemoryStore
from registry.names import ModelName, NodeId, Revision
from registry.pipeline_records import PipelineStatus
from registry.session import Session
from registry.store import Batch, Listing, PermissionDenied, Unavailable
from router.app import App
from router.pipeline.errors import TransformFailed
from tests.eventually import eventually
from tests.integration.test_http_support import ONE, Node, one_model, serving
from tests.pipelines import document

KEYS = Keys("/p")
NODE = NodeId("n")
P = ModelName("p")
STEP = {"name": "a", "model": "m", "inputs": {"x": "request.x"}}
GOOD = document("p", [STEP])


class PlayedStore(MemoryStore):
    """Fails its first lists as a test says."""

    list_failures: list[Exception]
    rewinds: int = 0
    listed: Listing | None = None
    """What it says instead of what it has."""

    async def list_prefix(self, prefix: str) -> Listing:
        if prefix == KEYS.pipelines_prefix and self.listed is not None:
            return self.listed
        if prefix == KEYS.pipelines_prefix and self.list_failures:
            raise self.list_failures.pop(0)
        return await super().list_prefix(prefix)

    async def watch_prefix(  # type: ignore[override]
        self, prefix: str, *, known: Listing | None = None
    ) -> AsyncIterator[Batch]:
        """The first watch goes back in time, as of a store restored from a backup."""
        if self.rewinds:
            self.rewinds -= 1
            yield Batch(Revision(1), ())
        async for batch in super().watch_prefix(prefix, known=known):
            yield batch


@dataclass
class Kept:
    store: PlayedStore
    app: App
    keeper: PipelineKeeper

    async def put(self, text: bytes, name: ModelName = P) -> Revision:
        return await self.store.put(KEYS.pipeline(name), text)

    async def told(self, **wanted: Any) -> PipelineStatus:
        """The status in the store, once it is so."""
        found: list[PipelineStatus] = []

        async def is_so() -> bool:
            kv = await self.store.get(KEYS.pipeline_status(P, NODE))
            found[:] = [] if kv is None else [PipelineStatus.from_json(kv.value)]
            return bool(found) and all(getattr(found[0], k) == v for k, v in wanted.items())

        await eventually(is_so, within_s=5, what=str(wanted))
        return found[0]


@contextlib.asynccontextmanager
async def keeping(
    folder: Path,
    store: PlayedStore | None = None,
    *,
    model: str = "m",
    transforms: TransformPool | None = None,
) -> AsyncIterator[Kept]:
    if store is None:
        store = PlayedStore()
    if "list_failures" not in store.__dict__:
        store.list_failures = []
    app = App(Node(), product_version="1")
    app.publish(serving(one_model(model, "1", ONE)))
    async with Session(store, 5) as session:
        keeper = PipelineKeeper(
            store=store,
            keys=KEYS,
            node=NODE,
            session=session,
            transforms=transforms or TransformPool(1),
            endpoint=app.pipelines,
            snapshot_path=folder / "pipelines.json",
        )
        task = asyncio.create_task(keeper.run())
        try:
            yield Kept(store, app, keeper)
            assert not task.done(), task
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


async def saved(folder: Path) -> None:
    await eventually(lambda: (folder / "pipelines.json").exists(), within_s=5)


async def test_the_last_accepted_document_stays(tmp_path: Path) -> None:
    async with keeping(tmp_path) as kept:
        good = await kept.put(GOOD)
        assert (await kept.told(applied_revision=good)).ready
        bad = await kept.put(GOOD.replace(b'"m"', b"7"))
        status = await kept.told(revision=bad)
        assert (status.accepted, status.applied_revision, status.ready) == (False, good, True)
        assert "spec.steps[0].model" in str(status.error)
        await kept.store.delete(KEYS.pipeline(P))

        async def is_gone() -> bool:
            return await kept.store.get(KEYS.pipeline_status(P, NODE)) is None

        await eventually(is_gone, within_s=5)


async def test_a_start_without_the_store_serves_what_was_accepted(tmp_path: Path) -> None:
    async with keeping(tmp_path) as kept:
        good = await kept.put(GOOD)
        await kept.told(applied_revision=good)
        await kept.put(b"spec: [")
        await kept.told(accepted=False)
        await saved(tmp_path)
    away = PlayedStore()
    away.list_failures = [Unavailable("away")] * 1000
    async with keeping(tmp_path, away) as kept:
        await eventually(lambda: kept.app.pipelines.has("p"), within_s=5)
        assert kept.keeper.status(P).applied_revision == good
        assert kept.keeper.status(P).ready


async def test_what_was_deleted_while_it_was_away_goes(tmp_path: Path) -> None:
    async with keeping(tmp_path) as kept:
        await kept.put(GOOD)
        await kept.told(ready=True)
        await saved(tmp_path)
        await kept.store.delete(KEYS.pipeline(P))
        store = kept.store
    async with keeping(tmp_path, store) as kept:
        await eventually(lambda: not kept.app.pipelines.has("p"), within_s=5)


async def test_a_store_that_refuses_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipelines_module, "REFUSED_RETRY_S", 0.01)
    store = PlayedStore()
    store.list_failures = [PermissionDenied("password rotated"), Unavailable("away")]
    await store.put(KEYS.pipeline(P), GOOD)
    async with keeping(tmp_path, store) as kept:
        await kept.told(ready=True)


async def test_a_store_that_goes_back_in_time_is_listed_again(tmp_path: Path) -> None:
    store = PlayedStore()
    store.rewinds = 1
    await store.put("/other", b"")
    await store.put(KEYS.pipeline(P), GOOD)
    async with keeping(tmp_path, store) as kept:
        await kept.told(ready=True)
        assert store.rewinds == 0
        newer = await kept.put(GOOD + b" ")
        await kept.told(applied_revision=newer)


async def test_what_another_store_lacks_is_served_on(tmp_path: Path) -> None:
    store = PlayedStore()
    await store.put(KEYS.pipeline(P), GOOD)
    async with keeping(tmp_path, store) as kept:
        await kept.told(ready=True)
        empty = Listing((), Revision(1), "another")
        store.listed = empty
        again = asyncio.create_task(kept.keeper._follow_listing())
        await asyncio.sleep(0.02)
        assert kept.app.pipelines.has("p"), "deleted by nobody"
        again.cancel()
        await asyncio.gather(again, return_exceptions=True)
        store.listed = None
        newer = await kept.put(GOOD + b" ")
        await kept.told(applied_revision=newer)
        await store.delete(KEYS.pipeline(P))
        await eventually(lambda: not kept.app.pipelines.has("p"), within_s=5)


async def test_a_models_name_is_free_when_the_model_goes(tmp_path: Path) -> None:
    async with keeping(tmp_path) as kept:
        await kept.store.put(KEYS.model(P), b"whatever")
        await kept.put(GOOD)
        status = await kept.told(accepted=False)
        assert "a model has this name" in str(status.error)
        await kept.store.delete(KEYS.model(P))
        kept.keeper.models_changed()
        await kept.told(accepted=True, ready=True)


async def test_readiness_is_told_when_models_change(tmp_path: Path) -> None:
    async with keeping(tmp_path, model="other") as kept:
        await kept.put(GOOD)
        status = await kept.told(accepted=True, ready=False)
        assert status.reason == "step 'a': unknown model 'm'"
        kept.app.publish(serving(one_model("m", "1", ONE)))
        kept.keeper.models_changed()
        await kept.told(ready=True, reason=None)
        kept.app.publish(serving(one_model("m", "1", ONE), one_model("p", "1", ONE)))
        kept.keeper.models_changed()
        await kept.told(ready=False, reason="a model has this name")


class LateTransforms(TransformPool):
    """Can't be loaded at first."""

    tries = 0

    async def prepare(self) -> None:
        self.tries += 1
        if self.tries < 3:
            raise TransformFailed("no memory for a process")
        self.signatures = {"double": Signature(ONE.inputs, ONE.inputs)}


async def test_transforms_that_load_later_are_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipelines_module, "HEAL_RETRY_S", 0.05)
    doubled = {"name": "d", "transform": "double", "inputs": {"x": "request.x"}}
    text = document("p", [doubled, {**STEP, "inputs": {"x": "d.x"}}])
    async with keeping(tmp_path, transforms=LateTransforms(1)) as kept:
        await kept.put(text)
        status = await kept.told(accepted=False)
        assert "no memory for a process" in str(status.error)
        await kept.told(accepted=True, ready=True)


async def test_odd_keys_are_passed_over(tmp_path: Path) -> None:
    async with keeping(tmp_path) as kept:
        await kept.store.put(f"{KEYS.pipelines_prefix}a b", GOOD)
        await kept.store.put(f"{KEYS.pipelines_prefix}p/q", GOOD)
        await kept.put(GOOD)
        await kept.told(ready=True)
