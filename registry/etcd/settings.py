"""Where etcd is and who we are to it."""

from __future__ import annotations

from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path
from urllib.parse import urlsplit

from registry.errors import PaddlewheelError

DEFAULT_PORT = 2379


class BadEndpoint(PaddlewheelError):
    """An endpoint that is none of ``http://host:port``, ``https://host:port``, ``host:port``."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One member's client address."""

    address: str
    """``host:port``, an IPv6 host in brackets."""
    tls: bool

    def __str__(self) -> str:
        return self.address

    @property
    def is_loopback(self) -> bool:
        """Whether it is on this machine, by its name alone."""
        host = self.address.rpartition(":")[0].strip("[]")
        if host == "localhost":
            return True
        try:
            return ip_address(host).is_loopback
        except ValueError:
            return False


@dataclass(frozen=True, slots=True)
class EtcdSettings:
    """How to reach one etcd cluster. Nothing is read or connected until a store is made of it."""

    endpoints: tuple[str, ...]
    """Each ``http://host:port``, ``https://host:port`` or ``host:port``; the last form uses TLS
    when any of ``ca``, ``cert`` is given, as etcdctl does. A missing port is 2379."""
    user: str | None = None
    password: str | None = field(default=None, repr=False)
    ca: Path | None = None
    """PEM file of the authorities to trust; without it, those that gRPC ships."""
    cert: Path | None = None
    """PEM file of our own certificate, for servers that ask for one (mTLS); needs ``key``."""
    key: Path | None = None
    timeout_s: float = 5.0
    """Deadline of one call, all of its attempts together."""

    def parsed(self) -> tuple[Endpoint, ...]:
        """The endpoints, in order. Raises `BadEndpoint`."""
        if not self.endpoints:
            raise BadEndpoint("no etcd endpoint given")
        bare_tls = self.ca is not None or self.cert is not None
        return tuple(parse_endpoint(text, bare_tls=bare_tls) for text in self.endpoints)


def parse_endpoint(text: str, *, bare_tls: bool = False) -> Endpoint:
    """Read one endpoint; ``bare_tls`` says whether one without a scheme means TLS."""
    bare = "://" not in text
    parts = urlsplit(f"//{text.strip()}" if bare else text.strip())
    try:
        host, port = parts.hostname, parts.port or DEFAULT_PORT
    except ValueError as exc:
        raise BadEndpoint(f"{text!r}: {exc}") from exc
    if not host or parts.path not in ("", "/") or (not bare and parts.scheme not in _SCHEMES):
        raise BadEndpoint(f"{text!r}: want http://host:port, https://host:port or host:port")
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    return Endpoint(address, tls=bare_tls if bare else parts.scheme == "https")


_SCHEMES = ("http", "https")
