"""The addresses that a node or gateway listens on, and their certificate kept fresh."""

from __future__ import annotations

import asyncio
import ssl
from typing import Protocol

import structlog

from paddlewheel.front import BadTls, Front, is_loopback

log = structlog.get_logger(__name__)

CERT_EVERY_S = 5.0
"""How often the certificate's files are looked at."""


class Door(Protocol):
    """`router.app.App`, `router.gateway_app.GatewayApp`."""

    async def start(self, host: str, port: int, *, tls: ssl.SSLContext | None) -> str: ...

    async def start_admin(
        self, host: str, port: int, *, is_trusted: bool, tls: ssl.SSLContext | None
    ) -> str: ...


class Doors:
    """One door for clients and, where that is wished, one for operators."""

    def __init__(self, door: Door, host: str, port: int, front: Front) -> None:
        self._door = door
        self._host = host
        self._port = port
        self._front = front
        self._tls: ssl.SSLContext | None = None
        self._mark: tuple[int, ...] = ()
        self.http = ""
        """Where clients come, as a URL."""
        self.admin: str | None = None

    async def open(self) -> None:
        """Listen. Raises `OSError`, `BadTls`."""
        front = self._front
        if front.tls is not None:
            self._mark = front.tls.mark()
            self._tls = front.tls.context()
        elif not is_loopback(self._host):
            log.warning("tls_off", host=self._host)  # credentials travel in clear
        if front.admin is not None:
            host, port = front.admin
            self.admin = await self._door.start_admin(
                host, port, is_trusted=front.trusts_admin, tls=self._tls
            )
        self.http = await self._door.start(self._host, self._port, tls=self._tls)

    def admin_line(self) -> dict[str, str]:
        """For the ready line."""
        return {} if self.admin is None else {"admin": self.admin}

    async def keep(self) -> None:
        """Use a renewed certificate for the handshakes to come. For ever."""
        tls = self._front.tls
        if tls is None or self._tls is None:
            await asyncio.Event().wait()
            return
        while True:
            await asyncio.sleep(CERT_EVERY_S)
            try:
                mark = tls.mark()
                if mark != self._mark:
                    tls.context()  # a certificate whose key is not there yet would end TLS here
                    tls.load_into(self._tls)
                    self._mark = mark
                    log.info("certificate_loaded", cert=str(tls.cert))
            except (OSError, BadTls) as exc:
                log.error("certificate_not_loaded", cert=str(tls.cert), reason=str(exc))
