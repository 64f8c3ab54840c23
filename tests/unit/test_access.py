"""Tokens, keys, buckets and paths: what is decided about a request before anybody serves it."""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
from aiohttp.test_utils import make_mocked_request
from hypothesis import given
from hypothesis import strategies as st
from jwt.algorithms import RSAAlgorithm

from registry.gateway_spec import (
    Access,
    FrozenDict,
    GatewayDocument,
    GatewayLimits,
    Jwt,
    Rate,
    parse_gateway,
)
from registry.names import ModelName
from registry.schema import gateway_fields, gateway_schema
from registry.schema_reference import gateway_reference
from registry.spec import ConfigError
from router.access.api_keys import ApiKeys, digest_of, show_key
from router.access.buckets import BUCKETS_MAX, Buckets, Quota, headers
from router.access.errors import AccessClosed, AccessError, BadToken, RateLimited
from router.access.guard import Guard, Keyring
from router.access.jwks import UNKNOWN_KID_S, RemoteKeys
from router.access.keyring import BadKeys, KeySet, UnknownKey, read_jwks, secret_key, verify
from router.access.resources import Area, Resource, resource_of
from router.access.tokens import judge, read_token
from router.app import _v1_call  # pyright: ignore[reportPrivateUsage]
from router.fleet.paths import model_path
from router.http_path import parse_target
from tests.access import ALICE, SECRET, Issuer, gateway_document, handmade

ROOT = Path(__file__).parents[2]
ISSUER = Issuer()


def access_of(document: bytes) -> Access:
    access = parse_gateway(document).spec.access
    assert access is not None
    return access


def rules(**changes: object) -> Jwt:
    access = access_of(gateway_document(jwks_url="https://a.test/", secret_file=Path("/k")))
    assert access.jwt is not None
    return access.jwt.model_copy(update=changes)


# --- tokens ---------------------------------------------------------------------------------------


def test_a_good_token_says_who_it_is() -> None:
    caller = judge(read_token(ISSUER.token()).claims, rules(), now_s=time.time())
    assert (caller.id, caller.name, caller.is_admin) == ("sub:alice", "alice", False)
    assert caller.may_use("mlp")
    assert not caller.may_use("other")
    admin = ISSUER.claims(**{"x-model-permission": "*", "x-paddlewheel-admin": True})
    assert judge(admin, rules(), now_s=time.time()).may_use("whatever")
    assert judge(admin, rules(), now_s=time.time()).is_admin


@pytest.mark.parametrize(("off_s", "holds"), [(0, True), (604, True), (605, False), (-6, False)])
def test_times_count_with_leeway(off_s: float, holds: bool) -> None:
    claims = ISSUER.claims()
    now_s = claims["iat"] + off_s
    if holds:
        judge(claims, rules(), now_s=now_s)
        return
    with pytest.raises(BadToken):
        judge(claims, rules(), now_s=now_s)


def test_claims_that_the_document_wants() -> None:
    judge(ISSUER.claims(tenant="a"), rules(required=("tenant",)), now_s=time.time())
    with pytest.raises(BadToken, match="missing"):
        judge(ISSUER.claims(), rules(required=("tenant",)), now_s=time.time())


@given(st.binary(max_size=200), st.text(max_size=60))
def test_no_rubbish_passes_or_crashes(raw: bytes, text: str) -> None:
    for rubbish in (text, f"{text}.{text}.{text}", handmade(raw, raw, SECRET)):
        with pytest.raises(BadToken):
            read_token(rubbish)


@pytest.mark.parametrize("depth", [9, 100, 400, 700, 900, 1500, 3000])
def test_nesting_ends_at_a_refusal(depth: int) -> None:
    nested = b'{"a": ' + b"[" * depth + b"]" * depth + b"}"
    with pytest.raises(BadToken):
        read_token(handmade({"alg": "HS256"}, nested, SECRET))
    with pytest.raises(BadToken):
        read_token(handmade(b'{"alg": "HS256", ' + nested[1:], ISSUER.claims(), SECRET))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=8,
)
CLAIMS = st.dictionaries(
    st.sampled_from(["aud", "iss", "exp", "nbf", "iat", "sub", "x-model-permission", "a",
                     "x-paddlewheel-admin"]),
    JSON,
)  # fmt: skip
HEADERS = st.dictionaries(st.sampled_from(["kid", "typ", "alg", "crit", "cty"]), JSON)


@given(HEADERS, CLAIMS)
def test_signed_rubbish_is_refused_or_holds(header: dict[str, Any], claims: dict[str, Any]) -> None:
    """Whatever stands in a token that is rightly signed: one of the refusals, never a crash."""
    shown = {"alg": "HS256", **header}
    try:
        token = read_token(handmade(shown, {**ISSUER.claims(), **claims}, SECRET))
        verify(token, [secret_key(SECRET)], frozenset({"HS256"}))
        caller = judge(token.claims, rules(), now_s=time.time())
    except AccessError:
        return
    assert shown["alg"] == "HS256"
    assert caller.is_admin is token.claims.get("x-paddlewheel-admin", False)


# --- keys -----------------------------------------------------------------------------------------

ALL = frozenset({"RS256", "ES256", "HS256", "PS256", "HS512"})


def test_each_key_is_good_for_its_own_kind_alone() -> None:
    keys = read_jwks(json.dumps(ISSUER.jwks).encode())
    for algorithm in ("RS256", "ES256", "PS256"):
        kid, key = ("e1", ISSUER.ec_key) if algorithm == "ES256" else ("r1", ISSUER.rsa_key)
        token = read_token(ISSUER.token(algorithm, key=key, headers={"kid": kid}))
        verify(token, [keys], ALL)
        with pytest.raises(BadToken, match="algorithm"):
            verify(token, [keys], ALL - {algorithm})
    forged = read_token(handmade({"alg": "HS256", "kid": "r1"}, ISSUER.claims(), ISSUER.rsa_pem))
    with pytest.raises(UnknownKey):
        verify(forged, [keys], ALL)
    with pytest.raises(AccessClosed):
        verify(forged, [keys, None], ALL)  # the secret was not read yet
    with pytest.raises(BadToken, match="signature"):
        verify(forged, [keys, secret_key(SECRET)], ALL)
    verify(read_token(ISSUER.token("HS256")), [keys, secret_key(SECRET + b"\n")], ALL)


RSA, EC = ISSUER.jwks["keys"]
PRIVATE = {**json.loads(RSAAlgorithm.to_jwk(ISSUER.rsa_key)), "key_ops": ["verify"]}


@pytest.mark.parametrize(
    "jwks",
    [
        b"", b"[]", b"{}", b'{"keys": {}}', b'{"keys": []}', b"[" * 100_000, b"\xff",
        {"keys": [PRIVATE]}, {"keys": [{"kty": "oct", "k": "c2VjcmV0"}]},
        {"keys": [{**RSA, "use": "enc"}]}, {"keys": [{**RSA, "key_ops": ["encrypt"]}]},
        {"keys": [{**RSA, "alg": "HS256"}]}, {"keys": [{**RSA, "alg": "none"}]},
        {"keys": [{**RSA, "kid": 1}]}, {"keys": [{**RSA, "n": "AQAB"}]},
        {"keys": [{**RSA, "n": 7}]},
        {"keys": [{**EC, "crv": "P-384"}]}, {"keys": [{**EC, "x": EC["y"]}]}, {"keys": ["x", None]},
    ],
    ids=range(19),
)  # fmt: skip
def test_key_sets_that_are_no_use(jwks: object) -> None:
    with pytest.raises(BadKeys):
        read_jwks(jwks if isinstance(jwks, bytes) else json.dumps(jwks).encode())


def test_a_bad_key_leaves_the_others() -> None:
    keys = read_jwks(json.dumps({"keys": [{**RSA, "use": "enc"}, EC]}).encode())
    assert [key.kid for key in keys.keys] == ["e1"]
    assert len(keys.ignored) == 1


@pytest.mark.parametrize("secret", [b"", b"short", b"x" * 31, b"x" * 5000, ISSUER.rsa_pem])
def test_secrets_that_are_none(secret: bytes) -> None:
    with pytest.raises(BadKeys):
        secret_key(secret)


async def test_a_key_set_is_looked_for_again_once_for_many_tokens() -> None:
    answers = [json.dumps({"keys": [RSA]}).encode()]

    async def fetch(_url: str) -> bytes:
        return answers[-1]

    remote = RemoteKeys("https://a.test", refresh_s=600, fetch=fetch)
    await remote.refresh()
    assert remote.fetches == 1
    answers.append(json.dumps(ISSUER.jwks).encode())
    assert await remote.look_again()
    assert remote.keys is not None
    assert len(remote.keys.keys) == 2
    assert not await remote.look_again(), f"again within {UNKNOWN_KID_S} s"
    assert remote.fetches == 2
    answers.append(b"gone")
    before: KeySet = remote.keys
    await remote.refresh()
    assert remote.keys is before, "the last good set stays"
    assert remote.error is not None


async def test_what_was_seen_before_is_judged_again() -> None:
    """A token that was verified once holds no longer than its time, or than the key it is of."""
    now_s = [time.time()]
    keyring = Keyring(secret=secret_key(SECRET))
    document = parse_gateway(gateway_document(secret_file=Path("/k")))
    guard = Guard(
        document.spec.access, document.spec.limits, keyring, Buckets(), wall=lambda: now_s[0]
    )
    credential = {"Authorization": f"Bearer {ISSUER.token('HS256')}"}
    request = make_mocked_request("POST", "/", headers=credential)
    for _ in range(2):
        assert (await guard.admit(request, Resource(Area.MODEL, "mlp"))).caller.name == "alice"
    now_s[0] += 700
    with pytest.raises(BadToken, match="expired"):
        await guard.admit(request, Resource(Area.MODEL, "mlp"))
    now_s[0] -= 700
    keyring.secret = secret_key(b"x" * 64)
    with pytest.raises(BadToken, match="signature"):
        await guard.admit(request, Resource(Area.MODEL, "mlp"))
    keyring.secret = None
    with pytest.raises(AccessClosed):
        await guard.admit(request, Resource(Area.MODEL, "mlp"))


def test_only_keys_that_we_made_are_keys() -> None:
    keys = ApiKeys(access_of(gateway_document()).api_keys)
    assert keys.caller(ALICE).name == "alice"
    password = "correct horse battery staple"
    weak = access_of(
        json.dumps({"apiVersion": "paddlewheel/v1", "kind": "Gateway", "spec": {"access": {
            "api_keys": [{"id": "a", "sha256": hashlib.sha256(password.encode()).hexdigest()}]
        }}}).encode()
    )  # fmt: skip
    with pytest.raises(BadToken):
        ApiKeys(weak.api_keys).caller(password)
    with pytest.raises(ValueError, match="32"):
        show_key(b"short")
    assert len(digest_of(show_key(bytes(32)))) == 64


# --- rates ----------------------------------------------------------------------------------------


def test_a_bucket_empties_and_fills() -> None:
    quota = Quota("client", "a", Rate(requests=2, per_s=10, burst=3))
    buckets = Buckets()
    assert [buckets.spend([quota], now_s=100.0).refused_by for _ in range(3)] == [None] * 3
    refused = buckets.spend([quota], now_s=100.0)
    assert refused.refused_by is quota
    assert headers(refused) == {
        "RateLimit-Policy": '"client";q=2;w=10;burst=3', "RateLimit": '"client";r=0;t=15',
        "X-RateLimit-Limit": "3", "X-RateLimit-Remaining": "0", "X-RateLimit-Reset": "15",
        "Retry-After": "5",
    }  # fmt: skip
    assert buckets.spend([quota], now_s=104.9).refused_by is quota
    assert buckets.spend([quota], now_s=105.0).refused_by is None
    assert buckets.spend([quota], now_s=50.0).refused_by is quota, "a clock that went back"


def test_who_is_refused_by_one_bucket_takes_nothing_from_the_other() -> None:
    client = Quota("client", "a", Rate(requests=5))
    model = Quota("model", "m", Rate(requests=1))
    buckets = Buckets()
    assert buckets.spend([client, model], now_s=0).refused_by is None
    spent = buckets.spend([client, model], now_s=0)
    assert spent.refused_by is model
    assert [round(level.tokens) for _, level in spent.levels] == [4, 0]


def test_buckets_are_bounded() -> None:
    buckets = Buckets()
    for n in range(BUCKETS_MAX + 10):
        buckets.spend([Quota("client", str(n), Rate(requests=1))], now_s=0.0)
    assert len(buckets) == BUCKETS_MAX


async def test_limits_without_access_are_by_address_and_model() -> None:
    limits = GatewayLimits(
        per_client=Rate(requests=3, per_s=60),
        per_model=Rate(requests=4, per_s=60),
        models=FrozenDict({ModelName("small"): Rate(requests=1, per_s=60)}),
    )
    guard = Guard(None, limits, Keyring(), Buckets(), clock=lambda: 5.0)

    async def passes(address: str, model: str = "m") -> bool:
        request = make_mocked_request("POST", "/", transport=_From(address))
        try:
            await guard.admit(request, Resource(Area.MODEL, model))
        except RateLimited:
            return False
        return True

    assert [await passes("10.0.0.1") for _ in range(4)] == [True, True, True, False]
    assert await passes("10.0.0.2")
    assert not await passes("10.0.0.3"), "the model's four are gone"
    assert [await passes("10.0.0.4", "small"), await passes("10.0.0.5", "small")] == [True, False]
    # One host has a whole /64 of addresses to ask from.
    assert [await passes(f"2001:db8::{n}", "other") for n in range(4)] == [True, True, True, False]
    assert await passes("2001:db8:0:1::1", "other")
    assert await guard.is_admin(make_mocked_request("GET", "/"))


class _From(asyncio.Transport):
    """A connection from somewhere."""

    def __init__(self, address: str) -> None:
        super().__init__({"peername": (address, 1)})

    def write(self, data: bytes | bytearray | memoryview) -> None:
        raise AssertionError(data)


@given(st.lists(st.floats(0, 3, allow_nan=False), min_size=1, max_size=200))
def test_no_more_than_burst_and_rate_ever_passes(steps: list[float]) -> None:
    rate = Rate(requests=3, per_s=2, burst=5)
    quota, buckets, now_s, passed = Quota("client", "a", rate), Buckets(), 0.0, 0
    for step in steps:
        now_s += step
        passed += buckets.spend([quota], now_s=now_s).refused_by is None
        assert passed <= 5 + now_s * 1.5 + 1e-6


# --- paths ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "wanted"),
    {
        "/livez": Resource(Area.OPEN),
        "/livez/": Resource(Area.OPEN),
        "/livez/x": Resource(Area.OTHER),
        "/v2/health/ready": Resource(Area.OPEN),
        "/v2/health": Resource(Area.OTHER),
        "/admin/routes": Resource(Area.ADMIN),
        "//admin/routes": Resource(Area.ADMIN),
        "/admin": Resource(Area.ADMIN),
        "/%61dmin/routes": Resource(Area.ADMIN),
        "/metrics": Resource(Area.ADMIN),
        "/v2/repository/index": Resource(Area.LISTING),
        "/v2/repository/models/m/load": Resource(Area.ADMIN),
        "/v1/models": Resource(Area.LISTING),
        "/v1/models/m:predict": Resource(Area.MODEL, "m"),
        "/v1/models/m/versions/1:predict": Resource(Area.MODEL, "m"),
        "/v2/models/%6D/infer": Resource(Area.MODEL, "m"),
        "/v2/models/m%2Fx": Resource(Area.MODEL, "m/x"),
        "/v1/pipelines/p/predict": Resource(Area.MODEL, "p"),
        "/": Resource(Area.OTHER),
        "*": Resource(Area.OTHER),
    }.items(),
)
def test_what_a_path_is_about(path: str, wanted: Resource) -> None:
    assert resource_of(parse_target(path).segments) == wanted


PARTS = st.sampled_from(
    ["v1", "v2", "models", "m", "other", "versions", "labels", "1", "infer", "predict", "m:predict",
     "1:predict", "stable:predict", "ready", "", "..", "%2e%2e", "%2F", "m%00", "m%3Apredict", ":"]
)  # fmt: skip


@given(st.lists(PARTS, min_size=1, max_size=8))
def test_what_access_is_checked_for_is_what_is_served(parts: list[str]) -> None:
    """The model that a node would run, however the path is written, is the one that was asked
    about on the gateway: two readings of one path would be a way in."""
    segments = parse_target("/" + "/".join(parts)).segments
    served: str | None = None
    match segments:
        case ("v2", "models", model, "infer") | ("v2", "models", model, "versions", _, "infer"):
            served = model
        case ("v1", "models", *_):
            call = _v1_call(segments)
            served = None if call is None else call.model
        case _:
            pass
    if served is not None and ":" not in served:  # no model's name has a colon
        asked = model_path(segments)
        assert asked is not None
        assert asked.model == served
        assert resource_of(segments) == Resource(Area.MODEL, served)


# --- the document ---------------------------------------------------------------------------------


def test_examples_and_pages() -> None:
    for path in (ROOT / "configs/gateway").iterdir():
        parse_gateway(path.read_bytes())
    page = (ROOT / "docs/access.md").read_text()
    assert gateway_reference() in page, "print it with: python -m registry.schema_reference gateway"
    for text in re.findall(r"^```yaml\n(.*?)^```", page, re.MULTILINE | re.DOTALL):
        parse_gateway(text)
    assert gateway_schema()["title"] == "Paddlewheel gateway document"
    for field in gateway_fields():
        assert len(field.description) > 4, field
        assert field.kind != "any", field


def test_a_document_comes_back_as_it_was() -> None:
    parsed = parse_gateway((ROOT / "configs/gateway/access.yaml").read_bytes())
    written = parsed.model_dump(mode="json", by_alias=True, exclude_none=True)
    assert parse_gateway(json.dumps(written)) == parsed
    assert GatewayDocument.model_validate(parsed) is parsed


JWT = 'jwt: {algorithms: [RS256], keys: {jwks_url: "https://a.test/"}, audience: [a]}'
DIGEST = "a" * 64

BAD = {
    "access: {}": "spec.access (line 4): want jwt or api_keys: nobody could use anything",
    "acess: {}": "spec.acess (line 4): unknown field: did you mean access?",
    f"access: {{{JWT.replace('RS256', 'none')}}}": "jwt.algorithms[0] (line 4): want one of",
    f"access: {{{JWT.replace('RS256', 'HS256')}}}": "HS256 wants keys.secret_file",
    f"access: {{{JWT.replace('https', 'http')}}}": "jwks_url (line 4): want an https:// URL",
    f"access: {{{JWT.replace('//a', '//u:p@a')}}}": "without a user or password",
    f"access: {{{JWT.replace('[a]', '[]')}}}": "audience (line 4): want a list of one entry",
    f"access: {{api_keys: [{{id: a, sha256: {DIGEST}}}, {{id: a, sha256: {'b' * 64}}}]}}": (
        "spec.access.api_keys[1].id (line 4): is the same as spec.access.api_keys[0].id"
    ),
    "access: {api_keys: [{id: a, key: pwk_x}]}": "api_keys[0].key (line 4): unknown field",
    "access: {api_keys: [{id: a, sha256: $2b$12$abc}]}": "want the 64 hex digits of a sha256",
    f"access: {{api_keys: [{{id: a, sha256: {DIGEST}, models: m}}]}}": 'model names, or "*"',
    f"access: {{api_keys: [{{id: a, sha256: {DIGEST}, models: [a/b]}}]}}": "list of model names",
    "limits: {per_client: {requests: 0}}": "requests (line 4): want a whole number in 1..1000000",
    "limits: {per_client: {requests: 1, per_s: 0.5}}": "per_s (line 4): want whole seconds",
    "limits: {head_timeout_s: -1}": "head_timeout_s (line 4): want seconds",
    "upstream: {idle_s: 100}": "idle_s (line 4): want seconds in 0..70",
}


def test_a_key_written_for_its_digest_is_not_told_on() -> None:
    text = gateway_document().replace(digest_of(ALICE).encode(), ALICE.encode())
    with pytest.raises(ConfigError) as caught:
        parse_gateway(text)
    (error,) = caught.value.errors
    assert error.path == "spec.access.api_keys[0].sha256"
    assert "pwk_" not in str(caught.value)


@pytest.mark.parametrize(("text", "wanted"), BAD.items())
def test_bad_documents_are_refused_with_the_place(text: str, wanted: str) -> None:
    head = "apiVersion: paddlewheel/v1\nkind: Gateway\nspec:\n  "
    with pytest.raises(ConfigError) as caught:
        parse_gateway(head + text + "\n")
    assert any(wanted in str(error) for error in caught.value.errors), caught.value.errors
