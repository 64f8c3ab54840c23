"""What this node last had in force, on its disk: the version to fall back to after a restart.

Last-good versions are written once a bake is over. A node that restarts before that, with a newest
document whose version can't be made ready, still knows from here what it served a moment ago.
"""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import orjson
import structlog

from loader.manager import Manager
from loader.model import ModelView
from registry.names import Digest, ModelName, Revision, Version
from registry.spec import ConfigError, parse_model

log = structlog.get_logger(__name__)

AFTER_S = 0.05
"""Routing changed just now, perhaps by a rollback: requests run again before anything is saved."""


class Applied:
    """One small file; written off the event loop, only when a live version changed."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._rows: dict[ModelName, dict[str, Any]] = {}
        self._changed = asyncio.Event()

    def restore(self, manager: Manager) -> None:
        """Offer what was in force to the manager, to be loaded only if nothing else can serve."""
        try:
            rows: dict[str, Any] = dict(orjson.loads(self._path.read_bytes()))
        except FileNotFoundError:
            return
        except (OSError, ValueError, TypeError) as exc:
            log.warning("applied_ignored", path=str(self._path), reason=str(exc))
            return
        for name, row in rows.items():
            try:
                document = parse_model(orjson.dumps(row["document"]), name=ModelName(name))
                version = Version(row["version"])
                manager.set_fallback(document, version, Revision(row["revision"]))
                source = document.spec.version(version).source
                manager.remember_served(document.name, version, source, Digest(row["digest"]))
                self._rows[document.name] = row
            except (KeyError, TypeError, ConfigError) as exc:
                log.warning("applied_ignored", model=name, reason=str(exc))

    def note(self, view: ModelView) -> None:
        """Remember what ``view`` has in force, if a live version is.

        After a rollback that may be a version which the document does not list: then it is the
        one remembered before.
        """
        live, document = view.in_force.live, view.document
        if live is None or document is None:
            return
        before = self._rows.get(view.name)
        key = (live.version, live.digest)
        if before is not None and (before["version"], before["digest"]) == key:
            return
        earlier = None if before is None else before.get("previous")
        if earlier is not None and (earlier["version"], earlier["digest"]) == key:
            self._rows[view.name] = {**earlier, "previous": None}
        elif document.spec.lists(live.version):
            self._rows[view.name] = {
                "version": live.version,
                "digest": live.digest,
                "revision": view.in_force.revision,
                "document": document.model_dump(mode="json", by_alias=True, exclude_defaults=True),
                "previous": None if before is None else {**before, "previous": None},
            }
        else:
            return
        self._changed.set()

    def forget(self, model: ModelName) -> None:
        """The model is gone."""
        if self._rows.pop(model, None) is not None:
            self._changed.set()

    async def run(self) -> None:
        """Save until cancelled; then once more, what was still to be saved."""
        try:
            while True:
                await self._changed.wait()
                await asyncio.sleep(AFTER_S)
                self._changed.clear()
                await asyncio.to_thread(self._save, orjson.dumps(self._rows))
        finally:
            if self._changed.is_set():
                self._save(orjson.dumps(self._rows))

    def _save(self, data: bytes) -> None:
        try:
            self._write(data)
        except OSError as exc:
            log.warning("applied_not_saved", path=str(self._path), reason=str(exc))

    def _write(self, data: bytes) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        new = self._path.with_suffix(".new")
        with new.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        new.replace(self._path)
