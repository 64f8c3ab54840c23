"""The gateway document as frozen values, or every error in it at once (pure).

It stands under ``P/configs/gateway`` and says who may use what, how much of it, and how nodes are
asked. Gateways and nodes follow the same one. No secret stands in it: keys are files on the
machine, a URL, or digests.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from annotated_types import Ge, Le, MaxLen, MinLen
from pydantic import (
    AfterValidator,
    Field,
    PlainSerializer,
    PlainValidator,
    StringConstraints,
    ValidationError,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import PydanticCustomError

from registry.document import Document, read
from registry.document_tree import (
    ConfigError,
    FieldError,
    Path,
    Scalar,
    Sequence,
    show_path,
)
from registry.names import ModelName, is_model_name
from registry.spec_errors import explain, in_order
from registry.spec_rules import Value
from registry.spec_values import (
    Bool,
    Count,
    FrozenDict,
    Labels,
    Megabytes,
    ModelNameText,
    PositiveSeconds,
    Sha256,
    Text,
    frozen,
    wants,
    wrong,
)

__all__ = [
    "Access",
    "ApiKey",
    "GatewayDocument",
    "GatewayLimits",
    "Jwt",
    "JwtKeys",
    "Models",
    "Rate",
    "UpstreamSpec",
    "parse_gateway",
]

ALL_MODELS = "*"
SYMMETRIC = ("HS256", "HS384", "HS512")
ASYMMETRIC = (
    "RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA",
)  # fmt: skip
LOOPBACK_HOSTS = frozenset({"localhost", "127.0.0.1", "::1"})

Models = frozenset[ModelName] | None
"""Which models; ``None``: all of them, written ``*``."""


def read_models(value: Any) -> Models:
    """A list of names, or ``*``, as a document or a token has it. Raises a ``want`` error."""
    if value == ALL_MODELS:
        return None
    if isinstance(value, tuple | list) and all(
        isinstance(name, str) and (name == ALL_MODELS or is_model_name(name)) for name in value
    ):
        names = frozenset(ModelName(name) for name in value)
        return None if ALL_MODELS in names else names
    raise wrong('a list of model names, or "*"')


def _written(models: Models) -> str | list[str]:
    return ALL_MODELS if models is None else sorted(models)


ModelsField = Annotated[
    Models,
    PlainValidator(read_models),
    PlainSerializer(_written, return_type=Any),
    WithJsonSchema(
        {"anyOf": [{"const": ALL_MODELS}, {"type": "array", "items": {"type": "string"}}]}
    ),
]

Algorithm = Annotated[
    Literal[
        "HS256", "HS384", "HS512", "RS256", "RS384", "RS512",
        "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA",
    ],
    wants(f"one of {', '.join((*SYMMETRIC, *ASYMMETRIC))}"),
]  # fmt: skip
ClientId = Annotated[
    str,
    StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._@-]{0,127}$"),
    wants("an id of letters, digits, '.', '_', '@' and '-' (at most 128)"),
]
ClaimName = Annotated[str, MinLen(1), MaxLen(128), wants("a claim's name")]
WholeSeconds = Annotated[int, Ge(1), Le(86_400), wants("whole seconds in 1..86400")]
Leeway = Annotated[float, Ge(0), Le(600), wants("seconds in 0..600")]


def _absolute(value: str) -> str:
    if not value.startswith("/") or any(char < " " for char in value):
        raise wrong("the absolute path of a file")
    return value


FilePath = Annotated[
    str,
    MinLen(2),
    MaxLen(4096),
    AfterValidator(_absolute),
    wants("the absolute path of a file"),
]
_WANT_URL = "an https:// URL (http:// only for this machine), without a user or password"


def _key_url(value: str) -> str:
    """Keys that come over a plain connection are whoever sits on it."""
    try:
        url = urlsplit(value)
        host = url.hostname
        _ = url.port
    except ValueError as exc:
        raise wrong(_WANT_URL) from exc
    plain = url.scheme == "http" and host in LOOPBACK_HOSTS
    if not host or not (url.scheme == "https" or plain) or url.username or url.password:
        raise wrong(_WANT_URL)
    if re.search(r"[\x00-\x20\x7f]", value) or url.fragment:
        raise wrong(_WANT_URL)
    return value


KeyUrl = Annotated[
    str, MinLen(8), MaxLen(4096), AfterValidator(_key_url), wants(_WANT_URL)
]  # fmt: skip


def _said(text: str) -> PydanticCustomError:
    return PydanticCustomError("said", "{said}", {"said": text})


class GatewayMetadata(Value):
    """What the document is about."""

    name: Annotated[Literal["gateway"], wants("gateway")] = "gateway"
    """``gateway``: there is one such document."""
    labels: Labels = Field(default_factory=FrozenDict[str, str])
    """Free text for people and tools."""


class JwtKeys(Value):
    """Where the keys are that tokens are signed with."""

    jwks_url: KeyUrl | None = None
    """A JSON Web Key Set to fetch; kept, fetched again in time and when a key is not in it."""
    jwks_file: FilePath | None = None
    """A JSON Web Key Set on each machine; read again when it changes."""
    secret_file: FilePath | None = None
    """A file with the secret of HS256 tokens, 32 bytes or more; read again when it changes."""
    refresh_s: Annotated[float, Ge(10), Le(86_400), wants("seconds in 10..86400")] = 600.0
    """Seconds between two fetches of ``jwks_url``."""

    @model_validator(mode="after")
    def _some_key(self) -> JwtKeys:
        if not (self.jwks_url or self.jwks_file or self.secret_file):
            raise _said("want jwks_url, jwks_file or secret_file")
        if self.jwks_url and self.jwks_file:
            raise _said("want jwks_url or jwks_file, got both")
        return self


class Jwt(Value):
    """JSON Web Tokens that are accepted as ``Authorization: Bearer``."""

    algorithms: Annotated[tuple[Algorithm, ...], Field(min_length=1)]
    """Those that a token may be signed with; no other is looked at."""
    keys: JwtKeys
    """Where the keys are that tokens are signed with."""
    audience: Annotated[tuple[Text, ...], Field(min_length=1)]
    """One of these has to be in the token's ``aud``."""
    issuer: Text | None = None
    """What the token's ``iss`` has to be."""
    leeway_s: Leeway = 30.0
    """Seconds that clocks may differ by."""
    required: tuple[ClaimName, ...] = ()
    """Further claims that a token must have; ``exp`` always is one."""
    permission_claim: ClaimName = "x-model-permission"
    """The claim with the models that the token is good for: a list of names, or ``*``."""
    admin_claim: ClaimName = "x-paddlewheel-admin"
    """The claim that is ``true`` in tokens that may use ``/admin`` and ``/metrics``."""

    @model_validator(mode="after")
    def _keys_fit(self) -> Jwt:
        shared = [name for name in self.algorithms if name in SYMMETRIC]
        public = [name for name in self.algorithms if name in ASYMMETRIC]
        has_public = bool(self.keys.jwks_url or self.keys.jwks_file)
        if shared and not self.keys.secret_file:
            raise _said(f"{shared[0]} wants keys.secret_file")
        if public and not has_public:
            raise _said(f"{public[0]} wants keys.jwks_url or keys.jwks_file")
        if self.keys.secret_file and not shared:
            raise _said("keys.secret_file is for HS256, HS384 or HS512, which are not listed")
        if has_public and not public:
            raise _said("a key set is for RS256, ES256 and the like, none of which is listed")
        return self


class ApiKey(Value):
    """A static key, made by ``paddlewheel access new-key`` and kept here as its digest."""

    id: ClientId
    """Whose it is: for rate limits and logs."""
    sha256: Sha256
    """Of the key's text."""
    models: ModelsField = frozenset()
    """The models that it is good for: a list of names, or ``*``."""
    admin: Bool = False
    """Whether it may use ``/admin`` and ``/metrics``."""


class Access(Value):
    """Who may use what. Without this section everybody may use everything."""

    jwt: Jwt | None = None
    """JSON Web Tokens that are accepted as ``Authorization: Bearer``."""
    api_keys: tuple[ApiKey, ...] = ()
    """Static keys, sent as ``X-Api-Key`` or ``Authorization: Bearer``."""

    @model_validator(mode="after")
    def _somebody(self) -> Access:
        if self.jwt is None and not self.api_keys:
            raise _said("want jwt or api_keys: nobody could use anything")
        return self


class Rate(Value):
    """A token bucket."""

    requests: Count
    """Requests that come back in ``per_s``."""
    per_s: WholeSeconds = 1
    """Seconds."""
    burst: Count | None = None
    """Requests that may come at once after a pause; as ``requests`` unless given."""


Connections = Annotated[int, Ge(1), Le(100_000), wants("a whole number in 1..100000")]


class GatewayLimits(Value):
    """How much of it."""

    per_client: Rate | None = None
    """For each API key, token subject, or address where nobody has to say who they are."""
    per_model: Rate | None = None
    """For each model, over all clients."""
    clients: Annotated[Mapping[ClientId, Rate], frozen] = Field(
        default_factory=FrozenDict[str, Rate]
    )
    """By API key's id or token's subject, instead of ``per_client``."""
    models: Annotated[Mapping[ModelNameText, Rate], frozen] = Field(
        default_factory=FrozenDict[ModelName, Rate]
    )
    """By model, instead of ``per_model``."""
    nodes: Bool = False
    """Whether nodes count requests too, each for itself: for nodes that clients ask directly."""
    max_body_mb: Megabytes | None = None
    """Size of a request's body where the model's own limit is higher."""
    head_timeout_s: PositiveSeconds = 20.0
    """Seconds in which a request's head has to arrive once it began."""
    body_timeout_s: PositiveSeconds = 60.0
    """Seconds in which its body has to arrive, and a client may leave its answer unread."""
    connections_per_client: Connections | None = None
    """Connections from one address at a time; one more is closed at once."""


class UpstreamSpec(Value):
    """How a gateway asks nodes."""

    connect_timeout_s: PositiveSeconds = 2.0
    """Seconds for a connection to be made; then another node is asked."""
    idle_max: Annotated[int, Ge(0), Le(10_000), wants("a whole number in 0..10000")] = 200
    """Connections to each node that are kept for later."""
    idle_s: Annotated[float, Ge(0), Le(70), wants("seconds in 0..70")] = 60.0
    """Seconds for which they are kept; nodes close theirs after 75."""
    replay_max_mb: Annotated[int, Ge(0), Le(1024), wants("a whole number in 0..1024")] = 8
    """Larger bodies pass as a stream and are not sent to a second node."""
    retry: Bool = True
    """Whether a request that failed on one node is sent to another."""


class GatewaySpec(Value):
    """What gateways, and nodes in front of clients, do."""

    access: Access | None = None
    """Who may use what. Without this section everybody may use everything."""
    limits: GatewayLimits = GatewayLimits()
    """How much of it."""
    upstream: UpstreamSpec = UpstreamSpec()
    """How a gateway asks nodes."""


class GatewayDocument(Value):
    """A whole document, as it stands under ``P/configs/gateway``."""

    api_version: Annotated[Literal["paddlewheel/v1"], wants("paddlewheel/v1")] = Field(
        validation_alias="apiVersion", serialization_alias="apiVersion"
    )
    """``paddlewheel/v1``"""
    kind: Annotated[Literal["Gateway"], wants("Gateway")]
    """``Gateway``"""
    metadata: GatewayMetadata = GatewayMetadata()
    """What the document is about."""
    spec: GatewaySpec
    """What gateways, and nodes in front of clients, do."""


def parse_gateway(text: bytes | str) -> GatewayDocument:
    """Parse a gateway document of YAML or JSON.

    Raises `ConfigError` with all that is wrong, in the text's order (at most 50 errors). Not for an
    event loop that serves: up to 0.3 s for the largest documents.
    """
    document = read(text)
    errors = list(document.errors)
    parsed: GatewayDocument | None = None
    try:
        parsed = GatewayDocument.model_validate(document.value, by_alias=True, by_name=False)
    except ValidationError as exc:
        errors += [_discreet(error) for error in explain(exc, document, GatewayDocument)]
    at_fault = {error.path for error in errors}
    errors += [error for error in _across(document) if error.path not in at_fault]
    if errors or parsed is None:
        raise ConfigError(in_order(errors))
    return parsed


def _discreet(error: FieldError) -> FieldError:
    """Without the value, where a key may stand by mistake for its digest: errors are logged."""
    if not error.path.endswith((".sha256", ".secret_file")):
        return error
    return replace(error, message=error.message.partition(", got ")[0])


def _across(document: Document) -> list[FieldError]:
    """Keys that stand there twice: which of the two would count?"""
    errors: list[FieldError] = []
    keys = document.node(("spec", "access", "api_keys"))
    for name in ("id", "sha256"):
        first_at: dict[str, Path] = {}
        for at in range(len(keys.items) if isinstance(keys, Sequence) else 0):
            path: Path = ("spec", "access", "api_keys", at, name)
            node = document.node(path)
            if not isinstance(node, Scalar):
                continue
            first = first_at.setdefault(node.raw.lower(), path)
            if first != path:
                message = f"is the same as {show_path(first)}"
                errors.append(FieldError(show_path(path), document.line(path), message))
    return errors
