"""What a node is told at its start."""

from __future__ import annotations

import socket
from dataclasses import dataclass, field
from pathlib import Path

from paddlewheel.front import Front
from registry.etcd.settings import EtcdSettings
from registry.names import NodeId

DEFAULT_CACHE = Path("~/.cache/paddlewheel")


@dataclass(frozen=True, slots=True)
class NodeSettings:
    id: NodeId
    etcd: EtcdSettings
    prefix: str = "/paddlewheel"
    host: str = "127.0.0.1"
    port: int = 8500
    """0 asks for a free one."""
    advertise: str | None = None
    """``http://host:port`` under which others reach this node; ``None``: as it listens."""
    devices: tuple[str, ...] = ("cpu",)
    """``cpu``, ``gpu:0``, with a quota ``gpu:0,memoryMB=16000``."""
    cache: Path = DEFAULT_CACHE
    """Model files by digest, and this node's snapshot."""
    cache_max_mb: int | None = None
    labels: dict[str, str] = field(default_factory=dict[str, str])
    lease_ttl_s: int = 10
    allow_sources: tuple[str, ...] = ()
    """Prefixes that a source must start with; empty: every source."""
    load_timeout_s: float = 300.0
    drain_s: float = 30.0
    """How long requests in flight may take after SIGTERM."""
    drain_delay_s: float = 0.0
    """How long to go on accepting after being unready, for balancers that poll."""
    enable_drills: bool = False
    front: Front = field(default_factory=Front)
    transform_workers: int | None = None
    """Processes for pipelines' Python steps; ``None``: one a processor, four at most."""


def default_node_id() -> NodeId:
    """The host's name: what an operator would call this node."""
    return NodeId(socket.gethostname())


def parse_listen(text: str) -> tuple[str, int]:
    """``HOST:PORT``, ``[::1]:PORT``, ``:PORT`` or ``PORT``. Raises `ValueError`."""
    host, colon, port = text.rpartition(":")
    if not colon:
        host, port = "", text
    host = host.strip("[]") or "127.0.0.1"
    number = int(port)
    if not 0 <= number <= 65535:
        raise ValueError(f"want a port in 0..65535, got {number}")
    return host, number
