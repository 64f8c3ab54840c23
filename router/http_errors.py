"""The one table from error type to status, and the two shapes errors go out in."""

from __future__ import annotations

import math
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

import orjson

from registry.errors import PaddlewheelError
from registry.inference import (
    BadInput,
    DeadlineExceeded,
    InferenceError,
    Overloaded,
    Poisonous,
)
from router.access.errors import (
    AccessClosed,
    AccessError,
    NotPermitted,
    RateLimited,
    Unauthenticated,
)
from router.errors import (
    BadRequest,
    BodyTooLarge,
    Forbidden,
    MethodNotAllowed,
    NotFound,
    NothingServes,
    SlowUpload,
    UnknownModel,
    UnknownVersion,
    UnsupportedEncoding,
)
from router.floor import REVISION_HEADER, Behind
from router.pipeline.errors import PipelineBroken, StepFailed

STATUS: Mapping[type[PaddlewheelError], int] = {
    PipelineBroken: 503,
    BadInput: 400,
    BadRequest: 400,
    Unauthenticated: 401,
    NotPermitted: 403,
    Forbidden: 403,
    UnknownModel: 404,
    UnknownVersion: 404,
    NotFound: 404,
    MethodNotAllowed: 405,
    SlowUpload: 408,
    BodyTooLarge: 413,
    UnsupportedEncoding: 415,
    Poisonous: 422,
    RateLimited: 429,
    InferenceError: 500,
    AccessClosed: 503,
    NothingServes: 503,
    Overloaded: 503,
    DeadlineExceeded: 504,
}
"""The most specific entry of an error's bases counts; anything else is a 500."""

JSON = "application/json"
PROBLEM = "application/problem+json"
CLIENT_CLOSED = 499
"""Never sent, only counted: the client went away before its answer."""

OUTCOMES = ("ok", "client_error", "unavailable", "deadline", "failed", "cancelled")


def status_of(error: BaseException) -> int:
    """Return the status that ``error`` is answered with."""
    if isinstance(error, StepFailed):
        own = status_of(error.error)
        return 503 if own == 404 else own  # what a step lacks, the client never asked for
    for base in type(error).__mro__:
        status = STATUS.get(base)
        if status is not None:
            return status
    return 500


def outcome_of(status: int) -> str:
    """Return the ``outcome`` label of a request that ended with ``status``; one of `OUTCOMES`."""
    if status < 400:
        return "ok"
    if status == CLIENT_CLOSED:
        return "cancelled"
    if status < 500:
        return "client_error"
    return {503: "unavailable", 504: "deadline"}.get(status, "failed")


def error_headers(error: BaseException, status: int) -> dict[str, str]:
    """Return what goes with ``error``: ``Retry-After``, ``Allow``, ``WWW-Authenticate`` ..."""
    headers: dict[str, str] = {}
    if isinstance(error, StepFailed):
        return error_headers(error.error, status)
    if status in (429, 503):
        retry_after_s = error.retry_after_s if isinstance(error, Overloaded) else 1.0
        headers["Retry-After"] = str(max(1, math.ceil(retry_after_s)))
    if isinstance(error, Behind):
        headers[REVISION_HEADER] = str(error.revision)
    if isinstance(error, MethodNotAllowed):
        headers["Allow"] = ", ".join(error.allow)
    if isinstance(error, AccessError):
        headers |= error.headers
    return headers


def error_body(
    error: BaseException, status: int, *, as_problem: bool, instance: str = "", **members: Any
) -> bytes:
    """Return the body: ``{"error": text}``, or RFC 9457's members with ``error`` beside them.

    Only what we raised on purpose is told to the client; a bug's text stays in the log.
    """
    text = str(error) if isinstance(error, PaddlewheelError) else "internal error"
    document: dict[str, Any] = {"error": text}
    if as_problem:
        document |= {
            "type": "about:blank",
            "title": HTTPStatus(status).phrase,
            "status": status,
            "detail": text,
            "instance": instance,
            "code": type(error).__name__ if isinstance(error, PaddlewheelError) else "Internal",
        }
        if isinstance(error, UnknownVersion):
            document["loaded_versions"] = list(error.loaded)
        document |= {name: value for name, value in members.items() if value is not None}
    return orjson.dumps(document)
