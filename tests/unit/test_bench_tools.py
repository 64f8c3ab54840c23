"""The closed-loop client, the comparison's arithmetic, the tables and the command's exit codes."""

from __future__ import annotations

import itertools
import json
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from click.testing import CliRunner

from paddlewheel.bench import front, responsiveness, tables
from paddlewheel.bench.closed_loop import BadAnswer, closed_loop
from paddlewheel.bench.footprint import footprint, pss_mb
from paddlewheel.bench.load import http_request
from paddlewheel.bench.subjects import one_version
from paddlewheel.cli import bench as command
from registry.names import ModelName
from registry.spec import parse_model

GET = http_request("GET", "/")
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello"


@contextmanager
def answering(*pieces: bytes) -> Iterator[int]:
    """A server that answers each request with these pieces, one packet each."""
    listener = socket.create_server(("127.0.0.1", 0))

    def converse(peer: socket.socket) -> None:
        with peer:
            peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            while peer.recv(65536):
                for piece in pieces:
                    peer.sendall(piece)

    def accept() -> None:
        while True:
            try:
                peer, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=converse, args=(peer,), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield listener.getsockname()[1]
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()


@pytest.mark.parametrize(
    "pieces", [(OK,), (OK[:20], OK[20:]), (OK[:-3], OK[-3:]), tuple(bytes([b]) for b in OK)]
)
def test_answers_are_read_whole_however_they_come(pieces: tuple[bytes, ...]) -> None:
    with answering(*pieces) as port:
        done = closed_loop("127.0.0.1", port, itertools.repeat(GET), concurrency=3, duration_s=0.1)
    assert done.requests > 10
    assert 0.1 <= done.duration_s < 5
    assert 0 < done.p50_s <= done.p99_s
    assert done.per_s == done.requests / done.duration_s


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\n\r\n", "503"),
        (b"HTTP/1.1 200 OK\r\n\r\n", "no Content-Length"),
    ],
)
def test_anything_but_a_good_answer_ends_the_measurement(answer: bytes, said: str) -> None:
    with answering(answer) as port, pytest.raises(BadAnswer, match=said):
        closed_loop("127.0.0.1", port, itertools.repeat(GET), concurrency=1, duration_s=5)


def test_ratios_are_taken_round_by_round() -> None:
    # A slow moment of the machine hits both: the ratio of each round is 1.5 all the same.
    seen = {
        "node tiny json x8": [{"per_s": 300.0, "p50_s": 0.001, "p99_s": 0.002},
                         {"per_s": 30.0, "p50_s": 0.01, "p99_s": 0.02}],
        "naive tiny x8": [{"per_s": 200.0, "p50_s": 0.001, "p99_s": 0.002},
                     {"per_s": 20.0, "p50_s": 0.01, "p99_s": 0.02}],
        "bare tiny": [{"per_s": 1000.0}, {"per_s": 100.0}],
    }  # fmt: skip
    run = front.figures(seen)
    assert run["ratios"] == {
        "node tiny json x8 / naive tiny x8": 1.5,
        "node tiny json x8 / bare tiny": 0.3,
    }
    assert run["systems"]["bare tiny"] == {"per_s": 550.0}
    assert run["systems"]["naive tiny x8"]["p50_ms"] == 5.5
    assert [c.holds for c in front.criteria(run)] == [True]
    assert tables.front(run)


def test_responsiveness_is_judged() -> None:
    seen = {"requests": 9, "failed": 0, "p50_ms": 1.0, "p90_ms": 2.0, "p99_ms": 3.0, "max_ms": 4.0}
    run = {
        "start_ms": {"process_to_http": 500.0},
        "livez": {"idle": seen, "loading": {**seen, "p99_ms": 21.0}},
        "front": {"paddle_mapped": True, "pss_mb": 90.0, "models": 11},
    }
    broken = [c.what for c in responsiveness.criteria(run) if not c.holds]
    assert broken == ["/livez p99, loading", "Paddle in the front's memory"]
    assert tables.responsiveness(run)


def test_its_document_is_a_good_one(tmp_path: Path) -> None:
    document = parse_model(one_version("small-1", tmp_path), name=ModelName("small-1"))
    assert document.spec.live == "1"


def test_a_footprint_counts_what_is_there() -> None:
    own = footprint(os.getpid())
    assert own.processes >= 1
    assert own.open_files > 3
    assert own.pss_mb >= pss_mb(os.getpid()) * 0.9 > 1
    assert 1 < own.own_mb < own.pss_mb
    assert not responsiveness.has_paddle(os.getpid())


def test_the_command_saves_and_judges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["routing", "--models", "2", "--rules", "3", "--requests", "500",
                 "--json", "--save", str(tmp_path)]  # fmt: skip
    done = CliRunner().invoke(command.bench, arguments)
    assert done.exit_code == 0, done.output
    run = json.loads(done.stdout)
    assert run["requests"] == 500
    assert run["machine"]["cores"] >= 1
    assert run["verdict"][0]["what"] == "p99 of a routing decision"
    assert json.loads((tmp_path / "routing.json").read_text()) == run

    monkeypatch.setattr(tables, "routing_criteria", lambda _run: [_broken_promise()])
    done = CliRunner().invoke(command.bench, arguments[:-3])
    assert done.exit_code == 1


def _broken_promise() -> object:
    from paddlewheel.bench.criteria import Criterion

    return Criterion("nothing lost", "1", "0", holds=False, is_promise=True)
