"""Hostile clients against a real gateway before a real node, both with access control on.

Each case says what is sent and what has to come back. Whatever comes back, to whomever: no name of
a model, node or key, no digest, no trace. Both processes stay as small as they were.
"""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
import time
import zlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

import psutil
import pytest
import pytest_asyncio

from tests.access import (
    ADMIN,
    ALICE,
    AUDIENCE,
    ISSUER,
    POOR,
    SECRET,
    Issuer,
    KeyServer,
    b64,
    gateway_document,
    handmade,
    key_server,
)
from tests.etcd import etcd_cluster
from tests.eventually import eventually
from tests.fleet import FleetUnderTest, fleet
from tests.served import KEYS, MLP

pytestmark = pytest.mark.asyncio(loop_scope="module")

BODY_MB = 2
TIMEOUT_S = 1.0
RSS_GROWTH_BYTES = 96 * 2**20
INFER = f"/v2/models/{MLP}/infer"
BODY = json.dumps(
    {"inputs": [{"name": "x", "shape": [1, 64], "datatype": "FP32", "data": [0.5] * 64}]}
).encode()


@dataclass
class World:
    fleet: FleetUnderTest
    issuer: Issuer
    key_server: KeyServer
    ports: dict[str, int] = field(default_factory=dict[str, int])
    """``gateway`` and ``node``."""

    def rss(self) -> dict[str, int]:
        pids = {"gateway": self.fleet.gateway.pid, "node": self.fleet.nodes[0].process.pid}
        return {name: psutil.Process(pid).memory_info().rss for name, pid in pids.items()}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def world(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[World]:
    folder = tmp_path_factory.mktemp("access")
    secret = folder / "jwt.secret"
    secret.write_bytes(SECRET + b"\n")
    issuer = Issuer()
    with etcd_cluster() as cluster:
        async with key_server(issuer.jwks) as keys, fleet(cluster, folder, 1) as running:
            world = World(running, issuer, keys)
            world.ports = {
                "gateway": int(running.gateway.http.rpartition(":")[2]),
                "node": running.nodes[0].port,
            }
            limits = {
                "clients": {"poor": {"requests": 2, "per_s": 3600}},
                "max_body_mb": BODY_MB, "head_timeout_s": TIMEOUT_S, "body_timeout_s": TIMEOUT_S,
            }  # fmt: skip
            document = gateway_document(jwks_url=keys.url, secret_file=secret, limits=limits)
            await running.store.put(KEYS.gateway, document)
            for port in world.ports.values():

                async def lets_in(port: int = port) -> bool:
                    refused = await ask(port, head("GET", INFER))
                    known = await ask(port, call(f"Bearer {issuer.token()}"))
                    return (refused.status, known.status) == (401, 200)

                await eventually(lets_in, within_s=10, what="access control on everywhere")
            yield world


# --- asking ---------------------------------------------------------------------------------------


@dataclass
class Got:
    status: int
    """0 where the connection was closed without an answer."""
    headers: dict[str, str]
    body: bytes
    raw: bytes


async def ask(port: int, sent: bytes, *, within_s: float = 10.0) -> Got:
    """Send these bytes and read until the connection ends or one answer is whole."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        async with asyncio.timeout(within_s):
            with contextlib.suppress(OSError):
                writer.write(sent)
                await writer.drain()
            return await read_answer(reader)
    finally:
        writer.transport.abort()


async def read_answer(reader: asyncio.StreamReader) -> Got:
    raw = b""
    with contextlib.suppress(OSError, asyncio.IncompleteReadError):
        raw = await reader.readuntil(b"\r\n\r\n")
    if not raw:
        return Got(0, {}, b"", b"")
    lines = raw.decode("latin-1").split("\r\n")
    headers = {
        name.lower(): value.strip()
        for name, _, value in (each.partition(":") for each in lines[1:])
    }
    body = b""
    with contextlib.suppress(OSError, asyncio.IncompleteReadError):
        body = await reader.readexactly(int(headers.get("content-length", "0")))
    return Got(int(lines[0].split()[1]), headers, body, raw + body)


def head(method: str, target: str, *headers: str) -> bytes:
    lines = [f"{method} {target} HTTP/1.1", "Host: a", *headers, "", ""]
    return "\r\n".join(lines).encode("latin-1")


def call(credential: str | None, target: str = INFER, *headers: str, body: bytes = BODY) -> bytes:
    shown = [] if credential is None else [f"Authorization: {credential}"]
    shown += [f"Content-Length: {len(body)}", *headers]
    return head("POST", target, *shown) + body


SAYS_NOTHING = (
    b"mlp", b"secret-model", b"n0", b"r1", b"e1", b"Traceback", b"File \"", b".py", b"alice",
    SECRET, b"pwk_", b"sha256", b"127.0.0.1", b"X-Node",
)  # fmt: skip


def check_says_nothing(got: Got) -> None:
    shown = b"\n".join(
        line for line in got.raw.split(b"\r\n") if not line.lower().startswith(b"x-request-id")
    )
    for word in SAYS_NOTHING:
        assert word not in shown, got.raw


# --- credentials ----------------------------------------------------------------------------------

Credential = Callable[[Issuer], str | None]


def _bearer(make: Callable[[Issuer], str]) -> Credential:
    return lambda issuer: f"Bearer {make(issuer)}"


def _strip_signature(token: str) -> str:
    return token.rpartition(".")[0] + "."


def _other_claims(issuer: Issuer) -> str:
    header, _, signature = issuer.token().split(".")
    claims = json.dumps(issuer.claims(**{"x-model-permission": "*"})).encode()
    return f"{header}.{b64(claims)}.{signature}"


def _flip(token: str) -> str:
    at = token.rindex(".") + 10
    return token[:at] + ("A" if token[at] != "A" else "B") + token[at + 1 :]


def _twice(issuer: Issuer) -> str:
    claims = json.dumps(issuer.claims())[:-1] + ', "exp": 99999999999}'
    return handmade({"alg": "HS256"}, claims.encode(), SECRET)


def _jku(issuer: Issuer) -> str:
    mine = Issuer()
    headers = {"jku": "https://evil.test/jwks", "kid": "r1"}
    return mine.token(headers=headers)


def _jwk(issuer: Issuer) -> str:
    mine = Issuer()
    return mine.token(headers={"jwk": mine.jwks["keys"][0], "kid": "r1"})


REFUSED_TOKENS: dict[str, Credential] = {
    "nothing": lambda _: None,
    "an empty credential": lambda _: "Bearer ",
    "a scheme alone": lambda _: "Bearer",
    "Basic": lambda _: "Basic YWxpY2U6YWxpY2U=",
    "no token at all": _bearer(lambda _: "hello"),
    "dots alone": _bearer(lambda _: ".."),
    "four parts": _bearer(lambda i: i.token() + ".x"),
    "alg none": _bearer(lambda i: _strip_signature(handmade({"alg": "none"}, i.claims(), b""))),
    "alg None in other letters": _bearer(lambda i: handmade({"alg": "nOnE"}, i.claims(), b"")),
    "alg none with a signature": _bearer(lambda i: handmade({"alg": "none"}, i.claims(), SECRET)),
    "no alg": _bearer(lambda i: handmade({"typ": "JWT"}, i.claims(), SECRET)),
    "alg a list": _bearer(lambda i: handmade({"alg": ["HS256"]}, i.claims(), SECRET)),
    "alg that is not listed": _bearer(lambda i: i.token("HS512")),
    "the signature cut off": _bearer(lambda i: _strip_signature(i.token())),
    "the signature changed": _bearer(lambda i: _flip(i.token())),
    "the claims changed": _bearer(_other_claims),
    "another RSA key": _bearer(lambda _: Issuer().token()),
    "another EC key": _bearer(lambda _: Issuer().token("ES256")),
    "another secret": _bearer(lambda i: i.token("HS256", key=b"x" * 40)),
    "an empty secret": _bearer(lambda i: handmade({"alg": "HS256"}, i.claims(), b"")),
    "the public key as a secret": _bearer(
        lambda i: handmade({"alg": "HS256", "kid": "r1"}, i.claims(), i.rsa_pem)
    ),
    "the key set as a secret": _bearer(
        lambda i: handmade({"alg": "HS256"}, i.claims(), json.dumps(i.jwks).encode())
    ),
    "RS256 by name, HMAC by nature": _bearer(
        lambda i: handmade({"alg": "RS256", "kid": "r1"}, i.claims(), SECRET)
    ),
    "kid of the other kind of key": _bearer(lambda i: i.token(headers={"kid": "e1"})),
    "kid that nobody has": _bearer(lambda i: i.token(headers={"kid": "zzz"})),
    "kid a path": _bearer(
        lambda i: handmade({"alg": "RS256", "kid": "../../../../dev/null"}, i.claims(), b"")
    ),
    "kid an injection": _bearer(
        lambda i: handmade({"alg": "RS256", "kid": "' UNION SELECT 'x"}, i.claims(), b"x")
    ),
    "kid a number": _bearer(lambda i: handmade({"alg": "HS256", "kid": 1}, i.claims(), SECRET)),
    "kid endless": _bearer(
        lambda i: handmade({"alg": "HS256", "kid": "k" * 1000}, i.claims(), SECRET)
    ),
    "jku": _bearer(_jku),
    "jwk in the header": _bearer(_jwk),
    "x5u": _bearer(
        lambda i: handmade({"alg": "HS256", "x5u": "https://evil.test"}, i.claims(), SECRET)
    ),
    "crit": _bearer(
        lambda i: handmade({"alg": "HS256", "crit": ["exp"], "exp": 1}, i.claims(), SECRET)
    ),
    "b64 false": _bearer(
        lambda i: handmade({"alg": "HS256", "b64": False, "crit": ["b64"]}, i.claims(), SECRET)
    ),
    "compressed": _bearer(
        lambda i: handmade(
            {"alg": "HS256", "zip": "DEF"}, zlib.compress(json.dumps(i.claims()).encode()), SECRET
        )
    ),
    "another type of token": _bearer(
        lambda i: handmade({"alg": "HS256", "typ": "dpop+jwt"}, i.claims(), SECRET)
    ),
    "an encrypted token": _bearer(lambda _: "eyJhbGciOiJkaXIiLCJlbmMiOiJBMTI4R0NNIn0..a.b.c"),
    "expired": _bearer(lambda i: i.token(exp=int(time.time()) - 6)),
    "no exp": _bearer(lambda i: i.token(exp=None)),
    "exp as text": _bearer(
        lambda i: handmade({"alg": "HS256"}, i.claims(exp="99999999999"), SECRET)
    ),
    "exp true": _bearer(lambda i: handmade({"alg": "HS256"}, i.claims(exp=True), SECRET)),
    "exp null": _bearer(
        lambda i: handmade({"alg": "HS256"}, {**i.claims(), "exp": None}, SECRET)
    ),
    "exp without end": _bearer(
        lambda i: handmade(
            {"alg": "HS256"}, json.dumps(i.claims(exp=0)).replace(': 0', ': 1e999').encode(), SECRET
        )
    ),
    "nbf in the future": _bearer(lambda i: i.token(nbf=int(time.time()) + 60)),
    "iat in the future": _bearer(lambda i: i.token(iat=int(time.time()) + 60)),
    "another audience": _bearer(lambda i: i.token(aud="others")),
    "no audience": _bearer(lambda i: i.token(aud=None)),
    "aud a mapping": _bearer(
        lambda i: handmade({"alg": "HS256"}, i.claims(aud={AUDIENCE: 1}), SECRET)
    ),
    "aud with a number beside": _bearer(
        lambda i: handmade({"alg": "HS256"}, i.claims(aud=[AUDIENCE, 1]), SECRET)
    ),
    "aud a longer text": _bearer(lambda i: i.token(aud=AUDIENCE + "x")),
    "another issuer": _bearer(lambda i: i.token(iss="https://evil.test/")),
    "no issuer": _bearer(lambda i: i.token(iss=None)),
    "iss a list": _bearer(lambda i: handmade({"alg": "HS256"}, i.claims(iss=[ISSUER]), SECRET)),
    "sub a mapping": _bearer(lambda i: handmade({"alg": "HS256"}, i.claims(sub={"a": 1}), SECRET)),
    "models that are no list": _bearer(
        lambda i: handmade({"alg": "HS256"}, i.claims(**{"x-model-permission": {"mlp": 1}}), SECRET)
    ),
    "admin as text": _bearer(
        lambda i: handmade({"alg": "HS256"}, i.claims(**{"x-paddlewheel-admin": "true"}), SECRET)
    ),
    "a claim twice": _bearer(_twice),
    "claims that are a list": _bearer(lambda _: handmade({"alg": "HS256"}, b"[]", SECRET)),
    "claims nested without end": _bearer(
        lambda _: handmade({"alg": "HS256"}, b"[" * 3000 + b"]" * 3000, SECRET)
    ),
    "claims nested deeply": _bearer(
        lambda _: handmade({"alg": "HS256"}, b'{"a":' + b"[" * 700 + b"]" * 700 + b"}", SECRET)
    ),
    "padding": _bearer(lambda i: i.token("HS256") + "="),
    "white space inside": _bearer(lambda i: i.token("HS256").replace(".", ". ")),
    "a huge token": _bearer(lambda i: i.token("HS256", pad="x" * 8000)),
    "an API key that nobody has": _bearer(lambda _: "pwk_" + "A" * 43),
    "half an API key": _bearer(lambda _: ALICE[:-1]),
    "an API key and more": _bearer(lambda _: ALICE + "A"),
    "a digest for a key": _bearer(lambda _: "a" * 64),
    "a good token in the query": lambda _: None,
}  # fmt: skip


@pytest.mark.parametrize("door", ["gateway", "node"])
@pytest.mark.parametrize("case", REFUSED_TOKENS)
async def test_no_good_credential(world: World, case: str, door: str) -> None:
    target = INFER
    if "query" in case:
        target += f"?access_token={world.issuer.token()}&api_key={ALICE}"
    got = await ask(world.ports[door], call(REFUSED_TOKENS[case](world.issuer), target))
    assert got.status == 401, got.raw
    challenge = got.headers["www-authenticate"]
    assert challenge.startswith('Bearer realm="paddlewheel"')
    assert ('error="invalid_token"' in challenge) is (case not in NOTHING_PRESENTED)
    assert json.loads(got.body).keys() == {"error"}
    check_says_nothing(got)


NOTHING_PRESENTED = {"nothing", "a good token in the query", "Basic"}


@pytest.mark.parametrize("door", ["gateway", "node"])
async def test_good_credentials(world: World, door: str) -> None:
    issuer = world.issuer
    for credential in (
        issuer.token(), issuer.token("ES256"), issuer.token("HS256"),
        issuer.token(headers={"kid": None}), issuer.token(aud=["others", AUDIENCE]),
        issuer.token(exp=int(time.time()) - 2), issuer.token(**{"x-model-permission": "*"}),
        ALICE, ADMIN,
    ):  # fmt: skip
        got = await ask(world.ports[door], call(f"Bearer {credential}"))
        assert got.status == 200, got.raw
    got = await ask(world.ports[door], call(None, INFER, f"X-Api-Key: {ALICE}"))
    assert got.status == 200, got.raw


# --- what a known client may not ------------------------------------------------------------------

ENCODED = "%6D%6C%70"
"""The model's name, percent-encoded."""

FORBIDDEN: dict[str, bytes] = {
    "a model outside the claim": call("$other"),
    "a model outside the claim, encoded": call("$other", f"/v2/models/{ENCODED}/infer"),
    "a model that is not there": call("$alice", "/v2/models/secret-model/infer"),
    "its metadata": head("GET", f"/v2/models/{MLP}", "Authorization: $other"),
    "its readiness": head("GET", f"/v2/models/{MLP}/ready", "Authorization: $other"),
    "its status": head("GET", f"/v1/models/{MLP}", "Authorization: $other"),
    "its options": head("OPTIONS", INFER, "Authorization: $other"),
    "by the short form": call("$other", f"/v1/models/{MLP}/predict"),
    "by TensorFlow Serving's": call("$other", f"/v1/models/{MLP}:predict"),
    "by version": call("$other", f"/v2/models/{MLP}/versions/1/infer"),
    "by label": call("$other", f"/v1/models/{MLP}/labels/stable:predict"),
    "a NUL after a permitted name": call("$alice", f"/v2/models/{MLP}%00/infer"),
    "a slash inside the name": call("$alice", f"/v2/models/{MLP}%2Finfer/infer"),
    "dots inside the name": call("$alice", f"/v2/models/{MLP}%2F..%2Fsecret-model/infer"),
    "a step up, encoded": call("$alice", "/v2/models/%2e%2e/infer"),
    "a step up": call("$alice", f"/v2/models/../models/{MLP}/infer"),
    "double slashes": call("$alice", f"/v2/models//{MLP}/infer"),
    "encoded twice": call("$alice", "/v2/models/%256D%256C%2570/infer"),
    "a token for nothing": call("$none"),
    "the routes": head("GET", "/admin/routes", "Authorization: $alice"),
    "who may come": head("GET", "/admin/access", "Authorization: $alice"),
    "a drill": call("$alice", "/admin/drill"),
    "a drill behind a slash": call("$alice", "//admin/drill"),
    "metrics": head("GET", "/metrics", "Authorization: $alice"),
    "loading": call("$alice", "/v2/repository/models/mlp/load", body=b"{}"),
}


@pytest.mark.parametrize("door", ["gateway", "node"])
@pytest.mark.parametrize("case", FORBIDDEN)
async def test_not_permitted(world: World, case: str, door: str) -> None:
    sent = FORBIDDEN[case]
    for mark, credential in (
        (b"$alice", world.issuer.token()),
        (b"$other", world.issuer.token(**{"x-model-permission": ["others"]})),
        (b"$none", world.issuer.token(**{"x-model-permission": None})),
    ):
        sent = sent.replace(mark, b"Bearer " + credential.encode())
    got = await ask(world.ports[door], sent)
    assert got.status == 403, got.raw
    assert json.loads(got.body)["error"] == "not permitted"
    assert 'error="insufficient_scope"' in got.headers["www-authenticate"]
    if case not in ("a drill", "a drill behind a slash"):
        body = got.body.replace(b"/v2/repository/models/mlp/load", b"")
        check_says_nothing(Got(got.status, got.headers, body, body))


@pytest.mark.parametrize("door", ["gateway", "node"])
async def test_lists_show_what_one_may_use(world: World, door: str) -> None:
    port, other = world.ports[door], world.issuer.token(**{"x-model-permission": ["others"]})
    for credential, models in ((world.issuer.token(), [MLP]), (other, []), (ADMIN, [MLP])):
        shown = await ask(port, head("GET", "/v1/models", f"Authorization: Bearer {credential}"))
        assert json.loads(shown.body) == {"models": models}
        index = await ask(port, call(f"Bearer {credential}", "/v2/repository/index", body=b"{}"))
        assert [entry["name"] for entry in json.loads(index.body)] == models


@pytest.mark.parametrize("door", ["gateway", "node"])
async def test_probes_are_open_and_name_nothing(world: World, door: str) -> None:
    port = world.ports[door]
    for path in ("/livez", "/healthz", "/readyz", "/readyz?verbose", "/startupz",
                 "/v2/health/live", "/v2/health/ready", "/v2/health/ready?verbose"):  # fmt: skip
        got = await ask(port, head("GET", path))
        assert got.status == 200, got.raw
        check_says_nothing(got)
    got = await ask(port, head("GET", "/readyz?verbose", f"Authorization: Bearer {ADMIN}"))
    assert f"model:{MLP}".encode() in got.body


@pytest.mark.parametrize("door", ["gateway", "node"])
@pytest.mark.parametrize(
    "target",
    ["/", "/v2", "/v1/models", "/v2/repository/index", "/metrics", "/admin/routes",
     "/admin/access", "/admin/../livez", "/livez/../admin/routes", "/livez%2F..%2Fadmin",
     "/.git/config",
     "//livez/x",
     "/%2e%2e/%2e%2e/etc/passwd", "/readyz/..;/admin/routes", "http://other.test/admin/routes",
     "/livez;x=/admin", "*"],
)  # fmt: skip
async def test_strangers_learn_not_even_what_there_is(world: World, target: str, door: str) -> None:
    for method in ("GET", "POST", "OPTIONS", "DELETE", "PROPFIND"):
        got = await ask(world.ports[door], head(method, target, "Origin: https://evil.test"))
        assert got.status == 401 if target != "*" else got.status in (400, 401), got.raw
        assert not [name for name in got.headers if name.startswith("access-control-")]
        check_says_nothing(got)


# --- broken and lying HTTP ------------------------------------------------------------------------

GOOD = f"Authorization: Bearer {ALICE}"
SMUGGLED = f"GET /admin/routes HTTP/1.1\r\nHost: a\r\nX-Api-Key: {ADMIN}\r\n\r\n"

BROKEN: dict[str, tuple[bytes, set[int]]] = {
    "length and chunks": (
        head("POST", INFER, GOOD, "Content-Length: 4", "Transfer-Encoding: chunked")
        + b"0\r\n\r\n" + SMUGGLED.encode(), {400}),
    "two lengths": (
        head("POST", INFER, GOOD, "Content-Length: 2", "Content-Length: 40") + b"{}", {400}),
    "a list of lengths": (head("POST", INFER, GOOD, "Content-Length: 2, 2") + b"{}", {400}),
    "a negative length": (head("POST", INFER, GOOD, "Content-Length: -1"), {400}),
    "a signed length": (head("POST", INFER, GOOD, "Content-Length: +2") + b"{}", {400}),
    "a length in hex": (head("POST", INFER, GOOD, "Content-Length: 0x2") + b"{}", {400}),
    "an endless length": (head("POST", INFER, GOOD, "Content-Length: " + "9" * 40), {400, 413}),
    "another coding": (head("POST", INFER, GOOD, "Transfer-Encoding: gzip") + b"{}", {400}),
    "chunked, not last": (
        head("POST", INFER, GOOD, "Transfer-Encoding: chunked, identity") + b"0\r\n\r\n", {400}),
    "chunked, misspelt": (
        head("POST", INFER, GOOD, "Transfer-Encoding: xchunked", "Content-Length: 2") + b"{}",
        {400}),
    "a chunk's size with a sign": (
        head("POST", INFER, GOOD, "Transfer-Encoding: chunked") + b"-1\r\n\r\n0\r\n\r\n", {400}),
    "a chunk's size that is endless": (
        head("POST", INFER, GOOD, "Transfer-Encoding: chunked") + b"f" * 40 + b"\r\n", {400, 413}),
    "a chunk longer than it says": (
        head("POST", INFER, GOOD, "Transfer-Encoding: chunked") + b"1\r\nabc\r\n0\r\n\r\n", {400}),
    "a header folded": (
        b"POST " + INFER.encode() + b" HTTP/1.1\r\nHost: a\r\nAuthorization:\r\n Bearer "
        + ALICE.encode() + b"\r\nContent-Length: 2\r\n\r\n{}", {400, 401}),
    "line feeds alone": (
        f"POST {INFER} HTTP/1.1\nHost: a\n{GOOD}\nContent-Length: 2\n\n{{}}".encode(), {400}),
    "a space before the colon": (
        head("POST", INFER, GOOD, "Content-Length : 2") + b"{}", {400}),
    "a NUL in a header": (head("POST", INFER, GOOD, "X: a\0b"), {400}),
    "a bare return in a header": (head("POST", INFER, GOOD, "X: a\rX-Api-Key: b"), {400}),
    "a header without a name": (head("POST", INFER, GOOD, ": x"), {400}),
    "no host": (f"GET /admin/routes HTTP/1.1\r\n{GOOD}\r\n\r\n".encode(), {400, 403}),
    "two hosts": (head("GET", "/admin/routes", GOOD, "Host: b"), {400, 403}),
    "two credentials": (call(f"Bearer {ALICE}", INFER, f"Authorization: Bearer {ADMIN}"), {401}),
    "two kinds of credential": (call(f"Bearer {ALICE}", INFER, f"X-Api-Key: {ADMIN}"), {401}),
    "two spellings of the header": (call(f"Bearer {ALICE}", INFER, GOOD.upper()), {401}),
    "an old protocol": (f"GET {INFER}\r\n\r\n".encode(), {400, 401}),
    "a protocol to come": (f"GET {INFER} HTTP/3.0\r\nHost: a\r\n\r\n".encode(), {400, 401, 505}),
    "no protocol": (b"\x16\x03\x01\x00\xa5\x01\x00\x00\xa1\x03\x03", {0, 400}),
    "HTTP/2 by knowledge": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", {400, 401}),
    "an upgrade": (
        head("GET", INFER, "Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c"), {400, 401}),
    "a websocket": (
        head("GET", INFER, "Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 13",
             "Sec-WebSocket-Key: x3JJHMbDL1EzLkh9GBhXDw=="), {400, 401}),
    "a tunnel": (head("CONNECT", "127.0.0.1:2379"), {400, 401}),
    "a huge head": (head("GET", "/livez", "X: " + "a" * 40_000), {400, 431}),
    "many headers": (head("GET", "/livez", *(f"X-{n}: a" for n in range(5000))), {400, 431}),
    "a long target": (head("GET", "/" + "a" * 40_000), {400, 414, 431}),
    "bytes in the target": (b"GET /\xff\xfe\x00 HTTP/1.1\r\nHost: a\r\n\r\n", {400, 401}),
    "an unknown expectation": (call(f"Bearer {ALICE}", INFER, "Expect: more"), {400, 417}),
    "a body too large by its length": (
        head("POST", INFER, GOOD, f"Content-Length: {BODY_MB * 1_000_000 + 1}"), {413}),
    "a gzip bomb": (
        call(f"Bearer {ALICE}", INFER, "Content-Encoding: gzip",
             body=gzip.compress(bytes(200_000_000), 9, mtime=0)), {413}),
    "a deflate bomb": (
        call(f"Bearer {ALICE}", INFER, "Content-Encoding: deflate",
             body=zlib.compress(bytes(200_000_000), 9)), {413}),
    "a bomb in a bomb": (
        call(f"Bearer {ALICE}", INFER, "Content-Encoding: gzip, gzip",
             body=gzip.compress(gzip.compress(bytes(1_000_000), mtime=0), mtime=0)), {415}),
    "many members of gzip": (
        call(f"Bearer {ALICE}", INFER, "Content-Encoding: gzip",
             body=gzip.compress(b"", mtime=0) * 50_000), {400, 413}),
    "JSON without end": (call(f"Bearer {ALICE}", body=b"[" * 1_900_000), {400}),
    "a model's name in the body": (
        call(f"Bearer {ALICE}", "/v2/models/others/infer",
             body=BODY[:-1] + b', "model_name": "mlp"}'), {403}),
    "a length for binary data that lies": (
        call(f"Bearer {ALICE}", INFER, "Inference-Header-Content-Length: 99999999999"), {400}),
}  # fmt: skip


@pytest.mark.parametrize("door", ["gateway", "node"])
@pytest.mark.parametrize("case", BROKEN)
async def test_broken_and_lying(world: World, case: str, door: str) -> None:
    sent, wanted = BROKEN[case]
    got = await ask(world.ports[door], sent)
    assert got.status in wanted, got.raw[:500]
    assert b"Traceback" not in got.raw
    assert b"live" not in got.raw, "the routes"
    assert (await ask(world.ports[door], call(f"Bearer {ALICE}"))).status == 200


@pytest.mark.parametrize("door", ["gateway", "node"])
async def test_nothing_is_smuggled_behind_a_request(world: World, door: str) -> None:
    """What follows a request is another request, with its own credential or none."""
    reader, writer = await asyncio.open_connection("127.0.0.1", world.ports[door])
    writer.write(call(f"Bearer {ADMIN}") + head("GET", "/admin/routes"))
    async with asyncio.timeout(5):
        first, second = await read_answer(reader), await read_answer(reader)
    assert (first.status, second.status) == (200, 401)
    writer.close()


# --- slow and many --------------------------------------------------------------------------------


@pytest.mark.parametrize("door", ["gateway", "node"])
async def test_slow_clients_are_given_up(world: World, door: str) -> None:
    """Heads and bodies that come by the byte, 40 at a time; others are answered meanwhile."""
    port = world.ports[door]
    began_s = time.monotonic()
    whole = head("POST", INFER, GOOD, f"Content-Length: {len(BODY)}")

    async def drip(first: bytes, then: bytes) -> Got:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        answer = asyncio.ensure_future(read_answer(reader))
        try:
            writer.write(first)
            async with asyncio.timeout(20 * TIMEOUT_S):
                for at in range(len(then)):
                    if answer.done():
                        break
                    with contextlib.suppress(OSError):
                        writer.write(then[at : at + 1])
                        await writer.drain()
                    await asyncio.sleep(0.05)
                return await answer
        finally:
            answer.cancel()
            writer.transport.abort()

    slow = [drip(whole[:10], whole[10:]) for _ in range(20)]
    slow += [drip(whole, BODY[:-1]) for _ in range(20)]
    under_way = asyncio.gather(*slow)
    for _ in range(5):
        assert (await ask(port, call(f"Bearer {ALICE}"))).status == 200
    got = await under_way
    assert {each.status for each in got[:20]} <= {0, 408}
    assert {each.status for each in got[20:]} == {408}
    assert time.monotonic() - began_s < 8 * TIMEOUT_S


async def test_a_client_has_its_quota(world: World) -> None:
    port = world.ports["gateway"]
    answers = [await ask(port, call(f"Bearer {POOR}")) for _ in range(4)]
    assert [got.status for got in answers] == [200, 200, 429, 429]
    first, refused = answers[0].headers, answers[2].headers
    assert first["ratelimit-policy"] == '"client";q=2;w=3600'
    assert first["ratelimit"].startswith('"client";r=1;t=')
    assert first["x-ratelimit-remaining"] == "1"
    assert refused["x-ratelimit-remaining"] == "0"
    assert 1700 < int(refused["retry-after"]) <= 1800
    check_says_nothing(answers[2])
    assert (await ask(port, call(f"Bearer {ALICE}"))).status == 200
    # A node counts nothing: what comes through gateways was counted there.
    assert (await ask(world.ports["node"], call(f"Bearer {POOR}"))).status == 200


async def test_keys_that_nobody_has_are_looked_for_once(world: World) -> None:
    before = world.key_server.asked
    for n in range(50):
        token = world.issuer.token(headers={"kid": f"new-{n}"})
        assert (await ask(world.ports["gateway"], call(f"Bearer {token}"))).status == 401
    assert world.key_server.asked - before <= 2, "one look a door, however many tokens ask for it"


async def test_memory_stays_bounded(world: World) -> None:
    """Bombs, large bodies and many connections at once, from clients with a credential."""
    for door in world.ports:
        await ask(world.ports[door], BROKEN["a gzip bomb"][0])
    before = world.rss()
    bomb = BROKEN["a gzip bomb"][0]
    large = call(f"Bearer {ALICE}", body=b"x" * (BODY_MB * 1_000_000 - 10))
    chunked = (
        head("POST", INFER, GOOD, "Transfer-Encoding: chunked")
        + (b"100000\r\n" + b"y" * 0x100000 + b"\r\n") * 20
    )
    unknown = call(None, body=b"z" * 1_900_000)
    for _ in range(3):
        await asyncio.gather(
            *(
                ask(port, sent, within_s=30)
                for port in world.ports.values()
                for sent in (bomb, large, chunked, unknown)
                for _ in range(6)
            )
        )
    grown = {name: world.rss()[name] - was for name, was in before.items()}
    assert all(each < RSS_GROWTH_BYTES for each in grown.values()), grown


async def test_a_verified_claim_takes_a_user_to_the_canary(world: World) -> None:
    """On the gateway, which chooses a node for it, and on the node, which chooses the version."""
    canary = {"version": "2", "rules": [{"user": {"claim": "tier", "percent": 100}}]}
    world.fleet.models.spec = {"canary": canary}
    revision = await world.fleet.models.put(world.fleet.store, "1")
    await world.fleet.until_applied(revision)
    tiered = world.issuer.token(tier="gold")
    forged = f"X-Claims: {json.dumps({'tier': 'gold'})}"
    for port in world.ports.values():

        async def goes_to_2(port: int = port) -> bool:
            got = await ask(port, call(f"Bearer {tiered}"))
            return got.headers["x-model-version"] == "2"

        await eventually(goes_to_2, within_s=10, what="the canary answers")
        for credential in (world.issuer.token(), ALICE):
            got = await ask(port, call(f"Bearer {credential}", INFER, forged))
            assert (got.status, got.headers["x-model-version"]) == (200, "1")


# --- the document changes -------------------------------------------------------------------------


async def test_a_bad_document_changes_nothing(world: World) -> None:
    store, port = world.fleet.store, world.ports["gateway"]
    good = await store.get(KEYS.gateway)
    assert good is not None
    await store.put(KEYS.gateway, good.value.replace(b'"RS256"', b'"none"'))

    async def report() -> dict[str, Any]:
        got = await ask(port, head("GET", "/admin/access", f"X-Api-Key: {ADMIN}"))
        assert got.status == 200
        shown: dict[str, Any] = json.loads(got.body)
        return shown

    async def is_refused() -> bool:
        return not (await report())["accepted"]

    await eventually(is_refused, within_s=5)
    shown = await report()
    assert shown["access"] == "on"
    assert shown["applied_revision"] == good.mod_revision
    assert shown["errors"][0]["path"] == "spec.access.jwt.algorithms[0]"
    assert b"sha256" not in json.dumps(shown).encode()
    assert (await ask(port, call(f"Bearer {world.issuer.token()}"))).status == 200
    assert (await ask(port, call(None))).status == 401
    await store.put(KEYS.gateway, good.value)

    async def is_accepted() -> bool:
        return bool((await report())["accepted"])

    await eventually(is_accepted, within_s=5)
