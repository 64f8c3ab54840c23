"""A model is fetched once, whole, into a folder that never changes; or a reason is given."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import multiprocessing
import os
import shutil
import subprocess
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import IO, Any

import aiohttp
import fsspec
import pytest

import loader.cache
import loader.copying
import loader.sources
from loader.cache import Cache, DiskFull
from loader.errors import FetchFailed, NotAdmitted, SourceGone
from loader.model_files import file_sha256
from loader.repository import Fetched, ModelRepository, is_allowed
from loader.sources import LocalFolder, SourceFile, open_source
from paddlewheel.models import make_mlp

Make = Callable[..., ModelRepository]


@pytest.fixture
async def repository(tmp_path: Path) -> AsyncIterator[Make]:
    made: list[ModelRepository] = []

    def make(**settings: Any) -> ModelRepository:
        settings.setdefault("hold_s", 0.0)
        made.append(ModelRepository(tmp_path / "cache", **settings))
        return made[-1]

    yield make
    for one in made:
        await one.close()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return make_mlp(tmp_path / "source", tag=1)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (loader.sources, loader.copying):
        monkeypatch.setattr(module, "CHUNK_BYTES", 4096)


def shasum(folder: Path) -> str:
    """The digest as the documentation tells users to compute it."""
    command = "sha256sum inference.json inference.pdiparams | sha256sum"
    done = subprocess.run(["sh", "-c", command], cwd=folder, capture_output=True, check=True)
    return f"sha256:{done.stdout.split()[0].decode()}"


def assert_copy_of(fetched: Fetched, folder: Path) -> None:
    assert {file.name for file in fetched.folder.iterdir()} == {
        "inference.json", "inference.pdiparams"
    }  # fmt: skip
    for file in fetched.folder.iterdir():
        assert file.read_bytes() == (folder / file.name).read_bytes()


def entries(repository: ModelRepository) -> set[str]:
    return {p.name for p in repository._cache.folder.iterdir() if not p.name.startswith(".")}  # pyright: ignore[reportPrivateUsage]


async def test_a_local_folder(repository: Make, source: Path) -> None:
    (source / "notes.txt").write_text("not part of the model")
    told: list[tuple[int, int]] = []
    fetched = await repository().fetch(str(source), progress=lambda *at: told.append(at))
    assert_copy_of(fetched, source)
    assert fetched.digest == shasum(source)
    assert fetched.folder.name == fetched.digest.removeprefix("sha256:")
    assert fetched.bytes == sum(file.stat().st_size for file in fetched.folder.iterdir())
    assert told[-1] == (fetched.bytes, fetched.bytes)
    assert all(file.stat().st_mode & 0o222 == 0 for file in fetched.folder.iterdir())


async def test_all_spellings_of_a_source_are_one_entry(repository: Make, source: Path) -> None:
    fetch = repository().fetch
    for spelling in (str(source), f"file://{source}", f"{source}/", f"{source}/../source"):
        assert (await fetch(spelling)).digest == shasum(source)
    assert len(list(fetch.__self__._cache._entries())) == 1  # type: ignore[attr-defined]


async def test_what_is_cached_is_not_copied_again(
    repository: Make, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = await repository().fetch(str(source))
    monkeypatch.setattr(loader.copying.Copier, "copy", lambda *_: pytest.fail("copied again"))
    assert await repository().fetch(str(source)) == first


async def test_new_bytes_in_the_same_folder_are_another_entry(
    repository: Make, source: Path
) -> None:
    fetch = repository().fetch
    first = await fetch(str(source))
    make_mlp(source, tag=2)
    second = await fetch(str(source))
    assert first.digest != second.digest == shasum(source)
    assert first.folder.is_dir()


def put(files: Any, source: Path) -> None:
    for file in source.iterdir():
        files.pipe(f"/models/ocr/{file.name}", file.read_bytes())


def digests(folder: Path) -> dict[str, str]:
    return {file.name: file_sha256(file) for file in folder.iterdir()}


async def test_memory_and_its_tags(repository: Make, source: Path) -> None:
    files = fsspec.filesystem("memory")
    put(files, source)
    try:
        fetched = await repository().fetch("memory://models/ocr")
        assert_copy_of(fetched, source)
        make_mlp(source, tag=9)
        put(files, source)
        again = await repository().fetch("memory://models/ocr")
        assert again.digest == shasum(source) != fetched.digest
    finally:
        files.rm("/models", recursive=True)


# --- http ---------------------------------------------------------------------------------------


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        self.requests: list[str] = []
        self.failures = 0
        self.is_silent = threading.Event()
        """Set: files begin, and then nothing more comes until it is cleared."""
        self.lists = True
        self.has_etags = True

        class Handler(SimpleHTTPRequestHandler):
            server: Server

            def __init__(self, *args: Any) -> None:
                super().__init__(*args, directory=str(folder))

            def do_GET(self) -> None:
                self.server.requests.append(self.path)
                if self.server.failures > 0:
                    self.server.failures -= 1
                    self.send_error(503)
                elif self.path.endswith("/") and not self.server.lists:
                    self.send_error(404)
                elif self.path.endswith(".pdiparams") and self.server.is_silent.is_set():
                    self.send_response(200)
                    self.send_header("Content-Length", "1000000")
                    self.end_headers()
                    self.wfile.write(b"x" * 1000)
                    while self.server.is_silent.is_set():
                        threading.Event().wait(0.02)
                else:
                    super().do_GET()

            def end_headers(self) -> None:
                path = Path(self.translate_path(self.path))
                if self.server.has_etags and path.is_file():
                    self.send_header("ETag", f'"{file_sha256(path)[:16]}"')
                super().end_headers()

            def log_message(self, *args: Any) -> None:
                pass

        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


@pytest.fixture
def server(tmp_path: Path, source: Path) -> Iterator[Server]:
    with Server(tmp_path) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("has_etags", [True, False])
@pytest.mark.parametrize("lists", [True, False])
async def test_http(
    repository: Make, server: Server, source: Path, lists: bool, has_etags: bool
) -> None:
    server.lists, server.has_etags = lists, has_etags
    first = await repository().fetch(f"{server.url}/source")
    assert_copy_of(first, source)
    server.requests.clear()
    assert await repository().fetch(f"{server.url}/source") == first
    if has_etags:  # what has not changed is not read again
        assert not [path for path in server.requests if path.endswith("inference.pdiparams")]
    make_mlp(source, tag=2)
    assert_copy_of(await repository().fetch(f"{server.url}/source"), source)


async def test_a_server_that_fails_for_a_moment(
    repository: Make, server: Server, source: Path
) -> None:
    server.failures = 2
    assert_copy_of(await repository().fetch(f"{server.url}/source"), source)


async def test_a_server_that_goes_silent_is_given_up(
    repository: Make, server: Server, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    silence = aiohttp.ClientTimeout(total=None, sock_read=0.2)
    monkeypatch.setattr(loader.sources, "_HTTP_TIMEOUT", silence)
    server.is_silent.set()
    one = repository(attempts=1)
    try:
        with pytest.raises(FetchFailed) as caught:
            await asyncio.wait_for(one.fetch(f"{server.url}/source"), 5)
    finally:
        server.is_silent.clear()
    assert caught.value.retryable
    assert "no answer in time" in str(caught.value)
    assert_copy_of(await one.fetch(f"{server.url}/source"), source)


async def test_a_source_that_is_away_is_answered_from_the_cache(
    repository: Make, server: Server, source: Path
) -> None:
    fetched = await repository().fetch(f"{server.url}/source")
    server.failures = 1000
    assert await repository(attempts=2).fetch(f"{server.url}/source") == fetched
    with pytest.raises(FetchFailed) as caught:
        await repository(attempts=2).fetch(f"{server.url}/other")
    assert caught.value.retryable


async def test_a_file_that_is_not_there_is_not_asked_for_again(
    repository: Make, server: Server
) -> None:
    with pytest.raises(FetchFailed) as caught:
        await repository().fetch(f"{server.url}/nothing")
    assert not caught.value.retryable


# --- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "wanted"),
    [
        ("/nowhere/at/all", "does not exist"),
        ("s3://bucket/model", "s3:// is not installed: pip install 'paddlewheel[s3]'"),
        ("oss://bucket/model", "oss:// is not installed: pip install 'paddlewheel[oss]'"),
        ("gopher://x/y", "Protocol not known"),
        ("zip://*.json::file:///tmp/x.zip", "chained URLs are not taken"),
    ],
)
async def test_sources_that_cannot_be_read(repository: Make, url: str, wanted: str) -> None:
    with pytest.raises(FetchFailed) as caught:
        await repository().fetch(url)
    assert wanted in str(caught.value)
    assert not caught.value.retryable
    assert isinstance(caught.value, SourceGone) == (url == "/nowhere/at/all")


async def test_folders_that_hold_no_model(repository: Make, tmp_path: Path, source: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(SourceGone, match="no program"):
        await repository().fetch(str(empty))
    (source / "other.json").write_bytes((source / "inference.json").read_bytes())
    (source / "inference.pdiparams").unlink()
    with pytest.raises(FetchFailed, match="more than one program"):
        await repository().fetch(str(source))
    with pytest.raises(FetchFailed, match="Not a directory"):
        await repository().fetch(str(source / "inference.json"))


async def test_missing_params_are_left_to_the_params_check(repository: Make, source: Path) -> None:
    (source / "inference.pdiparams").unlink()
    fetched = await repository().fetch(str(source))
    assert [file.name for file in fetched.folder.iterdir()] == ["inference.json"]


async def test_a_pipe_is_not_waited_for(repository: Make, source: Path) -> None:
    (source / "inference.pdiparams").unlink()
    os.mkfifo(source / "inference.pdiparams")
    fetched = await asyncio.wait_for(repository().fetch(str(source)), 5)
    assert [file.name for file in fetched.folder.iterdir()] == ["inference.json"]


# --- the document's digests ---------------------------------------------------------------------


async def test_wrong_digest(repository: Make, source: Path) -> None:
    for name in ("inference.pdiparams", "else.bin"):
        with pytest.raises(NotAdmitted) as caught:
            await repository().fetch(str(source), sha256={name: "0" * 64})
        assert caught.value.check == "digest"
    assert not entries(repository())


async def test_pinned_digests_find_the_model_without_its_source(
    repository: Make, source: Path
) -> None:
    pinned = {name: digest.upper() for name, digest in digests(source).items()}
    first = await repository().fetch(str(source), sha256=pinned)
    shutil.rmtree(source)
    assert await repository().fetch(str(source), sha256=pinned) == first
    with pytest.raises(FetchFailed):
        await repository().fetch(str(source))


# --- what is allowed ----------------------------------------------------------------------------

ALLOWED: dict[tuple[str, str], bool] = {
    ("/models/ocr", "/models"): True,
    ("/models", "/models"): True,
    ("/models/", "/models"): True,
    ("/models", "/models/"): True,
    ("file:///models/ocr", "/models"): True,
    ("/models/ocr", "file:///models/"): True,
    ("FILE:///models/ocr", "/models"): True,
    ("/models-old/ocr", "/models"): False,
    ("/models/../etc", "/models"): False,
    ("file:///models/../etc", "/models"): False,
    ("/models/x/../ocr", "/models"): True,
    ("/etc", "/models"): False,
    ("/anything", "/"): True,
    ("s3://bucket/a/b", "s3://bucket/a"): True,
    ("s3://bucket/a/b", "s3://bucket"): True,
    ("s3://bucket-2/a", "s3://bucket"): False,
    ("s3://bucket/ab", "s3://bucket/a"): False,
    ("s3://bucket/a/../b", "s3://bucket"): False,
    ("http://h/a/%2e%2e/b", "http://h/a"): False,
    ("http://h/a/b", "https://h/a"): False,
    ("http://h@evil/a", "http://h"): False,
    ("http://H/a/b", "http://h/a"): True,
    ("http://h/a\\b", "http://h/a"): False,
    ("zip://x::/models/a.zip", "/models"): False,
    ("/models/a", "s3://bucket"): False,
}


@pytest.mark.parametrize("case", ALLOWED, ids=" under ".join)
def test_is_allowed(case: tuple[str, str]) -> None:
    assert is_allowed(case[0], [case[1]]) is ALLOWED[case]
    assert is_allowed(case[0], [])


async def test_only_allowed_sources_are_fetched(
    repository: Make, source: Path, tmp_path: Path
) -> None:
    allowed = tmp_path / "allowed"
    allowed.mkdir()
    with pytest.raises(FetchFailed, match="not under an allowed prefix"):
        await repository(allow=[str(allowed)]).fetch(str(source))
    (allowed / "link").symlink_to(source)
    with pytest.raises(FetchFailed, match=r"is a link to .*, outside the allowed prefixes"):
        await repository(allow=[str(allowed)]).fetch(str(allowed / "link"))
    real = make_mlp(allowed / "v1", tag=3)
    (allowed / "current").symlink_to(real)
    fetched = await repository(allow=[str(allowed)]).fetch(str(allowed / "current"))
    assert_copy_of(fetched, real)
    with pytest.raises(FetchFailed, match="not under an allowed prefix"):
        await repository(allow=[str(allowed)]).fetch_file("/etc/passwd")


async def test_a_cached_model_is_not_given_to_a_source_that_is_not_allowed(
    repository: Make, source: Path
) -> None:
    pinned = digests(source)
    await repository().fetch(str(source), sha256=pinned)
    with pytest.raises(FetchFailed, match="not under an allowed prefix"):
        await repository(allow=["/nowhere"]).fetch(str(source), sha256=pinned)


# --- interruptions ------------------------------------------------------------------------------


def chunks_then(
    monkeypatch: pytest.MonkeyPatch, interrupt: Callable[[str, int], None]
) -> dict[str, int]:
    """Call ``interrupt`` with file and offset before each chunk; returns the bytes read by file."""
    read: dict[str, int] = {}
    chunks = LocalFolder.chunks

    def wrapped(self: LocalFolder, name: str, offset: int) -> Iterator[bytes]:
        for chunk in chunks(self, name, offset):
            interrupt(name, offset)
            read[name] = read.get(name, 0) + len(chunk)
            offset += len(chunk)
            yield chunk

    monkeypatch.setattr(LocalFolder, "chunks", wrapped)
    return read


@pytest.mark.usefixtures("small_chunks")
async def test_an_interrupted_copy_goes_on_where_it_was(
    repository: Make, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_broken = True

    def interrupt(name: str, offset: int) -> None:
        if is_broken and name.endswith("pdiparams") and offset >= 5 * 4096:
            raise FetchFailed("cable pulled")

    read = chunks_then(monkeypatch, interrupt)
    with pytest.raises(FetchFailed, match="cable pulled"):
        await repository(attempts=1).fetch(str(source))
    assert read["inference.pdiparams"] == 5 * 4096
    is_broken = False
    read.clear()
    assert_copy_of(await repository().fetch(str(source)), source)
    assert read == {"inference.pdiparams": 38543 - 5 * 4096}


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("damage", ["source", "part", "longer part", "note"])
async def test_half_a_copy_of_something_else_is_not_gone_on_with(
    repository: Make, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    is_broken = True

    def interrupt(name: str, offset: int) -> None:
        if is_broken and name.endswith("pdiparams") and offset >= 5 * 4096:
            raise FetchFailed("cable pulled")

    chunks_then(monkeypatch, interrupt)
    with pytest.raises(FetchFailed):
        await repository(attempts=1).fetch(str(source))
    is_broken = False
    (part,) = (tmp_path / "cache").glob(".partial/*/inference.pdiparams.part")
    pinned = {}
    if damage == "source":
        make_mlp(source, seed=2)
    elif damage == "note":
        part.with_suffix(".note").write_bytes(b"{")
    elif damage == "longer part":  # a power cut can leave zeros behind what was synced
        part.write_bytes(part.read_bytes() + bytes(9000))
    else:
        part.write_bytes(bytes(part.stat().st_size))
        pinned = {"inference.pdiparams": file_sha256(source / "inference.pdiparams")}
    fetched = await repository().fetch(str(source), sha256=pinned)
    assert_copy_of(fetched, source)


@pytest.mark.usefixtures("small_chunks")
async def test_a_source_written_to_while_it_is_read_is_read_again(
    repository: Make, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writes = 1

    def interrupt(name: str, offset: int) -> None:
        nonlocal writes
        if writes and name.endswith("pdiparams") and offset >= 4096:
            writes -= 1
            make_mlp(source, tag=writes + 10)

    chunks_then(monkeypatch, interrupt)
    fetched = await repository().fetch(str(source))
    assert fetched.digest == shasum(source)
    writes = 1000
    make_mlp(source, tag=3)
    with pytest.raises(FetchFailed, match=r"changed while it was read|bytes") as caught:
        await repository(attempts=2).fetch(str(source))
    assert caught.value.retryable
    assert entries(repository()) == {fetched.folder.name}


@pytest.mark.usefixtures("small_chunks")
async def test_fetches_of_one_source_share_one_copy(
    repository: Make, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = chunks_then(monkeypatch, lambda *_: None)
    one = repository()
    told: list[list[int]] = [[], []]
    results = await asyncio.gather(
        *(one.fetch(str(source), progress=lambda done, _, i=i: told[i].append(done))  # type: ignore[misc]
          for i in (0, 1))
    )  # fmt: skip
    assert results[0] == results[1]
    assert read["inference.pdiparams"] == 38543
    assert told[0] == told[1] != []


@pytest.mark.usefixtures("small_chunks")
async def test_a_fetch_goes_on_until_the_last_waiter_has_gone(
    repository: Make, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, reached, read_on = threading.Event(), threading.Event(), 0

    def interrupt(name: str, offset: int) -> None:
        nonlocal read_on
        if name.endswith("pdiparams"):
            reached.set()
            gate.wait(5)
            read_on += 1

    chunks_then(monkeypatch, interrupt)
    one = repository()
    waiters = [asyncio.create_task(one.fetch(str(source))) for _ in range(2)]
    await asyncio.to_thread(reached.wait, 5)
    waiters[0].cancel()
    await asyncio.sleep(0.01)
    assert not waiters[1].done()
    waiters[1].cancel()
    await asyncio.gather(*waiters, return_exceptions=True)
    gate.set()
    again = await one.fetch(str(source))  # waits for the copy that was given up, then goes on
    assert_copy_of(again, source)
    assert read_on < 2 * 38543 // 4096


@pytest.mark.usefixtures("small_chunks")
async def test_the_loop_is_free_during_a_fetch(
    repository: Make, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chunks_then(monkeypatch, lambda *_: threading.Event().wait(0.02))  # type: ignore[arg-type, return-value]
    task = asyncio.create_task(repository().fetch(str(source)))
    loop, longest_s = asyncio.get_running_loop(), 0.0
    before_s = loop.time()
    turns = 0
    while not task.done():
        await asyncio.sleep(0.001)
        now_s = loop.time()
        longest_s, before_s, turns = max(longest_s, now_s - before_s), now_s, turns + 1
    assert turns > 20
    assert longest_s < 0.15


# --- the cache ----------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["cut", "flip", "gone", "more"])
async def test_a_corrupt_entry_is_fetched_again(
    repository: Make, source: Path, damage: str
) -> None:
    one = repository()
    fetched = await one.fetch(str(source))
    params = fetched.folder / "inference.pdiparams"
    params.chmod(0o644)
    data = bytearray(params.read_bytes())
    if damage == "cut":
        params.write_bytes(data[:-4])
    elif damage == "flip":
        data[100] ^= 1
        params.write_bytes(data)
    elif damage == "gone":
        params.unlink()
    else:
        (fetched.folder / "second.pdiparams").write_bytes(b"")
        (fetched.folder / "second.json").write_bytes(b"")
    for again in (one, repository()):
        assert_copy_of(await again.fetch(str(source)), source)


async def test_a_cache_that_somebody_removed_is_made_again(
    repository: Make, source: Path, tmp_path: Path
) -> None:
    made = repository()
    fetched = await made.fetch(str(source))
    made.lease(fetched.digest)
    assert made.has(fetched.digest)
    shutil.rmtree(fetched.folder.parent)
    assert not made.has(fetched.digest)
    assert await made.fetch(str(source)) == fetched
    assert made.has(fetched.digest)
    (fetched.folder / "inference.pdiparams").unlink()
    assert not made.has(fetched.digest)


async def test_the_least_recently_used_goes_first_and_leased_ones_stay(
    repository: Make, tmp_path: Path
) -> None:
    sources = [make_mlp(tmp_path / f"s{i}", tag=i) for i in range(4)]
    one = repository(max_bytes=2 * 42_000)
    first, second = [await one.fetch(str(sources[i])) for i in (0, 1)]
    one.lease(first.digest)
    os.utime(first.folder, (1, 1))
    third = await one.fetch(str(sources[2]))
    assert entries(one) == {first.folder.name, third.folder.name}
    one.lease(third.digest)
    with pytest.raises(DiskFull, match=r"cache full: \d+ bytes wanted, \d+ of 84000 used"):
        await one.fetch(str(sources[3]))
    one.release(first.digest)
    fourth = await one.fetch(str(sources[3]))
    assert entries(one) == {third.folder.name, fourth.folder.name}
    with pytest.raises(FetchFailed, match="not in the cache"):
        one.lease(second.digest)
    one.release(second.digest)


async def test_leases_are_counted(repository: Make, source: Path, tmp_path: Path) -> None:
    one = repository(max_bytes=42_000)
    fetched = await one.fetch(str(source))
    one.lease(fetched.digest)
    one.lease(fetched.digest)
    one.release(fetched.digest)
    other = make_mlp(tmp_path / "other", tag=2)
    with pytest.raises(DiskFull):
        await one.fetch(str(other))
    one.release(fetched.digest)
    await one.fetch(str(other))


async def test_a_model_just_fetched_is_not_evicted_before_it_can_be_leased(
    repository: Make, source: Path, tmp_path: Path
) -> None:
    one = repository(max_bytes=42_000, hold_s=60.0)
    await one.fetch(str(source))
    with pytest.raises(DiskFull):
        await one.fetch(str(make_mlp(tmp_path / "other", tag=2)))


def _lease_and_die(cache: Path, name: str, ready: Any, die: Any) -> None:
    Cache(cache).lease(name)
    ready.set()
    die.wait(20)
    os._exit(9)


async def test_another_process_keeps_its_lease_until_it_dies(
    repository: Make, source: Path, tmp_path: Path
) -> None:
    one = repository(max_bytes=42_000)
    fetched = await one.fetch(str(source))
    context = multiprocessing.get_context("spawn")
    ready, die = context.Event(), context.Event()
    arguments = (tmp_path / "cache", fetched.folder.name, ready, die)
    process = context.Process(target=_lease_and_die, args=arguments)
    process.start()
    assert await asyncio.to_thread(ready.wait, 20)
    other = make_mlp(tmp_path / "other", tag=2)
    with pytest.raises(DiskFull):
        await one.fetch(str(other))
    die.set()
    await asyncio.to_thread(process.join, 20)
    await one.fetch(str(other))


async def test_a_full_disk_says_its_numbers(
    repository: Make, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = loader.cache.shutil._ntuple_diskusage  # type: ignore[attr-defined]
    with monkeypatch.context() as patched:
        patched.setattr(loader.cache.shutil, "disk_usage", lambda _: usage(10**6, 10**6, 5))  # type: ignore[attr-defined]
        with pytest.raises(DiskFull, match=r"disk full: 41278 bytes wanted, 5 free in"):
            await repository().fetch(str(source))


@pytest.mark.usefixtures("small_chunks")
async def test_a_disk_that_fills_up_on_the_way(
    repository: Make, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    append = loader.copying.Copier._append  # pyright: ignore[reportPrivateUsage]

    def full(self: Any, file: SourceFile, out: IO[bytes], digest: Any, size: int) -> int:
        if file.name.endswith("pdiparams"):
            raise OSError(errno.ENOSPC, "No space left on device")
        return append(self, file, out, digest, size)

    with monkeypatch.context() as patched:
        patched.setattr(loader.copying.Copier, "_append", full)
        with pytest.raises(DiskFull, match=r"disk full: 38543 bytes wanted, \d+ free"):
            await repository().fetch(str(source))
    assert_copy_of(await repository().fetch(str(source)), source)


async def test_what_was_left_half_copied_long_ago_is_dropped(
    repository: Make, source: Path, tmp_path: Path
) -> None:
    old, new = (tmp_path / "cache" / ".partial" / name for name in ("old", "new"))
    for left in (old, new):
        left.mkdir(parents=True)
        (left / "inference.pdiparams.part").write_bytes(b"x")
    os.utime(old, (1, 1))
    await repository().fetch(str(source))
    assert not old.exists()
    assert new.exists()


async def test_a_single_file(repository: Make, tmp_path: Path) -> None:
    golden = tmp_path / "golden.npz"
    golden.write_bytes(b"numbers")
    one = repository()
    for url in (str(golden), f"file://{golden}"):
        path = await one.fetch_file(url)
        assert path.name == "golden.npz"
        assert path.parent.name == f"file-{hashlib.sha256(b'numbers').hexdigest()}"
        assert path.read_bytes() == b"numbers"
    golden.write_bytes(b"others!")
    assert (await one.fetch_file(str(golden))).read_bytes() == b"others!"
    assert path.read_bytes() == b"numbers"
    with pytest.raises(FetchFailed, match="does not exist"):
        await one.fetch_file(str(tmp_path / "none.npz"))


async def test_one_file_under_two_names(repository: Make, tmp_path: Path) -> None:
    one = repository()
    for name in ("first.npz", "second.npz"):
        (tmp_path / name).write_bytes(b"numbers")
        assert (await one.fetch_file(str(tmp_path / name))).read_bytes() == b"numbers"


async def test_close_ends_what_is_under_way(
    repository: Make, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reached = threading.Event()

    def slow(*_: object) -> None:
        reached.set()
        threading.Event().wait(0.05)

    monkeypatch.setattr(loader.sources, "CHUNK_BYTES", 512)
    chunks_then(monkeypatch, slow)
    one = repository()
    task = asyncio.create_task(one.fetch(str(source)))
    await asyncio.to_thread(reached.wait, 5)
    await asyncio.wait_for(one.close(), 1)
    with pytest.raises(asyncio.CancelledError):
        await task


def test_open_source_follows_no_home_shorthand(tmp_path: Path) -> None:
    found = open_source("~/models")
    assert isinstance(found, LocalFolder)
    with pytest.raises(FetchFailed, match="does not exist"):
        found.names()
