"""The clients that people already have: made or found once, kept in a cache folder."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

from paddlewheel.embedded_etcd import find_etcd

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "paddlewheel-tests"


def etcd3_python() -> Path:
    """A Python that has the published ``etcd3``, with protobuf 3 as its users have it."""
    place = CACHE / f"etcd3-py{sys.version_info.major}{sys.version_info.minor}"
    if not (place / "bin" / "python").exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        # Made beside and moved at the end, so that an interrupted one is not taken for whole.
        # Only its interpreter is used, by path, so the move does no harm.
        with tempfile.TemporaryDirectory(dir=CACHE) as beside:
            fresh = Path(beside) / "venv"
            venv.create(fresh, with_pip=True)
            subprocess.run(
                [fresh / "bin/python", "-m", "pip", "install", "-q", "etcd3==0.12.0", "protobuf<4"],
                check=True,
                timeout=300,
            )
            if not place.exists():
                fresh.rename(place)
    return place / "bin" / "python"


def etcdctls() -> dict[str, Path]:
    """Every etcdctl to be had, by its minor version (``3.4``, ``3.5``)."""
    candidates = [find_etcd().with_name("etcdctl")]
    if on_path := shutil.which("etcdctl"):
        candidates.append(Path(on_path))
    if debian := _debian_etcdctl():
        candidates.append(debian)
    found: dict[str, Path] = {}
    for binary in candidates:
        if binary.exists():
            found.setdefault(_minor_version(binary), binary)
    return found


def _minor_version(etcdctl: Path) -> str:
    """From ``etcdctl version: 3.5.1``."""
    done = subprocess.run(
        [etcdctl, "version"],
        capture_output=True,
        text=True,
        timeout=10,
        env={**os.environ, "ETCDCTL_API": "3"},
        check=True,
    )
    version = done.stdout.splitlines()[0].rpartition(":")[2].strip()
    return ".".join(version.split(".")[:2])


def _debian_etcdctl() -> Path | None:
    """Debian's ``etcd-client`` (3.4 in Debian 12), unpacked without installing, where apt works."""
    place = CACHE / "debian-etcd-client"
    binary = place / "usr" / "bin" / "etcdctl"
    if binary.exists():
        return binary
    if not shutil.which("apt-get") or not shutil.which("dpkg"):
        return None
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as beside:
        done = subprocess.run(
            ["apt-get", "-q", "download", "etcd-client"],
            cwd=beside,
            capture_output=True,
            timeout=120,
            check=False,
        )
        packages = list(Path(beside).glob("etcd-client_*.deb"))
        if done.returncode != 0 or not packages:
            return None
        unpacked = Path(beside) / "unpacked"
        subprocess.run(["dpkg", "-x", packages[0], unpacked], check=True, timeout=60)
        if not (unpacked / "usr/bin/etcdctl").exists():
            return None
        if not place.exists():
            unpacked.rename(place)
    return binary if binary.exists() else None
