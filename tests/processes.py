"""Processes and the shared memory between them, looked at from outside."""

from __future__ import annotations

import contextlib
import re
from dataclasses import dataclass
from pathlib import Path

import psutil


@dataclass(frozen=True)
class Kin:
    """A process as it was seen once, told from a later one with its pid."""

    pid: int
    started_s: float
    name: str

    @property
    def is_alive(self) -> bool:
        """A zombie is not: it only waits for whoever adopted it."""
        try:
            process = psutil.Process(self.pid)
            return (
                process.create_time() == self.started_s and process.status() != psutil.STATUS_ZOMBIE
            )
        except psutil.NoSuchProcess:
            return False


def descendants(pid: int) -> list[Kin]:
    """All processes below ``pid``; none when it is gone itself."""
    found: list[Kin] = []
    with contextlib.suppress(psutil.NoSuchProcess):
        for child in psutil.Process(pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                found.append(Kin(child.pid, child.create_time(), child.name()))
    return found


# --- shared memory ----------------------------------------------------------------------------

_MEMFD = re.compile(rb"([0-9a-f]+:[0-9a-f]+) (\d+) +/memfd:pw-")


def memfds(pid: int) -> set[bytes]:
    """Identities (``device inode``) of the arenas that a process has mapped."""
    try:
        maps = Path(f"/proc/{pid}/maps").read_bytes()
    except (OSError, ValueError):
        return set()
    return {b" ".join(found) for found in _MEMFD.findall(maps)}


def holders(wanted: set[bytes]) -> list[int]:
    """The processes of this machine that have one of these mapped or open."""
    inodes = {int(identity.split()[1]) for identity in wanted}
    processes = [entry for entry in Path("/proc").iterdir() if entry.name.isdigit()]
    return [
        int(process.name)
        for process in processes
        if memfds(int(process.name)) & wanted or _open_memfds(process) & inodes
    ]


def _open_memfds(process: Path) -> set[int]:
    found: set[int] = set()
    with contextlib.suppress(OSError):
        for descriptor in (process / "fd").iterdir():
            with contextlib.suppress(OSError):
                if str(descriptor.readlink()).startswith("/memfd:pw-"):
                    found.add(descriptor.stat().st_ino)
    return found
