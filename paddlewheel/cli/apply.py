"""`paddlewheel apply`: validate everything, show the difference, write, and wait if asked."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

import click

from paddlewheel.cli.connection import Connection, with_etcd
from paddlewheel.cli.difference import print_difference
from paddlewheel.cli.documents import Candidate, Read, Refused, read
from paddlewheel.cli.options import dry_run_option, file_option, wait_options
from paddlewheel.cli.output import say
from paddlewheel.cli.pipelines import wait_for_pipelines
from paddlewheel.cli.waiting import wait_until_converged
from paddlewheel.cli.writing import Change, plan, write
from paddlewheel.etcd_options import EtcdOptions, etcd_options
from registry.names import ModelName, Revision


@click.command()
@file_option
@dry_run_option
@wait_options
@etcd_options
def apply(
    files: tuple[str, ...], dry_run: bool, wait: bool, timeout_s: float, etcd: EtcdOptions
) -> None:
    """Write documents into etcd, if all of them are valid.

    Shows what changes, writes each changed document if nobody else changed it meanwhile, and with
    --wait waits until every node has it in force. Unchanged documents are not written.
    """
    documents = valid_documents(files)
    with_etcd(etcd, lambda conn: _apply(conn, documents, dry_run, timeout_s if wait else None))


def valid_documents(files: tuple[str, ...]) -> list[Candidate]:
    """All documents of all files. Raises `Refused` once every problem has been printed."""
    found = _merge([read(each) for each in files])
    for problem in found.problems:
        say(str(problem), "red")
    if found.problems:
        count = len(found.problems)
        raise Refused(f"{count} problem{'s' * (count != 1)}, nothing written")
    if not found.documents:
        raise Refused("no document found")
    return list(found.documents)


def _merge(reads: list[Read]) -> Read:
    from paddlewheel.cli.documents import Problem

    documents: dict[ModelName, Candidate] = {}
    problems = [problem for each in reads for problem in each.problems]
    for document in (document for each in reads for document in each.documents):
        first = documents.setdefault(document.model, document)
        if first.where != document.where:
            message = f"{document.model!r} is also in {first.where}"
            source = document.source
            problems.append(Problem(source.file, source.first_line, "metadata.name", message))
    return Read(tuple(documents.values()), tuple(problems))


async def _apply(
    connection: Connection, documents: list[Candidate], dry_run: bool, timeout_s: float | None
) -> None:
    await carry_out(connection, await plan(connection, documents), dry_run, timeout_s)


async def carry_out(
    connection: Connection, changes: list[Change], dry_run: bool, timeout_s: float | None
) -> None:
    """Show the changes, write them, and wait where ``timeout_s`` is given.

    Raises what `write` and `wait_until_converged` raise; changes written before stay written,
    which the lines printed say.
    """
    for change in changes:
        print_difference(change.difference())
    goals: dict[ModelName, Revision] = {}
    pipelines: dict[ModelName, Revision] = {}
    for change in changes:
        if dry_run:
            note = "" if change.kind == "unchanged" else " (dry run: not written)"
            click.echo(f"{change.model} {change.kind}{note}")
            continue
        revision = await write(connection, change)
        if change.document_kind == "Model":
            goals[change.model] = revision
        elif change.document_kind == "Pipeline":
            pipelines[change.model] = revision
        click.echo(f"{change.model} {change.kind} (revision {revision})")
    if timeout_s is not None and not dry_run:
        deadline_s = asyncio.get_running_loop().time() + timeout_s
        if goals:
            await converge(connection, goals, timeout_s)
        if pipelines:
            left_s = max(0.1, deadline_s - asyncio.get_running_loop().time())
            await wait_for_pipelines(connection, pipelines, timeout_s=left_s)
            count = len(pipelines)
            say(f"{count} pipeline{'s' * (count != 1)} accepted everywhere", "green")


async def converge(
    connection: Connection, goals: Mapping[ModelName, Revision], timeout_s: float
) -> None:
    """Wait, and say how many nodes there are. Raises what `wait_until_converged` raises."""
    count = await wait_until_converged(connection, goals, timeout_s=timeout_s)
    if count:
        say(f"in force on {count} node{'s' * (count != 1)}", "green")
    else:
        say("no node is registered: nothing to wait for", "yellow")
