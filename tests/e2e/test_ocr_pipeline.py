"""The real OCR pipeline: reads as plain Paddle by hand does, also while a step is swapped.

Four images here; ``OCR_IMAGES=20`` in the environment makes it all of them.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.e2e.running import Answer, RunningNode, running_node
from tests.etcd import etcd_cluster
from tests.eventually import eventually
from tests.pipelines import put, until_status

EXAMPLE = Path(__file__).parent.parent.parent / "examples" / "ocr_pipeline"
IMAGES = int(os.environ.get("OCR_IMAGES", "4"))
_FIRST = ("novel-06.jpg", "typewriter-2.png", "leaflet-3.png", "page.png")
"""Turned a little, on its head, of several sizes, a photo."""

Texts = Mapping[tuple[str, str], list[str]]
"""By version of the recognition model and image."""


def images() -> Mapping[str, bytes]:
    found = {path.name: path.read_bytes() for path in sorted((EXAMPLE / "images").iterdir())}
    found.pop("LICENSES.md")
    ordered = [*_FIRST, *(name for name in found if name not in _FIRST)]
    return {name: found[name] for name in ordered[:IMAGES]}


def install(folder: Path) -> Path:
    """The example package as pip installs it. Returns what goes on PYTHONPATH."""
    subprocess.run(
        [
            sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet",
            "--no-deps", "--no-build-isolation", "--no-index", "--target", str(folder),
            str(EXAMPLE),
        ],
        check=True,
    )  # fmt: skip
    return folder


async def read_by_hand(models: Path) -> Texts:
    paths = [str(EXAMPLE / "images" / name) for name in images()]
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "ocr_pipeline.by_hand", str(models), *paths,
        cwd=EXAMPLE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    out, _ = await process.communicate()
    assert process.returncode == 0
    lines = [json.loads(line) for line in out.splitlines() if line.startswith(b"{")]
    return {(line["rec"], line["image"]): line["texts"] for line in lines}


@dataclass
class Readers:
    """Clients that send one image after the other; every answer is held against ``expected``."""

    node: RunningNode
    expected: Texts
    answered: Counter[tuple[str, str]] = field(default_factory=Counter[tuple[str, str]])
    """By version and image."""
    failed: list[str] = field(default_factory=list[str])

    async def send(self, name: str, data: bytes) -> None:
        answer = await self.node.request(
            "POST", "/v1/pipelines/ocr/predict", data, {"Content-Type": "image/png"}
        )
        self.judge(name, answer)

    def judge(self, name: str, answer: Answer) -> None:
        if answer.status != 200:
            self.failed.append(f"{name}: {answer.status} {answer.body[:300]!r}")
            return
        versions = dict(
            pair.split("=") for pair in answer.headers["X-Pipeline-Versions"].split(",")
        )
        texts = answer.json["outputs"]["texts"]
        if texts != self.expected[versions["rec"], name]:
            self.failed.append(f"{name} by {versions}: {texts}")
        self.answered[versions["rec"], name] += 1

    def have_read(self, version: str) -> bool:
        """Whether every image was read by that version, or something failed."""
        return bool(self.failed) or all(self.answered[version, name] for name in images())

    @asynccontextmanager
    async def reading(self, clients: int = 2) -> AsyncIterator[None]:
        async def client(at: int) -> None:
            names = list(images().items())
            while True:
                for name, data in names[at:] + names[:at]:
                    await self.send(name, data)

        tasks = [asyncio.create_task(client(at * IMAGES // clients)) for at in range(clients)]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


@pytest.mark.timeout(300 + 30 * IMAGES)
async def test_ocr_reads_as_by_hand_while_recognition_is_swapped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = install(tmp_path / "site")
    monkeypatch.setenv("PYTHONPATH", str(site))
    monkeypatch.syspath_prepend(str(EXAMPLE))
    from ocr_pipeline import prepare

    versions = prepare.prepare(tmp_path)
    with etcd_cluster() as etcd:
        by_hand = asyncio.create_task(read_by_hand(tmp_path / "models"))
        async with running_node(etcd, tmp_path / "node") as node:
            text = prepare.PIPELINE.read_bytes()
            await put(node.store, "ocr", text)
            for name, folders in versions.items():
                await node.put(name, prepare.document(name, "1", folders))
            await until_status(node.store, "ocr", within_s=120, ready=True)
            expected = await by_hand
            assert sum(len(texts) for texts in expected.values()) > 3 * IMAGES

            readers = Readers(node, expected)
            async with readers.reading():
                await eventually(lambda: readers.have_read("1"), within_s=60 + 20 * IMAGES)
                revision = await node.put(
                    "ocr-rec", prepare.document("ocr-rec", "2", versions["ocr-rec"])
                )
                await node.applied("ocr-rec", revision)
                await eventually(lambda: readers.have_read("2"), within_s=60 + 20 * IMAGES)
            assert not readers.failed, readers.failed[:5]
