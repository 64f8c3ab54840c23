"""watchdog's threads on one side, a coroutine that waits for quiet on the other."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path
from types import TracebackType
from typing import Self

import structlog
from watchdog.events import FileSystemEvent, FileSystemEventHandler
from watchdog.observers import Observer
from watchdog.observers.api import BaseObserver
from watchdog.observers.polling import PollingObserver

log = structlog.get_logger("paddlewheel.folder_watch")

_MOST_DEBOUNCES = 10
"""Under a steady stream of events a look is taken anyway, after this many quiet times."""
_ROOT_CHECK_S = 1.0
"""No event says that the folder itself was moved or unmounted: its inode is looked at."""
_READING = frozenset({"opened", "closed_no_write"})
"""Events that our own reading makes."""


class FolderWatch(FileSystemEventHandler):
    """Says when something below a folder has changed. Made and used inside one event loop.

    What changed is not said: whoever listens looks for themselves, which no lost, doubled or
    misread event can spoil.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._loop = asyncio.get_running_loop()
        self._changed = asyncio.Event()
        self._observer: BaseObserver | None = None
        self._inode: int | None = None

    def __enter__(self) -> Self:
        self._start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self._stop()

    async def quiet_after_change(self, quiet_s: float, *, at_most_s: float) -> bool:
        """Wait for a change and then until ``quiet_s`` passed without another.

        Returns whether there was one, ``False`` after ``at_most_s`` without. A folder that was
        removed and made anew is watched anew.
        """
        until_s = self._loop.time() + at_most_s
        while not self._changed.is_set():
            self._restart_if_replaced()
            left_s = until_s - self._loop.time()
            if left_s <= 0:
                return False
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(left_s, _ROOT_CHECK_S)):
                    await self._changed.wait()
        for _ in range(_MOST_DEBOUNCES):
            self._changed.clear()
            try:
                async with asyncio.timeout(quiet_s):
                    await self._changed.wait()
            except TimeoutError:
                break
        self._changed.clear()
        return True

    def on_any_event(self, event: FileSystemEvent) -> None:
        """Called in watchdog's thread."""
        # The loop may have closed between the event and now.
        if event.event_type not in _READING and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._changed.set)

    def _start(self) -> None:
        for observer in (Observer(), PollingObserver()):
            try:
                observer.schedule(self, str(self._folder), recursive=True)
                observer.start()
            except OSError as exc:
                # Not there yet, or no inotify watch left (fs.inotify.max_user_watches).
                log.warning("folder_watch_failed", observer=type(observer).__name__, error=str(exc))
                continue
            self._observer = observer
            self._inode = _inode(self._folder)
            return

    def _stop(self) -> None:
        observer, self._observer = self._observer, None
        if observer is not None:
            observer.stop()
            observer.join(5.0)

    def _restart_if_replaced(self) -> None:
        """An inotify watch stays with the folder it was set on, not with the name."""
        if self._observer is None or _inode(self._folder) != self._inode:
            self._stop()
            self._start()
            self._changed.set()


def _inode(folder: Path) -> int | None:
    try:
        return folder.stat().st_ino
    except OSError:
        return None
