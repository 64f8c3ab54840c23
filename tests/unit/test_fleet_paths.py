"""Paths about a model, the headers around one request, and deadlines."""

from __future__ import annotations

import pytest

from router.deadline import parse_timeout_s, show_timeout_ms
from router.errors import BadRequest
from router.fleet.paths import ModelPath, model_path
from router.http_path import parse_target
from router.proxy import request_head, with_deadline

CASES: dict[str, ModelPath | None] = {
    "/v2/models/m/infer": ModelPath("m", is_inference=True),
    "/v2/models/m/versions/1.0/infer": ModelPath("m", "1.0", is_inference=True),
    "/v2/models/m": ModelPath("m"),
    "/v2/models/m/ready": ModelPath("m"),
    "/v2/models/m/versions/2": ModelPath("m", "2"),
    "/v2/models/m/versions/2/ready": ModelPath("m", "2"),
    "/v2/models/a%2Fb/infer": ModelPath("a/b", is_inference=True),
    "/v1/models/m/predict": ModelPath("m", is_inference=True),
    "/v1/models/m/versions/2/predict": ModelPath("m", "2", is_inference=True),
    "/v1/models/m:predict": ModelPath("m", is_inference=True),
    "/v1/models/m/versions/2:predict": ModelPath("m", "2", is_inference=True),
    "/v1/models/m/labels/canary:predict": ModelPath("m", None, "canary", is_inference=True),
    "/v1/models/m/metadata": ModelPath("m"),
    "/v1/models": None,
    "/v2/models": None,
    "/v2": None,
    "/": None,
    "/v3/models/m": None,
    "/admin/models/m": None,
    "/v2/health/ready": None,
}


@pytest.mark.parametrize(("path", "wanted"), CASES.items(), ids=CASES)
def test_paths(path: str, wanted: ModelPath | None) -> None:
    assert model_path(parse_target(path).segments) == wanted


def test_headers_of_one_connection_stay_there() -> None:
    given = [
        (b"Host", b"gateway:8600"), (b"Connection", b"keep-alive, X-Private"),
        (b"Keep-Alive", b"5"), (b"Transfer-Encoding", b"chunked"), (b"Content-Length", b"99"),
        (b"Te", b"trailers"), (b"Upgrade", b"h2c"), (b"Expect", b"100-continue"),
        (b"X-Private", b"1"), (b"X-User-Id", b"u"), (b"X-Forwarded-For", b"10.0.0.9"),
        (b"X-Request-Id", b"forged\t"), (b"X-Request-Timeout-Ms", b"999999"),
        (b"Inference-Header-Content-Length", b"12"),
    ]  # fmt: skip
    head = request_head(
        "POST", "/v2/models/m/infer", given, length=3, request_id="r1", peer="10.0.0.1"
    )
    assert with_deadline(head, 1.5).decode().split("\r\n") == [
        "POST /v2/models/m/infer HTTP/1.1",
        "Host: gateway:8600",
        "X-User-Id: u",
        "Inference-Header-Content-Length: 12",
        "X-Forwarded-For: 10.0.0.9, 10.0.0.1",
        "X-Request-Id: r1",
        "Content-Length: 3",
        "X-Request-Timeout-Ms: 1500",
        "",
        "",
    ]


def test_deadlines() -> None:
    assert parse_timeout_s(None) is None
    assert parse_timeout_s(" 250 ") == 0.25
    assert show_timeout_ms(0.0001) == "1"
    assert parse_timeout_s(show_timeout_ms(9.9999)) == 9.999
    for bad in ("", "0", "-1", "1.5", "1e3", "x", "9" * 10, "\u0661"):
        with pytest.raises(BadRequest):
            parse_timeout_s(bad)
