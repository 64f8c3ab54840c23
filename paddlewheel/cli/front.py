"""Options about clients that nodes and gateways share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from paddlewheel.front import Front

FRONT_OPTIONS = (
    "require_access", "insecure", "admin_listen", "tls_cert", "tls_key", "tls_client_ca",
)  # fmt: skip
"""What `front_options` passes and `front_of` takes."""

Decorated = TypeVar("Decorated", bound=Callable[..., Any])
_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


def openness_options(command: Decorated) -> Decorated:
    """``--require-access``, ``--insecure``. Passes ``require_access`` and ``insecure``."""
    command = click.option(
        "--insecure", is_flag=True,
        help="Listen where others can reach it although everybody may use everything.",
    )(command)  # fmt: skip
    return click.option(
        "--require-access", is_flag=True,
        help="Let in only whom the gateway document names, and nobody without one.",
    )(command)  # fmt: skip


def front_options(command: Decorated) -> Decorated:
    """And ``--admin-listen``, ``--tls-*``. Passes what `front_of` takes."""
    for option in (
        click.option(
            "--tls-client-ca", type=_FILE, metavar="FILE",
            help="Clients must show a certificate signed by it.",
        ),
        click.option("--tls-key", type=_FILE, metavar="FILE", help="The certificate's key."),
        click.option(
            "--tls-cert", type=_FILE, metavar="FILE",
            help="Serve HTTPS with this certificate chain (PEM); read again when it changes.",
        ),
        click.option(
            "--admin-listen", metavar="HOST:PORT",
            help="Serve /admin and /metrics here and nowhere else; no credential on loopback.",
        ),
    ):  # fmt: skip
        command = option(command)
    return openness_options(command)


def front_of(
    host: str,
    *,
    require_access: bool,
    insecure: bool,
    admin_listen: str | None,
    tls_cert: Path | None,
    tls_key: Path | None,
    tls_client_ca: Path | None,
) -> Front:
    """What the options say. Raises `click.UsageError` where they make no sense together."""
    from paddlewheel.front import Front, ServerTls, TooOpen
    from paddlewheel.settings import parse_listen

    if (tls_cert is None) != (tls_key is None):
        raise click.UsageError("--tls-cert and --tls-key go together")
    if tls_client_ca is not None and tls_cert is None:
        raise click.UsageError("--tls-client-ca wants --tls-cert and --tls-key")
    tls = None
    if tls_cert is not None and tls_key is not None:
        tls = ServerTls(tls_cert, tls_key, tls_client_ca)
    admin = None
    if admin_listen is not None:
        try:
            admin = parse_listen(admin_listen)
        except ValueError as exc:
            raise click.BadParameter(
                f"want HOST:PORT, got {admin_listen!r}", param_hint="--admin-listen"
            ) from exc
    front = Front(require_access, insecure, admin, tls)
    try:
        front.check(host)
    except TooOpen as exc:
        raise click.UsageError(str(exc)) from exc
    return front
