"""The load generator: its schedule does not wait for the server, and it loses nothing."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import math
import time
from collections.abc import AsyncGenerator, Awaitable, Callable

import pytest

from paddlewheel.bench import load
from paddlewheel.bench.load import Request, http_request
from paddlewheel.bench.load_process import LoadProcess, Plan, PlannedRequest
from paddlewheel.bench.samples import Result, Sample, percentile

Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]

GET = http_request("GET", "/")
ANSWER = (
    b"HTTP/1.1 200 OK\r\nX-Model-Version: 7\r\nX-Model-Route: canary; rule=header\r\n"
    b"Content-Length: 2\r\n\r\nok"
)


@contextlib.asynccontextmanager
async def serving(handler: Handler) -> AsyncGenerator[int]:
    """A raw server on a free port of loopback; its connections end with it."""
    handlers: set[asyncio.Task[None]] = set()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        handlers.add(task)
        try:
            # Ends with the connection, and so with the generator that opened it.
            with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
                await handler(reader, writer)
        finally:
            writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        await asyncio.wait_for(asyncio.gather(*handlers), 10)
        await server.wait_closed()


def answering(answer: bytes = ANSWER) -> Handler:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(answer)

    return handle


def sample(due_s: float, latency_s: float, **fields: str | None) -> Sample:
    failure = fields.get("failure")
    version = fields.get("version") or "1"
    return Sample("json", due_s, latency_s, 200, version, "stable", failure)


@pytest.mark.parametrize(
    ("percent", "wanted"), [(0, 1.0), (50, 5.0), (90, 9.0), (99, 10.0), (100, 10.0)]
)
def test_percentile_is_a_measured_value(percent: float, wanted: float) -> None:
    assert percentile([float(n) for n in range(10, 0, -1)], percent) == wanted


def test_percentile_of_nothing() -> None:
    assert math.isnan(percentile([], 99))


def test_longest_gap_counts_good_answers_only() -> None:
    result = Result(
        [sample(0, 0.1), sample(1, 0.1, failure="status 503"), sample(2, 0.1)], 0.0, 2.2
    )
    assert result.longest_gap_s() == pytest.approx(2.0)


def test_longest_gap_reaches_to_the_end() -> None:
    assert Result([sample(0, 0.1)], 0.0, 5.1).longest_gap_s() == pytest.approx(5.0)


def test_window_takes_requests_by_the_time_they_were_due() -> None:
    result = Result([sample(0, 5), sample(1, 0.1), sample(2, 0.1)], 0.0, 3.0)
    assert [s.due_s for s in result.window(1, 2)] == [1]
    assert result.window(1, 2).latency_s(100) == 0.1


def test_result_survives_json() -> None:
    result = Result([sample(0, 0.5), sample(1, 0.25, failure="late")], 0.0, 2.0)
    assert Result.from_json(result.to_json()) == result
    assert result.summary()["failures"] == {"late": 1}


def test_mix_keeps_the_weights_in_every_round() -> None:
    kinds = [Request("a", GET, weight=3), Request("b", GET)]
    names = [request.name for request in itertools.islice(load.mix(kinds), 8)]
    assert names[:4].count("a") == 3
    assert names == names[:4] * 2


async def test_every_request_is_sent_on_time_and_told_apart() -> None:
    async with serving(answering()) as port:
        kinds = [Request("a", GET), Request("b", GET, weight=3)]
        result = await load.run("127.0.0.1", port, kinds, rate_per_s=200, duration_s=0.5)
    assert len(result) == 100
    assert result.failed == 0
    assert result.by(lambda s: s.name) == {"a": 25, "b": 75}
    assert result.by(lambda s: s.version) == {"7": 100}
    assert result.by(lambda s: s.route) == {"canary": 100}
    due = sorted(s.due_s - result.started_s for s in result)
    assert due == pytest.approx([n / 200 for n in range(100)], abs=1e-6)


async def test_a_stall_is_charged_to_every_request_it_delayed() -> None:
    """A closed loop would report one slow request; here all that were due meanwhile are slow."""
    stall_s = 0.4
    stalled = False

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal stalled
        while True:
            await reader.readuntil(b"\r\n\r\n")
            if not stalled:
                stalled = True
                time.sleep(stall_s)  # noqa: ASYNC251 (the loop itself stalls, the generator's too)
            writer.write(ANSWER)

    async with serving(handle) as port:
        kinds = [Request("a", GET)]
        result = await load.run("127.0.0.1", port, kinds, rate_per_s=100, duration_s=1.0)
    slow = [s for s in result if s.latency_s > 0.1]
    assert len(result) == 100
    assert result.failed == 0
    assert len(slow) >= 25, "0.4 s at 100/s delay some 40, of them 30 by more than 0.1 s"
    assert result.latency_s(100) >= stall_s * 0.95


async def test_requests_wait_when_all_connections_are_busy() -> None:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            await reader.readuntil(b"\r\n\r\n")
            await asyncio.sleep(0.05)
            writer.write(ANSWER)

    async with serving(handle) as port:
        result = await load.run(
            "127.0.0.1", port, [Request("a", GET)], rate_per_s=100, duration_s=0.2,
            connections_max=2,
        )  # fmt: skip
    assert len(result) == 20
    assert result.failed == 0
    assert result.latency_s(100) > 0.25, "20 answers of 50 ms over 2 connections take 0.5 s"


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (ANSWER.replace(b"200 OK", b"503 Busy"), "status 503"),
        (b"HTTP/1.1 200 OK\r\n\r\nok", "not an answer with a Content-Length"),
        (b"nonsense\r\n\r\n", "not an answer"),
        (b"x" * 70_000, "headers without end"),
    ],
)
async def test_bad_answers_are_failures_with_a_reason(answer: bytes, why: str) -> None:
    async with serving(answering(answer)) as port:
        kinds = [Request("a", GET)]
        result = await load.run("127.0.0.1", port, kinds, rate_per_s=20, duration_s=0.2)
    assert result.failed == len(result) == 4
    assert all(reason.startswith(why) for reason in result.failures())


async def test_a_connection_closed_instead_of_an_answer_is_a_lost_request() -> None:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.close()

    async with serving(handle) as port:
        kinds = [Request("a", GET)]
        result = await load.run("127.0.0.1", port, kinds, rate_per_s=20, duration_s=0.2)
    assert result.failures() == {"connection closed": 4}


async def test_silence_ends_with_a_timeout() -> None:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    async with serving(handle) as port:
        kinds = [Request("a", GET)]
        result = await load.run(
            "127.0.0.1", port, kinds, rate_per_s=20, duration_s=0.1, timeout_s=0.2
        )
    assert result.failures() == {"timeout": 2}


async def test_nobody_listening_is_a_failure() -> None:
    async with serving(answering()) as port:
        pass
    kinds = [Request("a", GET)]
    result = await load.run("127.0.0.1", port, kinds, rate_per_s=20, duration_s=0.1)
    assert len(result) == 2
    assert all(reason.startswith("no connection") for reason in result.failures())


async def test_answers_in_pieces_are_put_together() -> None:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            await reader.readuntil(b"\r\n\r\n")
            for at in range(0, len(ANSWER), 9):
                writer.write(ANSWER[at : at + 9])
                await writer.drain()
                await asyncio.sleep(0)

    seen: list[bytes] = []

    def verify(status: int, headers: load.Headers, body: bytes) -> str | None:
        seen.append(body)
        return None if headers["x-model-version"] == "7" else "wrong version"

    async with serving(handle) as port:
        kinds = [Request("a", GET, verify)]
        result = await load.run("127.0.0.1", port, kinds, rate_per_s=50, duration_s=0.1)
    assert result.failed == 0
    assert seen == [b"ok"] * 5


async def test_what_verify_says_is_the_reason_and_so_is_its_stumbling() -> None:
    def stumbling(status: int, headers: load.Headers, body: bytes) -> str | None:
        raise ValueError("not JSON")

    async with serving(answering()) as port:
        kinds = [Request("a", GET, lambda *_: "wrong text"), Request("b", GET, stumbling)]
        result = await load.run("127.0.0.1", port, kinds, rate_per_s=20, duration_s=0.2)
    assert result.failures() == {
        "wrong text": 2, "status 200, answer not understood: ValueError('not JSON')": 2,
    }  # fmt: skip


async def test_a_run_without_bound_is_refused() -> None:
    with pytest.raises(ValueError, match="more than"):
        await load.run("127.0.0.1", 1, [Request("a", GET)], rate_per_s=1e6, duration_s=3600)


async def test_the_process_stops_when_told_and_gives_all_samples() -> None:
    ticks: list[dict[str, object]] = []
    ticked = asyncio.Event()

    def on_tick(event: dict[str, object]) -> None:
        ticks.append(event)
        ticked.set()

    async with serving(answering()) as port:
        plan = Plan("127.0.0.1", port, (PlannedRequest("a", GET),), 50, duration_s=600)
        generator = await LoadProcess.start(plan, on_tick=on_tick)
        async with asyncio.timeout(60):
            await ticked.wait()
            result = await generator.stop()
    assert result.failed == 0
    assert len(result) >= sum(int(str(tick["requests"])) for tick in ticks)
    # All processes of a machine share the clock: windows cut here fit samples taken there.
    assert 0 <= time.monotonic() - result.ended_s < 30


def test_a_plan_survives_json() -> None:
    request = PlannedRequest("a", b"\x00\xff", 2, "paddlewheel.demo.traffic:direction_judge",
                             {"degrees": "0"})  # fmt: skip
    plan = Plan("127.0.0.1", 8500, (request,), 10.0, 5.0)
    assert Plan.parse(plan.dump()) == plan
