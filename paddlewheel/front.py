"""How a node or a gateway meets its clients: access control, TLS, the admin address."""

from __future__ import annotations

import ipaddress
import ssl
from dataclasses import dataclass
from pathlib import Path

from registry.errors import PaddlewheelError


class BadTls(PaddlewheelError):
    """Certificate, key or CA cannot be used."""


class TooOpen(PaddlewheelError):
    """An address that others can reach, and nothing that says who may."""


@dataclass(frozen=True, slots=True)
class ServerTls:
    """What is shown to clients, and asked of them."""

    cert: Path
    """The chain, in PEM."""
    key: Path
    client_ca: Path | None = None
    """Clients need a certificate that it signed; ``None``: they need none."""

    def context(self) -> ssl.SSLContext:
        """Raises `BadTls`."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.set_alpn_protocols(["http/1.1"])
        self.load_into(context)
        if self.client_ca is not None:
            try:
                context.load_verify_locations(self.client_ca)
            except (OSError, ssl.SSLError) as exc:
                raise BadTls(f"{self.client_ca}: {exc}") from exc
            context.verify_mode = ssl.CERT_REQUIRED
        return context

    def load_into(self, context: ssl.SSLContext) -> None:
        """Use the files as they are now for the handshakes to come. Raises `BadTls`."""
        try:
            context.load_cert_chain(self.cert, self.key, password=_no_password)
        except (OSError, ssl.SSLError) as exc:
            raise BadTls(f"{self.cert}, {self.key}: {exc}") from exc

    def mark(self) -> tuple[int, ...]:
        """Something else after the files were changed. Raises `OSError`."""
        return tuple(
            number
            for path in (self.cert, self.key)
            for number in (path.stat().st_mtime_ns, path.stat().st_ino, path.stat().st_size)
        )


def _no_password() -> str:
    raise BadTls("the key is encrypted; want one without a password")


@dataclass(frozen=True, slots=True)
class ClientTls:
    """How a gateway meets nodes that speak TLS."""

    ca: Path | None = None
    """Signs their certificates; ``None``: the system's CAs do."""
    cert: Path | None = None
    key: Path | None = None

    def context(self) -> ssl.SSLContext:
        """Raises `BadTls`."""
        try:
            context = ssl.create_default_context(cafile=None if self.ca is None else str(self.ca))
            context.minimum_version = ssl.TLSVersion.TLSv1_2
            if self.cert is not None:
                context.load_cert_chain(self.cert, self.key, password=_no_password)
        except (OSError, ssl.SSLError) as exc:
            raise BadTls(f"{self.ca or self.cert}: {exc}") from exc
        return context


@dataclass(frozen=True, slots=True)
class Front:
    """What a node or gateway is told of its clients."""

    require_access: bool = False
    """Let nobody in unless the gateway document says whom."""
    insecure: bool = False
    """Others can reach us, and that is meant."""
    admin: tuple[str, int] | None = None
    """Where ``/admin`` and ``/metrics`` are served, and then nowhere else."""
    tls: ServerTls | None = None

    def check(self, host: str) -> None:
        """Raises `TooOpen` where others could come in through ``host`` or the admin address."""
        for address in (host, *(() if self.admin is None else self.admin[:1])):
            if not (is_loopback(address) or self.require_access or self.insecure):
                raise TooOpen(
                    f"{address} can be reached from elsewhere, and anybody could use every model: "
                    "give --require-access (only whom the gateway document names is let in) or "
                    "--insecure (everybody is, unless the document says otherwise)"
                )

    @property
    def trusts_admin(self) -> bool:
        """Whether the admin address is this machine's alone, and asks for no credential."""
        return self.admin is not None and is_loopback(self.admin[0])


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
