"""A file that is replaced whole, and read only when nothing of it is missing or changed.

A header line with a magic word, the format's version, the body's length and its sha256; then the
body.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import threading
from pathlib import Path

from registry.errors import PaddlewheelError

_HEADER = re.compile(rb"([a-z-]{1,40}) ([0-9]{1,6}) ([0-9]{1,12}) sha256:([0-9a-f]{64})")
_HEADER_BYTES_MAX = 256

_one_writer = threading.Lock()
"""The temporary file has a fixed name, so that crashes leave one behind at most."""


class Damaged(PaddlewheelError):
    """Why a file is not to be trusted."""


def write(path: Path, body: bytes, *, magic: str, version: int) -> None:
    """Replace the file at ``path``, whole or not at all, and on the disk when this returns.

    Raises `OSError`; the file that was there is then still there. Blocks for two fsyncs: not for
    an event loop.
    """
    digest = hashlib.sha256(body).hexdigest().encode()
    data = b"%s %d %d sha256:%s\n%s" % (magic.encode(), version, len(body), digest, body)
    temporary = path.with_name(f".{path.name}.tmp")
    with _one_writer:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _write(temporary, data)
            temporary.replace(path)
            _sync_folder(path.parent)
        except OSError:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise


def read(path: Path, *, magic: str, version: int) -> bytes:
    """Return the body. Raises `Damaged`, and `OSError`."""
    data = path.read_bytes()
    first, newline, body = data.partition(b"\n")
    header = _HEADER.fullmatch(first) if len(first) < _HEADER_BYTES_MAX else None
    if not newline or header is None or header.group(1) != magic.encode():
        raise Damaged("not a snapshot of ours")
    if int(header.group(2)) != version:
        raise Damaged(f"format {int(header.group(2))}, want {version}")
    if len(body) != int(header.group(3)):
        raise Damaged(f"{len(body)} bytes, want {int(header.group(3))}")
    if hashlib.sha256(body).hexdigest().encode() != header.group(4):
        raise Damaged("checksum mismatch")
    return body


def _write(path: Path, data: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    """Without it, a power cut may bring the old name back."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
