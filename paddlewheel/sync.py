"""A folder kept applied: what changes in it is written into etcd, for as long as this runs.

Each round reads the whole folder and compares it with what was last taken from it, so a missed
file event, an editor's rename or an outage of etcd only costs one more round. What somebody else
writes into etcd is left alone until the file itself changes: a rollback stays a rollback.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

import structlog
from tenacity import (
    AsyncRetrying,
    RetryCallState,
    retry_if_exception_type,
    wait_random_exponential,
)

from paddlewheel.cli.documents import Candidate, Problem, Read, find_files, parse_files
from paddlewheel.cli.folder_watch import FolderWatch
from registry.cas import Conflict, put_if
from registry.keys import Keys
from registry.names import ModelName, Revision
from registry.store import Ambiguous, DeleteOp, ModRevisionIs, Store, Unavailable

log = structlog.get_logger("paddlewheel.sync")

DEBOUNCE_S = 0.2
"""Quiet time before a round: an editor's save is several events, and so is a checkout."""
RESCAN_S = 30.0
"""A round without any event, for file systems that tell nobody (NFS, some container mounts)."""
PRUNE_GRACE_S = 1.0
"""How long a document must be missing: some editors move a file away before they write it anew."""


class Did(StrEnum):
    APPLIED = "applied"
    UNCHANGED = "unchanged"
    """Etcd had the same text already."""
    REFUSED = "refused"
    """A file that is not valid; what it said before stays."""
    MENDED = "mended"
    """A file that was refused is valid again."""
    DELETED = "deleted"
    KEPT = "kept"
    """The document is gone from the folder, not from etcd."""
    RETRYING = "retrying"
    """Etcd, or the folder, is away."""


@dataclass(frozen=True, slots=True)
class Report:
    """One thing that happened, for whoever shows it."""

    did: Did
    what: str
    """The model, or the file refused."""
    detail: str = ""
    revision: Revision | None = None


@dataclass(slots=True)
class _Taken:
    """A document as last taken from the folder."""

    text: bytes
    revision: Revision
    """Of the document in etcd when we took it: nobody else's write is ever deleted."""
    key: str
    missing_since_s: float | None = None


@dataclass(slots=True)
class _File:
    """What a file last held that was valid, and what is wrong with it now."""

    documents: tuple[ModelName, ...] = ()
    problems: tuple[Problem, ...] = ()


class FolderGone(Exception):
    """The folder cannot be read: an unmounted volume must not look like deleted documents."""


@dataclass(slots=True)
class FolderSync:
    """Applies one folder to one store. Loop-bound; `run` once."""

    folder: Path
    store: Store
    keys: Keys
    report: Callable[[Report], None]
    prune: bool = False
    """Whether a document that goes away in the folder is deleted in etcd."""
    debounce_s: float = DEBOUNCE_S
    rescan_s: float = RESCAN_S
    prune_grace_s: float = PRUNE_GRACE_S
    _taken: dict[ModelName, _Taken] = field(default_factory=dict[ModelName, _Taken])
    _files: dict[str, _File] = field(default_factory=dict[str, _File])

    async def run(self) -> None:
        """One round at once, then one after every change. Ends only by being cancelled."""
        with FolderWatch(self.folder) as watch:
            while True:
                await self._round_with_retries()
                # A document missed for the first time is looked for again after the grace.
                missing = any(each.missing_since_s is not None for each in self._taken.values())
                wait_s = self.prune_grace_s if missing and self.prune else self.rescan_s
                await watch.quiet_after_change(self.debounce_s, at_most_s=wait_s)

    async def _round_with_retries(self) -> None:
        """Every attempt reads the folder again: after an outage its last word counts."""
        retrying = AsyncRetrying(
            retry=retry_if_exception_type((Unavailable, Ambiguous, FolderGone)),
            wait=wait_random_exponential(multiplier=0.2, max=5.0),
            before_sleep=self._say_retrying,
            reraise=True,
        )
        async for attempt in retrying:
            with attempt:
                await self.round()

    def _say_retrying(self, state: RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome is not None else None
        log.warning("sync_retrying", attempt=state.attempt_number, error=str(error))
        if state.attempt_number == 1:
            self.report(Report(Did.RETRYING, str(self.folder), " ".join(str(error).split())))

    async def round(self) -> None:
        """Read the folder, write what changed in it, and take note.

        Raises `FolderGone`; `Unavailable` or `Ambiguous` when etcd stayed away: nothing is lost,
        the next round does what is left.
        """
        contents = await asyncio.to_thread(_read_folder, self.folder)
        found = await asyncio.to_thread(parse_files, list(contents.items()))
        refused = self._note_files(contents, found)
        for document in found.documents:
            await self._take(document)
        await self._let_go({each.model for each in found.documents} | refused)

    def _note_files(self, contents: Mapping[str, object], found: Read) -> set[ModelName]:
        """Report problems once each. Returns the models that broken files held before."""
        kept: set[ModelName] = set()
        for file in self._files.keys() - contents.keys():
            del self._files[file]
        for file in contents:
            state = self._files.setdefault(file, _File())
            problems = tuple(each for each in found.problems if each.file == file)
            if problems and problems != state.problems:
                for problem in problems:
                    self.report(Report(Did.REFUSED, file, str(problem)))
            elif state.problems and not problems:
                self.report(Report(Did.MENDED, file))
            state.problems = problems
            if problems:
                kept.update(state.documents)
            else:
                state.documents = tuple(
                    each.model for each in found.documents if each.source.file == file
                )
        return kept

    async def _take(self, document: Candidate) -> None:
        """Write a document whose text is not the one last taken."""
        text = document.source.text.encode()
        taken = self._taken.get(document.model)
        if taken is not None and taken.text == text:
            taken.missing_since_s = None
            return
        key = document.key(self.keys)
        current = await self.store.get(key)
        while current is None or current.value != text:
            seen = Revision(0) if current is None else current.mod_revision
            done = await put_if(self.store, key, text, seen)
            if not isinstance(done, Conflict):
                self._taken[document.model] = _Taken(text, done, key)
                self.report(Report(Did.APPLIED, document.model, document.where, done))
                return
            current = done.current
        self._taken[document.model] = _Taken(text, current.mod_revision, key)
        self.report(Report(Did.UNCHANGED, document.model, document.where, current.mod_revision))

    async def _let_go(self, present: set[ModelName]) -> None:
        """Deal with documents that the folder no longer has."""
        now_s = asyncio.get_running_loop().time()
        for model, taken in list(self._taken.items()):
            if model in present:
                continue
            if not self.prune:
                del self._taken[model]
                self.report(Report(Did.KEPT, model, "gone from the folder; in etcd it stays"))
            elif taken.missing_since_s is None:
                taken.missing_since_s = now_s
            elif now_s - taken.missing_since_s >= self.prune_grace_s:
                await self._prune(model, taken)
                del self._taken[model]

    async def _prune(self, model: ModelName, taken: _Taken) -> None:
        key = taken.key
        done = await self.store.txn([ModRevisionIs(key, taken.revision)], [DeleteOp(key)])
        if done.succeeded or await self.store.get(key) is None:
            self.report(Report(Did.DELETED, model, "gone from the folder", done.revision))
        else:
            self.report(Report(Did.KEPT, model, "gone from the folder, but changed in etcd since"))


def _read_folder(folder: Path) -> dict[str, bytes | OSError]:
    """Every document file's content. Raises `FolderGone`."""
    try:
        files = find_files(folder) if folder.is_dir() else None
    except OSError as exc:
        raise FolderGone(f"{folder}: {exc.strerror}") from exc
    if files is None:
        raise FolderGone(f"{folder}: no such folder")
    contents: dict[str, bytes | OSError] = {}
    for file in files:
        try:
            contents[str(file)] = file.read_bytes()
        except FileNotFoundError:
            continue  # went away between the listing and now
        except OSError as exc:
            contents[str(file)] = exc
    return contents
