"""`paddlewheel pipelines`, and what other commands need of them: documents, standings, waiting."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import click

from paddlewheel.cli.connection import Connection, with_etcd
from paddlewheel.cli.options import OutputFormat, output_option
from paddlewheel.cli.output import cell, print_json, print_table, say
from paddlewheel.cli.waiting import NotConverged
from paddlewheel.etcd_options import EtcdOptions, etcd_options
from registry.document_tree import ConfigError
from registry.keys import NodeKey, PipelineKey, PipelineStatusKey
from registry.names import ModelName, NodeId, Revision
from registry.pipeline_records import PipelineStatus
from registry.pipeline_spec import parse_pipeline
from registry.records import BadRecord
from registry.store import KeyValue

POLL_S = 0.1
_STYLES = {"ready": "green", "refused": "red"}
_HEADINGS = ["PIPELINE", "REVISION", "NODE", "IN FORCE", "STANDING", "DETAIL"]


@dataclass(frozen=True, slots=True)
class StoredPipeline:
    """A pipeline's document as it stands in etcd, whether or not it parses."""

    name: ModelName
    kv: KeyValue
    problem: str | None


@dataclass(frozen=True, slots=True)
class PipelineView:
    """One pipeline: its document and what each node makes of it."""

    name: ModelName
    revision: Revision | None
    """``None``: there is no document (any more)."""
    problem: str | None
    statuses: Mapping[NodeId, PipelineStatus]
    unseen: Sequence[NodeId]
    """Registered nodes that have said nothing of it."""

    def standing(self, status: PipelineStatus) -> tuple[str, str | None]:
        """``ready``, ``waiting``, ``refused`` or ``unseen``, and why."""
        if self.revision is not None and (status.revision or 0) < self.revision:
            return "unseen", None
        if not status.accepted:
            return "refused", status.error
        return ("ready", None) if status.ready else ("waiting", status.reason)

    def as_json(self) -> dict[str, Any]:
        return {
            "pipeline": self.name,
            "document_revision": self.revision,
            "error": self.problem,
            "nodes": [status.to_dict() for status in self.statuses.values()],
            "converged": self.is_accepted and not self.unseen,
        }

    @property
    def is_accepted(self) -> bool:
        """Whether the document is in force on every node that has said something."""
        statuses = self.statuses.values()
        return bool(statuses) and all(s.applied_revision == self.revision for s in statuses)


@click.command()
@click.argument("pipeline", required=False)
@etcd_options
@output_option
def pipelines(pipeline: str | None, etcd: EtcdOptions, output: OutputFormat) -> None:
    """Show for every pipeline, or for PIPELINE, what each node makes of its document.

    \b
    ready    the newest document is in force, and all that it runs on is there
    waiting  it is in force, but a model or version that it names does not serve there
    refused  the newest document was not accepted; the one before stays in force
    unseen   the node has not seen the newest document yet
    """
    views = [
        view
        for view in with_etcd(etcd, read_pipelines)
        if pipeline is None or view.name == pipeline
    ]
    if pipeline is not None and not views:
        say(f"paddlewheel: no document for the pipeline {pipeline!r}", "red")
        raise click.exceptions.Exit(1)
    if output == "json":
        print_json({"pipelines": [view.as_json() for view in views]})
        return
    rows: list[list[object]] = []
    for view in views:
        shown = "deleted" if view.revision is None else view.revision
        for node, status in view.statuses.items():
            standing, detail = view.standing(status)
            styled = cell(standing, _STYLES.get(standing, "yellow"))
            rows.append([view.name, shown, node, status.applied_revision, styled, detail])
        for node in view.unseen:
            unseen: list[object] = [view.name, shown, node, None, cell("unseen", "yellow"), None]
            rows.append(unseen)
        if not view.statuses and not view.unseen:
            rows.append([view.name, shown, None, None, cell("no node", "yellow"), view.problem])
    print_table(_HEADINGS, rows, empty="no pipelines")


async def read_pipelines(connection: Connection) -> list[PipelineView]:
    """All pipelines that have a document, or that a node still tells of."""
    keys, store = connection.keys, connection.store
    documents: dict[ModelName, KeyValue] = {}
    for kv in (await store.list_prefix(keys.pipelines_prefix)).kvs:
        if isinstance(key := keys.parse(kv.key), PipelineKey):
            documents[key.name] = kv
    statuses: dict[ModelName, dict[NodeId, PipelineStatus]] = {}
    for kv in (await store.list_prefix(keys.pipeline_status_prefix())).kvs:
        if isinstance(key := keys.parse(kv.key), PipelineStatusKey):
            try:
                status = PipelineStatus.from_json(kv.value)
            except BadRecord:
                continue
            statuses.setdefault(key.name, {})[key.node] = status
    nodes = [
        key.node
        for kv in (await store.list_prefix(keys.nodes_prefix)).kvs
        if isinstance(key := keys.parse(kv.key), NodeKey)
    ]
    views: list[PipelineView] = []
    for name in sorted({*documents, *statuses}):
        document = documents.get(name)
        said = dict(sorted(statuses.get(name, {}).items()))
        unseen = [node for node in nodes if node not in said] if document is not None else []
        revision = None if document is None else document.mod_revision
        problem = None if document is None else _problem(name, document)
        views.append(PipelineView(name, revision, problem, said, unseen))
    return views


async def stored_pipeline(connection: Connection, name: ModelName) -> StoredPipeline | None:
    """The document of ``name``, where there is one."""
    kv = await connection.store.get(connection.keys.pipeline(name))
    return None if kv is None else StoredPipeline(name, kv, _problem(name, kv))


def print_pipeline(document: StoredPipeline, output: OutputFormat) -> None:
    """As `paddlewheel get` does for models: the very bytes, or JSON about them."""
    if output == "json":
        print_json(
            {
                "pipeline": document.name,
                "revision": document.kv.mod_revision,
                "document": document.kv.value.decode("utf-8", "replace"),
                "error": document.problem,
            }
        )
        return
    sys.stdout.buffer.write(document.kv.value)
    sys.stdout.buffer.flush()


def _problem(name: ModelName, kv: KeyValue) -> str | None:
    try:
        parse_pipeline(kv.value, name=name)
    except ConfigError as exc:
        return str(exc)
    return None


async def wait_for_pipelines(
    connection: Connection, goals: Mapping[ModelName, Revision], *, timeout_s: float
) -> int:
    """Wait until every registered node has accepted each pipeline's revision.

    Returns how many nodes there are. What a pipeline runs on may come later: that is no part of
    accepting it. Raises `NotConverged` with the refusing node's reason, or who is missing.
    """
    missing = "nothing heard"
    try:
        async with asyncio.timeout(timeout_s):
            while True:
                views = {view.name: view for view in await read_pipelines(connection)}
                missing = _missing(views, goals)
                if not missing:
                    nodes = [len(views[name].statuses) for name in goals]
                    return max(nodes, default=0)
                await asyncio.sleep(POLL_S)
    except TimeoutError:
        raise NotConverged(f"not converged after {timeout_s:g} s: {missing}") from None


def _missing(views: Mapping[ModelName, PipelineView], goals: Mapping[ModelName, Revision]) -> str:
    """What is still to be waited for; empty: nothing. Raises `NotConverged` for a refusal."""
    waits: list[str] = []
    for name, revision in goals.items():
        view = views.get(name)
        if view is None or view.revision is None:
            raise NotConverged(f"{name}: the document was deleted meanwhile")
        if view.revision > revision:
            raise NotConverged(f"{name}: revision {view.revision} came before {revision} was seen")
        for node, status in view.statuses.items():
            if status.revision == revision and not status.accepted:
                raise NotConverged(f"{name}: {node}: {status.error}")
            if status.applied_revision != revision:
                waits.append(f"{name}: {node}")
        waits += [f"{name}: {node}" for node in view.unseen]
    return ", ".join(waits)
