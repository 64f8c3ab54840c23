"""This node's pipelines: documents followed in etcd, judged, published and told of.

As with models, a document that is refused changes nothing: the last accepted one stays in force,
and the status says why. What was accepted last is kept on disk, for a start without etcd.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import structlog
from tenacity import AsyncRetrying, retry_if_exception, wait_random_exponential

from paddlewheel.history import is_passing
from paddlewheel.report import ERRORS_MAX, one_line
from paddlewheel.transforms.pool import TransformPool
from registry.document import read
from registry.document_tree import ConfigError, FieldError
from registry.errors import PaddlewheelError
from registry.keys import Keys, PipelineKey
from registry.names import ModelName, NodeId, Revision
from registry.pipeline_records import PipelineStatus
from registry.pipeline_spec import PipelineDocument, parse_pipeline
from registry.records import ErrorRecord
from registry.session import Session
from registry.snapshot import SavedDocument, Snapshot, load, save
from registry.store import Delete, KeyValue, Listing, Put, Store, StoreError
from router.http_pipeline import PipelineEndpoint
from router.pipeline.errors import PipelineBroken
from router.pipeline.plan import Plan, plan_of
from router.pipeline.ports import Pipeline, Pipelines
from router.pipeline.wiring import check_known

log = structlog.get_logger(__name__)

REFUSED_RETRY_S = 5.0
HEAL_RETRY_S = 5.0


@dataclass(frozen=True, slots=True)
class _Known:
    """One pipeline's document, as last seen and as last accepted."""

    revision: Revision
    sha256: str
    text: bytes
    """The one last seen."""
    errors: tuple[FieldError, ...] = ()
    plan: Plan | None = None
    accepted_text: str = ""
    may_heal: bool = False
    """Refused for what may end without a new document: a model that has its name, transforms that
    could not be loaded."""


class PipelineKeeper:
    """Runs beside the follower of models, on the node's event loop."""

    def __init__(
        self,
        *,
        store: Store,
        keys: Keys,
        node: NodeId,
        session: Session,
        transforms: TransformPool,
        endpoint: PipelineEndpoint,
        snapshot_path: Path,
    ) -> None:
        self._store = store
        self._keys = keys
        self._node = node
        self._session = session
        self._transforms = transforms
        self._endpoint = endpoint
        self._snapshot_path = snapshot_path
        self._known: dict[ModelName, _Known] = {}
        self._heard: Listing | None = None
        self._missing: set[ModelName] = set()
        """Served on although the store that answers now has never heard of them."""
        self._is_complete = False
        self._folding = asyncio.Lock()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="pipelines")
        self._unsaved = asyncio.Event()
        self._stirred = asyncio.Event()

    async def _restore(self) -> None:
        """Start from what was last accepted here, without etcd."""
        loop = asyncio.get_running_loop()
        snapshot = await loop.run_in_executor(self._thread, load, self._snapshot_path)
        if snapshot is not None and snapshot.prefix == self._keys.prefix:
            for name, saved in sorted(snapshot.documents.items()):
                await self._put(name, saved.revision, saved.text.encode(), ask=False)
            self._is_complete = True
            log.info("pipelines_restored", pipelines=len(self._known))
        self._publish()

    async def run(self) -> None:
        """Start from the snapshot, then follow until cancelled."""
        if not self._is_complete:
            await self._restore()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._follow(), name="follow pipelines")
            tasks.create_task(self._save_snapshots(), name="pipelines' snapshot")
            tasks.create_task(self._look_again(), name="pipelines' readiness")

    def models_changed(self) -> None:
        """What a pipeline runs on may be there now, or gone. Cheap: looked at a little later."""
        if self._known:
            self._stirred.set()

    # --- from the store -------------------------------------------------------------------------

    async def _follow(self) -> None:
        while True:
            try:
                await self._follow_listing()
            except StoreError as exc:
                log.error("store_refuses", prefix=self._keys.pipelines_prefix, error=str(exc))
                await asyncio.sleep(REFUSED_RETRY_S)

    async def _follow_listing(self) -> None:
        """List, then watch. Returns when the store is another one, or in its past: list again."""
        prefix = self._keys.pipelines_prefix
        listing = await self._list(prefix)
        listed = {kv.key for kv in listing.kvs}
        is_other = self._is_other(listing)
        self._heard = listing
        for name in [n for n in self._known if self._keys.pipeline(n) not in listed]:
            self._let_go(name, listing.revision, is_other=is_other)
        for kv in sorted(listing.kvs, key=lambda kv: kv.mod_revision):
            await self._take(kv)
        self._is_complete = True
        self._publish()
        revision = listing.revision
        async for batch in self._store.watch_prefix(prefix, known=listing):
            is_other = batch.store_id not in ("", listing.store_id)
            if batch.revision < revision or is_other:
                log.warning("store_rewound", prefix=prefix, was=revision, now=batch.revision)
                return
            revision = batch.revision
            self._heard = replace(listing, revision=revision)
            for event in batch.events:
                match event:
                    case Put(kv):
                        await self._take(kv)
                    case Delete(key, at):
                        parsed = self._keys.parse(key)
                        if isinstance(parsed, PipelineKey):
                            self._delete(parsed.name, at)
            self._publish()

    def _is_other(self, listing: Listing) -> bool:
        """Whether this is another store than the one listed before, or that one in its past."""
        before = self._heard
        if before is None:
            return False  # a start: only the store knows what was deleted meanwhile
        return listing.revision < before.revision or listing.store_id != before.store_id

    def _let_go(self, name: ModelName, revision: Revision, *, is_other: bool) -> None:
        """Deal with a document that is not listed: what another store lacks, nobody deleted."""
        if is_other and name not in self._missing:
            self._missing.add(name)
            log.warning("document_missing_and_kept", pipeline=name)
        if name not in self._missing:
            self._delete(name, revision)

    async def _list(self, prefix: str) -> Listing:
        retrying = AsyncRetrying(
            retry=retry_if_exception(is_passing),
            wait=wait_random_exponential(multiplier=0.1, max=1.0),
        )
        async for attempt in retrying:
            with attempt:
                return await self._store.list_prefix(prefix)
        raise AssertionError("tenacity ends with a result or an error")

    async def _take(self, kv: KeyValue) -> None:
        parsed = self._keys.parse(kv.key)
        if not isinstance(parsed, PipelineKey):
            log.warning("record_ignored", key=kv.key, reason="not a pipeline's name")
            return
        await self._put(parsed.name, kv.mod_revision, kv.value)

    async def _put(
        self, name: ModelName, revision: Revision, text: bytes, *, ask: bool = True
    ) -> None:
        """Judge one document. ask: whether etcd is asked for a model of that name."""
        sha256 = hashlib.sha256(text).hexdigest()
        self._missing.discard(name)
        before = self._known.get(name)
        if before is not None and (before.revision, before.sha256) == (revision, sha256):
            return
        async with self._folding:
            await self._judge(name, revision, sha256, text, ask=ask)

    async def _judge(
        self, name: ModelName, revision: Revision, sha256: str, text: bytes, *, ask: bool
    ) -> None:
        before = self._known.get(name)
        document, errors = await self._parse(name, text)
        plan = None if document is None else plan_of(document, revision)
        may_heal = False
        if plan is not None:
            found, may_heal = await self._not_runnable(plan)
            if not found and ask and await self._is_model(name):
                found, may_heal = (_NAME_TAKEN,), True
            errors = _with_lines(text, found)
        if errors or plan is None:
            kept = (None, "") if before is None else (before.plan, before.accepted_text)
            self._known[name] = _Known(revision, sha256, text, errors, *kept, may_heal)
            log.warning(
                "pipeline_refused", pipeline=name, revision=revision,
                errors=[f"{error.path}: {error.message}" for error in errors[:3]],
            )  # fmt: skip
        else:
            self._known[name] = _Known(revision, sha256, text, (), plan, text.decode())
            log.info("pipeline_accepted", pipeline=name, revision=revision)
            self._unsaved.set()

    async def _parse(
        self, name: ModelName, text: bytes
    ) -> tuple[PipelineDocument | None, tuple[FieldError, ...]]:
        def parse() -> PipelineDocument:
            return parse_pipeline(text, name=name)

        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, parse), ()
        except ConfigError as exc:
            return None, exc.errors
        except Exception as exc:  # a bug, met by one document: it must not stop them all
            log.exception("document_not_judged", pipeline=name)
            return None, (FieldError("", None, f"this node can't judge it: {exc!r}"),)

    async def _not_runnable(self, plan: Plan) -> tuple[tuple[FieldError, ...], bool]:
        """What speaks against it on this very node, besides the models it names; and whether that
        may pass by itself."""
        if plan.transforms:
            try:
                await self._transforms.prepare()
            except PaddlewheelError as exc:
                asyncio.get_running_loop().call_later(HEAL_RETRY_S, self._stirred.set)
                return (FieldError("spec.steps", None, str(exc)),), True
        errors: list[FieldError] = []
        for at, step in enumerate(plan.document.spec.steps):
            why = None if step.transform is None else self._transforms.missing(step.transform)
            if why is not None:
                errors.append(FieldError(f"spec.steps[{at}].transform", None, why))
        if not errors:
            try:
                check_known(plan, self._transforms.signatures)
            except PipelineBroken as exc:
                errors.append(FieldError("spec.steps", None, exc.why))
        return tuple(errors), False

    async def _is_model(self, name: ModelName) -> bool:
        try:
            return await self._store.get(self._keys.model(name)) is not None
        except StoreError:
            return False  # models go first anyway: the status will say so

    def _delete(self, name: ModelName, revision: Revision) -> None:
        self._missing.discard(name)
        if self._known.pop(name, None) is None:
            return
        log.info("pipeline_deleted", pipeline=name, revision=revision)
        self._session.remove(self._keys.pipeline_status(name, self._node))
        self._unsaved.set()

    # --- to requests and to etcd ----------------------------------------------------------------

    def _publish(self) -> None:
        by_name = {
            str(name): Pipeline(name, known.plan, _documents(known))
            for name, known in self._known.items()
        }
        self._endpoint.publish(Pipelines(by_name, self._is_complete), self._transforms)
        self._tell()

    def _tell(self) -> None:
        """Write each status, on change only (the session compares)."""
        for name in self._known:
            status = self.status(name)
            self._session.set(self._keys.pipeline_status(name, self._node), status.to_json())

    def status(self, name: ModelName) -> PipelineStatus:
        """What this node makes of the pipeline now."""
        known = self._known[name]
        reason = self._endpoint.trouble(name)
        shown = PipelineStatus(
            pipeline=name,
            node=self._node,
            revision=known.revision,
            accepted=not known.errors,
            applied_revision=None if known.plan is None else known.plan.revision,
            error=one_line(known.errors[0]) if known.errors else None,
            errors=tuple(ErrorRecord.of(error) for error in known.errors[:ERRORS_MAX]),
            ready=reason is None,
            reason=reason,
        )
        if known.plan is None:
            return shown
        limits = known.plan.limits
        return shown.model_copy(
            update={"timeout_s": limits.timeout_s, "max_body_mb": limits.max_body_mb}
        )

    async def _look_again(self) -> None:
        """After something changed: readiness, and documents refused for what may have ended."""
        while True:
            await self._stirred.wait()
            self._stirred.clear()
            for name, known in list(self._known.items()):
                if known.may_heal:
                    async with self._folding:
                        if self._known.get(name) is known:
                            await self._judge(
                                name, known.revision, known.sha256, known.text, ask=True
                            )
                            self._publish()
            self._tell()
            await asyncio.sleep(_LOOK_AGAIN_S)

    async def _save_snapshots(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._unsaved.wait()
            self._unsaved.clear()
            snapshot = Snapshot(
                documents={
                    name: SavedDocument(known.plan.revision, known.accepted_text)
                    for name, known in sorted(self._known.items())
                    if known.plan is not None
                },
                prefix=self._keys.prefix,
            )
            try:
                await loop.run_in_executor(self._thread, save, self._snapshot_path, snapshot)
            except PaddlewheelError as exc:
                log.warning("snapshot_not_saved", error=str(exc))


_LOOK_AGAIN_S = 0.05
_NAME_TAKEN = FieldError("metadata.name", None, "a model has this name: both answer /v2/models")


def _documents(known: _Known) -> Mapping[str, Any]:
    return {
        "revision": known.revision,
        "accepted": not known.errors,
        "applied_revision": None if known.plan is None else known.plan.revision,
        "error": one_line(known.errors[0]) if known.errors else None,
        "errors": [ErrorRecord.of(error).to_dict() for error in known.errors],
    }


def _with_lines(raw: bytes, errors: tuple[FieldError, ...]) -> tuple[FieldError, ...]:
    """These errors know the path; the text knows the line."""
    if not errors:
        return errors
    document = read(raw)
    return tuple(replace(error, line=document.line_of(error.path)) for error in errors)
