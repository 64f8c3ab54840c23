"""Requests of the command line to nodes: with a credential, and over TLS, where that is wanted.

``PADDLEWHEEL_API_KEY_FILE`` names a file with an API key or a token; ``PADDLEWHEEL_NODE_CA`` the CA
that signs the nodes' certificates. Never on the command line, where others could read them.
"""

from __future__ import annotations

import http.client
import os
import ssl
import urllib.request
from pathlib import Path
from typing import cast

from registry.errors import PaddlewheelError


class BadCredential(PaddlewheelError):
    """The file that should have a credential, or the CA, cannot be used."""


def open_node(request: urllib.request.Request, *, timeout_s: float) -> http.client.HTTPResponse:
    """As `urllib.request.urlopen`. Raises `BadCredential` besides."""
    name = os.environ.get("PADDLEWHEEL_API_KEY_FILE")
    if name:
        try:
            credential = Path(name).read_text().strip()
        except (OSError, UnicodeDecodeError) as exc:
            raise BadCredential(f"PADDLEWHEEL_API_KEY_FILE: {exc}") from exc
        if not credential.isascii() or not credential.isprintable():
            raise BadCredential(f"PADDLEWHEEL_API_KEY_FILE: {name}: want one line")
        request.add_unredirected_header("Authorization", f"Bearer {credential}")
    context = None
    if request.type == "https":
        authority = os.environ.get("PADDLEWHEEL_NODE_CA") or None
        try:
            context = ssl.create_default_context(cafile=authority)
        except (OSError, ssl.SSLError) as exc:
            raise BadCredential(f"PADDLEWHEEL_NODE_CA: {exc}") from exc
    opened = urllib.request.urlopen(request, timeout=timeout_s, context=context)
    return cast("http.client.HTTPResponse", opened)
