"""The load generator as a process of its own: a plan in, live counts and one result out.

The plan is one line of JSON on standard input; closing standard input (or dying) ends the run
early and still gives a result. Events come as lines of JSON on standard output: ``tick`` each
second, ``result`` at the end. A result of many samples goes through a file that both have open:
through the pipe, its last part was lost now and then.
"""

from __future__ import annotations

import asyncio
import base64
import importlib
import os
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, cast
from urllib.parse import urlsplit

import click
import orjson
import uvloop

from paddlewheel.bench import load
from paddlewheel.bench.report import load_table, print_table
from paddlewheel.bench.samples import Result, Sample
from registry.errors import PaddlewheelError

_END_TIMEOUT_S = 60.0


class LoadFailed(PaddlewheelError):
    """The generator's process ended without a result."""


@dataclass(frozen=True, slots=True)
class PlannedRequest:
    """One kind of request, with its judge named so that another process can make it."""

    name: str
    data: bytes
    weight: int = 1
    judge: str | None = None
    """``package.module:function``; called with ``judge_args``, it returns a `load.Verify`."""
    judge_args: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """JSON values only."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What `load.run` takes, as a value that fits into JSON."""

    host: str
    port: int
    requests: tuple[PlannedRequest, ...]
    rate_per_s: float
    duration_s: float
    connections_max: int = 64
    timeout_s: float = 30.0

    def dump(self) -> bytes:
        """One line of JSON."""
        requests = [
            {
                "name": request.name,
                "data": base64.b64encode(request.data).decode(),
                "weight": request.weight,
                "judge": request.judge,
                "judge_args": dict(request.judge_args),
            }
            for request in self.requests
        ]
        return orjson.dumps(
            {
                "host": self.host, "port": self.port, "requests": requests,
                "rate_per_s": self.rate_per_s, "duration_s": self.duration_s,
                "connections_max": self.connections_max, "timeout_s": self.timeout_s,
            }
        )  # fmt: skip

    @classmethod
    def parse(cls, line: bytes) -> Plan:
        """Read what `dump` wrote."""
        document = cast("dict[str, Any]", orjson.loads(line))
        rows = cast("list[dict[str, Any]]", document.pop("requests"))
        for row in rows:
            row["data"] = base64.b64decode(row["data"])
        requests = tuple(PlannedRequest(**row) for row in rows)
        return cls(requests=requests, **document)


class LoadProcess:
    """A running generator. Start it, do what is to be measured, then `stop` or `wait`."""

    def __init__(self, process: asyncio.subprocess.Process, reader: asyncio.Task[Result]) -> None:
        self._process = process
        self._reader = reader

    @property
    def pid(self) -> int:
        return self._process.pid

    @classmethod
    async def start(
        cls, plan: Plan, *, on_tick: Callable[[dict[str, Any]], None] | None = None
    ) -> LoadProcess:
        """Start the process. Requests begin to leave some 0.3 s later (a Python start)."""
        shared = tempfile.TemporaryFile()  # noqa: SIM115  closed by who reads it
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "paddlewheel.bench.load", "--json", "-",
            "--result-fd", str(shared.fileno()),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            pass_fds=(shared.fileno(),),
        )  # fmt: skip
        assert process.stdin is not None
        process.stdin.write(plan.dump() + b"\n")
        await process.stdin.drain()
        reader = asyncio.get_running_loop().create_task(_read_events(process, shared, on_tick))
        return cls(process, reader)

    async def stop(self) -> Result:
        """Send nothing more, wait for the answers under way, and return all samples."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        return await self.wait()

    async def wait(self) -> Result:
        """Wait for the end of the plan. Raises `LoadFailed` when there is no result."""
        try:
            result = await self._reader
        finally:
            await self.kill()
        return result

    async def kill(self) -> None:
        """End the process now, whatever it does. Safe to call more than once."""
        if self._process.returncode is None:
            try:
                async with asyncio.timeout(_END_TIMEOUT_S if self._reader.done() else 0):
                    await self._process.wait()
            except TimeoutError:
                self._process.kill()
                await self._process.wait()
        self._reader.cancel()


async def _read_events(
    process: asyncio.subprocess.Process,
    shared: IO[bytes],
    on_tick: Callable[[dict[str, Any]], None] | None,
) -> Result:
    assert process.stdout is not None
    with shared:
        while (line := await process.stdout.readline()).endswith(b"\n"):
            event = cast("dict[str, Any]", orjson.loads(line))
            if on_tick is not None and event["event"] == "tick":
                on_tick(event)
        code = await process.wait()
        shared.seek(0)
        written = shared.read()
    if not written.endswith(b"\n"):
        raise LoadFailed(f"the load generator ended with {code} and without a result")
    return Result.from_json(orjson.loads(written))


# --- the process itself -----------------------------------------------------------------------


def _judge(request: PlannedRequest) -> load.Verify | None:
    if request.judge is None:
        return None
    module, _, function = request.judge.partition(":")
    make = cast("Callable[..., load.Verify]", getattr(importlib.import_module(module), function))
    return make(**request.judge_args)


class _Ticker:
    """Counts since the last tick."""

    def __init__(self) -> None:
        self._recent: list[Sample] = []

    def add(self, sample: Sample) -> None:
        self._recent.append(sample)

    async def run(self) -> None:
        while True:
            await asyncio.sleep(1)
            recent = Result(self._recent)
            self._recent = []
            p99_s = recent.latency_s(99)
            _emit(
                {
                    "event": "tick",
                    "requests": len(recent),
                    "failed": recent.failed,
                    "versions": dict(recent.by(lambda sample: sample.version)),
                    "p99_ms": round(p99_s * 1e3, 3) if recent.samples else None,
                }
            )


def _emit(event: Mapping[str, Any]) -> None:
    # Whoever made the pipe may have made it non-blocking, and half a result is none.
    os.set_blocking(sys.stdout.fileno(), True)
    sys.stdout.buffer.write(orjson.dumps(event) + b"\n")
    sys.stdout.buffer.flush()


async def _run(plan: Plan, *, watch_stdin: bool, quiet: bool) -> Result:
    stop = asyncio.Event()
    ticker = _Ticker()
    requests = [load.Request(r.name, r.data, _judge(r), r.weight) for r in plan.requests]
    async with asyncio.TaskGroup() as group:
        helpers = [] if quiet else [group.create_task(ticker.run())]
        if watch_stdin:
            helpers.append(group.create_task(_stop_at_end_of_stdin(stop)))
        result = await load.run(
            plan.host, plan.port, requests,
            rate_per_s=plan.rate_per_s, duration_s=plan.duration_s,
            connections_max=plan.connections_max, timeout_s=plan.timeout_s,
            stop=stop, on_sample=ticker.add,
        )  # fmt: skip
        for helper in helpers:
            helper.cancel()
    return result


async def _stop_at_end_of_stdin(stop: asyncio.Event) -> None:
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader()
    transport, _ = await loop.connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), sys.stdin.buffer
    )
    try:
        await reader.read()
        stop.set()
    finally:
        transport.close()


@click.command("load")
@click.argument("plan_file", metavar="[PLAN|-]", required=False)
@click.option("--url", help="Instead of a plan: POST (GET without --body) to this http URL.")
@click.option("--body", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--content-type", default="application/json", show_default=True)
@click.option("--rate", "rate_per_s", default=50.0, show_default=True, help="Requests per second.")
@click.option("--duration", "duration_s", default=10.0, show_default=True, help="Seconds.")
@click.option("--timeout", "timeout_s", default=30.0, show_default=True, help="Per request.")
@click.option("--json", "as_json", is_flag=True, help="Events and the result as lines of JSON.")
@click.option("--result-fd", type=int, hidden=True, help="Write the result there instead.")
def main(
    plan_file: str | None,
    url: str | None,
    body: Path | None,
    content_type: str,
    rate_per_s: float,
    duration_s: float,
    timeout_s: float,
    as_json: bool,
    result_fd: int | None,
) -> None:
    """Send requests at a fixed rate, whether answers come or not, and report what came back.

    Exits 1 when a request failed.
    """
    if (plan_file is None) == (url is None):
        raise click.UsageError("want either a plan or --url")
    if url is not None:
        plan = _plan_for_url(url, body, content_type, rate_per_s, duration_s, timeout_s)
    elif plan_file == "-":
        plan = Plan.parse(_first_line_of_stdin())
    else:
        plan = Plan.parse(Path(plan_file or "").read_bytes())
    result = uvloop.run(_run(plan, watch_stdin=plan_file == "-", quiet=not as_json))
    if as_json:
        event = {"event": "result", **result.to_json(with_samples=plan_file is not None)}
        if result_fd is None:
            _emit(event)
        else:
            with os.fdopen(result_fd, "wb") as file:
                file.write(orjson.dumps(event) + b"\n")
    else:
        print_table(load_table(result))
    if result.failed:
        sys.exit(1)


def _first_line_of_stdin() -> bytes:
    """Read past Python's buffer: the event loop watches the descriptor for its end."""
    line = bytearray()
    while not line.endswith(b"\n"):
        chunk = os.read(sys.stdin.fileno(), 65536)
        if not chunk:
            break
        line += chunk
    return bytes(line)


def _plan_for_url(
    url: str,
    body: Path | None,
    content_type: str,
    rate_per_s: float,
    duration_s: float,
    timeout_s: float,
) -> Plan:
    parts = urlsplit(url)
    if parts.scheme != "http" or not parts.hostname:
        raise click.UsageError(f"want a URL like http://127.0.0.1:8500/..., got {url!r}")
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    data = load.http_request(
        "GET" if body is None else "POST",
        path,
        b"" if body is None else body.read_bytes(),
        host=parts.netloc,
        headers={"Content-Type": content_type},
    )
    return Plan(
        parts.hostname, parts.port or 80, (PlannedRequest("request", data),),
        rate_per_s, duration_s, timeout_s=timeout_s,
    )  # fmt: skip
