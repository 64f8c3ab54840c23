"""The last accepted state on disk, for a start while etcd is away (DESIGN section 5).

One file: a header line with the format's version, the body's length and its sha256, then JSON.
It is a cache of etcd and never more: a file that can't be trusted is reported and ignored.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import threading
from pathlib import Path
from typing import Any

import orjson
import structlog

from registry.errors import PaddlewheelError
from registry.names import ModelName, Revision, Version, is_model_name, is_version
from registry.records import BadRecord, LastGood, Quarantine
from registry.rollouts import RolloutRecord
from registry.saved import SavedDocument, Snapshot

__all__ = ["SavedDocument", "Snapshot", "SnapshotNotSaved", "load", "save"]

log = structlog.get_logger(__name__)

FORMAT = 1
_MAGIC = b"paddlewheel-snapshot"
_HEADER = re.compile(rb"paddlewheel-snapshot ([0-9]{1,6}) ([0-9]{1,12}) sha256:([0-9a-f]{64})")
_HEADER_BYTES_MAX = 256

_one_writer = threading.Lock()
"""The temporary file has a fixed name, so that crashes leave one behind at most."""


class SnapshotNotSaved(PaddlewheelError):
    """The file could not be written (disk full, no permission). The one before is untouched."""


class _Damaged(Exception):
    """Why a file is not to be trusted."""


def load(path: Path) -> Snapshot | None:
    """The snapshot at ``path``; ``None`` when there is none that can be trusted.

    A missing file is normal; a damaged, cut or foreign one is logged (``snapshot_ignored``) and
    left where it is. Never raises.
    """
    try:
        return _decode(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, _Damaged) as exc:
        log.warning("snapshot_ignored", path=str(path), reason=str(exc))
        return None


def save(path: Path, snapshot: Snapshot) -> None:
    """Replace the snapshot at ``path``, whole or not at all, and on the disk when this returns.

    Raises `SnapshotNotSaved`; the file that was there is then still there. Blocks for two fsyncs:
    not for an event loop.
    """
    data = _encode(snapshot)
    temporary = path.with_name(f".{path.name}.tmp")
    with _one_writer:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _write(temporary, data)
            temporary.replace(path)
            _sync_folder(path.parent)
        except OSError as exc:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise SnapshotNotSaved(f"{path}: {exc.strerror or exc}") from exc


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


def _encode(snapshot: Snapshot) -> bytes:
    body = orjson.dumps(
        {
            "prefix": snapshot.prefix,
            "documents": {
                model: {"revision": saved.revision, "text": saved.text}
                for model, saved in snapshot.documents.items()
            },
            "lastgoods": {model: good.to_dict() for model, good in snapshot.lastgoods.items()},
            "quarantines": [
                {"model": model, "version": version, "record": quarantine.to_dict()}
                for (model, version), quarantine in sorted(snapshot.quarantines.items())
            ],
            "rollouts": {model: held.to_dict() for model, held in snapshot.rollouts.items()},
        },
        option=orjson.OPT_SORT_KEYS,
    )
    digest = hashlib.sha256(body).hexdigest().encode()
    return b"%s %d %d sha256:%s\n%s" % (_MAGIC, FORMAT, len(body), digest, body)


def _decode(data: bytes) -> Snapshot:
    first, newline, body = data.partition(b"\n")
    header = _HEADER.fullmatch(first) if len(first) < _HEADER_BYTES_MAX else None
    if not newline or header is None:
        raise _Damaged("not a snapshot of ours")
    if int(header.group(1)) != FORMAT:
        raise _Damaged(f"format {int(header.group(1))}, want {FORMAT}")
    if len(body) != int(header.group(2)):
        raise _Damaged(f"{len(body)} bytes, want {int(header.group(2))}")
    if hashlib.sha256(body).hexdigest().encode() != header.group(3):
        raise _Damaged("checksum mismatch")
    try:
        return _read_body(orjson.loads(body))
    except (orjson.JSONDecodeError, BadRecord, KeyError, TypeError, ValueError) as exc:
        raise _Damaged(f"unexpected content: {exc!r}") from exc


def _read_body(body: Any) -> Snapshot:
    return Snapshot(
        documents={
            _model(model): SavedDocument(Revision(int(saved["revision"])), _text(saved["text"]))
            for model, saved in body["documents"].items()
        },
        lastgoods={
            _model(model): LastGood.from_json(orjson.dumps(good))
            for model, good in body["lastgoods"].items()
        },
        quarantines={
            (_model(held["model"]), _version(held["version"])): Quarantine.from_json(
                orjson.dumps(held["record"])
            )
            for held in body["quarantines"]
        },
        rollouts={  # not there in a file of before there were any
            _model(model): RolloutRecord.from_json(orjson.dumps(held))
            for model, held in body.get("rollouts", {}).items()
        },
        prefix=_text(body["prefix"]),
    )


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError("want text")
    return value


def _model(value: Any) -> ModelName:
    if not is_model_name(_text(value)):
        raise ValueError(f"not a name: {value!r}")
    return ModelName(value)


def _version(value: Any) -> Version:
    if not is_version(_text(value)):
        raise ValueError(f"not a version: {value!r}")
    return Version(value)
