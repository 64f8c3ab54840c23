"""`get`, `diff`, `history`: documents as etcd has them and had them."""

from __future__ import annotations

import sys
from typing import Any

import click

from paddlewheel.cli.connection import Connection, with_etcd
from paddlewheel.cli.difference import print_difference, unified
from paddlewheel.cli.fleet_view import StoredDocument
from paddlewheel.cli.history import find, read_history
from paddlewheel.cli.kinds import GATEWAY_NAME
from paddlewheel.cli.options import OutputFormat, output_option
from paddlewheel.cli.output import cell, print_json, print_table
from paddlewheel.cli.pipelines import StoredPipeline, print_pipeline, stored_pipeline
from paddlewheel.etcd_options import EtcdOptions, etcd_options
from registry.errors import PaddlewheelError
from registry.gateway_spec import parse_gateway
from registry.keys import ModelKey
from registry.names import ModelName, Revision
from registry.records import rfc3339_ms
from registry.spec import ConfigError, parse_model
from registry.store import KeyValue


class NoSuchDocument(PaddlewheelError):
    """There is no document of this name in etcd."""


@click.command()
@click.argument("model", required=False)
@etcd_options
@output_option
def get(model: str | None, etcd: EtcdOptions, output: OutputFormat) -> None:
    """List the models' documents, or print MODEL's document as it stands in etcd.

    MODEL may be a pipeline's name too; `paddlewheel pipelines` lists those. The gateway document
    goes by configs/gateway.
    """
    if model is None:
        _print_documents(with_etcd(etcd, _documents), output)
        return
    if model == GATEWAY_NAME:
        _print_gateway(with_etcd(etcd, lambda conn: conn.store.get(conn.keys.gateway)), output)
        return
    document = with_etcd(etcd, lambda conn: _any_document(conn, ModelName(model)))
    if isinstance(document, StoredPipeline):
        print_pipeline(document, output)
        return
    if output == "json":
        print_json(
            {
                "model": document.model,
                "revision": document.revision,
                "document": document.text,
                "error": document.problem,
            }
        )
    else:
        # As it is, byte for byte: `get M > file` gives the file that was applied.
        sys.stdout.buffer.write(document.kv.value)
        sys.stdout.buffer.flush()


def _print_gateway(kv: KeyValue | None, output: OutputFormat) -> None:
    if kv is None:
        raise NoSuchDocument("no gateway document")
    if output != "json":
        sys.stdout.buffer.write(kv.value)
        sys.stdout.buffer.flush()
        return
    problem: str | None = None
    try:
        parse_gateway(kv.value)
    except ConfigError as exc:
        problem = str(exc)
    text = kv.value.decode("utf-8", "replace")
    print_json({"revision": kv.mod_revision, "document": text, "error": problem})


async def _documents(connection: Connection) -> list[StoredDocument]:
    listing = await connection.store.list_prefix(connection.keys.models_prefix)
    found: list[StoredDocument] = []
    for kv in listing.kvs:
        key = connection.keys.parse(kv.key)
        if isinstance(key, ModelKey):
            found.append(StoredDocument.of(key.model, kv))
    return found


async def _any_document(connection: Connection, name: ModelName) -> StoredDocument | StoredPipeline:
    kv = await connection.store.get(connection.keys.model(name))
    pipeline = None if kv is not None else await stored_pipeline(connection, name)
    return await _document(connection, name) if pipeline is None else pipeline


async def _document(connection: Connection, model: ModelName) -> StoredDocument:
    kv = await connection.store.get(connection.keys.model(model))
    if kv is None:
        known = ", ".join(document.model for document in await _documents(connection))
        raise NoSuchDocument(f"no document for {model!r}; there are: {known or 'none'}")
    return StoredDocument.of(model, kv)


def _print_documents(documents: list[StoredDocument], output: OutputFormat) -> None:
    if output == "json":
        print_json({"models": [_summary(document) for document in documents]})
        return
    rows: list[list[object]] = []
    for document in documents:
        summary = _summary(document)
        problem = cell(document.problem, "red") if document.problem else cell(" ")
        rows.append(
            [
                document.model,
                document.revision,
                summary["live"],
                summary["canary"],
                " ".join(summary["versions"]),
                problem,
            ]
        )
    headings = ["MODEL", "REVISION", "LIVE", "CANARY", "VERSIONS", ""]
    print_table(headings, rows, empty="no documents")


def _summary(document: StoredDocument) -> dict[str, Any]:
    spec = None if document.parsed is None else document.parsed.spec
    return {
        "model": document.model,
        "revision": document.revision,
        "live": document.intent.live,
        "canary": document.intent.canary,
        "versions": [] if spec is None else [version.version for version in spec.versions],
        "error": document.problem,
    }


@click.command()
@click.argument("model")
@etcd_options
@output_option
def history(model: str, etcd: EtcdOptions, output: OutputFormat) -> None:
    """List MODEL's documents, oldest first, as nodes have seen them.

    Two of them are compared with: paddlewheel diff MODEL REVISION REVISION
    """
    name = ModelName(model)

    async def work(connection: Connection) -> tuple[list[Any], Revision | None]:
        current = await connection.store.get(connection.keys.model(name))
        entries = await read_history(connection, name)
        if current is None and not entries:
            raise NoSuchDocument(f"no document for {model!r}, and no history of one")
        return entries, None if current is None else current.mod_revision

    entries, current = with_etcd(etcd, work)
    if output == "json":
        print_json({"model": model, "history": [entry.to_dict() for entry in entries]})
        return
    rows: list[list[object]] = []
    for entry in entries:
        live, canary, problem = _versions(name, entry.document)
        mark = "current" if entry.revision == current else ""
        note = cell(problem, "red") if problem else cell(mark or " ", "green")
        rows.append(
            [entry.revision, rfc3339_ms(entry.seen_at), live, canary, entry.sha256[:12], note]
        )
    headings = ["REVISION", "SEEN", "LIVE", "CANARY", "SHA256", ""]
    print_table(headings, rows, empty=f"no history of {model}: nodes write it")


def _versions(name: ModelName, text: str) -> tuple[str | None, str | None, str | None]:
    try:
        spec = parse_model(text, name=name).spec
    except ConfigError as exc:
        return None, None, str(exc)
    return spec.live, spec.canary.version if spec.canary else None, None


@click.command()
@click.argument("model", required=False)
@click.argument("revisions", nargs=-1, type=click.IntRange(min=1))
@click.option(
    "-f",
    "--file",
    "files",
    multiple=True,
    type=click.Path(exists=True, allow_dash=True),
    metavar="FILE|DIR|-",
    help="Compare etcd with these documents: what `apply -f` would change.",
)
@click.option("--exit-code", is_flag=True, help="Exit with 1 when there is a difference.")
@etcd_options
@output_option
def diff(
    model: str | None,
    revisions: tuple[int, ...],
    files: tuple[str, ...],
    exit_code: bool,
    etcd: EtcdOptions,
    output: OutputFormat,
) -> None:
    """Show what `apply -f FILE` would change, or how two revisions of MODEL differ.

    \b
    paddlewheel diff -f FILE             etcd against a file
    paddlewheel diff MODEL REV [REV]     one revision against another, or the current one
    """
    if bool(files) == (model is not None):
        raise click.UsageError("want either -f FILE or MODEL REVISION [REVISION]")
    if model is not None and len(revisions) not in (1, 2):
        raise click.UsageError("want one or two revisions")
    if model is None:
        differences = with_etcd(etcd, lambda conn: _against_files(conn, files))
    else:
        name = ModelName(model)
        differences = [with_etcd(etcd, lambda conn: _between(conn, name, revisions))]
    if output == "json":
        print_json({"differences": differences})
    else:
        for difference in differences:
            print_difference(difference["diff"].split("\n") if difference["diff"] else [])
    if exit_code and any(difference["diff"] for difference in differences):
        raise click.exceptions.Exit(1)


async def _against_files(connection: Connection, files: tuple[str, ...]) -> list[dict[str, Any]]:
    from paddlewheel.cli.apply import valid_documents
    from paddlewheel.cli.writing import plan

    return [
        {
            "model": change.model,
            "kind": change.kind,
            "from_revision": None if change.old is None else change.old.mod_revision,
            "to": change.source,
            "diff": "\n".join(change.difference()),
        }
        for change in await plan(connection, valid_documents(files))
    ]


async def _between(
    connection: Connection, model: ModelName, revisions: tuple[int, ...]
) -> dict[str, Any]:
    entries = await read_history(connection, model)
    current = await connection.store.get(connection.keys.model(model))
    texts = {entry.revision: entry.document for entry in entries}
    if current is not None:
        texts[current.mod_revision] = current.value.decode("utf-8", "replace")
    if len(revisions) == 1 and current is None:
        raise NoSuchDocument(f"no document for {model!r}")
    old = Revision(revisions[0])
    new = Revision(revisions[1]) if len(revisions) == 2 else Revision(current.mod_revision)  # type: ignore[union-attr]
    for revision in (old, new):
        if revision not in texts:
            find(model, entries, revision)
    lines = unified(texts[old], texts[new], old_name=f"{model}@{old}", new_name=f"{model}@{new}")
    return {
        "model": model,
        "kind": "changed" if lines else "unchanged",
        "from_revision": old,
        "to": f"{model}@{new}",
        "diff": "\n".join(lines),
    }
