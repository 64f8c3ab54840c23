"""What the endpoints other than inference answer with, before it becomes HTTP."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import orjson

from router.http_errors import JSON

SERVER = "paddlewheel"
"""The ``Server`` header of every answer."""


class Reply(NamedTuple):
    """A status, a body and what else goes into the head."""

    status: int
    body: bytes
    content_type: str = JSON
    headers: Mapping[str, str] = {}


def json_reply(document: Any, status: int = 200, **headers: str) -> Reply:
    """Return ``document`` as JSON; header names are given with ``_`` for ``-``."""
    shown = {name.replace("_", "-"): value for name, value in headers.items()}
    return Reply(status, orjson.dumps(document), headers=shown)
