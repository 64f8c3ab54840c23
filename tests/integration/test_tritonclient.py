"""Triton's own Python clients, unmodified, against the real HTTP side."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import aiohttp
import ml_dtypes
import numpy as np
import pytest
import tritonclient.http as sync_http
import tritonclient.http.aio as aio_http
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from registry.names import ModelName, Revision
from router.serving import Serving
from router.table import Route
from tests.integration.test_http_support import (
    ONE,
    SIMPLE,
    TYPES,
    Node,
    NumpyPredictor,
    echo_signature,
    one_model,
    running,
    servable,
    serving,
)

X = np.array([[1, 2, 3, 4], [5, 6, 7, 8]], np.float32)
N = np.array([10, 20], np.int64)


def world() -> Serving:
    old, new = (
        NumpyPredictor(servable("simple", version), SIMPLE, factor)
        for version, factor in (("1", 1.0), ("2", 2.0))
    )
    simple = Route(
        ModelName("simple"),
        live=new.id,
        standby=old.id,
        revision=Revision(12),
        pinned={old.id.version: old.id, new.id.version: new.id},
    )
    echoes = [one_model(f"echo_{dtype}", "1", echo_signature(dtype)) for dtype in TYPES]
    empty = Route(ModelName("empty"), live=None)
    return serving((simple, [old, new]), one_model("one", "1", ONE, 3.0), (empty, []), *echoes)


NODE = Node(
    listed=[
        {"model": "simple", "version": "2", "state": "LIVE", "reason": None},
        {"model": "simple", "version": "1", "state": "STANDBY", "reason": None},
        {"model": "empty", "version": "1", "state": "FAILED", "reason": "digest: differs"},
    ]
)


@pytest.fixture
async def url() -> AsyncIterator[str]:
    async with running(world(), NODE) as (_, address):
        yield address.removeprefix("http://")


Client = sync_http.InferenceServerClient


async def using(url: str, body: Callable[[Client], Any]) -> Any:
    """Run ``body`` with the blocking client on a thread: the server lives on this loop."""

    def run() -> Any:
        client = Client(url, concurrency=2)
        try:
            return body(client)
        finally:
            client.close()

    return await asyncio.to_thread(run)


def tensor(name: str, array: Any, *, binary: bool, module: Any = sync_http) -> Any:
    given = module.InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype))
    given.set_data_from_numpy(array, binary_data=binary)
    return given


def simple_inputs(*, binary: bool = True) -> list[Any]:
    return [tensor("x", X, binary=binary), tensor("n", N, binary=binary)]


async def test_health_metadata_and_index(url: str) -> None:
    def ask(client: Client) -> None:
        assert client.is_server_live()
        assert client.is_server_ready()
        assert client.is_model_ready("simple")
        assert client.is_model_ready("simple", "1")
        assert not client.is_model_ready("simple", "9")
        assert not client.is_model_ready("empty")
        assert not client.is_model_ready("nope")
        server = client.get_server_metadata()
        assert (server["name"], server["version"]) == ("paddlewheel", "1.2.3")
        assert "binary_tensor_data" in server["extensions"]
        assert client.get_model_metadata("simple") == {
            "name": "simple",
            "versions": ["1", "2"],
            "platform": "paddle_inference",
            "inputs": [
                {"name": "x", "datatype": "FP32", "shape": [-1, 4]},
                {"name": "n", "datatype": "INT64", "shape": [-1]},
            ],
            "outputs": [
                {"name": "sum", "datatype": "FP32", "shape": [-1]},
                {"name": "scaled", "datatype": "FP32", "shape": [-1, 4]},
            ],
        }
        assert client.get_model_metadata("simple", "1")["versions"] == ["1"]
        index = client.get_model_repository_index()
        assert [(entry["name"], entry["version"], entry["state"]) for entry in index] == [
            ("simple", "2", "READY"), ("simple", "1", "READY"), ("empty", "1", "UNAVAILABLE"),
        ]  # fmt: skip
        for call in (client.load_model, client.unload_model):
            with pytest.raises(InferenceServerException, match="managed by config") as caught:
                call("simple")
            assert caught.value.status() == "400"

    await using(url, ask)


@pytest.mark.parametrize("binary_in", [True, False])
@pytest.mark.parametrize("binary_out", [True, False, None])
async def test_several_outputs(url: str, binary_in: bool, binary_out: bool | None) -> None:
    outputs = None
    if binary_out is not None:
        outputs = [
            sync_http.InferRequestedOutput(name, binary_data=binary_out)
            for name in ("scaled", "sum")
        ]
    result = await using(
        url,
        lambda client: client.infer(
            "simple", simple_inputs(binary=binary_in), outputs=outputs, request_id="r1"
        ),
    )
    assert result.as_numpy("sum").tolist() == [20, 46]
    assert result.as_numpy("scaled").tolist() == (X * 2).tolist()
    shown = result.get_response()
    assert (shown["id"], shown["model_name"], shown["model_version"]) == ("r1", "simple", "2")
    names = [output["name"] for output in shown["outputs"]]
    assert names == (["sum", "scaled"] if outputs is None else ["scaled", "sum"])


async def test_one_output_of_two(url: str) -> None:
    asked = [sync_http.InferRequestedOutput("sum")]
    result = await using(url, lambda client: client.infer("simple", simple_inputs(), outputs=asked))
    assert result.as_numpy("scaled") is None
    assert result.as_numpy("sum").dtype == np.float32


async def test_a_pinned_version(url: str) -> None:
    result = await using(
        url, lambda client: client.infer("simple", simple_inputs(), model_version="1")
    )
    assert result.get_response()["model_version"] == "1"
    assert result.as_numpy("scaled").tolist() == X.tolist()


@pytest.mark.parametrize("packing", ["gzip", "deflate"])
@pytest.mark.parametrize("rows", [1, 100, 40_000])
async def test_packed_both_ways(url: str, packing: str, rows: int) -> None:
    array = np.arange(rows * 3, dtype=np.float32).reshape(rows, 3)

    def ask(client: Client) -> Any:
        return client.infer(
            "one",
            [tensor("x", array, binary=True)],
            request_compression_algorithm=packing,
            response_compression_algorithm=packing,
        )

    assert np.array_equal((await using(url, ask)).as_numpy("y"), array * 3)


ARRAYS: dict[str, Any] = {
    "bool": np.array([[True, False]]),
    "bfloat16": np.array([[1.5, -2.0]], ml_dtypes.bfloat16),
    "bytes": np.array([["text", "字"]], np.object_),
    **{
        dtype: np.array([[1, 2], [3, 4]], dtype)
        for dtype in TYPES
        if dtype not in ("bool", "bfloat16", "bytes")
    },
}


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("binary", [True, False])
async def test_every_datatype(url: str, dtype: str, binary: bool) -> None:
    array = ARRAYS[dtype]
    if not binary and dtype in ("float16", "bfloat16"):
        array = array.astype(np.float32)

    def ask(client: Client) -> Any:
        asked = [sync_http.InferRequestedOutput("y", binary_data=binary)]
        return client.infer(f"echo_{dtype}", [tensor("x", array, binary=binary)], outputs=asked)

    if not binary and dtype in ("float16", "bfloat16"):
        with pytest.raises(InferenceServerException, match="want datatype"):
            await using(url, ask)
        return
    got = (await using(url, ask)).as_numpy("y")
    if dtype == "bytes":
        texts = [item.decode() if isinstance(item, bytes) else item for item in got.ravel()]
        assert texts == array.ravel().tolist()
    else:
        assert got.dtype == array.dtype
        assert np.array_equal(got, array)


ERRORS: dict[str, tuple[Callable[[Client], Any], str, str]] = {
    "an unknown model": (lambda c: c.infer("nope", simple_inputs()), "404", "unknown model"),
    "an unknown version": (
        lambda c: c.infer("simple", simple_inputs(), model_version="9"), "404",
        "loaded versions: 1, 2"),
    "a model with nothing loaded": (
        lambda c: c.infer("empty", simple_inputs()), "503", "can serve"),
    "a missing input": (
        lambda c: c.infer("simple", simple_inputs()[:1]), "400", "missing 'n'"),
    "an unknown input": (
        lambda c: c.infer("one", [tensor("q", X, binary=True)]), "400", "unknown input"),
    "another datatype": (
        lambda c: c.infer("one", [tensor("x", X[:, :3].astype("f8"), binary=True)]), "400",
        "want datatype FP32, got FP64"),
    "another shape": (
        lambda c: c.infer("one", [tensor("x", X, binary=True)]), "400", "want shape"),
    "an unknown output": (
        lambda c: c.infer(
            "simple", simple_inputs(), outputs=[sync_http.InferRequestedOutput("q")]),
        "400", "unknown output"),
    "classification": (
        lambda c: c.infer(
            "simple", simple_inputs(),
            outputs=[sync_http.InferRequestedOutput("sum", class_count=1)]),
        "400", "classification"),
    "metadata of an unknown model": (lambda c: c.get_model_metadata("nope"), "404", "unknown"),
}  # fmt: skip


@pytest.mark.parametrize("case", ERRORS)
async def test_errors(url: str, case: str) -> None:
    call, status, text = ERRORS[case]
    with pytest.raises(InferenceServerException, match=text) as caught:
        await using(url, call)
    assert caught.value.status() == status


async def test_the_async_call_of_the_blocking_client(url: str) -> None:
    def ask(client: Client) -> list[Any]:
        pending = [client.async_infer("simple", simple_inputs()) for _ in range(8)]
        return [request.get_result().as_numpy("sum").tolist() for request in pending]

    assert await using(url, ask) == [[20, 46]] * 8


async def test_the_asyncio_client(url: str) -> None:
    async with aio_http.InferenceServerClient(url) as client:
        assert await client.is_server_ready()
        assert (await client.get_model_metadata("simple"))["name"] == "simple"
        given = [
            tensor("x", X, binary=True, module=aio_http),
            tensor("n", N, binary=False, module=aio_http),
        ]
        results = await asyncio.gather(*(client.infer("simple", given) for _ in range(20)))
        assert all(result.as_numpy("sum").tolist() == [20, 46] for result in results)
        for packing in ("gzip", "deflate"):
            result = await client.infer(
                "simple",
                given,
                request_compression_algorithm=packing,
                response_compression_algorithm=packing,
            )
            assert result.as_numpy("sum").tolist() == [20, 46]
        with pytest.raises(InferenceServerException, match="unknown model"):
            await client.infer("nope", given)


async def test_body_helpers_of_the_client_agree(url: str) -> None:
    """The static request builder is what load generators use."""
    body, length = sync_http.InferenceServerClient.generate_request_body(simple_inputs())
    headers = {} if length is None else {"Inference-Header-Content-Length": str(length)}
    async with (
        aiohttp.ClientSession() as session,
        session.post(f"http://{url}/v2/models/simple/infer", data=body, headers=headers) as answer,
    ):
        raw = await answer.read()
        shown = sync_http.InferenceServerClient.parse_response_body(
            raw, header_length=int(answer.headers["Inference-Header-Content-Length"])
        )
    assert shown.as_numpy("sum").tolist() == [20, 46]
