"""The file a node starts from while etcd is away."""

from __future__ import annotations

import hashlib
import os
import resource
import threading
from datetime import UTC, datetime
from pathlib import Path

import pytest
import structlog
from hypothesis import given, settings
from hypothesis import strategies as st

from registry.names import ModelName, NodeId, Revision, Version
from registry.records import LastGood, Quarantine
from registry.snapshot import SavedDocument, Snapshot, SnapshotNotSaved, load, save
from tests.bad_documents import GOOD

AT = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
M = ModelName("m")
FULL = Snapshot(
    documents={
        M: SavedDocument(Revision(7), GOOD),
        ModelName("é".encode().hex()): SavedDocument(Revision(8), "a: 'é😀\t'\n"),
    },
    lastgoods={M: LastGood(version=Version("1"), revision=Revision(3), at=AT)},
    quarantines={
        (M, Version("2")): Quarantine(reason="code 700", code=700, nodes=(NodeId("a"),), at=AT),
        (M, Version("1")): Quarantine(reason="died", code="SIGSEGV", at=AT),
    },
    prefix="/paddlewheel",
)


def saved(folder: Path, snapshot: Snapshot = FULL) -> Path:
    path = folder / "snapshot"
    save(path, snapshot)
    return path


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    assert load(saved(tmp_path)) == FULL
    assert load(saved(tmp_path, Snapshot())) == Snapshot()


def test_the_folder_is_made_and_nothing_else_is_left_in_it(tmp_path: Path) -> None:
    path = tmp_path / "state" / "node-1" / "snapshot"
    save(path, FULL)
    save(path, FULL)
    assert [entry.name for entry in path.parent.iterdir()] == ["snapshot"]
    assert path.stat().st_mode & 0o777 == 0o600, "documents may name private places"


def test_equal_snapshots_are_equal_files(tmp_path: Path) -> None:
    first = saved(tmp_path).read_bytes()
    turned = Snapshot(
        documents=dict(reversed(FULL.documents.items())),
        lastgoods=FULL.lastgoods,
        quarantines=dict(reversed(FULL.quarantines.items())),
        prefix=FULL.prefix,
    )
    assert saved(tmp_path, turned).read_bytes() == first


def test_none_there_is_normal_and_not_worth_a_line(tmp_path: Path) -> None:
    with structlog.testing.capture_logs() as logs:
        assert load(tmp_path / "none") is None
    assert logs == []


def test_cut_anywhere_it_is_ignored(tmp_path: Path) -> None:
    path = saved(tmp_path)
    whole = path.read_bytes()
    for size in [*range(200), *range(200, len(whole), 37), len(whole) - 1]:
        path.write_bytes(whole[:size])
        assert load(path) is None, size
    path.write_bytes(whole + b"\n")
    assert load(path) is None


@settings(max_examples=200)
@given(at=st.integers(0, 3000), bit=st.integers(0, 7))
def test_one_flipped_bit_anywhere_is_noticed(
    tmp_path_factory: pytest.TempPathFactory, at: int, bit: int
) -> None:
    path = saved(tmp_path_factory.mktemp("flip"))
    data = bytearray(path.read_bytes())
    data[at % len(data)] ^= 1 << bit
    path.write_bytes(data)
    assert load(path) is None


@given(st.binary(max_size=300))
def test_any_bytes_are_ignored(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.mktemp("any") / "snapshot"
    path.write_bytes(data)
    assert load(path) is None


def sealed(body: bytes, version: int = 1) -> bytes:
    digest = hashlib.sha256(body).hexdigest()
    return b"paddlewheel-snapshot %d %d sha256:%s\n%s" % (version, len(body), digest.encode(), body)


FOREIGN = {
    "another program's": b'{"documents": {}}',
    "a later format": sealed(b"{}", version=2),
    "no JSON": sealed(b"{"),
    "another shape": sealed(b"[]"),
    "nothing in it": sealed(b"{}"),
    "a name that is no name": sealed(
        b'{"documents":{"a/b":{"revision":1,"text":""}},"lastgoods":{},"quarantines":[],"prefix":""}'
    ),
    "text that is a number": sealed(
        b'{"documents":{"a":{"revision":1,"text":7}},"lastgoods":{},"quarantines":[],"prefix":""}'
    ),
    "a record that is none": sealed(
        b'{"documents":{},"lastgoods":{"m":{}},"quarantines":[],"prefix":""}'
    ),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_foreign_files_are_reported_ignored_and_left_alone(name: str, tmp_path: Path) -> None:
    path = tmp_path / "snapshot"
    path.write_bytes(FOREIGN[name])
    with structlog.testing.capture_logs() as logs:
        assert load(path) is None
    assert [(line["event"], line["log_level"]) for line in logs] == [
        ("snapshot_ignored", "warning")
    ]
    assert logs[0]["reason"]
    assert path.read_bytes() == FOREIGN[name]


def test_a_folder_in_its_place_is_reported(tmp_path: Path) -> None:
    assert load(tmp_path) is None
    (tmp_path / "snapshot" / "x").mkdir(parents=True)
    with pytest.raises(SnapshotNotSaved, match="snapshot"):
        save(tmp_path / "snapshot", FULL)
    assert [entry.name for entry in tmp_path.iterdir()] == ["snapshot"]


def test_no_room_leaves_the_old_one(tmp_path: Path) -> None:
    path = saved(tmp_path)
    big = Snapshot(documents={M: SavedDocument(Revision(9), "x" * 1_000_000)})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(SnapshotNotSaved, match="too large"):
            save(path, big)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert load(path) == FULL
    assert [entry.name for entry in tmp_path.iterdir()] == ["snapshot"]


def test_what_a_crash_left_behind_is_overwritten(tmp_path: Path) -> None:
    path = saved(tmp_path)
    (tmp_path / ".snapshot.tmp").write_bytes(b"half a snapsh" * 10_000)
    assert load(path) == FULL
    save(path, Snapshot())
    assert load(path) == Snapshot()
    assert [entry.name for entry in tmp_path.iterdir()] == ["snapshot"]


def test_readers_see_one_or_the_other_never_a_mixture(tmp_path: Path) -> None:
    small, large = Snapshot(), Snapshot(documents={M: SavedDocument(Revision(1), "y" * 500_000)})
    path = saved(tmp_path, small)
    seen: list[Snapshot | None] = []
    over = threading.Event()

    def look() -> None:
        while not over.is_set():
            seen.append(load(path))

    def write(snapshot: Snapshot) -> None:
        for _ in range(15):
            save(path, snapshot)

    reader = threading.Thread(target=look)
    writers = [threading.Thread(target=write, args=(one,)) for one in (small, large)]
    reader.start()
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    over.set()
    reader.join()
    assert all(one in (small, large) for one in seen)
    assert load(path) in (small, large)


def test_file_and_folder_are_synced_before_it_returns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    real = os.fsync

    def record(descriptor: int) -> None:
        synced.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
        real(descriptor)

    monkeypatch.setattr(os, "fsync", record)
    saved(tmp_path)
    assert synced == [".snapshot.tmp", tmp_path.name]
