"""Where a running `paddlewheel up` is remembered, so that other commands here find its etcd.

One small JSON file a process, under ``$XDG_STATE_HOME/paddlewheel/running/`` (``~/.local/state`` by
default), readable by its owner alone and without secrets. A file outlives a kill -9; it counts only
while the process that wrote it lives, told by pid *and* start time, since pids are used again.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil


@dataclass(frozen=True, slots=True)
class RunningUp:
    """What other commands need to know of a running `up`."""

    pid: int
    process_started_s: float
    """The kernel's start time of ``pid``, seconds since the epoch (psutil's ``create_time``)."""
    etcd: tuple[str, ...]
    """Client addresses, ``host:port`` or URLs, at least one."""
    prefix: str = "/paddlewheel"
    nodes: tuple[str, ...] = ()
    """HTTP addresses of its nodes."""
    gateway: str | None = None


def state_dir() -> Path:
    """The folder of the user's that Paddlewheel keeps its state in. Not made here."""
    base = os.environ.get("XDG_STATE_HOME") or ""
    root = Path(base) if base.startswith("/") else Path.home() / ".local" / "state"
    return root / "paddlewheel"


def remember(
    *,
    etcd: tuple[str, ...],
    prefix: str = "/paddlewheel",
    nodes: tuple[str, ...] = (),
    gateway: str | None = None,
) -> RunningUp:
    """Note that this process is a running `up`; called again, it replaces the note.

    Raises `OSError` where the folder cannot be written; the caller may well go on without.
    """
    me = psutil.Process()
    running = RunningUp(me.pid, me.create_time(), etcd, prefix, nodes, gateway)
    folder = _folder()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    # mkstemp makes it 0600; the rename makes a reader see all of it or nothing.
    handle, temporary = tempfile.mkstemp(dir=folder, prefix=".")
    with os.fdopen(handle, "w") as file:
        json.dump(asdict(running), file)
    Path(temporary).replace(folder / f"{me.pid}.json")
    return running


def forget() -> None:
    """Take this process's note away. Quiet where there is none."""
    with contextlib.suppress(OSError):
        (_folder() / f"{os.getpid()}.json").unlink()


def find() -> RunningUp | None:
    """The running `up` of this user, the latest started where there are several.

    Notes of processes that are gone are swept on the way.
    """
    alive: list[RunningUp] = []
    try:
        notes = sorted(_folder().glob("*.json"))
    except OSError:
        return None
    for note in notes:
        running = _read(note)
        if running is not None and _lives(running):
            alive.append(running)
        else:
            with contextlib.suppress(OSError):
                note.unlink()
    return max(alive, key=lambda running: running.process_started_s, default=None)


def _folder() -> Path:
    return state_dir() / "running"


def _read(note: Path) -> RunningUp | None:
    try:
        raw: object = json.loads(note.read_text())
        if not isinstance(raw, Mapping):
            return None
        gateway = raw.get("gateway")
        return RunningUp(
            pid=int(raw["pid"]),
            process_started_s=float(raw["process_started_s"]),
            etcd=tuple(str(each) for each in raw["etcd"]),
            prefix=str(raw["prefix"]),
            nodes=tuple(str(each) for each in raw.get("nodes", ())),
            gateway=None if gateway is None else str(gateway),
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _lives(running: RunningUp) -> bool:
    try:
        started_s = psutil.Process(running.pid).create_time()
    except psutil.Error:
        return False
    # create_time is derived from the boot time, which a clock step moves by a little.
    return abs(started_s - running.process_started_s) < 2.0
