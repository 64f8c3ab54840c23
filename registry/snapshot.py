"""The last accepted state on disk, for a start while etcd is away (DESIGN section 5).

One file (`registry.sealed_file`) with JSON in it. It is a cache of etcd and never more: a file that
can't be trusted is reported and ignored.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import orjson
import structlog

from registry import sealed_file
from registry.errors import PaddlewheelError
from registry.names import ModelName, Revision, Version, is_model_name, is_version
from registry.records import BadRecord, LastGood, Quarantine
from registry.rollouts import RolloutRecord
from registry.saved import SavedDocument, Snapshot
from registry.sealed_file import Damaged

__all__ = ["SavedDocument", "Snapshot", "SnapshotNotSaved", "load", "save"]

log = structlog.get_logger(__name__)

FORMAT = 1
_MAGIC = "paddlewheel-snapshot"


class SnapshotNotSaved(PaddlewheelError):
    """The file could not be written (disk full, no permission). The one before is untouched."""


def load(path: Path) -> Snapshot | None:
    """The snapshot at ``path``; ``None`` when there is none that can be trusted.

    A missing file is normal; a damaged, cut or foreign one is logged (``snapshot_ignored``) and
    left where it is. Never raises.
    """
    try:
        return _decode(sealed_file.read(path, magic=_MAGIC, version=FORMAT))
    except FileNotFoundError:
        return None
    except (OSError, Damaged) as exc:
        log.warning("snapshot_ignored", path=str(path), reason=str(exc))
        return None


def save(path: Path, snapshot: Snapshot) -> None:
    """Replace the snapshot at ``path``, whole or not at all, and on the disk when this returns.

    Raises `SnapshotNotSaved`; the file that was there is then still there. Blocks for two fsyncs:
    not for an event loop.
    """
    body = _encode(snapshot)
    try:
        sealed_file.write(path, body, magic=_MAGIC, version=FORMAT)
    except OSError as exc:
        raise SnapshotNotSaved(f"{path}: {exc.strerror or exc}") from exc


def _encode(snapshot: Snapshot) -> bytes:
    return orjson.dumps(
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


def _decode(body: bytes) -> Snapshot:
    try:
        return _read_body(orjson.loads(body))
    except (orjson.JSONDecodeError, BadRecord, KeyError, TypeError, ValueError) as exc:
        raise Damaged(f"unexpected content: {exc!r}") from exc


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
