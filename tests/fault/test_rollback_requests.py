"""A client's own errors are its own: ten thousand malformed requests of thirty kinds move nothing.

They are sent to a real node from several connections at once while good traffic goes on. Nothing
is counted, no worker is replaced, no route changes, and each is told what was wrong with it.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import struct
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from typing import Any

import numpy as np
import pytest
import pytest_asyncio

from tests.etcd import EtcdCluster, etcd_cluster
from tests.fault.rollback_stage import Fleet, ask, fleet_of, steady
from tests.served import Models

pytestmark = pytest.mark.asyncio(loop_scope="module")

SENT = 10_000
CONNECTIONS = 8
V2 = "/v2/models/mlp/infer"
V1 = "/v1/models/mlp/predict"
SPEC = {"rollback": {"bake_s": 3600, "consecutive": 1}, "limits": {"max_body_mb": 1}}
"""One fault would be enough."""


@pytest.fixture(scope="module")
def cluster() -> Iterator[EtcdCluster]:
    with etcd_cluster() as cluster:
        yield cluster


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models(tmp_path_factory.mktemp("models"), spec=SPEC)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def fleet(
    cluster: EtcdCluster, models: Models, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Fleet]:
    async with fleet_of(cluster, tmp_path_factory.mktemp("nodes"), "n1") as fleet:
        await fleet.serve(models)
        yield fleet


def tensor(**changes: Any) -> bytes:
    """A good request of one row but for ``changes``; ``...`` leaves a field out."""
    good = {"name": "x", "shape": [1, 64], "datatype": "FP32", "data": [0.5] * 64}
    fields = {name: value for name, value in (good | changes).items() if value is not ...}
    return json.dumps({"inputs": [fields]}).encode()


def binary(head: Any, payload: bytes, length: str | None = None) -> tuple[bytes, dict[str, str]]:
    text = head if isinstance(head, bytes) else json.dumps(head).encode()
    shown = {"Inference-Header-Content-Length": length or str(len(text))}
    return text + payload, shown | {"Content-Type": "application/octet-stream"}


def raw(payload: bytes, **changes: Any) -> tuple[bytes, dict[str, str]]:
    good: dict[str, Any] = {
        "name": "x", "shape": [1, 64], "datatype": "FP32",
        "parameters": {"binary_data_size": len(payload)},
    }  # fmt: skip
    return binary({"inputs": [good | changes]}, payload)


ROW = np.full(64, 0.5, np.float32).tobytes()
KINDS: dict[str, tuple[str, bytes | tuple[bytes, dict[str, str]]]] = {
    "no body": (V2, b""),
    "no JSON": (V2, b"\x00\xff\xfe garbage"),
    "half a document": (V2, tensor()[:-20]),
    "a list": (V2, b"[1, 2, 3]"),
    "no inputs": (V2, b'{"inputs": []}'),
    "inputs that are none": (V2, b'{"inputs": 7}'),
    "another name": (V2, tensor(name="y")),
    "no name": (V2, tensor(name=...)),
    "twice": (V2, json.dumps({"inputs": json.loads(tensor())["inputs"] * 2}).encode()),
    "one too many": (
        V2,
        json.dumps(
            {"inputs": [*json.loads(tensor())["inputs"], *json.loads(tensor(name="z"))["inputs"]]}
        ).encode(),
    ),
    "63 features": (V2, tensor(shape=[1, 63], data=[0.5] * 63)),
    "another rank": (V2, tensor(shape=[64])),
    "rank 5": (V2, tensor(shape=[1, 1, 1, 1, 64])),
    "a negative extent": (V2, tensor(shape=[-1, 64])),
    "a huge extent": (V2, tensor(shape=[2**62, 64])),
    "extents that overflow": (V2, tensor(shape=[2**40, 2**40])),
    "an extent of text": (V2, tensor(shape=["1", 64])),
    "no shape": (V2, tensor(shape=...)),
    "data too short": (V2, tensor(data=[0.5] * 63)),
    "data too long": (V2, tensor(data=[0.5] * 65)),
    "data of text": (V2, tensor(data=["a"] * 64)),
    "data of null": (V2, tensor(data=[None] * 64)),
    "no data": (V2, tensor(data=...)),
    "another type": (V2, tensor(datatype="INT64", data=[1] * 64)),
    "a type of nothing": (V2, tensor(datatype="FP33")),
    "bytes for floats": (V2, tensor(datatype="BYTES", data=["a"] * 64)),
    "raw, too short": (V2, raw(ROW[:-1])),
    "raw, of doubles": (V2, raw(ROW * 2, datatype="FP64")),
    "raw, said longer": (V2, raw(ROW, parameters={"binary_data_size": 1 << 40})),
    "raw, said negative": (V2, raw(ROW, parameters={"binary_data_size": -4})),
    "raw, bytes left over": (V2, binary(json.loads(raw(ROW)[0][: -len(ROW)]), ROW + b"more")),
    "a head longer than all": (V2, binary(b"{}", b"", length="999999")),
    "a head of nonsense": (V2, binary(b"{}", struct.pack("<d", 1.0), length="-1")),
    "short form, ragged": (V1, b'{"inputs": {"x": [[1, 2], [3]]}}'),
    "short form, 63 features": (V1, json.dumps({"inputs": {"x": [[0.5] * 63]}}).encode()),
    "short form, text": (V1, b'{"inputs": {"x": "hello"}}'),
    "a version of nothing": ("/v2/models/mlp/versions/9/infer", tensor()),
    "a model of nothing": ("/v2/models/nope/infer", tensor()),
    "a body too large": (V2, b" " * 1_100_000),
}
STATUSES = {
    "a body too large": 413,
    "a version of nothing": 404,
    "a model of nothing": 404,
}


async def send(fleet: Fleet, kinds: Iterator[str], seen: Counter[tuple[str, int]]) -> None:
    """Send what ``kinds`` yields over one connection, which outlives the refusals."""
    host, _, port = fleet["n1"].http.removeprefix("http://").rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    for kind in kinds:
        path, what = KINDS[kind]
        body, headers = what if isinstance(what, tuple) else (what, {})
        headers = {"Host": "n", "Content-Length": str(len(body)), **headers}
        head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        writer.write(f"POST {path} HTTP/1.1\r\n{head}\r\n".encode() + body)
        answer = (await reader.readuntil(b"\r\n\r\n")).lower()
        length = int(answer.partition(b"content-length:")[2].partition(b"\r\n")[0])
        told = json.loads(await reader.readexactly(length))
        status = int(answer.split()[1])
        assert told["error"], kind
        seen[kind, status] += 1
        if b"connection: close" in answer:
            writer.close()
            reader, writer = await asyncio.open_connection(host, int(port))
    writer.close()


async def test_ten_thousand_malformed_requests_move_nothing(fleet: Fleet, models: Models) -> None:
    one = fleet["n1"]
    assert len(KINDS) >= 30
    before = await one.pids(models.name)
    # The large ones are few: what takes long there is to send them.
    cheap = [kind for kind in KINDS if kind != "a body too large"]
    kinds = iter([*["a body too large"] * 20, *itertools.islice(itertools.cycle(cheap), SENT)])
    seen: Counter[tuple[str, int]] = Counter()
    async with steady(one, models, rate_per_s=50):
        await asyncio.gather(*(send(fleet, kinds, seen) for _ in range(CONNECTIONS)))
    assert {kind for kind, _ in seen} == KINDS.keys()
    assert {kind: status for kind, status in seen if status != STATUSES.get(kind, 400)} == {}
    assert sum(seen.values()) == SENT + 20
    assert await one.pids(models.name) == before
    assert not one.events("servable_fault")
    servables = await one.servables(models.name)
    assert [servables[version]["errors"] for version in ("1", "2")] == [{}, {}]
    await fleet.until_serves(models.name, "2", standby="1", within_s=1)
    assert await fleet.quarantine(models.name, "2") is None


async def test_what_paddle_calls_the_clients_error_is_no_fault(
    fleet: Fleet, models: Models
) -> None:
    """Found only inside the predictor: 400, and as little counted."""
    one = fleet["n1"]
    before = await one.pids(models.name)
    await one.drill(models.name, kind="code", code="InvalidArgument", count=200)
    async with steady(one, models, rate_per_s=60, may_fail=True) as traffic:
        await one.until_drilled()
        assert (await ask(one, models)).status == 200
        result = await traffic.stop()
    seen = Counter(sample.status for sample in result)
    assert seen[400] == 200
    assert seen.keys() <= {200, 400}
    assert await one.pids(models.name) == before
    await fleet.until_serves(models.name, "2", standby="1", within_s=1)
