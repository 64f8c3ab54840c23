"""One channel a member, and which of them is in use.

gRPC's own balancing is not used: ``round_robin`` goes on choosing a member that is frozen but
still accepts connections. Here a call that a member fails to answer moves everybody to the next.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import grpc
import grpc.aio

from registry.etcd.settings import Endpoint, EtcdSettings

OPTIONS: Sequence[tuple[str, int]] = (
    # etcd answers keepalives more often than every 5 s with GOAWAY (--grpc-keepalive-min-time).
    ("grpc.keepalive_time_ms", 6000),
    ("grpc.keepalive_timeout_ms", 3000),
    # Newer gRPC waits this long, and not keepalive_timeout, for the answer to a ping; 60 s unset.
    ("grpc.http2.ping_timeout_ms", 3000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
    # Despite its name how long one attempt to connect may take. At 100 ms a line or a machine that
    # needs more than a second for the handshake never connects at all (decision 0004).
    ("grpc.min_reconnect_backoff_ms", 3000),
    ("grpc.max_receive_message_length", -1),
    # A retry that we do not see would make a write happen twice.
    ("grpc.enable_retries", 0),
    # Otherwise two stores of one process share a connection, and one's rotation is the other's.
    ("grpc.use_local_subchannel_pool", 1),
)

_POLL_S = 0.01


@dataclass(slots=True)
class Member:
    """One endpoint and its channel."""

    endpoint: Endpoint
    channel: grpc.aio.Channel
    suspected: asyncio.Event
    """Set when somebody stopped using this member; streams on it move too. A new event is put
    here each time, so a stream waits for the suspicion that comes after it started."""

    async def connected(self, timeout_s: float) -> bool:
        """Whether a connection stands, waiting for it at most ``timeout_s``.

        Nothing is sent to a member before this is true, so a write to one that is down surely
        did not happen. The state is polled: a cancelled ``wait_for_state_change`` leaves a
        watcher behind in gRPC's core.
        """
        loop = asyncio.get_running_loop()
        deadline_s = loop.time() + timeout_s
        while True:
            state = self.channel.get_state(try_to_connect=True)
            if state is grpc.ChannelConnectivity.READY:
                return True
            if state in _DOWN or loop.time() >= deadline_s:
                return False
            await asyncio.sleep(_POLL_S)


_DOWN = (grpc.ChannelConnectivity.TRANSIENT_FAILURE, grpc.ChannelConnectivity.SHUTDOWN)


class Members:
    """Every member of the cluster and the one in use; needs a running event loop."""

    def __init__(self, settings: EtcdSettings) -> None:
        """Raises `BadEndpoint`, and `OSError` when a TLS file cannot be read. Connects nothing."""
        credentials: grpc.ChannelCredentials | None = None
        endpoints = settings.parsed()
        if any(endpoint.tls for endpoint in endpoints):
            credentials = grpc.ssl_channel_credentials(
                _read(settings.ca), _read(settings.key), _read(settings.cert)
            )
        self._members = [
            Member(endpoint, _open(endpoint, credentials), asyncio.Event())
            for endpoint in endpoints
        ]
        self._current = 0
        self.rotations = 0

    def __len__(self) -> int:
        return len(self._members)

    @property
    def current(self) -> Member:
        return self._members[self._current]

    def rotate(self, bad: Member) -> None:
        """Use the next member, unless somebody moved away from ``bad`` already."""
        if self.current is bad:
            self._current = (self._current + 1) % len(self._members)
            self.rotations += 1
        bad.suspected.set()
        bad.suspected = asyncio.Event()

    async def close(self) -> None:
        for member in self._members:
            await member.channel.close(None)


def _open(endpoint: Endpoint, credentials: grpc.ChannelCredentials | None) -> grpc.aio.Channel:
    options = list(OPTIONS)
    if endpoint.is_loopback:
        # gRPC's core would ask the proxy of `http_proxy` for 127.0.0.1 too; Go's tools do not.
        options.append(("grpc.enable_http_proxy", 0))
    if endpoint.tls and credentials is not None:
        return grpc.aio.secure_channel(endpoint.address, credentials, options=options)
    return grpc.aio.insecure_channel(endpoint.address, options=options)


def _read(path: Path | None) -> bytes | None:
    return None if path is None else path.read_bytes()
