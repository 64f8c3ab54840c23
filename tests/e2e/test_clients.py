"""Clients of others, unmodified, against a real node with a real model: Triton's, KServe's and
TensorFlow Serving's forms, and plain requests."""

from __future__ import annotations

import asyncio
import gzip
import zlib
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import orjson
import pytest
import pytest_asyncio
import tritonclient.http as sync_http
import tritonclient.http.aio as aio_http
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from paddlewheel.models import make_mlp, make_two_output, reference_two_output
from registry.inference import Array
from tests import models
from tests.e2e.running import RunningNode, document, running_node
from tests.e2e.traffic import rows
from tests.etcd import EtcdCluster, etcd_cluster

pytestmark = pytest.mark.asyncio(loop_scope="module")

MODEL = "two"
X = rows(4, 32, seed=3)
IDS = np.random.default_rng(4).integers(0, 50, (4, 6))
NAMES = ("fetch_name_0", "fetch_name_1", "fetch_name_2")

Client: TypeAlias = Any
"""`tritonclient.http.InferenceServerClient`, which has no types."""


@pytest.fixture(scope="module")
def etcd() -> Iterator[EtcdCluster]:
    with etcd_cluster() as cluster:
        yield cluster


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """Two good versions of two inputs and three outputs, and one whose params are cut."""
    root = tmp_path_factory.mktemp("models")
    good = {v: make_two_output(root / v, seed=int(v), tag=int(v)) for v in ("1", "2")}
    return good | {"3": models.cut_last_tensor(good["1"], root / "3")}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def node(
    etcd: EtcdCluster, folders: Mapping[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[RunningNode]:
    """Version 2 is live, 1 its standby; 3 was asked for and could not be made ready.

    The model ``one`` is an MLP with one input and one output; ``empty`` never had a good version.
    """
    root = tmp_path_factory.mktemp("node")
    async with running_node(etcd, root) as node:
        for live in ("1", "2"):
            await node.apply(MODEL, document(MODEL, live, folders, limits={"max_body_mb": 1}))
        await node.apply("one", document("one", "1", {"1": make_mlp(root / "one", tag=1)}))
        text = document(MODEL, "3", folders, limits={"max_body_mb": 1})
        await node.failed(MODEL, await node.put(MODEL, text), "3")
        broken = document("empty", "1", {"1": folders["3"]})
        await node.failed("empty", await node.put("empty", broken), "1")
        yield node


@pytest.fixture(scope="module")
def client(node: RunningNode) -> Iterator[Client]:
    client = sync_http.InferenceServerClient(node.host_port, concurrency=2)
    yield client
    client.close()


def tensor(name: str, array: Array, *, binary: bool = True, module: Any = sync_http) -> Any:
    given = module.InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype))
    given.set_data_from_numpy(array, binary_data=binary)
    return given


def inputs(*, binary: bool = True, module: Any = sync_http) -> list[Any]:
    return [
        tensor("x", X, binary=binary, module=module),
        tensor("ids", IDS, binary=binary, module=module),
    ]


def check(result: Any, folder: Path) -> None:
    """The answer of exactly these weights, all three outputs."""
    for name, wanted in zip(NAMES, reference_two_output(folder, X, IDS), strict=True):
        got = result.as_numpy(name)
        assert got is not None, name
        assert got.shape == wanted.shape
        assert got.dtype == wanted.dtype
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5)


# --- Triton's client -----------------------------------------------------------------------------


async def test_metadata_health_and_index(client: Client) -> None:
    assert client.is_server_live()
    server = client.get_server_metadata()
    assert server["name"] == "paddlewheel"
    assert {"binary_tensor_data", "model_repository"} <= set(server["extensions"])
    assert client.is_model_ready(MODEL)
    assert client.is_model_ready(MODEL, "1")
    assert not client.is_model_ready(MODEL, "3")
    assert not client.is_model_ready(MODEL, "9")
    assert not client.is_model_ready("empty")
    assert not client.is_model_ready("nobody")
    shown = client.get_model_metadata(MODEL)
    assert sorted(shown.pop("versions")) == ["1", "2"]
    assert shown == {
        "name": MODEL,
        "platform": "paddle_inference",
        "inputs": [
            {"name": "x", "datatype": "FP32", "shape": [-1, 32]},
            {"name": "ids", "datatype": "INT64", "shape": [-1, 6]},
        ],
        "outputs": [
            {"name": NAMES[0], "datatype": "FP32", "shape": [-1, 8]},
            {"name": NAMES[1], "datatype": "FP32", "shape": [-1, 24]},
            {"name": NAMES[2], "datatype": "INT64", "shape": [-1]},
        ],
    }
    assert client.get_model_metadata(MODEL, "1")["versions"] == ["1"]
    index = {(e["name"], e["version"]): e for e in client.get_model_repository_index()}
    assert {key: entry["state"] for key, entry in index.items()} == {
        (MODEL, "1"): "READY", (MODEL, "2"): "READY", (MODEL, "3"): "UNAVAILABLE",
        ("one", "1"): "READY", ("empty", "1"): "UNAVAILABLE",
    }  # fmt: skip
    assert "cut short" in index[MODEL, "3"]["reason"]
    for call in (client.load_model, client.unload_model):
        with pytest.raises(InferenceServerException, match="managed by config") as caught:
            call(MODEL)
        assert caught.value.status() == "400"


async def test_not_ready_with_a_model_that_never_was(client: Client, node: RunningNode) -> None:
    assert not client.is_server_ready()
    verbose = (await node.get("/readyz?verbose")).json
    failing = [check for check in verbose["checks"] if not check["ok"]]
    assert [check["name"] for check in failing] == ["model:empty"]
    assert "cut short" in failing[0]["detail"]


@pytest.mark.parametrize("binary_in", [True, False])
@pytest.mark.parametrize("binary_out", [True, False, None])
async def test_inference(
    client: Client, folders: Mapping[str, Path], binary_in: bool, binary_out: bool | None
) -> None:
    asked = None
    if binary_out is not None:
        asked = [sync_http.InferRequestedOutput(n, binary_data=binary_out) for n in NAMES[::-1]]
    result = client.infer(MODEL, inputs(binary=binary_in), outputs=asked, request_id="r-1")
    check(result, folders["2"])
    shown = result.get_response()
    assert (shown["id"], shown["model_name"], shown["model_version"]) == ("r-1", MODEL, "2")
    names = [output["name"] for output in shown["outputs"]]
    assert names == list(NAMES if asked is None else NAMES[::-1])


async def test_only_one_output(client: Client) -> None:
    asked = [sync_http.InferRequestedOutput(NAMES[2])]
    result = client.infer(MODEL, inputs(), outputs=asked)
    assert result.as_numpy(NAMES[2]).dtype == np.int64
    assert result.as_numpy(NAMES[0]) is None


async def test_a_pinned_version(client: Client, folders: Mapping[str, Path]) -> None:
    for version in ("1", "2"):
        result = client.infer(MODEL, inputs(), model_version=version)
        assert result.get_response()["model_version"] == version
        check(result, folders[version])
        check(client.infer(MODEL, inputs(), headers={"X-Model-Version": version}), folders[version])


@pytest.mark.parametrize("packing", ["gzip", "deflate"])
@pytest.mark.parametrize("binary", [True, False])
async def test_packed_both_ways(
    client: Client, folders: Mapping[str, Path], packing: str, binary: bool
) -> None:
    result = client.infer(
        MODEL,
        inputs(binary=binary),
        request_compression_algorithm=packing,
        response_compression_algorithm=packing,
    )
    check(result, folders["2"])


async def test_calls_in_the_background(client: Client, folders: Mapping[str, Path]) -> None:
    for request in [client.async_infer(MODEL, inputs()) for _ in range(10)]:
        check(request.get_result(), folders["2"])


async def test_the_asyncio_client(node: RunningNode, folders: Mapping[str, Path]) -> None:
    async with aio_http.InferenceServerClient(node.host_port) as client:
        assert await client.is_server_live()
        assert (await client.get_model_metadata(MODEL))["name"] == MODEL
        assert len(await client.get_model_repository_index()) == 5
        given = [
            inputs(binary=binary, module=aio_http) for binary in (True, False) for _ in range(8)
        ]
        for result in await asyncio.gather(*(client.infer(MODEL, each) for each in given)):
            check(result, folders["2"])
        for packing in ("gzip", "deflate"):
            result = await client.infer(
                MODEL, given[0], model_version="1",
                request_compression_algorithm=packing, response_compression_algorithm=packing,
            )  # fmt: skip
            check(result, folders["1"])
        with pytest.raises(InferenceServerException, match="unknown model") as caught:
            await client.infer("nobody", given[0])
        assert caught.value.status() == "404"


ERRORS: Mapping[str, tuple[Callable[[Client], Any], str, str]] = {
    "an unknown model": (lambda c: c.infer("nobody", inputs()), "404", "unknown model"),
    "an unknown version": (
        lambda c: c.infer(MODEL, inputs(), model_version="9"), "404", "loaded versions: "),
    "a version that failed": (
        lambda c: c.infer(MODEL, inputs(), model_version="3"), "404",
        "FAILED: params: .*cut short"),
    "a model that never had a good version": (
        lambda c: c.infer("empty", inputs()), "503", "cut short"),
    "a missing input": (lambda c: c.infer(MODEL, inputs()[:1]), "400", "missing 'ids'"),
    "an unknown input": (
        lambda c: c.infer(MODEL, [*inputs(), tensor("z", X)]), "400", "unknown input"),
    "another datatype": (
        lambda c: c.infer(MODEL, [tensor("x", X.astype("f8")), inputs()[1]]), "400",
        "want datatype FP32, got FP64"),
    "another rank": (
        lambda c: c.infer(MODEL, [tensor("x", X.reshape(-1)), inputs()[1]]), "400", "want shape"),
    "another width": (
        lambda c: c.infer(MODEL, [tensor("x", rows(4, 33)), inputs()[1]]), "400", "want shape"),
    "an unknown output": (
        lambda c: c.infer(MODEL, inputs(), outputs=[sync_http.InferRequestedOutput("q")]), "400",
        "unknown output"),
    "metadata of an unknown model": (lambda c: c.get_model_metadata("nobody"), "404", "unknown"),
}  # fmt: skip


@pytest.mark.parametrize("case", ERRORS)
async def test_errors(client: Client, folders: Mapping[str, Path], case: str) -> None:
    call, status, text = ERRORS[case]
    with pytest.raises(InferenceServerException, match=text) as caught:
        call(client)
    assert caught.value.status() == status
    check(client.infer(MODEL, inputs()), folders["2"])


async def test_inputs_that_paddle_itself_refuses(
    node: RunningNode, client: Client, folders: Mapping[str, Path]
) -> None:
    """Of the right shape, and wrong all the same: the client's fault, and the worker lives on."""
    before = node.worker_pids()
    for ids, x in ((IDS + 1000, X), (IDS - 60, X), (IDS, X[:3])):
        with pytest.raises(InferenceServerException) as caught:
            client.infer(MODEL, [tensor("x", x), tensor("ids", ids)])
        assert caught.value.status() == "400", caught.value
    check(client.infer(MODEL, inputs()), folders["2"])
    assert node.worker_pids() == before
    (live,) = [s for s in (await node.status(MODEL))["servables"] if s["state"] == "LIVE"]
    assert live["errors"] == {}


# --- plain requests ------------------------------------------------------------------------------

COLUMNS = {"x": X.tolist(), "ids": IDS.tolist()}


def same(got: Any, wanted: Array) -> None:
    np.testing.assert_allclose(np.asarray(got), wanted, rtol=1e-4, atol=1e-5)


async def test_the_short_form(node: RunningNode, folders: Mapping[str, Path]) -> None:
    answer = await node.post(f"/v1/models/{MODEL}/predict", {"inputs": COLUMNS})
    shown = answer.json
    assert (answer.status, shown["model"], shown["version"]) == (200, MODEL, "2")
    for name, wanted in zip(NAMES, reference_two_output(folders["2"], X, IDS), strict=True):
        same(shown["outputs"][name], wanted)
    bare = await node.post("/v1/models/one/predict", rows(2).tolist())
    assert np.asarray(bare.json["outputs"]["fetch_name_0"])[:, -1].tolist() == [1, 1]
    pinned = await node.post(f"/v1/models/{MODEL}/versions/1/predict", {"inputs": COLUMNS})
    assert pinned.json["version"] == "1"


async def test_tensorflow_serving(node: RunningNode, folders: Mapping[str, Path]) -> None:
    wanted = reference_two_output(folders["2"], X, IDS)
    columns = await node.post(f"/v1/models/{MODEL}:predict", {"inputs": COLUMNS})
    for name, each in zip(NAMES, wanted, strict=True):
        same(columns.json["outputs"][name], each)
    instances = [{"x": x, "ids": ids} for x, ids in zip(X.tolist(), IDS.tolist(), strict=True)]
    given = {"signature_name": "serving_default", "instances": instances}
    by_row = await node.post(f"/v1/models/{MODEL}:predict", given)
    assert len(by_row.json["predictions"]) == 4
    for name, each in zip(NAMES, wanted, strict=True):
        same([row[name] for row in by_row.json["predictions"]], each)
    # One output loses its name.
    one = await node.post("/v1/models/one:predict", {"instances": rows(3).tolist()})
    assert np.asarray(one.json["predictions"]).shape == (3, 10)
    for path, version in (("versions/1", "1"), ("versions/2", "2"), ("labels/stable", "2")):
        answer = await node.post(f"/v1/models/{MODEL}/{path}:predict", {"inputs": COLUMNS})
        assert (answer.status, answer.version) == (200, version)
    assert (await node.post(f"/v1/models/{MODEL}/labels/canary:predict", given)).status == 404
    assert (
        await node.post(f"/v1/models/{MODEL}:predict", {"inputs": 1, "instances": 2})
    ).status == 400


async def test_status_as_tensorflow_serving_and_kserve_show_it(node: RunningNode) -> None:
    shown = (await node.get(f"/v1/models/{MODEL}")).json
    assert (shown["name"], shown["ready"]) == (MODEL, True)
    states = {each["version"]: each["state"] for each in shown["model_version_status"]}
    assert states == {"1": "AVAILABLE", "2": "AVAILABLE", "3": "END"}
    (failed,) = [e for e in shown["model_version_status"] if e["version"] == "3"]
    assert failed["status"]["error_code"] == "ABORTED"
    assert "cut short" in failed["status"]["error_message"]
    assert (await node.get("/v1/models/empty")).json["ready"] is False
    assert sorted((await node.get("/v1/models")).json["models"]) == ["empty", "one", MODEL]
    described = (await node.get(f"/v1/models/{MODEL}/metadata")).json
    assert described["model_spec"] == {"name": MODEL, "signature_name": "", "version": "2"}
    assert (await node.get("/v1/models/nobody")).status == 404


async def test_kserve_v2_over_plain_json(node: RunningNode, folders: Mapping[str, Path]) -> None:
    """Data flat and nested, in one request."""
    given = {
        "id": "k",
        "inputs": [
            {"name": "x", "shape": [4, 32], "datatype": "FP32", "data": X.ravel().tolist()},
            {"name": "ids", "shape": [4, 6], "datatype": "INT64", "data": IDS.tolist()},
        ],
    }
    answer = await node.post(f"/v2/models/{MODEL}/infer", given, X_Request_Id="mine")
    assert answer.json["id"] == "k"
    assert answer.headers["X-Request-Id"] == "mine"
    outputs = answer.outputs()
    for name, wanted in zip(NAMES, reference_two_output(folders["2"], X, IDS), strict=True):
        same(outputs[name], wanted)
    assert (await node.get("/v2/health/live")).json["live"] is True


async def test_packed_by_hand(node: RunningNode) -> None:
    body = orjson.dumps({"inputs": COLUMNS})
    path = f"/v1/models/{MODEL}/predict"
    for coding, packed in (("gzip", gzip.compress(body)), ("deflate", zlib.compress(body))):
        headers = {"Content-Type": "application/json", "Content-Encoding": coding}
        assert (await node.request("POST", path, packed, headers)).status == 200
    brotli = await node.request("POST", path, body, {"Content-Encoding": "br"})
    assert brotli.status == 415
    cut = await node.request("POST", path, gzip.compress(body)[:-9], {"Content-Encoding": "gzip"})
    assert cut.status == 400


BAD_REQUESTS: Mapping[str, tuple[str, bytes, int]] = {
    "no JSON": (f"/v2/models/{MODEL}/infer", b"{", 400),
    "a list": (f"/v2/models/{MODEL}/infer", b"[]", 400),
    "nothing": (f"/v2/models/{MODEL}/infer", b"", 400),
    "a float for an integer": (
        "/v1/models/two/predict",
        orjson.dumps({"inputs": {"x": X.tolist(), "ids": (IDS + 0.5).tolist()}}), 400),
    "text for a number": (
        "/v1/models/one/predict", orjson.dumps({"inputs": {"x": [["a"] * 64]}}), 400),
    "rows of unequal length": (
        "/v1/models/one/predict", orjson.dumps({"inputs": {"x": [[0.0] * 64, [0.0] * 63]}}), 400),
    "an unknown signature": (
        "/v1/models/one:predict", b'{"signature_name": "other", "inputs": []}', 400),
    "more than a megabyte": (f"/v2/models/{MODEL}/infer", b" " * 1_000_001, 413),
    "more than a megabyte of JSON": (f"/v1/models/{MODEL}/predict", b"[" + b"1," * 600_000, 413),
    "an unknown model": ("/v1/models/nobody/predict", b"{}", 404),
    "an unknown endpoint": ("/v2/models/two/explode", b"{}", 404),
    "an unknown label": ("/v1/models/two/labels/blue:predict", b'{"inputs": {}}', 404),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_REQUESTS)
async def test_bad_requests(node: RunningNode, case: str) -> None:
    """Answered with a status and a reason; the model is not disturbed, and not blamed."""
    path, body, status = BAD_REQUESTS[case]
    answer = await node.request("POST", path, body, {"Content-Type": "application/json"})
    assert answer.status == status, answer.body
    assert answer.error
    assert (await node.infer(MODEL, {"x": X, "ids": IDS})).version == "2"
    for servable in (await node.status(MODEL))["servables"]:
        assert servable["errors"] == {}


async def test_a_packed_bomb_is_too_large(node: RunningNode) -> None:
    """Judged by what it unpacks to, before it has."""
    for packed, coding in (
        (gzip.compress(b" " * 50_000_000), "gzip"),
        (zlib.compress(b" " * 50_000_000), "deflate"),
    ):
        headers = {"Content-Encoding": coding, "Content-Type": "application/json"}
        answer = await node.request("POST", f"/v2/models/{MODEL}/infer", packed, headers)
        assert answer.status == 413
