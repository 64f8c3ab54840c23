"""Bad documents put into etcd while requests are answered: none is applied, all are explained."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Iterator, Mapping
from pathlib import Path

import pytest
import pytest_asyncio

from paddlewheel.models import make_mlp
from registry.names import ModelName, Revision
from registry.records import HistoryEntry
from registry.spec import ConfigError, parse_model
from tests.bad_documents import CASES, BadDocument
from tests.e2e.running import RunningNode, Status, document, running_node
from tests.e2e.traffic import Traffic, mlp_requests, traffic_to
from tests.etcd import EtcdCluster, etcd_cluster

pytestmark = pytest.mark.asyncio(loop_scope="module")

MODEL = "m"
"""The name that the bad documents have."""


@pytest.fixture(scope="module")
def etcd() -> Iterator[EtcdCluster]:
    with etcd_cluster() as cluster:
        yield cluster


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    root = tmp_path_factory.mktemp("good")
    return {v: make_mlp(root / v, seed=int(v), tag=int(v)) for v in ("1", "2")}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def node(
    etcd: EtcdCluster, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[RunningNode]:
    async with running_node(etcd, tmp_path_factory.mktemp("node")) as node:
        yield node


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def traffic(node: RunningNode, folders: Mapping[str, Path]) -> AsyncIterator[Traffic]:
    """Judged requests through all the tests of this module: not one may fail."""
    await node.apply(MODEL, good_document("1", folders))
    async with traffic_to(node, mlp_requests(MODEL, folders), rate_per_s=60) as traffic:
        yield traffic


def good_document(live: str, folders: Mapping[str, Path]) -> bytes:
    return document(MODEL, live, folders)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
async def test_a_bad_document_is_refused_with_path_and_line(
    node: RunningNode, traffic: Traffic, case: BadDocument
) -> None:
    before = await node.status(MODEL)
    status = await node.refused(MODEL, await node.put(MODEL, case.raw))
    _still_in_force(before, status)
    where = [(error["path"], error["line"]) for error in status["errors"]]
    assert (case.path, case.line) in where
    error = status["errors"][where.index((case.path, case.line))]
    assert case.message in error["message"]
    assert len(where) == case.errors
    # The first of them, on one line for people.
    first = status["errors"][0]
    assert "\n" not in status["error"]
    assert (f"line {first['line']}: " in status["error"]) is (first["line"] is not None)
    assert first["path"] in status["error"]
    assert not traffic.failures, traffic.failures


async def test_a_good_document_after_all_of_them_is_applied(
    node: RunningNode, traffic: Traffic, folders: Mapping[str, Path]
) -> None:
    await traffic.goes_on()
    for live in ("2", "1"):
        status = await node.apply(MODEL, good_document(live, folders))
        assert status["accepted"] is True
        assert status["live"] == live
        assert (status["error"], status["errors"]) == (None, [])
        await traffic.goes_on()


async def test_good_and_bad_in_turns(
    node: RunningNode, traffic: Traffic, folders: Mapping[str, Path]
) -> None:
    """In one go, without waiting: the last good one is in force, whatever came between."""
    some = CASES[:: len(CASES) // 12]
    good = Revision(0)
    for number, case in enumerate(some):
        good = await node.put(MODEL, good_document(str(number % 2 + 1), folders))
        last = await node.put(MODEL, case.raw)
    status = await node.until(
        MODEL,
        lambda s: s["revision"] == last and s["applied_revision"] == good,
        what=f"{good} in force, {last} refused",
    )
    assert status["accepted"] is False
    assert status["live"] == str((len(some) - 1) % 2 + 1)
    await traffic.goes_on()


async def test_every_document_is_in_history_as_it_was(
    node: RunningNode, traffic: Traffic, folders: Mapping[str, Path]
) -> None:
    """Bad ones too: what was put, byte for byte where it is text."""
    bad = '# 字 and no document: \\ " \t\n'.encode()
    revision = await node.put(MODEL, bad)
    await node.refused(MODEL, revision)
    await node.apply(MODEL, good_document("1", folders))
    key = node.keys.history(ModelName(MODEL), revision)
    kv = await node.store.get(key)
    assert kv is not None
    entry = HistoryEntry.from_json(kv.value)
    assert entry.revision == revision
    assert entry.document == bad.decode()
    await traffic.goes_on()


def _still_in_force(before: Status, status: Status) -> None:
    for name in ("applied_revision", "live", "canary", "standby", "reason"):
        assert status[name] == before[name], name
    assert [(s["version"], s["state"]) for s in status["servables"]] == [
        (s["version"], s["state"]) for s in before["servables"]
    ]


# --- fuzz ----------------------------------------------------------------------------------------


MARKS = (b"{", b"}", b"[", b'"', b":", b"\n  - ", b"&a ", b"*a", b"\t", b"\0", b"!!int ")


def damaged(text: bytes, dice: random.Random) -> bytes:
    """A document with one to four accidents."""
    data = bytearray(text)
    for _ in range(dice.randint(1, 4)):
        at, length = dice.randrange(len(data) + 1), dice.randint(1, 30)
        match dice.randrange(6):
            case 0:
                del data[at : at + length]
            case 1:
                data[at:at] = dice.randbytes(length)
            case 2:
                data[at : at + 1] = bytes([dice.randrange(256)])
            case 3:
                data[at:at] = data[dice.randrange(len(data) + 1) :][:length]
            case 4:
                data[at:at] = dice.choice(
                    [
                        b"{",
                        b"}",
                        b"[",
                        b'"',
                        b":",
                        b"\n  - ",
                        b"&a ",
                        b"*a",
                        b"\t",
                        b"\0",
                        b"!!int ",
                    ]
                )
            case _:
                del data[at:]
        if not data:
            break
    return bytes(data)


def is_good(text: bytes) -> bool:
    try:
        parse_model(text, name=ModelName(MODEL))
    except ConfigError:
        return False
    return True


@pytest.mark.parametrize("seed", range(3))
async def test_damaged_documents(
    node: RunningNode, traffic: Traffic, folders: Mapping[str, Path], seed: int
) -> None:
    """Forty at a time: those that no longer hold are refused, and the node lives on."""
    dice = random.Random(seed)
    sound = good_document("1", folders)
    texts = [sound, _yaml_of(folders)]
    before = await node.apply(MODEL, sound)
    bad = [t for t in (damaged(dice.choice(texts), dice) for _ in range(80)) if not is_good(t)][:40]
    assert len(bad) == 40
    for number, text in enumerate(bad):
        revision = await node.put(MODEL, text)
        if number % 10 == 9:  # the others may be taken over by the next
            status = await node.refused(MODEL, revision)
            _still_in_force(before, status)
            assert status["errors"]
            assert all(error["message"] for error in status["errors"])
    await traffic.goes_on()
    assert (await node.apply(MODEL, sound))["accepted"] is True


def _yaml_of(folders: Mapping[str, Path]) -> bytes:
    versions = "".join(
        f'    - version: "{version}"\n      source: {folder}\n'
        for version, folder in folders.items()
    )
    return (
        f"apiVersion: paddlewheel/v1\nkind: Model\nmetadata: {{name: {MODEL}}}\n"
        f'spec:\n  live: "1"\n  versions:\n{versions}'
        f'  canary:\n    version: "2"\n    rules: [{{percent: 1}}]\n'
    ).encode()


async def test_the_yaml_that_is_damaged_is_sound(
    node: RunningNode, traffic: Traffic, folders: Mapping[str, Path]
) -> None:
    status = await node.apply(MODEL, _yaml_of(folders))
    assert (status["live"], status["canary"]) == ("1", "2")
    await traffic.goes_on()
    await node.apply(MODEL, good_document("1", folders))


# --- keys that are no model documents ------------------------------------------------------------


async def test_keys_that_name_no_model(
    node: RunningNode, traffic: Traffic, folders: Mapping[str, Path]
) -> None:
    """Whatever stands under the prefix, the node neither serves it nor minds."""
    text = good_document("1", folders)
    for key in ("", "a/b", "-", "no spaces", "\u5b57", "x" * 300, "..", "m/", "UPPER?"):
        await node.store.put(f"/paddlewheel/configs/models/{key}", text)
    await node.store.put("/paddlewheel/quarantine/m", b"\xff")
    await node.store.put("/paddlewheel/quarantine/another/1", b"not JSON")
    await node.store.put("/paddlewheel/lastgood/m", b"[]")
    status = await node.apply(MODEL, good_document("2", folders))
    assert status["live"] == "2"
    await traffic.goes_on()
    routes = (await node.get("/admin/routes")).json["models"]
    assert list(routes) == [MODEL]


async def test_a_document_of_1_mib_and_one_byte_more(
    node: RunningNode, traffic: Traffic, folders: Mapping[str, Path]
) -> None:
    padded = good_document("1", folders).ljust(1 << 20, b"\n")
    assert (await node.apply(MODEL, padded))["accepted"] is True
    revision = await node.put(MODEL, padded + b"\n")
    assert "1048576 bytes" in (await node.refused(MODEL, revision))["error"]
    await node.apply(MODEL, good_document("1", folders))
    await traffic.goes_on()
