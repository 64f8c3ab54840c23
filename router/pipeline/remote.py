"""A step on another node or gateway: the Open Inference Protocol over HTTP, tensors as raw bytes.

Source: Triton, docs/protocol/extension_binary_data.md.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any, cast
from urllib.parse import quote

import aiohttp
import numpy as np
import orjson

from registry.inference import (
    Array,
    BadInput,
    DeadlineExceeded,
    InferenceError,
    Overloaded,
    TensorSpec,
)
from registry.pipeline_spec import Step
from registry.transforms import carrier
from router.deadline import TIMEOUT_HEADER, show_timeout_ms
from router.pipeline.engine import StepAnswer
from router.pipeline.errors import RemoteFailed
from router.rules import Headers
from router.tensors import (
    DATATYPES,
    DTYPE_OF,
    checked_shape,
    dtype_of,
    from_bytes,
    from_json,
    raw_bytes,
)

HOPS_HEADER = "X-Pipeline-Hops"
HOPS_MAX = 8
"""A pipeline may ask another one elsewhere; two that ask each other must come to an end."""
ANSWER_BYTES_MAX = 1 << 30
_RETRY_PAUSE_S = 0.05
_LENGTH = "Inference-Header-Content-Length"
_OWN = frozenset(
    name.lower()
    for name in (
        "X-Api-Key",
        "X-Request-Id",
        "X-Model-Version",
        "X-Forwarded-For",
        TIMEOUT_HEADER,
        HOPS_HEADER,
    )
)
"""Headers that are not the client's to pass through."""


class _Unreachable(Exception):
    """No answer, or 503: another try may do better."""


class Remote:
    """Connections to other servers, made when the first step asks for one."""

    def __init__(self) -> None:
        self._session: aiohttp.ClientSession | None = None

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def infer(
        self,
        step: Step,
        feeds: Mapping[str, Array],
        headers: Headers,
        request_id: str,
        *,
        deadline_s: float,
    ) -> StepAnswer:
        """Ask for one inference; once more where the first try found nobody.

        Headers of the client that routing rules look at (``X-...``) go along, credentials do not.
        Raises `BadInput` (400), `Overloaded` (503, 429), `DeadlineExceeded`, `RemoteFailed`.
        """
        hops = _hops(headers)
        if hops >= HOPS_MAX:
            raise RemoteFailed(f"over {HOPS_MAX} pipelines ask each other in turn")
        head, body = _encode(feeds)
        shown = {
            name: value
            for name, value in headers.items()
            if name.lower().startswith("x-") and name.lower() not in _OWN
        }
        shown |= {
            "X-Request-Id": request_id,
            HOPS_HEADER: str(hops + 1),
            "Content-Type": "application/octet-stream",
            _LENGTH: str(head),
        }
        assert step.model is not None
        path = f"{step.endpoint}/v2/models/{quote(step.model, safe='')}"
        if step.version is not None:
            path += f"/versions/{quote(step.version, safe='')}"
        loop = asyncio.get_running_loop()
        for is_last in (False, True):
            left_s = deadline_s - loop.time()
            if left_s <= 0:
                raise DeadlineExceeded("no time was left to ask")
            shown[TIMEOUT_HEADER] = show_timeout_ms(left_s)
            try:
                async with asyncio.timeout_at(deadline_s):
                    return await self._ask(f"{path}/infer", shown, body)
            except TimeoutError as exc:
                raise DeadlineExceeded("no answer within the time it had") from exc
            except _Unreachable as exc:
                if is_last:
                    raise Overloaded(str(exc)) from exc
                await asyncio.sleep(_RETRY_PAUSE_S)
        raise AssertionError("the loop returns or raises")

    async def _ask(self, url: str, headers: Mapping[str, str], body: bytes) -> StepAnswer:
        if self._session is None:
            self._session = aiohttp.ClientSession(
                timeout=aiohttp.ClientTimeout(total=None),
                connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=60),
                auto_decompress=True,
                cookie_jar=aiohttp.DummyCookieJar(),
            )
        try:
            async with self._session.post(
                url, data=body, headers=headers, allow_redirects=False
            ) as answer:
                if (answer.content_length or 0) > ANSWER_BYTES_MAX:
                    raise RemoteFailed("its answer is too large")
                content = await answer.read()
                if answer.status == 503:
                    raise _Unreachable(f"503: {_said(content)}")
                _check_status(answer.status, content)
                return _decode(
                    content, answer.headers.get(_LENGTH), answer.headers.get("X-Model-Version")
                )
        except (aiohttp.ClientError, OSError) as exc:
            raise _Unreachable(f"it can't be reached: {exc}") from exc


def _hops(headers: Headers) -> int:
    text = headers.get(HOPS_HEADER) or ""
    return int(text) if text.isascii() and text.isdigit() and len(text) < 4 else 0


def _check_status(status: int, content: bytes) -> None:
    if status == 200:
        return
    said = _said(content)
    if status == 400:
        raise BadInput(said)
    if status == 429:
        raise Overloaded(f"429: {said}")
    if status == 504:
        raise DeadlineExceeded(said)
    raise RemoteFailed(f"{status}: {said}")


def _said(content: bytes) -> str:
    try:
        document: object = orjson.loads(content)
    except orjson.JSONDecodeError:
        document = None
    error = cast("dict[str, object]", document).get("error") if isinstance(document, dict) else None
    return str(error)[:500] if error else "it gave no reason"


def _encode(feeds: Mapping[str, Array]) -> tuple[int, bytes]:
    """The body, and how much of it is JSON."""
    inputs: list[dict[str, Any]] = []
    raws: list[bytes | memoryview] = []
    for name, array in feeds.items():
        raw = raw_bytes(array)
        raws.append(raw)
        inputs.append(
            {
                "name": name,
                "datatype": DATATYPES[dtype_of(array, None)],
                "shape": list(array.shape),
                "parameters": {"binary_data_size": len(raw)},
            }
        )
    head = orjson.dumps({"inputs": inputs, "parameters": {"binary_data_output": True}})
    return len(head), b"".join((head, *raws))


def _decode(content: bytes, length: str | None, version: str | None) -> StepAnswer:
    """Raises `RemoteFailed`."""
    try:
        size = len(content) if length is None else int(length)
        if not 0 <= size <= len(content):
            raise ValueError(f"{_LENGTH}: {length}")
        document: Any = orjson.loads(content[:size])
        raw = memoryview(content)[size:]
        outputs: dict[str, Array] = {}
        for tensor in document["outputs"]:
            dtype = DTYPE_OF[tensor["datatype"]]
            shape = tensor["shape"]
            spec = TensorSpec(str(tensor["name"]), dtype, tuple(-1 for _ in shape))
            if 0 in shape:
                outputs[spec.name] = np.zeros(shape, carrier(dtype))
                continue
            sizes = checked_shape(shape, spec)
            taken = (tensor.get("parameters") or {}).get("binary_data_size")
            if taken is None:
                outputs[spec.name] = from_json(tensor["data"], sizes, spec)
                continue
            if type(taken) is not int or not 0 <= taken <= len(raw):
                raise ValueError(f"binary_data_size: {taken}")
            outputs[spec.name] = from_bytes(raw[:taken], sizes, spec)
            raw = raw[taken:]
        if len(raw):
            raise ValueError(f"{len(raw)} bytes belong to no output")
        if version is None:
            version = document.get("model_version")
        return StepAnswer(outputs, version if isinstance(version, str) else None)
    except (ValueError, KeyError, TypeError, AttributeError, InferenceError) as exc:
        raise RemoteFailed(f"its answer can't be understood: {exc!r}"[:300]) from exc
