"""Protocol Buffers' wire format, as little of it as Paddle's files need.

The full library would be a second owner of Paddle's schema and of its own version; the two
messages read here (`TensorDesc` and `ProgramDesc` of Paddle's ``framework.proto``) have kept their
field numbers since 2018. Source: protobuf.dev, "Encoding".
"""

from __future__ import annotations

from collections.abc import Iterator

Buffer = memoryview
Field = tuple[int, int | Buffer]

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_WIDTH = {_FIXED64: 8, _FIXED32: 4}


class WireError(ValueError):
    """These bytes are not a message. ``offset`` counts from the start of the message."""

    def __init__(self, offset: int, reason: str) -> None:
        super().__init__(f"{reason} at byte {offset}")
        self.offset = offset
        self.reason = reason


def varint(data: Buffer, at: int) -> tuple[int, int]:
    """The unsigned number at ``at`` and where the next thing starts."""
    value = 0
    for position in range(at, min(at + 10, len(data))):
        byte = data[position]
        value |= (byte & 0x7F) << (7 * (position - at))
        if byte < 0x80:
            return value & 0xFFFF_FFFF_FFFF_FFFF, position + 1
    raise WireError(at, "a varint that does not end")


def signed(value: int) -> int:
    """An int64 or int32 as protobuf writes it: two's complement in 64 bits."""
    return value - (1 << 64) if value >= 1 << 63 else value


def fields(message: Buffer) -> Iterator[Field]:
    """Each field's number and value, in order: an unsigned int, or a view of its bytes.

    Raises `WireError` where the bytes end early or mean nothing. Nothing is copied.
    """
    at = 0
    while at < len(message):
        start = at
        key, at = varint(message, at)
        number, kind = key >> 3, key & 7
        if number == 0:
            raise WireError(start, "a field numbered 0")
        if kind == _VARINT:
            value, at = varint(message, at)
            yield number, value
            continue
        if kind == _BYTES:
            size, at = varint(message, at)
        elif kind in _WIDTH:
            size = _WIDTH[kind]
        else:
            raise WireError(start, f"a field of wire type {kind}")
        if size > len(message) - at:
            raise WireError(start, f"field {number} wants {size} bytes, {len(message) - at} left")
        yield number, message[at : at + size]
        at += size


def submessage(value: int | Buffer) -> Buffer:
    """The bytes of a field that must be a message or a string."""
    if isinstance(value, int):
        raise WireError(0, "a number where a message should be")
    return value


def number(value: int | Buffer) -> int:
    """The value of a field that must be a varint."""
    if not isinstance(value, int):
        raise WireError(0, "bytes where a number should be")
    return value


def text(value: int | Buffer) -> str:
    """The value of a field that must be a UTF-8 string."""
    try:
        return bytes(submessage(value)).decode()
    except UnicodeDecodeError as exc:
        raise WireError(exc.start, "a string that is not UTF-8") from exc


def numbers(value: int | Buffer) -> list[int]:
    """One element of a repeated int64, or all of them where they are packed; signed."""
    if isinstance(value, int):
        return [signed(value)]
    found: list[int] = []
    at = 0
    while at < len(value):
        one, at = varint(value, at)
        found.append(signed(one))
    return found


# --- writing, for `loader.params.write_params` ---------------------------------------------------


def encode_varint(value: int) -> bytes:
    """``value`` as a varint; negative ones take ten bytes, as in protobuf."""
    rest = value & 0xFFFF_FFFF_FFFF_FFFF
    out = bytearray()
    while rest >= 0x80:
        out.append(rest & 0x7F | 0x80)
        rest >>= 7
    out.append(rest)
    return bytes(out)
