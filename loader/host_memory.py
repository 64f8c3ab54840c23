"""How much memory this process may use, and how much is used: the machine's and its cgroup's.

Sources: Linux "Control Group v2" (``memory.max``, ``memory.current``), "Memory Resource Controller"
(v1, ``memory.limit_in_bytes``), proc(5) (``/proc/meminfo``, ``/proc/<pid>/cgroup``).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

MIB = 1024 * 1024


@dataclass(frozen=True, slots=True)
class HostMemory:
    """Reads below the two roots, so that tests can lay out a machine of their own."""

    proc: Path = Path("/proc")
    cgroup: Path = Path("/sys/fs/cgroup")

    def usable_mb(self) -> int:
        """The least of the machine's memory and every limit from this cgroup up to the root."""
        limits = [self._meminfo()["MemTotal"] * 1024]
        for folder, limit_name, _ in self._groups():
            limit = _number(folder / limit_name)
            if limit is not None:
                limits.append(limit)
        return min(limits) // MIB

    def used_mb(self) -> int:
        """What counts against `usable_mb` now, without the page cache that can be dropped.

        In a limited cgroup that is the group's own use, else the machine's.
        """
        for folder, limit_name, usage_name in self._groups():
            limit, usage = _number(folder / limit_name), _number(folder / usage_name)
            if limit is None or usage is None or limit // MIB > self.usable_mb():
                continue
            return max(0, usage - _inactive_file(folder / "memory.stat")) // MIB
        info = self._meminfo()
        return (info["MemTotal"] - info.get("MemAvailable", info.get("MemFree", 0))) // 1024

    def _meminfo(self) -> dict[str, int]:
        lines = (self.proc / "meminfo").read_text().splitlines()
        fields = (line.replace(":", " ").split() for line in lines)
        return {f[0]: int(f[1]) for f in fields if len(f) >= 2 and f[1].isdigit()}

    def _groups(self) -> Iterator[tuple[Path, str, str]]:
        """Folders from this process's group up to the root, with their files' names."""
        try:
            lines = (self.proc / "self" / "cgroup").read_text().splitlines()
        except OSError:
            return
        for line in lines:
            number, controllers, path = line.split(":", 2)
            if number == "0" and not controllers:
                yield from _upwards(self.cgroup, path, "memory.max", "memory.current")
            elif "memory" in controllers.split(","):
                yield from _upwards(
                    self.cgroup / "memory", path, "memory.limit_in_bytes", "memory.usage_in_bytes"
                )


def _upwards(root: Path, path: str, limit: str, usage: str) -> Iterator[tuple[Path, str, str]]:
    """In a container the path may be the host's and not exist here: then the root is ours."""
    parts = [part for part in path.split("/") if part not in ("", "..")]
    for depth in range(len(parts), -1, -1):
        folder = root.joinpath(*parts[:depth])
        if folder.is_dir():
            yield folder, limit, usage


def _number(path: Path) -> int | None:
    """``None`` for ``max`` (no limit) and for a file that is not there."""
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _inactive_file(stat: Path) -> int:
    try:
        fields = dict(line.split(maxsplit=1) for line in stat.read_text().splitlines() if line)
    except (OSError, ValueError):
        return 0
    # v1 sums up the groups below in total_*; v2 always does.
    value = fields.get("total_inactive_file", fields.get("inactive_file", "0"))
    return int(value) if value.strip().isdigit() else 0
