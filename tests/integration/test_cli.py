"""The commands as a user runs them, each in a process of its own, on a real etcd."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from paddlewheel.promotion import promote_text
from registry.etcd import EtcdStore
from registry.keys import Keys
from registry.names import ModelName, NodeId, Revision, Version
from registry.records import HistoryEntry, ModelStatus, NodeRecord, Quarantine
from registry.spec import HeaderRule
from router.rules import compile_rules
from tests.etcd import EtcdCluster, etcd_cluster
from tests.eventually import eventually
from tests.integration.test_http_support import ONE as ONE_SIGNATURE
from tests.integration.test_http_support import (
    NumpyPredictor,
    one_model,
    running,
    servable,
    serving,
)

COMMAND = (sys.executable, "-m", "paddlewheel")
KEYS = Keys("/test")
OCR = ModelName("ocr")
NODE = NodeId("node-1")
AT = datetime(2024, 5, 21, 8, tzinfo=UTC)

ONE = """\
# owned by vision
apiVersion: paddlewheel/v1
kind: Model
metadata: {name: ocr}
spec:
  live: "1"    # since May
  versions:
    - {version: "1", source: /m/1}
    - {version: "2", source: /m/2}
"""
CANARY = f"""{ONE}  canary:
    version: "2"
    rules:
      - percent: 5
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[EtcdCluster]:
    with etcd_cluster() as started:
        yield started


@dataclass
class World:
    cluster: EtcdCluster
    store: EtcdStore
    folder: Path

    @property
    def environment(self) -> dict[str, str]:
        kept = {k: v for k, v in os.environ.items() if not k.startswith("PADDLEWHEEL_")}
        return kept | {
            "PADDLEWHEEL_ETCD": ",".join(self.cluster.endpoints),
            "PADDLEWHEEL_PREFIX": KEYS.prefix,
            "XDG_STATE_HOME": str(self.folder / "state"),
            "COLUMNS": "200",
        }

    async def run(
        self, *arguments: str, stdin: str | None = None, code: int = 0, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        """Run to the end; fail on another exit code, or on a traceback."""
        done = await asyncio.to_thread(
            subprocess.run,
            [*COMMAND, *arguments],
            input=stdin,
            capture_output=True,
            text=True,
            timeout=60,
            env=self.environment | environment,
            check=False,
        )
        assert done.returncode == code, (done.returncode, done.stdout, done.stderr)
        assert "Traceback" not in done.stderr
        return done

    async def json(self, *arguments: str) -> Any:
        return json.loads((await self.run(*arguments, "-o", "json")).stdout)

    def file(self, text: str, name: str = "ocr.yaml") -> str:
        (self.folder / name).write_text(text)
        return str(self.folder / name)

    async def text(self) -> str | None:
        kv = await self.store.get(KEYS.model(OCR))
        return None if kv is None else kv.value.decode()

    async def revision(self) -> Revision:
        kv = await self.store.get(KEYS.model(OCR))
        assert kv is not None
        return kv.mod_revision

    async def put(self, text: str) -> Revision:
        return await self.store.put(KEYS.model(OCR), text.encode())

    async def register(self, node: NodeId = NODE, http: str = "http://127.0.0.1:1") -> None:
        record = NodeRecord(id=node, http=http, started_at=AT, version="0.1.0")
        await self.store.put(KEYS.node(node), record.to_json())

    async def says(self, node: NodeId = NODE, **fields: Any) -> None:
        """What a node makes of the document."""
        record = ModelStatus(model=OCR, node=node, **fields)
        await self.store.put(KEYS.status(OCR, node), record.to_json())

    async def seen(self, revision: Revision, text: str) -> None:
        entry = HistoryEntry.of(revision, text.encode(), AT)
        await self.store.put(KEYS.history(OCR, revision), entry.to_json())

    @contextlib.asynccontextmanager
    async def running(self, *arguments: str) -> AsyncGenerator[Process]:
        process = await asyncio.create_subprocess_exec(
            *COMMAND,
            *arguments,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env=self.environment,
            # A shell's background jobs, and their children, are born deaf to Ctrl-C.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        seen = Process(process)
        try:
            yield seen
        finally:
            if process.returncode is None:
                process.kill()
            await process.wait()


class Process:
    """A command that stays, and its output, both streams in one."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.lines: list[str] = []

    async def until(self, pattern: str, within_s: float = 20.0) -> str:
        """The next line that matches."""
        assert self.process.stdout is not None
        try:
            async with asyncio.timeout(within_s):
                while raw := await self.process.stdout.readline():
                    self.lines.append(raw.decode().rstrip("\n"))
                    if re.search(pattern, self.lines[-1]):
                        return self.lines[-1]
        except TimeoutError:
            raise AssertionError(f"no {pattern!r} in {self.lines}") from None
        raise AssertionError(f"ended without {pattern!r}: {self.lines}")

    async def rest(self) -> int:
        """Read to the end; the exit code."""
        assert self.process.stdout is not None
        async with asyncio.timeout(20):
            self.lines += (await self.process.stdout.read()).decode().splitlines()
            return await self.process.wait()


@pytest.fixture
async def world(cluster: EtcdCluster, tmp_path: Path) -> AsyncIterator[World]:
    store = EtcdStore.connect(cluster.settings())
    try:
        yield World(cluster, store, tmp_path)
        await store.delete_prefix(KEYS.root)
    finally:
        await store.close()


# --- apply --------------------------------------------------------------------------------------


async def test_apply_writes_what_changed_and_nothing_else(world: World) -> None:
    file = world.file(ONE)
    done = await world.run("apply", "-f", file, "--dry-run")
    assert "+++ " in done.stdout
    assert "ocr created (dry run: not written)" in done.stdout
    assert await world.text() is None

    done = await world.run("apply", "-f", file)
    revision = await world.revision()
    assert f"ocr created (revision {revision})" in done.stdout
    assert await world.text() == ONE

    done = await world.run("apply", "-f", str(world.folder))
    assert done.stdout == f"ocr unchanged (revision {revision})\n"
    assert await world.revision() == revision

    done = await world.run("apply", "-f", "-", stdin=ONE.replace("since May", "since June"))
    assert '-  live: "1"    # since May\n+  live: "1"    # since June\n' in done.stdout
    assert f"ocr changed (revision {await world.revision()})" in done.stdout
    assert "\x1b" not in done.stdout  # no colours where nobody sees them


async def test_apply_says_all_that_is_wrong_and_writes_nothing(world: World) -> None:
    world.file(ONE, "a.yaml")
    world.file(ONE.replace("ocr}", "x}").replace('live: "1"', "live: 1\n  lives: 2"), "b.yaml")
    world.file("a: [", "c.yaml")
    done = await world.run("apply", "-f", str(world.folder), code=1)
    wrong = done.stderr.splitlines()
    assert wrong[0].startswith(f"{world.folder}/b.yaml:6: spec.live: ")
    assert wrong[1].startswith(f"{world.folder}/b.yaml:7: spec.lives: ")
    assert wrong[2].startswith(f"{world.folder}/c.yaml:")
    assert wrong[-1] == "paddlewheel: 3 problems, nothing written"
    assert await world.text() is None


async def test_apply_does_not_overwrite_what_changed_meanwhile(world: World) -> None:
    """Between the look and the write somebody else writes: theirs stands."""
    from paddlewheel.cli.connection import Connection
    from paddlewheel.cli.documents import parse_file
    from paddlewheel.cli.writing import Overtaken, plan, write
    from paddlewheel.etcd_options import Located

    await world.put(ONE)
    connection = Connection(world.store, KEYS, Located((), KEYS.prefix, ""))
    (change,) = await plan(connection, parse_file("f", CANARY.encode()).documents)
    theirs = ONE.replace("May", "April")
    revision = await world.put(theirs)
    with pytest.raises(Overtaken, match=f"revision {revision}"):
        await write(connection, change)
    assert await world.text() == theirs


async def test_wait_ends_when_every_node_has_it(world: World) -> None:
    await world.register()
    await world.register(NodeId("node-2"))
    async with world.running("apply", "-f", world.file(ONE), "--wait") as apply:
        await apply.until("node-2 unseen")
        revision = await world.revision()
        done: dict[str, Any] = {"revision": revision, "applied_revision": revision, "live": "1"}
        await world.says(**done)
        await apply.until("node-1 converged")
        loading = [{"model": OCR, "version": "1", "state": "LOADING"}]
        await world.says(NodeId("node-2"), revision=revision, servables=loading)
        await apply.until("node-2 loading: 1 LOADING")
        await world.says(NodeId("node-2"), **done)
        assert await apply.rest() == 0
    assert apply.lines[-1] == "in force on 2 nodes"


async def test_wait_fails_with_the_refusing_nodes_reason(world: World) -> None:
    await world.register()
    async with world.running("apply", "-f", world.file(ONE), "--wait") as apply:
        await apply.until("unseen")
        reason = "memory: want 5000 MB, 2048 MB left on cpu"
        await world.says(revision=await world.revision(), accepted=False, error=reason)
        assert await apply.rest() == 1
    assert apply.lines[-1] == f"paddlewheel: ocr: node-1: {reason}"


async def test_wait_fails_when_a_version_cannot_be_made_ready(world: World) -> None:
    await world.register()
    async with world.running("apply", "-f", world.file(ONE), "--wait") as apply:
        await apply.until("unseen")
        revision = await world.revision()
        failed = {"model": OCR, "version": "1", "state": "FAILED", "reason": "params: cut short"}
        await world.says(revision=revision, servables=[failed])
        assert await apply.rest() == 1
    assert apply.lines[-1] == "paddlewheel: ocr: node-1: 1 FAILED: params: cut short"


async def test_wait_does_not_believe_a_failure_of_the_document_before(world: World) -> None:
    """A node says that it saw a document before it has acted on it."""
    await world.register()
    async with world.running("apply", "-f", world.file(ONE), "--wait") as apply:
        await apply.until("unseen")
        revision = await world.revision()
        failed = {"model": OCR, "version": "1", "state": "FAILED", "reason": "old"}
        await world.says(revision=revision, servables=[failed])
        await apply.until("failed")
        await world.says(revision=revision, servables=[failed | {"state": "LOADING"}])
        await apply.until("loading")
        await world.says(revision=revision, applied_revision=revision, live="1")
        assert await apply.rest() == 0


async def test_wait_gives_up_and_says_who_is_missing(world: World) -> None:
    await world.register()
    file = world.file(ONE)
    done = await world.run("apply", "-f", file, "--wait", "--timeout", "0.5", code=1)
    assert "not converged after 0.5 s: ocr@" in done.stderr
    assert "node-1 unseen" in done.stderr


async def test_wait_ends_when_another_document_comes(world: World) -> None:
    await world.register()
    async with world.running("apply", "-f", world.file(ONE), "--wait") as apply:
        await apply.until("unseen")
        await world.put(CANARY)
        assert await apply.rest() == 1
    assert "came before" in apply.lines[-1]


async def test_wait_says_when_there_is_nobody_to_wait_for(world: World) -> None:
    done = await world.run("apply", "-f", world.file(ONE), "--wait")
    assert done.stderr == "no node is registered: nothing to wait for\n"


# --- rollout ------------------------------------------------------------------------------------


async def test_promote_keeps_the_users_text(world: World) -> None:
    await world.put(CANARY)
    done = await world.run("promote", "ocr")
    assert await world.text() == promote_text(CANARY).text == ONE.replace('live: "1"', 'live: "2"')
    assert "ocr: 1 -> 2" in done.stderr
    done = await world.run("promote", "ocr", code=1)
    assert "has no canary" in done.stderr
    done = await world.run("promote", "nope", code=1)
    assert "no document for 'nope'" in done.stderr


async def test_rollback_restores_the_last_valid_text_that_differs(world: World) -> None:
    good = await world.put(ONE)
    await world.seen(good, ONE)
    for text in ("a: [", CANARY, CANARY):
        await world.seen(await world.put(text), text)
    done = await world.run("rollback", "ocr")
    assert f"back to revision {good}" in done.stderr
    assert await world.text() == ONE
    assert await world.revision() > good  # a new write, not a step back in time


async def test_rollback_to_a_revision(world: World) -> None:
    first = await world.put(ONE)
    await world.seen(first, ONE)
    second = await world.put("a: [")
    await world.seen(second, "a: [")
    await world.run("rollback", "ocr", "--to", str(first), "--dry-run")
    assert await world.text() == "a: ["
    done = await world.run("rollback", "ocr", "--to", "1", code=1)
    assert f"no revision 1 in history; known: {first}, {second}" in done.stderr
    await world.run("rollback", "ocr", "--to", str(second), code=1)  # would be refused again
    await world.run("rollback", "ocr", "--to", str(first))
    assert await world.text() == ONE


async def test_rollback_brings_a_deleted_document_back(world: World) -> None:
    await world.seen(await world.put(ONE), ONE)
    await world.store.delete(KEYS.model(OCR))
    await world.run("rollback", "ocr")
    assert await world.text() == ONE


async def test_release_lifts_a_quarantine(world: World) -> None:
    key = KEYS.quarantine(OCR, Version("2"))
    held = Quarantine(reason="code 700, 3 in a row", code=700, nodes=(NODE,), at=AT)
    await world.store.put(key, held.to_json())
    done = await world.run("release", "ocr", "1", code=1)
    assert "not quarantined; quarantined: 2" in done.stderr
    done = await world.run("release", "ocr", "2")
    assert done.stdout == "ocr 2 released (was quarantined: code 700, 3 in a row)\n"
    assert await world.store.get(key) is None


# --- reading ------------------------------------------------------------------------------------


async def test_get(world: World) -> None:
    assert (await world.run("get")).stderr == "no documents\n"
    assert await world.json("get") == {"models": []}
    revision = await world.put(CANARY)
    assert (await world.run("get", "ocr")).stdout == CANARY
    shown = await world.json("get", "ocr")
    assert (shown["revision"], shown["document"]) == (revision, CANARY)
    (listed,) = (await world.json("get"))["models"]
    assert (listed["live"], listed["canary"], listed["versions"]) == ("1", "2", ["1", "2"])
    assert re.search(rf"^ocr +{revision} +1 +2 +1 2$", (await world.run("get")).stdout, re.M)
    done = await world.run("get", "nope", code=1)
    assert "there are: ocr" in done.stderr


async def test_diff(world: World) -> None:
    first = await world.put(ONE)
    await world.seen(first, ONE)
    second = await world.put(CANARY)
    await world.seen(second, CANARY)
    expected = f"--- ocr@{first}\n+++ ocr@{second}\n"
    assert (await world.run("diff", "ocr", str(first), str(second))).stdout.startswith(expected)
    assert (await world.run("diff", "ocr", str(first))).stdout.startswith(expected)
    assert (await world.run("diff", "-f", world.file(CANARY))).stdout == ""
    done = await world.run("diff", "-f", world.file(ONE), "--exit-code", code=1)
    assert "-  canary:" in done.stdout
    (shown,) = (await world.json("diff", "-f", world.file(ONE)))["differences"]
    assert (shown["model"], shown["from_revision"]) == ("ocr", second)
    await world.run("diff", "ocr", "1", code=1)


async def test_history(world: World) -> None:
    first = await world.put(ONE)
    await world.seen(first, ONE)
    second = await world.put("a: [")
    await world.seen(second, "a: [")
    shown = await world.json("history", "ocr")
    assert [each["revision"] for each in shown["history"]] == [first, second]
    assert shown["history"][0]["document"] == ONE
    assert shown["history"][0]["seen_at"] == "2024-05-21T08:00:00.000Z"
    lines = (await world.run("history", "ocr")).stdout.splitlines()
    assert lines[1].split()[:3] == [str(first), "2024-05-21T08:00:00.000Z", "1"]
    assert "not readable" in lines[2]
    await world.run("history", "nope", code=1)


async def test_status(world: World) -> None:
    revision = await world.put(ONE)
    await world.register()
    await world.says(revision=revision, applied_revision=revision, live="1", standby="0")
    (model,) = (await world.json("status"))["models"]
    assert model["model"] == "ocr"
    assert model["document_revision"] == revision
    assert model["intent"] == {"live": "1", "canary": None}
    assert [each["node"] for each in model["nodes"]] == ["node-1"]
    assert model["converged"] is True
    row = (await world.run("status", "ocr")).stdout.splitlines()[1]
    assert row.split() == ["ocr", str(revision), "1", "node-1", "1", "0", "converged", "-"]
    await world.run("status", "nope", code=1)


async def test_status_watch_prints_a_line_a_change(world: World) -> None:
    await world.register()
    async with world.running("status", "--watch") as status:
        revision = await world.put(ONE)
        await status.until("ocr .*unseen")
        await world.says(revision=revision, applied_revision=revision, live="1")
        await status.until("ocr .*converged")
        await world.store.delete(KEYS.model(OCR))
        await world.store.delete(KEYS.status(OCR, NODE))
        await status.until("ocr .*gone")
        status.process.send_signal(signal.SIGINT)
        assert await status.rest() == 130
    assert not any("Traceback" in line for line in status.lines)


async def test_nodes(world: World) -> None:
    await world.register()
    (node,) = (await world.json("nodes"))["nodes"]
    assert (node["id"], node["started_at"]) == ("node-1", "2024-05-21T08:00:00.000Z")
    assert "node-1  http://127.0.0.1:1  serving" in (await world.run("nodes")).stdout


async def test_events(world: World) -> None:
    def event(number: int, subject: str) -> tuple[str, bytes]:
        key = KEYS.event(f"01HYBZ0000000000000000000{number}")
        body = {"specversion": "1.0", "id": str(number), "type": "t", "subject": subject}
        body |= {"source": "/paddlewheel/nodes/node-7"}
        return key, json.dumps(body | {"data": "\x1b[31mred"}).encode()

    for number, subject in ((1, "ocr/1"), (2, "det/1")):
        await world.store.put(*event(number, subject))
    shown = await world.json("events")
    assert [each["id"] for each in shown["events"]] == ["1", "2"]
    shown = await world.json("events", "--model", "ocr")
    assert [each["id"] for each in shown["events"]] == ["1"]
    # What an event says must not be able to paint the terminal.
    listed = (await world.run("events")).stdout
    assert "\\x1b[31mred" in listed
    assert "  node-7 t ocr/1 " in listed
    async with world.running("events", "--follow", "--limit", "1") as events:
        assert "det/1" in await events.until("det/1")
        await world.store.put(*event(3, "ocr/2"))
        await events.until("ocr/2")
    assert not any("ocr/1" in line for line in events.lines)


async def test_schema_accepts_what_apply_accepts(world: World) -> None:
    schema = await world.json("schema")
    assert schema == json.loads((await world.run("schema")).stdout)
    jsonschema.validate(yaml.safe_load(CANARY), schema)
    broken = yaml.safe_load(CANARY)
    broken["spec"]["lives"] = 1
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(broken, schema)


async def test_doctor(world: World) -> None:
    shown = await world.json("doctor", "--skip-paddle", "--cache", str(world.folder / "c" / "d"))
    found = {check["name"]: check["finding"] for check in shown["checks"]}
    assert shown["ok"] is True
    assert found["cache"] == found["etcd read"] == "ok"
    done = await world.run("doctor", "--skip-paddle", "--etcd", "http://127.0.0.1:1", code=1)
    assert re.search(r"^FAIL +etcd http://127.0.0.1:1 +no answer", done.stdout, re.M)
    assert not (world.folder / "c").exists()  # it looks, and leaves nothing behind


async def test_explain_asks_a_node(world: World) -> None:
    """A real node's HTTP side, found through its registration."""
    canary = NumpyPredictor(servable("ocr", "2"), ONE_SIGNATURE, 2.0)
    rules = compile_rules(OCR, [HeaderRule(name="X-Canary", equals="1")])
    route, predictors = one_model("ocr", "1", ONE_SIGNATURE, canary=canary.id, rules=rules)
    async with running(serving((route, [*predictors, canary]))) as (_, url):
        done = await world.run("explain", "ocr", code=1)
        assert "no node is registered" in done.stderr
        await world.register(NodeId("gone"))
        await world.register(NODE, http=url)
        await world.says(NODE)
        shown = await world.json("explain", "ocr", "-H", "X-Canary: 1")
        assert (shown["version"], shown["route"], shown["rule"]["kind"]) == (
            "2",
            "canary",
            "header",
        )
        text = (await world.run("explain", "ocr", "--node", "node-1")).stdout
        assert re.search(r"^version: +1$", text, re.M)
        text = (await world.run("explain", "ocr", "--node", url, "--etcd", "127.0.0.1:1")).stdout
        assert re.search(r"^route: +stable$", text, re.M)
        done = await world.run("explain", "nope", "--node", url, code=1)
        assert "HTTP 404" in done.stderr
        done = await world.run("explain", "ocr", "--node", "gone", code=1)
        assert "no answer" in done.stderr
        done = await world.run("explain", "ocr", "--node", "other", code=1)
        assert "registered: gone, node-1" in done.stderr
        await world.run("explain", "ocr", "-H", "no colon", code=2)


# --- sync, weather, terminals -------------------------------------------------------------------


async def test_sync_through_an_outage(world: World) -> None:
    world.file(ONE, "docs.yaml")
    member = world.cluster.members[0]
    async with world.running("sync", str(world.folder)) as sync:
        await sync.until("ocr applied")
        world.file("a: [", "docs.yaml")
        await sync.until(r"refused: .*docs\.yaml:\d+: ")
        member.kill()
        world.file(CANARY, "docs.yaml")
        await sync.until("retrying", within_s=40)
        member.start()
        await sync.until("ocr applied", within_s=40)
        sync.process.send_signal(signal.SIGTERM)
        assert await sync.rest() == 0
    assert await world.text() == CANARY


async def test_etcd_away_is_one_line(world: World) -> None:
    done = await world.run("get", "--etcd", "http://127.0.0.1:1", code=1)
    (line,) = done.stderr.splitlines()
    assert line.startswith("paddlewheel: etcd at http://127.0.0.1:1 (--etcd or PADDLEWHEEL_ETCD)")
    done = await world.run("get", "--etcd", "ftp://x", code=2)
    assert "--etcd: 'ftp://x'" in done.stderr


async def test_a_closed_pipe_is_not_an_error(world: World) -> None:
    for number in range(50):
        await world.store.put(
            KEYS.model(ModelName(f"m{number}")), ONE.replace("ocr", f"m{number}").encode()
        )
    done = await asyncio.to_thread(
        subprocess.run,
        ["/bin/sh", "-c", f"{' '.join(COMMAND)} get | head -1"],
        capture_output=True,
        text=True,
        env=world.environment,
        timeout=30,
        check=False,
    )
    assert done.stdout.startswith("MODEL")
    assert done.stderr == ""


def on_a_terminal(arguments: Sequence[str], environment: dict[str, str]) -> str:
    """What a terminal of 120 columns gets to see."""
    parent, child = pty.openpty()
    with subprocess.Popen(
        [*COMMAND, *arguments],
        stdin=child,
        stdout=child,
        stderr=child,
        env=environment | {"TERM": "xterm-256color", "COLUMNS": "120"},
    ) as process:
        os.close(child)
        seen = b""
        deadline_s = time.monotonic() + 30
        while time.monotonic() < deadline_s:
            try:
                data = os.read(parent, 65536)
            except OSError:  # EIO: the other side is closed
                break
            if not data:
                break
            seen += data
        process.wait(10)
    os.close(parent)
    return seen.decode()


async def test_a_terminal_gets_colours_and_a_bar(world: World) -> None:
    await world.register()
    waiting = asyncio.create_task(
        asyncio.to_thread(
            on_a_terminal, ["apply", "-f", world.file(ONE), "--wait"], world.environment
        )
    )

    async def written() -> bool:
        return await world.text() is not None

    await eventually(written, within_s=20)
    revision = await world.revision()
    await world.says(revision=revision, applied_revision=revision, live="1")
    seen = await waiting
    assert "\x1b[32m+" in seen
    assert "1/1 nodes" in seen
    without = await asyncio.to_thread(on_a_terminal, ["get"], world.environment | {"NO_COLOR": "1"})
    assert "\x1b[3" not in without
    assert "ocr" in without
