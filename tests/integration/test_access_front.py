"""A front door as its document and its flags make it: access control, addresses, TLS."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import shutil
import ssl
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from click.testing import CliRunner

from paddlewheel import access as access_module
from paddlewheel import front_door
from paddlewheel.access import AccessControl
from paddlewheel.cli.explain import NodeRefused, NoNode, ask
from paddlewheel.cli.root import root
from paddlewheel.front import BadTls, ClientTls, Front, ServerTls, TooOpen
from paddlewheel.front_door import Doors
from registry.keys import Keys
from registry.memory_store import MemoryStore
from registry.names import NodeId
from router import health
from router.access.guard import ClosedGuard, Guard, Guarding
from router.app import App
from router.http_server import ConnectionLimits, HttpServer
from router.ports import Health
from router.upstream import Upstream, UpstreamFailed
from tests.access import ADMIN, SECRET, gateway_document
from tests.etcd import CERTS, etcd_cluster
from tests.eventually import eventually
from tests.integration.test_http_support import ONE, Node, one_model, serving

KEYS = Keys()
MODEL = "mlp"
BODY = b'{"inputs": [[1, 2, 3]]}'
SERVER_PEM, CLIENT_PEM = ((CERTS / f"{who}.pem").read_text() for who in ("server", "client"))
TLS = ServerTls(CERTS / "server.pem", CERTS / "server.key")


@dataclass
class Door:
    """What access control sets; requests are not needed to see it."""

    guard: Guarding | None = None
    limits: ConnectionLimits = field(default_factory=ConnectionLimits)


@contextlib.asynccontextmanager
async def followed(
    store: MemoryStore, *, required: bool = False, snapshot: Path | None = None, node: bool = True
) -> AsyncIterator[tuple[Door, AccessControl]]:
    door = Door()
    control = AccessControl(
        door, store=store, keys=KEYS, required=required, is_node=node, snapshot=snapshot
    )
    control.restore()
    task = asyncio.create_task(control.run())
    try:
        yield door, control
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


# --- the document ---------------------------------------------------------------------------------


async def test_without_a_document_all_is_open_and_costs_nothing() -> None:
    store = MemoryStore()
    async with followed(store) as (door, control):
        await store.put("/paddlewheel/configs/gateway-2", gateway_document())  # is none
        await store.put(KEYS.gateway, gateway_document())
        await eventually(lambda: isinstance(door.guard, Guard), within_s=2)
        await store.delete(KEYS.gateway)
        await eventually(lambda: door.guard is None, within_s=2)
        assert control.report()["access"] == "off"


async def test_required_means_nobody_until_somebody_is_named() -> None:
    store = MemoryStore()
    async with followed(store, required=True) as (door, control):
        assert isinstance(door.guard, ClosedGuard)
        assert not control.check().ok
        limits_only = b"{apiVersion: paddlewheel/v1, kind: Gateway, spec: {limits: {}}}"
        await store.put(KEYS.gateway, limits_only)
        await eventually(lambda: control.report()["applied_revision"] is not None, within_s=2)
        assert isinstance(door.guard, ClosedGuard), "a document that names nobody"
        await store.put(KEYS.gateway, gateway_document())
        await eventually(lambda: isinstance(door.guard, Guard), within_s=2)
        assert control.check().ok
        await store.delete(KEYS.gateway)
        await eventually(lambda: isinstance(door.guard, ClosedGuard), within_s=2)


async def test_a_first_document_that_is_refused_opens_nothing() -> None:
    store = MemoryStore()
    await store.put(KEYS.gateway, b"kind: Gateway")
    async with followed(store) as (door, control):
        await eventually(lambda: isinstance(door.guard, ClosedGuard), within_s=2)
        assert [check.name for check in control.remarks()] == ["gateway_document"]
        shown = Health(ready=False, started=True, live=True, checks=[control.check()])
        _, told = health.ready(shown, verbose=True, names=False)
        assert told["checks"][0] == {"name": "access", "ok": False, "detail": ""}


async def test_a_node_starts_with_what_it_knew(tmp_path: Path) -> None:
    """The last good document is in force again, with etcd away and a bad one written since."""
    store, path = MemoryStore(), tmp_path / "deep/gateway.json"
    async with followed(store, snapshot=path) as (door, _):
        await store.put(KEYS.gateway, gateway_document())
        await eventually(path.exists, within_s=2)
        await store.put(KEYS.gateway, b"{}")
    assert path.stat().st_mode & 0o077 == 0
    door = Door()
    AccessControl(
        door, store=store, keys=KEYS, required=False, is_node=True, snapshot=path
    ).restore()
    assert isinstance(door.guard, Guard)
    other = Door()
    AccessControl(
        other, store=store, keys=Keys("/other"), required=False, is_node=True, snapshot=path
    ).restore()
    assert other.guard is None, "another fleet's"
    path.write_bytes(b"\x00rubbish")
    broken = Door()
    AccessControl(
        broken, store=store, keys=KEYS, required=True, is_node=True, snapshot=path
    ).restore()
    assert isinstance(broken.guard, ClosedGuard)


async def test_key_files_are_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(access_module, "FILES_EVERY_S", 0.02)
    store, secret = MemoryStore(), tmp_path / "secret"
    await store.put(KEYS.gateway, gateway_document(secret_file=secret))
    async with followed(store) as (_, control):
        await eventually(lambda: bool(control.report()["key_problems"]), within_s=2)
        secret.write_bytes(SECRET)
        await eventually(lambda: not control.report()["key_problems"], within_s=2)
        secret.write_bytes(b"short")
        await eventually(lambda: bool(control.report()["key_problems"]), within_s=2)
        assert SECRET.decode() not in str(control.report())


async def test_rates_are_the_gateways_unless_nodes_shall_count() -> None:
    store = MemoryStore()
    rate = {"requests": 1, "per_s": 60}
    async with followed(store) as (node, _), followed(store, node=False) as (gateway, _):
        await store.put(
            KEYS.gateway,
            gateway_document(limits={"per_client": rate, "connections_per_client": 3}),
        )
        await eventually(
            lambda: isinstance(node.guard, Guard) and isinstance(gateway.guard, Guard), within_s=2
        )
        assert isinstance(node.guard, Guard)
        assert isinstance(gateway.guard, Guard)
        assert node.guard.limits.per_client is None
        assert node.limits.per_client is None, "a gateway is one address to it"
        assert gateway.guard.limits.per_client is not None
        assert gateway.limits.per_client == 3
        await store.put(KEYS.gateway, gateway_document(limits={"per_client": rate, "nodes": True}))
        await eventually(
            lambda: isinstance(node.guard, Guard) and node.guard.limits.per_client is not None,
            within_s=2,
        )


def test_the_document_is_applied_and_shown_like_any_other(tmp_path: Path) -> None:
    file = tmp_path / "access.yaml"
    file.write_bytes((Path(__file__).parents[2] / "configs/gateway/access.yaml").read_bytes())
    made = CliRunner().invoke(root, ["access", "new-key", "--id=a", "--model=mlp", "--output=json"])
    entry = json.loads(made.stdout)
    assert _digest(entry["key"]) == entry["entry"]["sha256"]
    with etcd_cluster() as cluster:
        etcd = ["--etcd", ",".join(cluster.endpoints)]
        applied = CliRunner().invoke(root, ["apply", "-f", str(file), *etcd])
        assert applied.exit_code == 0, applied.output
        assert "configs/gateway created (revision 2)" in applied.output
        shown = CliRunner().invoke(root, ["get", "configs/gateway", *etcd])
        assert shown.stdout_bytes == file.read_bytes()
        file.write_text(file.read_text().replace("RS256", "none"))
        refused = CliRunner().invoke(root, ["apply", "-f", str(file), *etcd])
        assert refused.exit_code == 1
        assert "access.yaml:8: spec.access.jwt.algorithms[0]: want one of" in refused.output
        file.write_text("apiVersion: paddlewheel/v1\nkind: Gateway\nspec: {}\n")
        changed = CliRunner().invoke(root, ["diff", "-f", str(file), "--exit-code", *etcd])
        assert changed.exit_code == 1
        assert "-  access:" in changed.output


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


# --- addresses ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "command",
    [
        ["gateway", "--listen", "0.0.0.0:0"],
        ["node", "--listen", "0.0.0.0:0"],
        ["node", "--listen", "[::]:0"],
        ["node", "--listen", "my.host:0"],
        ["node", "--admin-listen", "0.0.0.0:0"],
        ["up", "--listen", "0.0.0.0:0"],
    ],
    ids=" ".join,
)
def test_open_to_others_by_chance_is_called_wrongly(command: list[str]) -> None:
    result = CliRunner().invoke(
        root, [*command, *(["--etcd", "x:1"] if command[0] != "up" else [])]
    )
    assert result.exit_code == 2, result.output
    assert "--require-access" in result.output
    assert "--insecure" in result.output


def test_what_may_listen_where() -> None:
    for host in ("127.0.0.1", "127.1.2.3", "localhost", "::1"):
        Front().check(host)
    Front(insecure=True).check("0.0.0.0")
    Front(require_access=True).check("10.0.0.1")
    with pytest.raises(TooOpen):
        Front(admin=("10.0.0.1", 1)).check("127.0.0.1")


@contextlib.asynccontextmanager
async def opened(front: Front) -> AsyncIterator[tuple[App, Doors]]:
    app = App(Node(), product_version="1.2.3")
    app.publish(serving(one_model(MODEL, "1", ONE)))
    doors = Doors(app, "127.0.0.1", 0, front)
    await doors.open()
    keeping = asyncio.create_task(doors.keep())
    try:
        yield app, doors
    finally:
        keeping.cancel()
        await asyncio.gather(keeping, return_exceptions=True)
        await app.stop(drain_s=1)


async def status(url: str, method: str = "GET", **options: Any) -> int:
    async with (
        aiohttp.ClientSession() as session,
        session.request(method, url, **options) as answer,
    ):
        await answer.read()
        return answer.status


async def test_operators_have_their_own_address() -> None:
    async with opened(Front(admin=("127.0.0.1", 0))) as (app, doors):
        assert doors.admin is not None
        store = MemoryStore()
        await store.put(KEYS.gateway, gateway_document())
        for guarded in (False, True):
            if guarded:
                control = AccessControl(app, store=store, keys=KEYS, required=False, is_node=True)
                task = asyncio.create_task(control.run())
                await eventually(lambda: app.guard is not None, within_s=2)
            headers = {"X-Api-Key": ADMIN}
            for path in ("/admin/routes", "/metrics"):
                assert await status(doors.http + path, headers=headers) == 404
                assert await status(doors.admin + path) == 200
            assert await status(doors.http + "/readyz") == 200
            assert await status(doors.admin + "/readyz") == 200
            assert await status(doors.admin + f"/v2/models/{MODEL}") == 404
            predict = f"/v1/models/{MODEL}/predict"
            assert await status(doors.admin + predict, "POST", data=BODY) == 404
            assert await status(doors.http + predict, "POST", data=BODY, headers=headers) == 200
        task.cancel()


async def test_commands_show_nodes_a_credential(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`paddlewheel explain` and `drill` over TLS to a node that wants an admin."""
    file, store = tmp_path / "key", MemoryStore()
    await store.put(KEYS.gateway, gateway_document())
    async with opened(Front(tls=TLS)) as (app, doors):
        control = AccessControl(app, store=store, keys=KEYS, required=True, is_node=True)
        task = asyncio.create_task(control.run())
        await eventually(lambda: isinstance(app.guard, Guard), within_s=2)

        def explained() -> str:
            return str(ask(doors.http, MODEL, [])["version"])

        with pytest.raises(NoNode, match="CERTIFICATE_VERIFY_FAILED"):
            await asyncio.to_thread(explained)
        monkeypatch.setenv("PADDLEWHEEL_NODE_CA", str(CERTS / "ca.pem"))
        with pytest.raises(NodeRefused, match="credential"):
            await asyncio.to_thread(explained)
        monkeypatch.setenv("PADDLEWHEEL_API_KEY_FILE", str(file))
        with pytest.raises(NodeRefused, match="PADDLEWHEEL_API_KEY_FILE"):
            await asyncio.to_thread(explained)
        file.write_text(f"{ADMIN}\n")
        assert await asyncio.to_thread(explained) == "1"
        task.cancel()


async def test_one_address_has_so_many_connections() -> None:
    async with opened(Front()) as (app, doors):
        app.limits.per_client = 2
        port = int(doors.http.rpartition(":")[2])
        held = [await asyncio.open_connection("127.0.0.1", port) for _ in range(2)]
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        async with asyncio.timeout(5):
            with contextlib.suppress(ConnectionError):
                assert await reader.read() == b""
        writer.close()
        for _, each in held:
            each.close()
        await eventually(lambda: not app.limits.open, within_s=2)
        assert await status(doors.http + "/livez") == 200


async def test_a_client_that_does_not_read_its_answer_is_given_up() -> None:
    """One that reads, however slowly, is not."""

    async def handle(_: web.BaseRequest) -> web.StreamResponse:
        return web.Response(body=bytes(50_000_000))

    limits = ConnectionLimits(send_timeout_s=0.5, per_client=9)
    server = HttpServer(handle, limits=limits)
    port = int((await server.start("127.0.0.1", 0)).rpartition(":")[2])
    for reads in (False, True):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        if reads:
            async with asyncio.timeout(20):
                await reader.readuntil(b"\r\n\r\n")
                for _ in range(20):
                    assert len(await reader.readexactly(2_500_000)) == 2_500_000
                    await asyncio.sleep(0.05)
        else:
            await eventually(lambda: bool(limits.open), within_s=2)
            await eventually(lambda: not limits.open, within_s=5)
        writer.transport.abort()
    await server.stop(drain_s=1)


# --- TLS ------------------------------------------------------------------------------------------


async def probe(url: str, tls: ssl.SSLContext | None) -> int:
    """As a gateway asks a node."""
    host, _, port = url.partition("://")[2].rpartition(":")
    upstream = Upstream(NodeId("n"), host, int(port), tls=tls)
    loop = asyncio.get_running_loop()
    head = b"GET /livez HTTP/1.1\r\nHost: a\r\n\r\n"
    exchange = await upstream.send(head, b"", deadline_s=loop.time() + 5)
    try:
        return exchange.status
    finally:
        await exchange.read()
        exchange.close()
        upstream.close()


async def test_https_with_and_without_client_certificates() -> None:
    trusting = ClientTls(CERTS / "ca.pem").context()
    known = ClientTls(CERTS / "ca.pem", CERTS / "client.pem", CERTS / "client.key").context()
    async with opened(Front(tls=TLS)) as (_, doors):
        assert doors.http.startswith("https://")
        assert await probe(doors.http, trusting) == 200
        for stranger in (ClientTls().context(), None):
            with pytest.raises(UpstreamFailed):
                await probe(doors.http, stranger)
        old = ssl.create_default_context(cafile=str(CERTS / "ca.pem"))
        old.maximum_version = ssl.TLSVersion.TLSv1_2
        assert await probe(doors.http, old) == 200
    mutual = Front(tls=ServerTls(TLS.cert, TLS.key, CERTS / "ca.pem"))
    async with opened(mutual) as (_, doors):
        assert await probe(doors.http, known) == 200
        with pytest.raises((UpstreamFailed, ssl.SSLError)):
            await probe(doors.http, trusting)


async def test_a_renewed_certificate_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(front_door, "CERT_EVERY_S", 0.02)
    cert, key = tmp_path / "cert.pem", tmp_path / "cert.key"
    shutil.copy(CERTS / "server.pem", cert)
    shutil.copy(CERTS / "server.key", key)
    async with opened(Front(tls=ServerTls(cert, key))) as (_, doors):
        host, port = "127.0.0.1", int(doors.http.rpartition(":")[2])

        def shown() -> str:
            return ssl.get_server_certificate((host, port), timeout=5)

        async def shows(pem: str) -> bool:
            return await asyncio.to_thread(shown) == pem

        assert await shows(SERVER_PEM)
        # As a renewal writes it: what was there stays in use until both are whole.
        for partial in ("half a certif", CLIENT_PEM):
            cert.write_text(partial)
            await asyncio.sleep(0.1)
            assert await shows(SERVER_PEM)
        shutil.copy(CERTS / "client.key", key)
        await eventually(lambda: shows(CLIENT_PEM), within_s=5)


def test_files_that_are_no_certificates(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("x")
    for tls in (
        ServerTls(tmp_path / "x", TLS.key),
        ServerTls(TLS.cert, tmp_path / "gone"),
        ServerTls(TLS.cert, CERTS / "client.key"),
        ServerTls(TLS.cert, TLS.key, tmp_path / "x"),
        ClientTls(tmp_path / "x"),
        ClientTls(CERTS / "ca.pem", TLS.cert, CERTS / "client.key"),
    ):
        with pytest.raises(BadTls):
            tls.context()
