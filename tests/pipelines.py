"""Pipelines of small models to be served, and what is asked of them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp

from registry.names import ModelName, Revision
from registry.pipeline_records import PipelineStatus
from registry.store import Store
from tests.eventually import eventually
from tests.node import Node
from tests.served import KEYS

Step = Mapping[str, Any]


def document(
    name: str,
    steps: Sequence[Step],
    *,
    inputs: Sequence[Any] = ({"name": "x"},),
    outputs: Mapping[str, str] | None = None,
    **limits: Any,
) -> bytes:
    """A pipeline document; ``outputs`` by name, the last step's first one unless given."""
    outputs = outputs or {"y": f"{steps[-1]['name']}.0"}
    spec: dict[str, Any] = {
        "inputs": list(inputs),
        "outputs": [{"name": name, "from": source} for name, source in outputs.items()],
        "steps": [dict(step) for step in steps],
    }
    if limits:
        spec["limits"] = limits
    head = {"apiVersion": "paddlewheel/v1", "kind": "Pipeline", "metadata": {"name": name}}
    return json.dumps({**head, "spec": spec}).encode()


async def put(store: Store, name: str, text: bytes) -> Revision:
    """What ``etcdctl put`` does."""
    return await store.put(KEYS.pipeline(ModelName(name)), text)


async def status_of(store: Store, name: str) -> PipelineStatus | None:
    kv = await store.get(KEYS.pipeline_status(ModelName(name), Node.id))
    return None if kv is None else PipelineStatus.from_json(kv.value)


async def until_status(
    store: Store, name: str, within_s: float = 20.0, **wanted: Any
) -> PipelineStatus:
    """Until the node's status of the pipeline has these values."""
    last: list[PipelineStatus | None] = [None]

    async def holds() -> bool:
        last[0] = await status_of(store, name)
        return last[0] is not None and all(getattr(last[0], k) == v for k, v in wanted.items())

    try:
        await eventually(holds, within_s=within_s)
    except AssertionError:
        raise AssertionError(f"not within {within_s:g} s: {wanted}; last: {last[0]}") from None
    assert last[0] is not None
    return last[0]


@dataclass
class Answer:
    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


async def call(
    url: str,
    body: bytes | Mapping[str, Any] | None = None,
    *,
    method: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> Answer:
    """One request; a mapping goes as JSON."""
    is_json = isinstance(body, Mapping)
    data = json.dumps(body).encode() if isinstance(body, Mapping) else body
    headers = {**({"Content-Type": "application/json"} if is_json else {}), **(headers or {})}
    method = method or ("GET" if data is None else "POST")
    timeout = aiohttp.ClientTimeout(total=30)
    async with (
        aiohttp.ClientSession(timeout=timeout) as session,
        session.request(method, url, data=data, headers=headers) as answer,
    ):
        return Answer(answer.status, answer.headers, await answer.read())
