"""The checks of `paddlewheel doctor` that concern etcd."""

from __future__ import annotations

import contextlib
import json
import ssl
import time
import urllib.error
import urllib.request
from email.utils import parsedate_to_datetime

from paddlewheel.cli.checks import Check
from paddlewheel.etcd_options import EtcdOptions
from registry.errors import PaddlewheelError
from registry.store import PermissionDenied

ETCD_TIMEOUT_S = 3.0
CLOCK_SKEW_WANTED_S = 5.0
"""Times in status and history come from several machines; routing and leases use none of them."""
ETCD_WANTED = (3, 5, 6)
"""3.5.0 to 3.5.2 can diverge after a kill -9 under load; etcd's own advice is 3.5.6 and later."""


def etcd_checks(options: EtcdOptions) -> list[Check]:
    """Each member over its HTTP side (version, health, clock), then one read through our client."""
    located = options.locate()
    try:
        settings = options.settings()
        members = settings.parsed()
        context = _tls(options) if any(member.tls for member in members) else None
    except (PaddlewheelError, OSError) as exc:
        return [Check("etcd", "fail", str(exc))]
    checks: list[Check] = []
    for member in members:
        url = f"{'https' if member.tls else 'http'}://{member.address}"
        checks.append(_member(url, context if member.tls else None))
    checks.append(_read_through(options, located.found_by))
    return checks


def _tls(options: EtcdOptions) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=options.ca)
    if options.cert is not None:
        context.load_cert_chain(options.cert, options.key)
    return context


def _member(url: str, context: ssl.SSLContext | None) -> Check:
    name = f"etcd {url}"
    try:
        body, date = _fetch(f"{url}/version", context)
        version = str(json.loads(body)["etcdserver"])
        health, _ = _fetch(f"{url}/health", context)
        healthy = str(json.loads(health).get("health", "")).lower() == "true"
    except urllib.error.HTTPError as exc:
        return Check(name, "fail", f"unhealthy: HTTP {exc.code}", "etcdctl endpoint status")
    except (OSError, ValueError, KeyError) as exc:
        reason = exc.reason if isinstance(exc, urllib.error.URLError) else exc
        return Check(name, "fail", f"no answer: {reason}", "is it running? --etcd says where")
    detail = f"version {version}, {'healthy' if healthy else 'unhealthy'}"
    if not healthy:
        return Check(name, "fail", detail, "etcdctl endpoint status")
    if date is not None:
        skew_s = time.time() - parsedate_to_datetime(date).timestamp()
        detail += f", clocks within {max(abs(skew_s), 1):.0f} s"
        if abs(skew_s) > CLOCK_SKEW_WANTED_S:
            return Check(name, "warn", detail, "synchronise the clocks (chrony, ntp)")
    if _numbers(version) < ETCD_WANTED:
        wanted = ".".join(map(str, ETCD_WANTED))
        return Check(name, "warn", detail, f"fine for trying out; {wanted} or later in production")
    return Check(name, "ok", detail)


def _fetch(url: str, context: ssl.SSLContext | None) -> tuple[bytes, str | None]:
    # The scheme is ours: http or https, never file.
    with urllib.request.urlopen(url, timeout=ETCD_TIMEOUT_S, context=context) as answer:
        return answer.read(), answer.headers.get("Date")


def _numbers(version: str) -> tuple[int, ...]:
    numbers: list[int] = []
    for part in version.split("-")[0].split("."):
        with contextlib.suppress(ValueError):
            numbers.append(int(part))
    return tuple(numbers)


def _read_through(options: EtcdOptions, found_by: str) -> Check:
    """The same client, user and prefix as every other command."""
    from paddlewheel.cli.connection import Connection, with_etcd

    async def count(connection: Connection) -> tuple[int, int]:
        models = await connection.store.list_prefix(connection.keys.models_prefix)
        nodes = await connection.store.list_prefix(connection.keys.nodes_prefix)
        return len(models.kvs), len(nodes.kvs)

    started_s = time.monotonic()
    try:
        models, nodes = with_etcd(options, count)
    except PermissionDenied as exc:
        return Check("etcd read", "fail", str(exc), "user and password: see --etcd-auth-file")
    except PaddlewheelError as exc:
        return Check("etcd read", "fail", str(exc))
    took_ms = (time.monotonic() - started_s) * 1000
    prefix = options.locate().prefix
    detail = f"{models} models and {nodes} nodes under {prefix} in {took_ms:.0f} ms"
    detail += f" (found through {found_by})"
    return Check("etcd read", "ok", detail)
