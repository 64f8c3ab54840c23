"""Model folders by digest: fetched from their source into this node's cache, once."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import shutil
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import orjson
import structlog
from tenacity import (
    AsyncRetrying,
    retry_if_exception,
    stop_after_attempt,
    wait_exponential_jitter,
)

from loader.cache import FILE_PREFIX, HOLD_S, Cache, DiskFull
from loader.copying import Copier, SourceChanged, gather
from loader.errors import FetchFailed, NotAdmitted, SourceGone
from loader.fetch_threads import FetchThreads
from loader.model_files import (
    ModelFiles,
    NoSuchModel,
    choose,
    digest_breach,
    file_sha256,
    model_digest,
)
from loader.sources import Source, SourceFile, is_allowed, local_path, open_source
from registry.names import Digest

__all__ = ["Fetched", "ModelRepository", "is_allowed"]

log = structlog.get_logger()

Progress = Callable[[int, int], None]
"""Bytes done and in all (0: not known), called on the event loop."""

ATTEMPTS = 4


@dataclass(frozen=True, slots=True)
class Fetched:
    """A whole model on this machine. The folder never changes; lease it before you use it."""

    folder: Path
    digest: Digest
    bytes: int
    """Of program and params together."""


@dataclass(slots=True)
class _Flight:
    """One fetch under way and everybody who waits for it."""

    task: asyncio.Task[Path]
    stop: threading.Event
    listeners: list[Progress]
    waiters: int = 0


@dataclass(frozen=True, slots=True)
class _Job:
    """What a fetch is about: a folder with a model in it, or one file of a folder."""

    folder: str
    file: str | None
    sha256: Mapping[str, str] = field(default_factory=dict[str, str])

    @property
    def key(self) -> str:
        """Names the partial copy and the origin: the source, not what it holds today."""
        return hashlib.sha256(f"{self.folder}\n{self.file or ''}".encode()).hexdigest()[:32]

    def select(self, names: Sequence[str]) -> ModelFiles:
        if self.file is not None:
            return ModelFiles(self.file, None)
        try:
            return choose(names)
        except NoSuchModel as exc:
            raise SourceGone(f"{self.folder}: {exc}") from exc

    def entry(self, files: ModelFiles, found: Mapping[str, str]) -> str:
        """The cache entry's name for files of these digests."""
        if self.file is not None:
            return FILE_PREFIX + found[self.file]
        return model_digest(files, found).removeprefix("sha256:")

    def pinned_entry(self) -> str | None:
        """The entry's name where the document says the digest of every file."""
        try:
            files = choose(self.sha256)
        except NoSuchModel:
            return None
        if self.file is not None or files.params is None:
            return None
        pinned = {name: text.lower().removeprefix("sha256:") for name, text in self.sha256.items()}
        return self.entry(files, pinned)


class _Unwanted(Exception):
    """Everybody who waited has gone."""


class ModelRepository:
    """Fetches models; any number of calls at once, those for the same source share one copy.

    Reading, hashing and writing happen on threads of its own, a few MB at a time. One loop only.
    """

    def __init__(
        self,
        cache_dir: Path | str,
        *,
        max_bytes: int | None = None,
        allow: Sequence[str] = (),
        attempts: int = ATTEMPTS,
        hold_s: float = HOLD_S,
    ) -> None:
        """allow: prefixes that sources must be under; none: every source will do.

        hold_s: how long after a fetch a model that nobody leased is safe from eviction.
        """
        self._cache = Cache(Path(cache_dir).absolute(), max_bytes, hold_s)
        self._allow = tuple(allow)
        self._attempts = attempts
        self._flights: dict[_FlightKey, _Flight] = {}
        self._threads = FetchThreads()
        self._is_prepared = False

    async def fetch(
        self,
        source: str,
        *,
        sha256: Mapping[str, str] | None = None,
        progress: Progress | None = None,
    ) -> Fetched:
        """Bring the model in the folder ``source`` (fsspec URL or path) into the cache.

        sha256: file name to hex digest, as in the document; where it names program and params
        and the cache has them, the source is not even looked at. A source that does not answer
        (unlike one that is gone) is answered from what it gave last, if the cache still has it.
        Raises `FetchFailed`; `NotAdmitted` (digest) when the bytes are not the document's.
        A missing params file is no failure here: the params check says so.
        """
        folder = await self._run(_Job(source, None, dict(sha256 or {})), progress)
        size = sum(file.stat().st_size for file in folder.iterdir())
        return Fetched(folder, Digest(f"sha256:{folder.name}"), size)

    async def cached(self, source: str, digest: Digest) -> Fetched | None:
        """A model that came from ``source`` once, whatever is there now; ``None``: not here (any
        more), not whole, or not allowed."""
        if not is_allowed(source, self._allow):
            return None
        folder = await self._threads.run(
            partial(self._cache.lookup, digest.removeprefix("sha256:"))
        )
        if folder is None:
            return None
        return Fetched(folder, digest, sum(file.stat().st_size for file in folder.iterdir()))

    async def fetch_file(self, url: str, *, progress: Progress | None = None) -> Path:
        """Bring one file (golden data) into the cache. Raises `FetchFailed`."""
        path = local_path(url)
        folder, _, name = (str(path) if path is not None else url).rpartition("/")
        if not name:
            raise FetchFailed(f"{url} is not a file", retryable=False)
        entry = await self._run(_Job(folder or "/", name), progress)
        # Not by its name: the same bytes may be here already under another one.
        (only,) = entry.iterdir()
        return only

    def has(self, digest: Digest) -> bool:
        """Whether a model that was fetched is still in the cache, as it was then."""
        return self._cache.is_intact(digest.removeprefix("sha256:"))

    def lease(self, digest: Digest) -> None:
        """Keep a model's folder from eviction, also by other processes that share the cache.

        To be called soon after `fetch`, and as often as `release`. Raises `FetchFailed` when the
        folder is not in the cache (any more).
        """
        self._cache.lease(digest.removeprefix("sha256:"))

    def release(self, digest: Digest) -> None:
        """Give one lease back. Without a lease nothing happens."""
        self._cache.release(digest.removeprefix("sha256:"))

    async def close(self) -> None:
        """End what is under way; half copied files stay for the next time."""
        flights = list(self._flights.values())
        for flight in flights:
            flight.stop.set()
            flight.task.cancel()
        await asyncio.gather(*(flight.task for flight in flights), return_exceptions=True)
        await self._threads.close()

    # --- sharing ----------------------------------------------------------------------------------

    async def _run(self, job: _Job, progress: Progress | None) -> Path:
        key: _FlightKey = (job.folder, job.file, tuple(sorted(job.sha256.items())))
        flight = self._flights.get(key)
        if flight is None:
            stop, listeners = threading.Event(), list[Progress]()
            task = asyncio.create_task(self._fly(job, stop, listeners), name=f"fetch {job.folder}")
            flight = self._flights[key] = _Flight(task, stop, listeners)
            task.add_done_callback(lambda _: self._landed(key, task))
        flight.waiters += 1
        if progress is not None:
            flight.listeners.append(progress)
        try:
            return await asyncio.shield(flight.task)
        finally:
            flight.waiters -= 1
            if progress is not None:
                flight.listeners.remove(progress)
            if flight.waiters == 0 and not flight.task.done():
                flight.stop.set()
                flight.task.cancel()
                self._landed(key, flight.task)

    def _landed(self, key: _FlightKey, task: asyncio.Task[Path]) -> None:
        flight = self._flights.get(key)
        if flight is not None and flight.task is task:
            del self._flights[key]
        if task.done() and not task.cancelled():
            task.exception()  # seen, even if every waiter has gone

    async def _fly(self, job: _Job, stop: threading.Event, listeners: list[Progress]) -> Path:
        loop = asyncio.get_running_loop()

        def tell(done_bytes: int, total_bytes: int) -> None:
            for listener in tuple(listeners):
                listener(done_bytes, total_bytes)

        def progress(done_bytes: int, total_bytes: int) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(tell, done_bytes, total_bytes)

        def check() -> None:
            if stop.is_set():
                raise _Unwanted

        attempt = _Attempt(self._cache, self._allow, job, check, progress)
        try:
            async for trial in AsyncRetrying(
                stop=stop_after_attempt(self._attempts),
                wait=wait_exponential_jitter(initial=0.1, max=2.0, jitter=0.1),
                retry=retry_if_exception(_is_passing),
                reraise=True,
            ):
                with trial:
                    return await self._threads.run(partial(self._attempt, attempt))
        except FetchFailed as exc:
            if exc.retryable and not isinstance(exc, SourceChanged | DiskFull):
                last = await self._threads.run(attempt.last_given)
                if last is not None:
                    log.warning("source_unreachable", source=job.folder, reason=str(exc))
                    return last
            raise
        raise AssertionError("unreachable")

    def _attempt(self, attempt: _Attempt) -> Path:
        if not self._is_prepared:
            try:
                self._cache.prepare()
            except OSError as exc:
                raise FetchFailed(f"cache {self._cache.folder}: {exc.strerror or exc}") from exc
            self._is_prepared = True
        try:
            return attempt.run()
        except OSError as exc:  # of the cache: the source's own are translated where they happen
            self._is_prepared = False  # somebody may have tidied its folders away
            raise FetchFailed(f"cache {self._cache.folder}: {exc.strerror or exc}") from exc


_FlightKey = tuple[str, str | None, tuple[tuple[str, str], ...]]


def _is_passing(exc: BaseException) -> bool:
    return isinstance(exc, FetchFailed) and exc.retryable and not isinstance(exc, DiskFull)


@dataclass(slots=True)
class _Attempt:
    """One try of one job, on a thread."""

    cache: Cache
    allow: Sequence[str]
    job: _Job
    check: Callable[[], None]
    progress: Progress

    def run(self) -> Path:
        pinned = self.job.pinned_entry()
        if not is_allowed(self.job.folder, self.allow):
            open_source(self.job.folder, self.allow)  # says why
        if pinned is not None and (cached := self.cache.lookup(pinned)) is not None:
            return cached
        source = open_source(self.job.folder, self.allow)
        names = [] if self.job.file else source.names(hints=self.job.sha256)
        files = self.job.select(names)
        seen = [source.stat(name) for name in files.names()]
        # A local file's times can be the same before and after a write (they tick every few ms):
        # only its bytes say that it is what it was.
        same = self._same_bytes(source, files, seen) if source.is_local else self._unchanged(seen)
        return same or self._copy(source, files, seen)

    def last_given(self) -> Path | None:
        """What this source gave last time, whatever it would give now."""
        origin = self._origin()
        return None if origin is None else self._fitting(str(origin["entry"]))

    def _unchanged(self, seen: list[SourceFile]) -> Path | None:
        """The entry of a source whose files all have the tags they had last time."""
        origin = self._origin()
        if origin is None or not all(file.is_exact for file in seen):
            return None
        if origin["tags"] != {file.name: f"{file.size} {file.tag}" for file in seen}:
            return None
        return self._fitting(str(origin["entry"]))

    def _same_bytes(self, source: Source, files: ModelFiles, seen: list[SourceFile]) -> Path | None:
        """The entry with the same bytes: reading is cheaper than copying."""
        if not self.cache.has_sizes({f.name: f.size for f in seen}):
            return None
        found = self._copier(source).hash_in_place(seen)
        entry = self.job.entry(files, found)
        self._still(source, seen)
        self._hold_to_document(found)
        cached = self.cache.lookup(entry)
        if cached is not None:
            self._remember(entry, seen)
        return cached

    def _copy(self, source: Source, files: ModelFiles, seen: list[SourceFile]) -> Path:
        with self.cache.partial(self.job.key, self.check) as partial:
            copier = self._copier(source)
            have = sum(f.stat().st_size for f in partial.rglob("*") if f.is_file())
            self.cache.make_room(max(0, sum(max(file.size, 0) for file in seen) - have))
            found = copier.copy(seen, partial)
            self._still(source, seen)
            try:
                self._hold_to_document(found)
            except NotAdmitted as exc:
                shutil.rmtree(partial)  # a copy put together from two times is not tried again
                if copier.has_resumed:
                    raise SourceChanged(str(exc)) from exc
                raise
            entry = self.job.entry(files, found)
            path = self.cache.publish(entry, gather(seen, partial))
            shutil.rmtree(partial, ignore_errors=True)
            self._remember(entry, seen)
            return path

    def _still(self, source: Source, seen: list[SourceFile]) -> None:
        for file in seen:
            if source.stat(file.name) != file:
                raise SourceChanged(f"{self.job.folder}: {file.name} changed while it was read")

    def _hold_to_document(self, found: Mapping[str, str]) -> None:
        reason = digest_breach(found, self.job.sha256)
        if reason is not None:
            raise NotAdmitted("digest", reason)

    def _fitting(self, entry: str) -> Path | None:
        """The entry, unless the document wants other bytes than it has."""
        cached = self.cache.lookup(entry)
        if cached is None or not self.job.sha256:
            return cached
        found = {file.name: file_sha256(file) for file in cached.iterdir()}
        return cached if digest_breach(found, self.job.sha256) is None else None

    def _copier(self, source: Source) -> Copier:
        return Copier(source, self.cache, self.check, self.progress)

    def _remember(self, entry: str, seen: list[SourceFile]) -> None:
        tags = {file.name: f"{file.size} {file.tag}" for file in seen}
        path = self.cache.origin_path(self.job.key)
        new = path.with_suffix(".new")
        new.write_bytes(orjson.dumps({"source": self.job.folder, "entry": entry, "tags": tags}))
        new.replace(path)

    def _origin(self) -> dict[str, Any] | None:
        try:
            origin = orjson.loads(self.cache.origin_path(self.job.key).read_bytes())
            return {"entry": origin["entry"], "tags": origin["tags"]}
        except (OSError, ValueError, KeyError, TypeError):
            return None
