"""A real folder kept applied to a store in memory, with faults on demand."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from paddlewheel.sync import Did, FolderSync, Report
from registry.keys import Keys
from registry.memory_store import MemoryStore
from registry.names import ModelName
from tests.eventually import eventually

KEYS = Keys()


def document(name: str, note: str = "") -> str:
    return (
        f"# {note}\napiVersion: paddlewheel/v1\nkind: Model\nmetadata: {{name: {name}}}\n"
        'spec:\n  live: "1"\n  versions: [{version: "1", source: /m/1}]\n'
    )


@dataclass
class World:
    folder: Path
    store: MemoryStore = field(default_factory=MemoryStore)
    reports: list[Report] = field(default_factory=list[Report])

    def __post_init__(self) -> None:
        self.other = self.store.client()
        """Somebody else's connection, without our faults."""

    @contextlib.asynccontextmanager
    async def syncing(self, *, prune: bool = False, grace_s: float = 0.2) -> AsyncGenerator[None]:
        sync = FolderSync(
            self.folder,
            self.store,
            KEYS,
            self.reports.append,
            prune=prune,
            debounce_s=0.05,
            prune_grace_s=grace_s,
        )
        task = asyncio.create_task(sync.run())
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            assert task.cancelled(), task.exception()

    async def text(self, model: str = "m") -> str | None:
        kv = await self.other.get(KEYS.model(ModelName(model)))
        return None if kv is None else kv.value.decode()

    async def becomes(self, wanted: str | None, model: str = "m") -> None:
        async def holds() -> bool:
            return await self.text(model) == wanted

        await eventually(holds, within_s=10, what=f"{model} is {wanted!r}: {self.reports}")

    async def reported(self, did: Did, times: int = 1) -> None:
        await eventually(
            lambda: self.count(did) >= times, within_s=10, what=f"{did}: {self.reports}"
        )

    def count(self, did: Did) -> int:
        return sum(report.did is did for report in self.reports)

    def write(self, name: str, text: str) -> None:
        """As careful editors save: a new file renamed over the old one."""
        temporary = self.folder / f".{name}.tmp"
        temporary.write_text(text)
        temporary.replace(self.folder / name)


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


async def test_the_first_round_applies_what_is_there(world: World) -> None:
    world.write("m.yaml", document("m"))
    await world.other.put(KEYS.model(ModelName("same")), document("same").encode())
    world.write("same.yaml", document("same"))
    async with world.syncing():
        await world.becomes(document("m"))
        await world.reported(Did.UNCHANGED)
    assert world.count(Did.APPLIED) == 1


async def test_a_change_is_applied(world: World) -> None:
    world.write("m.yaml", document("m"))
    async with world.syncing():
        await world.becomes(document("m"))
        world.write("m.yaml", document("m", "renamed over"))
        await world.becomes(document("m", "renamed over"))
        (world.folder / "m.yaml").write_text(document("m", "in place"))
        await world.becomes(document("m", "in place"))
        (world.folder / "deep").mkdir()
        (world.folder / "deep" / "n.yaml").write_text(document("n"))
        await world.becomes(document("n"), "n")


async def test_a_broken_file_is_reported_once_and_the_old_stays(world: World) -> None:
    world.write("m.yaml", document("m"))
    async with world.syncing(prune=True):
        await world.becomes(document("m"))
        world.write("m.yaml", "a: [")
        await world.reported(Did.REFUSED)
        # A document that is pruned meanwhile shows that the broken one would have been.
        world.write("other.yaml", document("other"))
        await world.becomes(document("other"), "other")
        (world.folder / "other.yaml").unlink()
        await world.becomes(None, "other")
        assert await world.text() == document("m")
        assert world.count(Did.REFUSED) == 1
        world.write("m.yaml", document("m", "good again"))
        await world.becomes(document("m", "good again"))
        await world.reported(Did.MENDED)


async def test_a_file_that_goes_away_leaves_the_document(world: World) -> None:
    world.write("m.yaml", document("m"))
    async with world.syncing():
        await world.becomes(document("m"))
        (world.folder / "m.yaml").unlink()
        await world.reported(Did.KEPT)
        assert await world.text() == document("m")


async def test_prune_deletes(world: World) -> None:
    world.write("m.yaml", document("m"))
    async with world.syncing(prune=True):
        await world.becomes(document("m"))
        (world.folder / "m.yaml").unlink()
        await world.becomes(None)
        await world.reported(Did.DELETED)


async def test_prune_leaves_what_somebody_else_changed(world: World) -> None:
    world.write("m.yaml", document("m"))
    async with world.syncing(prune=True):
        await world.becomes(document("m"))
        await world.other.put(KEYS.model(ModelName("m")), document("m", "theirs").encode())
        (world.folder / "m.yaml").unlink()
        await world.reported(Did.KEPT)
        assert await world.text() == document("m", "theirs")


async def test_a_move_and_a_slow_save_are_not_deletions(world: World) -> None:
    """Some editors move the old file away, then write the new one."""
    world.write("m.yaml", document("m"))
    async with world.syncing(prune=True, grace_s=60):
        await world.becomes(document("m"))
        (world.folder / "m.yaml").rename(world.folder / "renamed.yaml")
        world.write("n.yaml", document("n"))
        await world.becomes(document("n"), "n")
        (world.folder / "renamed.yaml").rename(world.folder / "m.yaml~")
        for name in ("two", "rounds", "see it missing"):
            world.write("n.yaml", document("n", name))
            await world.becomes(document("n", name), "n")
        world.write("m.yaml", document("m", "saved"))
        await world.becomes(document("m", "saved"))
    assert world.count(Did.DELETED) == 0


async def test_what_others_write_stays_until_the_file_changes(world: World) -> None:
    """A rollback made in etcd is not undone by the folder it did not come from."""
    world.write("m.yaml", document("m"))
    async with world.syncing():
        await world.becomes(document("m"))
        await world.other.put(KEYS.model(ModelName("m")), document("m", "rollback").encode())
        world.write("n.yaml", document("n"))
        await world.becomes(document("n"), "n")
        assert await world.text() == document("m", "rollback")
        world.write("m.yaml", document("m", "a new word"))
        await world.becomes(document("m", "a new word"))


async def test_an_outage_is_waited_out_and_the_last_word_counts(world: World) -> None:
    world.write("m.yaml", document("m"))
    async with world.syncing():
        await world.becomes(document("m"))
        world.store.cut_off()
        world.write("m.yaml", document("m", "during"))
        await world.reported(Did.RETRYING)
        world.write("m.yaml", document("m", "last"))
        world.store.heal()
        await world.becomes(document("m", "last"))
    assert world.count(Did.RETRYING) == 1


async def test_a_folder_that_vanishes_is_an_outage_not_a_deletion(world: World) -> None:
    world.write("m.yaml", document("m"))
    away = world.folder.with_name("away")
    async with world.syncing(prune=True):
        await world.becomes(document("m"))
        world.folder.rename(away)
        await world.reported(Did.RETRYING)
        assert await world.text() == document("m")
        away.rename(world.folder)
        world.write("m.yaml", document("m", "back"))
        await world.becomes(document("m", "back"))
    assert world.count(Did.DELETED) == 0


async def test_a_folder_made_anew_is_watched_anew(world: World) -> None:
    world.write("m.yaml", document("m"))
    async with world.syncing():
        await world.becomes(document("m"))
        world.folder.rename(world.folder.with_name("old"))
        world.folder.mkdir()
        world.write("m.yaml", document("m", "new folder"))
        await world.becomes(document("m", "new folder"))
        world.write("m.yaml", document("m", "and again"))
        await world.becomes(document("m", "and again"))
