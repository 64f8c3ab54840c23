"""Keys, tokens and a gateway document to test access control with; a server of key sets."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hmac
import json
import time
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jwt
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from jwt.algorithms import ECAlgorithm, RSAAlgorithm

from router.access.api_keys import digest_of, show_key

AUDIENCE = "paddlewheel"
ISSUER = "https://idp.test/"
ALICE, ADMIN, POOR = (show_key(bytes([n]) * 32) for n in (1, 2, 3))
"""API keys: of one model, of all with admin, of one with hardly any quota."""
SECRET = b"a secret of the tests, and longer than the sixty-four bytes of HS512"


def b64(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


def handmade(
    header: Mapping[str, Any] | bytes, claims: Mapping[str, Any] | bytes, key: bytes
) -> str:
    """A token signed with HMAC-SHA-256 whatever its header says."""
    parts = [
        b64(part if isinstance(part, bytes) else json.dumps(part).encode())
        for part in (header, claims)
    ]
    signed = ".".join(parts)
    return f"{signed}.{b64(hmac.digest(key, signed.encode(), 'sha256'))}"


@dataclass
class Issuer:
    """Whoever signs tokens, rightly."""

    rsa_key: rsa.RSAPrivateKey = field(
        default_factory=lambda: rsa.generate_private_key(65537, 2048)
    )
    ec_key: ec.EllipticCurvePrivateKey = field(
        default_factory=lambda: ec.generate_private_key(ec.SECP256R1())
    )

    @property
    def jwks(self) -> dict[str, Any]:
        public = {
            "r1": RSAAlgorithm.to_jwk(self.rsa_key.public_key()),
            "e1": ECAlgorithm.to_jwk(self.ec_key.public_key()),
        }
        return {
            "keys": [{**json.loads(jwk), "kid": kid, "use": "sig"} for kid, jwk in public.items()]
        }

    @property
    def rsa_pem(self) -> bytes:
        return self.rsa_key.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )

    def claims(self, **changes: Any) -> dict[str, Any]:
        """Good ones, for one model; ``None`` takes one away."""
        now = int(time.time())
        claims = {
            "iss": ISSUER, "aud": AUDIENCE, "sub": "alice", "iat": now, "exp": now + 600,
            "x-model-permission": ["mlp"],
        }  # fmt: skip
        return {name: value for name, value in {**claims, **changes}.items() if value is not None}

    def token(
        self,
        algorithm: str = "RS256",
        *,
        key: Any = None,
        headers: Mapping[str, Any] | None = None,
        **changes: Any,
    ) -> str:
        default = {"RS256": (self.rsa_key, "r1"), "ES256": (self.ec_key, "e1")}
        own, kid = default.get(algorithm, (SECRET, None))
        shown = {"kid": kid, **(headers or {})}
        return jwt.encode(
            self.claims(**changes),
            key or own,
            algorithm=algorithm,
            headers={name: value for name, value in shown.items() if value is not None},
        )


def gateway_document(
    *, jwks_url: str | None = None, secret_file: Path | None = None, **spec: Any
) -> bytes:
    """Access for API keys and, where keys are given, tokens. spec: ``limits`` and the like."""
    access: dict[str, Any] = {
        "api_keys": [
            {"id": "alice", "sha256": digest_of(ALICE), "models": ["mlp"]},
            {"id": "admin", "sha256": digest_of(ADMIN), "models": "*", "admin": True},
            {"id": "poor", "sha256": digest_of(POOR), "models": ["mlp"]},
        ]
    }
    keys: dict[str, str] = {}
    algorithms: list[str] = []
    if jwks_url is not None:
        keys["jwks_url"] = jwks_url
        algorithms += ["RS256", "ES256"]
    if secret_file is not None:
        keys["secret_file"] = str(secret_file)
        algorithms.append("HS256")
    if keys:
        access["jwt"] = {
            "algorithms": algorithms, "keys": keys, "audience": [AUDIENCE], "issuer": ISSUER,
            "leeway_s": 5,
        }  # fmt: skip
    document = {
        "apiVersion": "paddlewheel/v1", "kind": "Gateway", "spec": {"access": access, **spec}
    }  # fmt: skip
    return json.dumps(document).encode()


@dataclass
class KeyServer:
    """Serves a key set and counts."""

    jwks: Mapping[str, Any]
    url: str = ""
    asked: int = 0


@contextlib.asynccontextmanager
async def key_server(jwks: Mapping[str, Any]) -> AsyncGenerator[KeyServer]:
    served = KeyServer(jwks)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            await reader.readuntil(b"\r\n\r\n")
            served.asked += 1
            body = json.dumps(served.jwks).encode()
            writer.write(
                b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(body)
            )
            writer.write(body)
            await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    served.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/jwks.json"
    try:
        yield served
    finally:
        server.close()
