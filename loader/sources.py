"""Where models come from: a folder on this machine, or in anything that fsspec reads.

All of it is blocking and runs on the repository's own threads. Errors leave here as `FetchFailed`
(retryable or not); nobody else looks at what fsspec's many backends raise.
"""

from __future__ import annotations

import contextlib
import os
import posixpath
import stat
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from errno import EDQUOT, ENOSPC, EROFS
from pathlib import Path
from typing import Any, Protocol, cast
from urllib.parse import unquote, urlsplit

import aiohttp
import fsspec

from loader.errors import FetchFailed, SourceGone

CHUNK_BYTES = 4 << 20
"""Small enough that a fetch given up ends soon, large enough that hashing never waits."""

_HTTP_TIMEOUT = aiohttp.ClientTimeout(total=None, sock_connect=10.0, sock_read=30.0)
"""A server that goes silent is given up soon; how long a large file takes does not matter
(aiohttp's own limit is five minutes for a whole answer, and none for silence)."""

_LOCAL_SCHEMES = ("", "file", "local")
_EXTRA_OF_SCHEME: Mapping[str, str] = {
    "s3": "s3", "s3a": "s3", "oss": "oss", "http": "http", "https": "http",
}  # fmt: skip
_EXACT_TAGS = ("ETag", "etag", "md5", "Content-MD5", "Digest", "checksum", "generation")
_CONVENTIONAL = tuple(
    f"{stem}{suffix}"
    for stem in ("inference", "model")
    for suffix in (".json", ".pdmodel", ".pdiparams")
)
"""What is asked for on a web server that lists no folders."""


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A file as it was when looked at."""

    name: str
    size: int
    """-1 when the source does not say."""
    tag: str | None
    """Changes when the content does: etag, or inode and times. ``None``: nobody knows."""
    is_exact: bool = False
    """Whether an equal tag proves equal content; a time, which ticks, does not."""


class Source(Protocol):
    """One folder. `FetchFailed` is all that is raised."""

    @property
    def url(self) -> str: ...

    @property
    def is_local(self) -> bool: ...

    def names(self, hints: Iterable[str] = ()) -> list[str]:
        """The plain files in it. ``hints``: names worth asking for where nothing is listed."""
        ...

    def stat(self, name: str) -> SourceFile: ...

    def chunks(self, name: str, offset: int) -> Iterator[bytes]:
        """The content from ``offset`` on. Raises `CannotSeek` where only offset 0 will do."""
        ...


class CannotSeek(FetchFailed):
    """The source can't be read from the middle."""


def open_source(url: str, allow: Sequence[str] = ()) -> Source:
    """The folder at an fsspec URL or a plain path.

    allow: the prefixes that sources must be under, when there are any. Symbolic links are
    followed, and where they lead must be under them too.
    """
    if "::" in url:
        raise FetchFailed(f"{url}: chained URLs are not taken", retryable=False)
    if not is_allowed(url, allow):
        raise FetchFailed(
            f"{url} is not under an allowed prefix ({', '.join(allow)})", retryable=False
        )
    path = local_path(url)
    if path is not None:
        return LocalFolder(url, path, [p for prefix in allow if (p := local_path(prefix))])
    return RemoteFolder(url)


def local_path(url: str) -> Path | None:
    """The absolute path that a plain path or a ``file://`` URL means; ``None`` for others."""
    scheme, separator, rest = url.partition("://")
    if separator and scheme.lower() not in _LOCAL_SCHEMES:
        return None
    # Not resolve(): where links lead is looked at when the file is, not here.
    return Path(os.path.abspath(rest if separator else url))  # noqa: PTH100


def is_allowed(source: str, prefixes: Sequence[str]) -> bool:
    """Whether ``source`` lies under one of ``prefixes``; without prefixes everything does.

    Compared by whole path segments: ``/models`` allows ``/models/ocr``, not ``/models-old``. On
    this machine ``..`` is resolved first; elsewhere a path with ``..`` in it, encoded or not, is
    under nothing.
    """
    if not prefixes:
        return True
    wanted = _normalised(source)
    return wanted is not None and any(
        allowed is not None and wanted[: len(allowed)] == allowed
        for allowed in map(_normalised, prefixes)
    )


def _normalised(url: str) -> tuple[str, ...] | None:
    """Scheme, host and path segments; ``None`` for what can't be compared safely."""
    if "::" in url or "\\" in url or not url.isprintable():
        return None
    path = local_path(url)
    if path is not None:
        return ("file", "", *path.parts[1:])
    try:
        parts = urlsplit(url)
    except ValueError:
        return None
    segments = [segment for segment in unquote(parts.path).split("/") if segment]
    if any(segment in (".", "..") for segment in segments):
        return None
    return (parts.scheme.lower(), parts.netloc.lower(), *segments)


class LocalFolder:
    """A folder of this machine, by its own system calls: exact times, no surprises."""

    is_local = True

    def __init__(self, url: str, path: Path, allow: Sequence[Path] = ()) -> None:
        self.url = url
        self._path = path
        self._allow = [Path(os.path.realpath(prefix)) for prefix in allow]

    def names(self, hints: Iterable[str] = ()) -> list[str]:
        with _translated(self.url):
            return sorted(entry.name for entry in os.scandir(self._path) if entry.is_file())

    def stat(self, name: str) -> SourceFile:
        path = self._path / name
        with _translated(f"{self.url}/{name}"):
            if self._allow:
                real = Path(os.path.realpath(path))
                if not any(real.is_relative_to(prefix) for prefix in self._allow):
                    raise FetchFailed(
                        f"{self.url}/{name} is a link to {real}, outside the allowed prefixes",
                        retryable=False,
                    )
            found = path.stat()
            if not stat.S_ISREG(found.st_mode):
                raise FetchFailed(f"{self.url}/{name} is not a plain file", retryable=False)
        tag = f"{found.st_dev}:{found.st_ino}:{found.st_mtime_ns}:{found.st_ctime_ns}"
        return SourceFile(name, found.st_size, tag)

    def chunks(self, name: str, offset: int) -> Iterator[bytes]:
        with _translated(f"{self.url}/{name}"), (self._path / name).open("rb") as file:
            file.seek(offset)
            while chunk := file.read(CHUNK_BYTES):
                yield chunk


class RemoteFolder:
    """A folder in an object store, on a web server, in memory: whatever fsspec knows."""

    is_local = False

    def __init__(self, url: str) -> None:
        self.url = url
        scheme = url.partition("://")[0].lower()
        extra = _EXTRA_OF_SCHEME.get(scheme)
        options: dict[str, Any] = {}
        if scheme in ("http", "https"):
            options["client_kwargs"] = {"timeout": _HTTP_TIMEOUT}
        try:
            fs, path = fsspec.core.url_to_fs(url, **options)
        except ImportError as exc:
            how = f"pip install 'paddlewheel[{extra}]'" if extra else str(exc)
            raise FetchFailed(
                f"{url}: {scheme}:// is not installed: {how}", retryable=False
            ) from exc
        except ValueError as exc:
            raise FetchFailed(f"{url}: {exc}", retryable=False) from exc
        self._fs: Any = fs
        self._path = str(path).rstrip("/")
        self._may_guess = scheme in ("http", "https")

    def names(self, hints: Iterable[str] = ()) -> list[str]:
        with _translated(self.url):
            self._fs.invalidate_cache()
            try:
                entries = cast("list[dict[str, Any]]", self._fs.ls(self._path + "/", detail=True))
            except FileNotFoundError:
                if not self._may_guess:
                    raise
                entries = []
            found = {
                posixpath.basename(str(entry["name"]).rstrip("/"))
                for entry in entries
                if entry.get("type") == "file"
            }
            if self._may_guess and not any(name.endswith(".pdiparams") for name in found):
                found.update(name for name in {*hints, *_CONVENTIONAL} if self._exists(name))
            return sorted(found)

    def stat(self, name: str) -> SourceFile:
        with _translated(f"{self.url}/{name}"):
            self._fs.invalidate_cache()
            info = cast("dict[str, Any]", self._fs.info(f"{self._path}/{name}"))
            size = -1 if info.get("size") is None else int(info["size"])
            exact = next((f"{key}:{info[key]}" for key in _EXACT_TAGS if info.get(key)), None)
            if exact is not None:
                return SourceFile(name, size, exact, is_exact=True)
            return SourceFile(name, size, self._time(name, info))

    def chunks(self, name: str, offset: int) -> Iterator[bytes]:
        path = f"{self._path}/{name}"
        with _translated(f"{self.url}/{name}"), self._fs.open(path, "rb") as file:
            if offset:
                try:
                    file.seek(offset)
                except (ValueError, OSError, NotImplementedError) as exc:
                    raise CannotSeek(f"{self.url}/{name}: {exc}") from exc
            while chunk := file.read(CHUNK_BYTES):
                yield chunk

    def _exists(self, name: str) -> bool:
        # Not exists(): over http that is a GET, and an answer of 503 means "no" to it.
        try:
            self._fs.info(f"{self._path}/{name}")
        except FileNotFoundError as exc:
            if not _is_missing(exc):
                raise
            return False
        return True

    def _time(self, name: str, info: Mapping[str, Any]) -> str | None:
        for key in ("LastModified", "Last-Modified", "last_modified", "mtime"):
            if info.get(key):
                return f"{key}:{info[key]}"
        with contextlib.suppress(Exception):  # most backends have no such call
            return f"modified:{self._fs.modified(f'{self._path}/{name}')}"
        return None


@contextlib.contextmanager
def _translated(what: str) -> Generator[None]:
    """Turn whatever a backend raises into `FetchFailed`. Bugs of ours pass through."""
    try:
        yield
    except (FetchFailed, AssertionError, NameError, AttributeError):
        raise
    except FileNotFoundError as exc:
        if not _is_missing(exc):
            raise FetchFailed(f"{what}: {exc.__cause__!r}") from exc
        raise SourceGone(f"{what} does not exist") from exc
    except TimeoutError as exc:  # fsspec's has no text
        raise FetchFailed(f"{what}: no answer in time") from exc
    except (NotADirectoryError, IsADirectoryError, PermissionError) as exc:
        raise SourceGone(f"{what}: {exc.strerror or exc}") from exc
    except OSError as exc:
        lasting = exc.errno in (ENOSPC, EDQUOT, EROFS)
        raise FetchFailed(f"{what}: {exc.strerror or exc}", retryable=not lasting) from exc
    except Exception as exc:  # aiohttp's, botocore's, oss2's own: mostly the network
        status = getattr(exc, "status", None)
        lasting = isinstance(status, int) and 400 <= status < 500 and status not in (408, 429)
        raise FetchFailed(f"{what}: {type(exc).__name__}: {exc}", retryable=not lasting) from exc


def _is_missing(exc: FileNotFoundError) -> bool:
    """Whether the file is really not there: fsspec's http says so of every failed look-up too."""
    cause = exc.__cause__
    return (
        cause is None
        or isinstance(cause, FileNotFoundError)
        or getattr(cause, "status", None) in (404, 410)
    )
