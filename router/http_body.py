"""A request's body: whole, bounded, unpacked; and a response's, packed where that is asked for."""

from __future__ import annotations

import asyncio
import zlib

from aiohttp import StreamReader, web
from aiohttp.http_exceptions import HttpProcessingError

from router.errors import BadRequest, BodyTooLarge, SlowUpload, UnsupportedEncoding

UPLOAD_TIMEOUT_S = 60.0
"""Within it a body has to arrive; a slower client is answered 408."""

_LOOP_BYTES = 256 * 1024
"""More than this is packed on a thread: zlib lets go of the interpreter meanwhile."""
_UNPACK_LOOP_BYTES = 4096
"""A packed body may unpack to a thousand times its size, so less of it is done on the loop."""
_PACK_MIN_BYTES = 256
_MEMBERS_MAX = 64
"""Of a gzip body. Each costs a copy of what follows it, so millions of them would be an attack."""


async def read_body(
    request: web.BaseRequest, limit_bytes: int, *, timeout_s: float | None = None
) -> bytes:
    """Return the body, unpacked.

    limit_bytes: for what was sent and for what it unpacks to. timeout_s: for what is not here
    yet; `UPLOAD_TIMEOUT_S` unless given. Raises `BodyTooLarge` as soon as
    that is known (a declared length is not waited for), `UnsupportedEncoding`, `SlowUpload`,
    `BadRequest` for data that is not what ``Content-Encoding`` says.
    """
    timeout_s = timeout_s or UPLOAD_TIMEOUT_S
    headers = request.headers
    encoding = headers.get("Content-Encoding")
    if encoding is not None:
        encoding = encoding.strip().lower()
        if encoding not in ("gzip", "x-gzip", "deflate", "identity", ""):
            raise UnsupportedEncoding(
                f"Content-Encoding {encoding[:64]!r}: want gzip, deflate or identity"
            )
    length = request.content_length
    if length is not None and length > limit_bytes:
        raise _too_large(limit_bytes)
    if "Expect" in headers:
        await _continue(request)
    content = request.content
    if content.is_eof():
        body = content.read_nowait()
    else:
        try:
            async with asyncio.timeout(timeout_s):
                body = await _collect(content, limit_bytes)
        except TimeoutError as exc:
            raise SlowUpload(f"the body did not arrive within {timeout_s:g} s") from exc
        except (web.RequestPayloadError, HttpProcessingError) as exc:
            raise BadRequest(f"the body broke off: {exc}") from exc
    if len(body) > limit_bytes:
        raise _too_large(limit_bytes)
    if not encoding or encoding == "identity":
        return body
    if len(body) <= _UNPACK_LOOP_BYTES:
        return unpack(body, encoding, limit_bytes)
    return await asyncio.to_thread(unpack, body, encoding, limit_bytes)


async def _continue(request: web.BaseRequest) -> None:
    if request.headers["Expect"].lower() != "100-continue":
        raise BadRequest("Expect: want 100-continue")
    await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    # The interim line is not part of the answer, whose headers are still to come.
    request.writer.output_size = 0


async def _collect(content: StreamReader, limit_bytes: int) -> bytes:
    chunks: list[bytes] = []
    size = 0
    while True:
        chunk = await content.readany()
        if not chunk:
            break
        size += len(chunk)
        if size > limit_bytes:
            raise _too_large(limit_bytes)
        chunks.append(chunk)
    return chunks[0] if len(chunks) == 1 else b"".join(chunks)


def _too_large(limit_bytes: int) -> BodyTooLarge:
    return BodyTooLarge(f"the body is over {limit_bytes / 1e6:g} MB (limits.max_body_mb)")


def unpack(body: bytes, encoding: str, limit_bytes: int) -> bytes:
    """Return what ``body`` unpacks to, at most ``limit_bytes`` of it.

    ``deflate`` may be zlib-wrapped, as the standard says, or bare, as some clients send it.
    Raises `BodyTooLarge`, `BadRequest`.
    """
    if encoding == "deflate":
        is_wrapped = len(body) >= 2 and body[0] & 0x0F == 8 and int.from_bytes(body[:2]) % 31 == 0
        window = zlib.MAX_WBITS if is_wrapped else -zlib.MAX_WBITS
    else:
        window = zlib.MAX_WBITS | 16
    out = b""
    rest = body
    try:
        for _ in range(_MEMBERS_MAX):
            unpacker = zlib.decompressobj(window)
            out += unpacker.decompress(rest, limit_bytes + 1 - len(out))
            if len(out) > limit_bytes:
                raise _too_large(limit_bytes)
            if not unpacker.eof:
                raise BadRequest(f"the body ends in the middle of its {encoding} data")
            rest = unpacker.unused_data
            if not rest:
                return out
            if encoding == "deflate":
                raise BadRequest("the body goes on after its deflate data")
        raise BadRequest(f"the body has over {_MEMBERS_MAX} gzip members")
    except zlib.error as exc:
        raise BadRequest(f"the body is not {encoding} data") from exc


def wanted_packing(accept_encoding: str | None) -> str | None:
    """Return ``gzip`` or ``deflate`` where the client names just that one coding.

    A list is what HTTP libraries send by habit, and packing tensors costs more than it saves;
    one coding alone is somebody's wish (Triton's clients, Prometheus).
    """
    if accept_encoding is None:
        return None
    coding, _, parameters = accept_encoding.partition(";")
    coding = coding.strip().lower()
    if coding not in ("gzip", "deflate") or "," in accept_encoding:
        return None
    return None if parameters.replace(" ", "").startswith("q=0") else coding


async def pack(body: bytes, coding: str) -> bytes | None:
    """Return ``body`` packed as ``coding``, or ``None`` where it is too small to be worth it."""
    if len(body) < _PACK_MIN_BYTES:
        return None
    window = zlib.MAX_WBITS | 16 if coding == "gzip" else zlib.MAX_WBITS
    if len(body) <= _LOOP_BYTES:
        return zlib.compress(body, level=1, wbits=window)
    return await asyncio.to_thread(zlib.compress, body, 1, window)
