"""Where etcd is and who we are to it, from flags, environment and the running `up` here.

Order (SPEC section 8): ``--etcd``, ``PADDLEWHEEL_ETCD``, the `paddlewheel up` running on this
machine, then ``127.0.0.1:2379``. User and password come from ``PADDLEWHEEL_ETCD_USER`` and
``PADDLEWHEEL_ETCD_PASSWORD`` or from a file: a command line is readable by everyone here.
"""

from __future__ import annotations

import functools
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from paddlewheel import state_file
from registry.errors import PaddlewheelError

if TYPE_CHECKING:
    from registry.etcd.settings import EtcdSettings

DEFAULT_ETCD = "127.0.0.1:2379"
DEFAULT_PREFIX = "/paddlewheel"
_GIVEN = "--etcd or PADDLEWHEEL_ETCD"
EMBEDDED = "embedded"
"""What ``up --etcd`` takes for an etcd of its own; elsewhere it means the one of that `up`."""

Decorated = TypeVar("Decorated", bound=Callable[..., Any])


class BadEtcdOptions(PaddlewheelError):
    """A credentials file that cannot be used, or half of a pair."""


@dataclass(frozen=True, slots=True)
class EtcdOptions:
    """The flags as given; ``None`` where they were not."""

    etcd: str | None = None
    """``URL[,URL]``, or `EMBEDDED`."""
    prefix: str | None = None
    ca: Path | None = None
    cert: Path | None = None
    key: Path | None = None
    auth_file: Path | None = None

    def locate(self) -> Located:
        """Decide which etcd and which prefix. Looks at the state file, connects to nothing."""
        if self.etcd and self.etcd != EMBEDDED:
            given = tuple(each.strip() for each in self.etcd.split(",") if each.strip())
            return Located(given, self._prefix(DEFAULT_PREFIX), _GIVEN)
        running = state_file.find()
        if running is not None:
            found_by = f"`paddlewheel up` (pid {running.pid})"
            return Located(running.etcd, self._prefix(running.prefix), found_by)
        return Located((DEFAULT_ETCD,), self._prefix(DEFAULT_PREFIX), "the default")

    def settings(self) -> EtcdSettings:
        """What the etcd client wants to know. Raises `BadEtcdOptions`."""
        from registry.etcd.settings import EtcdSettings

        if (self.cert is None) != (self.key is None):
            raise BadEtcdOptions("--etcd-cert and --etcd-key go together")
        user, password = self._credentials()
        return EtcdSettings(
            endpoints=self.locate().endpoints,
            user=user,
            password=password,
            ca=self.ca,
            cert=self.cert,
            key=self.key,
        )

    def _prefix(self, otherwise: str) -> str:
        prefix = (self.prefix or otherwise).rstrip("/")
        return prefix if prefix.startswith("/") else f"/{prefix}"

    def _credentials(self) -> tuple[str | None, str | None]:
        if self.auth_file is not None:
            return _read_auth_file(self.auth_file)
        user = os.environ.get("PADDLEWHEEL_ETCD_USER") or None
        password = os.environ.get("PADDLEWHEEL_ETCD_PASSWORD") or None
        if password is not None and user is None:
            raise BadEtcdOptions("PADDLEWHEEL_ETCD_PASSWORD is set without PADDLEWHEEL_ETCD_USER")
        if user is not None and password is None:
            raise BadEtcdOptions("PADDLEWHEEL_ETCD_USER is set without PADDLEWHEEL_ETCD_PASSWORD")
        return user, password


@dataclass(frozen=True, slots=True)
class Located:
    """Which etcd, under which prefix, and how that was found: for messages and `doctor`."""

    endpoints: tuple[str, ...]
    prefix: str
    """Starts with ``/`` and does not end with one."""
    found_by: str


def _read_auth_file(path: Path) -> tuple[str, str]:
    """``user:password`` on the first line, as ``etcdctl --user`` takes it."""
    try:
        lines = path.read_text().splitlines()
        mode = path.stat().st_mode
    except (OSError, UnicodeDecodeError) as exc:
        raise BadEtcdOptions(f"{path}: {exc}") from exc
    if mode & stat.S_IROTH:
        raise BadEtcdOptions(f"{path}: readable by everyone; chmod o-r it")
    user, colon, password = (lines[0] if lines else "").partition(":")
    if not (user and colon and password):
        raise BadEtcdOptions(f"{path}: want user:password on the first line")
    return user, password


def _check_endpoints(etcd: str | None) -> None:
    """Raises `click.BadParameter`: what is no address will never answer."""
    from registry.etcd.settings import BadEndpoint, EtcdSettings

    if etcd and etcd != EMBEDDED:
        given = tuple(each.strip() for each in etcd.split(",") if each.strip())
        try:
            EtcdSettings(endpoints=given).parsed()
        except BadEndpoint as exc:
            raise click.BadParameter(str(exc), param_hint="--etcd") from exc


def etcd_options(command: Decorated) -> Decorated:
    """Add the flags to a click command, which gets them as one argument ``etcd: EtcdOptions``."""

    @functools.wraps(command)
    def with_options(
        *args: Any,
        etcd: str | None,
        prefix: str | None,
        etcd_ca: Path | None,
        etcd_cert: Path | None,
        etcd_key: Path | None,
        etcd_auth_file: Path | None,
        **kwargs: Any,
    ) -> Any:
        _check_endpoints(etcd)
        options = EtcdOptions(etcd, prefix, etcd_ca, etcd_cert, etcd_key, etcd_auth_file)
        return command(*args, etcd=options, **kwargs)

    file = click.Path(exists=True, dir_okay=False, path_type=Path)
    decorated: Any = with_options
    for option in (
        click.option(
            "--etcd-auth-file",
            type=file,
            help="File with user:password; else PADDLEWHEEL_ETCD_USER and _PASSWORD are read.",
        ),
        click.option("--etcd-key", type=file, help="PEM file with the certificate's private key."),
        click.option("--etcd-cert", type=file, help="PEM file with our certificate (mTLS)."),
        click.option("--etcd-ca", type=file, help="PEM file of the authorities to trust."),
        click.option(
            "--prefix", metavar="P", help=f"Where the keys live in etcd.  [{DEFAULT_PREFIX}]"
        ),
        click.option(
            "--etcd",
            metavar="URL[,URL]",
            help=f"Where etcd is.  [the running `up` here, else {DEFAULT_ETCD}]",
        ),
    ):
        decorated = option(decorated)
    return decorated  # type: ignore[no-any-return]
