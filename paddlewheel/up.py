"""`paddlewheel up`: an etcd, nodes and a folder of documents on one machine, kept running.

Each node is a process of its own (`paddlewheel node`), as it would be on a machine of its own;
what ends without being asked to is started again at the same address.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
import structlog
import uvloop

from paddlewheel import state_file
from paddlewheel.embedded_etcd import EmbeddedEtcd, EtcdNotStarted
from paddlewheel.etcd_options import EtcdOptions
from paddlewheel.logs import configure_logs
from paddlewheel.parentage import end_with_parent
from paddlewheel.settings import parse_listen
from paddlewheel.sync import FolderSync, Report
from registry.errors import PaddlewheelError
from registry.etcd import EtcdSettings, EtcdStore
from registry.keys import Keys

log = structlog.get_logger(__name__)

NODE_READY_TIMEOUT_S = 60.0
GATEWAY_PORT = 8600
RESTART_DELAY_S = 0.5


class NodeNotStarted(PaddlewheelError):
    """A node ended, or did not listen in time."""


@dataclass(frozen=True, slots=True)
class UpSettings:
    """What `up` is told; the fields after ``ephemeral`` go on to each node as they are."""

    etcd: EtcdOptions | None
    """``None``: an embedded one."""
    prefix: str
    listen: str
    node_count: int
    gateway: bool
    config_dir: Path | None
    data: Path | None
    ephemeral: bool
    devices: tuple[str, ...]
    cache: Path
    cache_max_mb: int | None
    lease_ttl_s: int
    allow_sources: tuple[str, ...]
    load_timeout_s: float
    drain_s: float
    drain_delay_s: float
    enable_drills: bool
    require_access: bool
    insecure: bool
    transform_workers: int | None

    def openness_flags(self) -> list[str]:
        """For nodes and the gateway."""
        flags = ["--require-access"] if self.require_access else []
        return [*flags, "--insecure"] if self.insecure else flags

    def node_flags(self) -> list[str]:
        """The command line of a node, without its own id, address and etcd."""
        flags = [
            "--prefix", self.prefix, "--cache", str(self.cache),
            "--lease-ttl", str(self.lease_ttl_s), "--load-timeout", str(self.load_timeout_s),
            "--drain", str(self.drain_s), "--drain-delay", str(self.drain_delay_s),
        ]  # fmt: skip
        for device in self.devices:
            flags += ["--device", device]
        for prefix in self.allow_sources:
            flags += ["--allow-source", prefix]
        if self.cache_max_mb is not None:
            flags += ["--cache-max-mb", str(self.cache_max_mb)]
        if self.transform_workers is not None:
            flags += ["--transform-workers", str(self.transform_workers)]
        if self.enable_drills:
            flags.append("--enable-drills")
        return [*flags, *self.openness_flags()]


def run_up(settings: UpSettings) -> int:
    """Run until SIGTERM or Ctrl-C; returns the exit status."""
    configure_logs()
    return uvloop.run(_Up(settings).run())


class _Node:
    """One node process, started again when it ends by itself."""

    def __init__(self, index: int, address: str, flags: Sequence[str]) -> None:
        self.id = f"node-{index + 1}"
        self._address = address
        self._flags = flags
        self._command: tuple[str, ...] = ("node", "--id", self.id)
        self._process: asyncio.subprocess.Process | None = None
        self._stopping = False
        self.ready: dict[str, Any] = {}

    async def start(self) -> None:
        """Start it and wait for its ready line. Raises `NodeNotStarted`."""
        self._process = process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "paddlewheel", *self._command,
            "--listen", self._address, *self._flags,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            start_new_session=True,  # Ctrl-C is for us; nodes are drained first
            preexec_fn=end_with_parent(signal.SIGTERM),
        )  # fmt: skip
        assert process.stdout is not None
        try:
            async with asyncio.timeout(NODE_READY_TIMEOUT_S):
                line = await process.stdout.readline()
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            raise NodeNotStarted(f"{self.id} did not listen in time") from None
        if not line:
            status = await process.wait()
            raise NodeNotStarted(f"{self.id} ended with {status} at its start; see its log above")
        self.ready = orjson.loads(line)
        self._address = self.ready["http"].removeprefix("http://")

    async def supervise(self) -> None:
        """Start it again whenever it ends, at the address it had."""
        while True:
            assert self._process is not None
            status = await self._process.wait()
            if self._stopping:
                return
            log.warning("node_ended", node=self.id, status=status)
            await asyncio.sleep(RESTART_DELAY_S)
            try:
                await self.start()
            except (NodeNotStarted, OSError) as exc:
                log.warning("node_not_restarted", node=self.id, reason=str(exc))
            else:
                log.info("node_restarted", node=self.id, pid=self._process.pid)

    async def stop(self, timeout_s: float) -> None:
        self._stopping = True
        process = self._process
        if process is None or process.returncode is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGTERM)
        try:
            await asyncio.wait_for(process.wait(), timeout_s)
        except TimeoutError:
            log.warning("node_killed", node=self.id)
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()


class _Gateway(_Node):
    """The gateway, kept running like a node."""

    def __init__(self, address: str, flags: Sequence[str]) -> None:
        super().__init__(0, address, flags)
        self.id = "gateway"
        self._command = ("gateway",)


class _Up:
    def __init__(self, settings: UpSettings) -> None:
        self._settings = settings
        self._etcd: EmbeddedEtcd | None = None
        self._etcd_folder = Path()
        self._nodes: list[_Node] = []
        self._gateway: _Gateway | None = None

    async def run(self) -> int:
        settings = self._settings
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        temporary: Path | None = None
        try:
            if settings.etcd is None:
                folder = settings.data
                if settings.ephemeral:
                    temporary = folder = Path(tempfile.mkdtemp(prefix="paddlewheel-etcd-"))
                folder = folder or state_file.state_dir() / "etcd"
                self._etcd = EmbeddedEtcd(folder)
                await self._etcd.start()
                self._etcd_folder = folder
                etcd = EtcdSettings(endpoints=(self._etcd.endpoint,))
            else:
                etcd = settings.etcd.settings()
            await self._run_nodes(etcd, stop)
        except (EtcdNotStarted, NodeNotStarted) as exc:
            log.error("up_failed", reason=str(exc))
            return 1
        finally:
            state_file.forget()
            drain_s = settings.drain_s + settings.drain_delay_s + 10
            if self._gateway is not None:
                await self._gateway.stop(drain_s)  # first: its requests end on nodes that serve
            await asyncio.gather(*(node.stop(drain_s) for node in self._nodes))
            if self._etcd is not None:
                await self._etcd.stop()
            if temporary is not None:
                await asyncio.to_thread(shutil.rmtree, temporary, ignore_errors=True)
        return 0

    async def _run_nodes(self, etcd: EtcdSettings, stop: asyncio.Event) -> None:
        settings, endpoints = self._settings, etcd.endpoints
        host, port = parse_listen(settings.listen)
        etcd_flags = ["--etcd", ",".join(endpoints), *_etcd_flags(settings.etcd)]
        flags = [*etcd_flags, *settings.node_flags()]
        for index in range(settings.node_count):
            address = f"{host}:{port + index if port else 0}"
            self._nodes.append(_Node(index, address, flags))
        supervised = list(self._nodes)
        if settings.gateway:
            shared = [*etcd_flags, "--prefix", settings.prefix, "--drain", str(settings.drain_s)]
            shared += settings.openness_flags()
            if self._etcd is not None:  # so that it goes with the etcd that it is about
                shared += ["--state", str(self._etcd_folder / "gateway")]
            address = f"{host}:{GATEWAY_PORT if port else 0}"
            self._gateway = _Gateway(address, shared)
            supervised.append(self._gateway)
        await asyncio.gather(*(process.start() for process in supervised))
        gateway = self._gateway.ready["http"] if self._gateway is not None else None
        ready = [node.ready for node in self._nodes]
        with contextlib.suppress(OSError):
            state_file.remember(
                etcd=endpoints,
                prefix=settings.prefix,
                nodes=tuple(line["http"] for line in ready),
                gateway=gateway,
            )
        line = {
            "event": "ready",
            "http": ready[0]["http"],
            "grpc": None,
            "nodes": ready,
            "gateway": gateway,
            "pid": os.getpid(),
            "etcd": [endpoint.split("://")[-1] for endpoint in endpoints],
        }
        print(orjson.dumps(line).decode(), flush=True)
        async with asyncio.TaskGroup() as tasks:
            background = [tasks.create_task(node.supervise()) for node in supervised]
            if self._etcd is not None:
                background.append(tasks.create_task(self._supervise_etcd(self._etcd_folder)))
            if settings.config_dir is not None:
                background.append(tasks.create_task(self._sync(etcd, settings.config_dir)))
            await stop.wait()
            for task in background:
                task.cancel()

    async def _supervise_etcd(self, folder: Path) -> None:
        """Start the embedded etcd again on its data and at its address when it ends by itself."""
        while True:
            etcd = self._etcd
            assert etcd is not None
            await etcd.ended()
            log.warning("etcd_ended", endpoint=etcd.endpoint)
            again = EmbeddedEtcd(folder, client_port=int(etcd.endpoint.rpartition(":")[2]))
            try:
                await again.start()
            except EtcdNotStarted as exc:
                log.warning("etcd_not_restarted", reason=str(exc))
                await asyncio.sleep(RESTART_DELAY_S)
            else:
                self._etcd = again

    async def _sync(self, settings: EtcdSettings, folder: Path) -> None:
        """Keep the folder's documents applied."""
        store = EtcdStore.connect(settings)
        try:
            await FolderSync(folder, store, Keys(self._settings.prefix), _report).run()
        finally:
            await store.close()


def _report(report: Report) -> None:
    log.info("sync", did=str(report.did), what=report.what, detail=report.detail)


def _etcd_flags(options: EtcdOptions | None) -> list[str]:
    if options is None:
        return []
    flags = list[str]()
    for name, path in (
        ("--etcd-ca", options.ca), ("--etcd-cert", options.cert), ("--etcd-key", options.key),
        ("--etcd-auth-file", options.auth_file),
    ):  # fmt: skip
        if path is not None:
            flags += [name, str(path)]
    return flags
