"""Real etcd members on free loopback ports, to be killed, frozen, cut off and brought back.

Everything here blocks for a moment at most, except `EtcdCluster.start`; every member ends with the
test process, by its pid, whatever happens.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import signal
import ssl
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from paddlewheel.embedded_etcd import find_etcd, free_ports
from registry.etcd import EtcdSettings

CERTS = Path(__file__).parent / "certs"
_LIBC = ctypes.CDLL(None)


@dataclass
class EtcdMember:
    """One process. Its ports and its folder outlive it."""

    name: str
    client_port: int
    peer_port: int
    folder: Path
    arguments: tuple[str, ...]
    process: subprocess.Popen[bytes] | None = None
    is_frozen: bool = False

    def start(self) -> None:
        def end_with_parent() -> None:
            _LIBC.prctl(1, signal.SIGKILL, 0, 0, 0)

        with (self.folder / f"{self.name}.log").open("ab") as log:
            self.process = subprocess.Popen(
                [str(find_etcd()), *self.arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                preexec_fn=end_with_parent,
                start_new_session=True,
            )

    def kill(self) -> None:
        """kill -9."""
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        """SIGTERM, and kill -9 after 5 s."""
        self.thaw()
        self._end(signal.SIGTERM)

    def freeze(self) -> None:
        """SIGSTOP: connections stay open, nothing answers."""
        self._signal(signal.SIGSTOP)
        self.is_frozen = True

    def thaw(self) -> None:
        if self.is_frozen:
            self._signal(signal.SIGCONT)
            self.is_frozen = False

    @property
    def is_running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def _signal(self, number: signal.Signals) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(number)

    def _end(self, number: signal.Signals) -> None:
        process, self.process = self.process, None
        self.is_frozen = False
        if process is None:
            return
        if process.poll() is None:
            process.send_signal(number)
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(5)


@dataclass
class EtcdCluster:
    """``size`` members that know each other."""

    size: int = 1
    tls: bool = False
    """Client traffic over TLS, a client certificate asked for (tests/certs)."""
    extra: tuple[str, ...] = ()
    """More arguments for every member."""
    user: str | None = None
    password: str | None = None
    members: list[EtcdMember] = field(default_factory=list[EtcdMember])
    folder: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="etcd-test-")))

    @property
    def endpoints(self) -> tuple[str, ...]:
        scheme = "https" if self.tls else "http"
        return tuple(f"{scheme}://127.0.0.1:{member.client_port}" for member in self.members)

    def settings(self, *, timeout_s: float = 5.0, first: int = 0, **changes: Any) -> EtcdSettings:
        """How a store reaches it; ``first``: the member to begin with."""
        endpoints = self.endpoints[first:] + self.endpoints[:first]
        given: dict[str, Any] = {"endpoints": endpoints, "timeout_s": timeout_s}
        if self.tls:
            given |= {"ca": CERTS / "ca.pem", "cert": CERTS / "client.pem"}
            given |= {"key": CERTS / "client.key"}
        if self.user is not None:
            given |= {"user": self.user, "password": self.password}
        return EtcdSettings(**(given | changes))

    def start(self) -> None:
        """Start all and wait until each serves."""
        ports = free_ports(*[0] * (2 * self.size))
        pairs = list(zip(ports[::2], ports[1::2], strict=True))
        peers = ",".join(f"m{i}=http://127.0.0.1:{peer}" for i, (_, peer) in enumerate(pairs))
        for index, (client, peer) in enumerate(pairs):
            name = f"m{index}"
            url = f"{'https' if self.tls else 'http'}://127.0.0.1:{client}"
            arguments = [
                f"--name={name}",
                f"--data-dir={self.folder / name}",
                f"--listen-client-urls={url}",
                f"--advertise-client-urls={url}",
                f"--listen-peer-urls=http://127.0.0.1:{peer}",
                f"--initial-advertise-peer-urls=http://127.0.0.1:{peer}",
                f"--initial-cluster={peers}",
                "--logger=zap",
                "--log-level=warn",
                # A killed process loses nothing that it wrote; only a killed machine does.
                "--unsafe-no-fsync",
                *self.extra,
            ]
            if self.tls:
                arguments += [
                    f"--cert-file={CERTS / 'server.pem'}",
                    f"--key-file={CERTS / 'server.key'}",
                    f"--trusted-ca-file={CERTS / 'ca.pem'}",
                    "--client-cert-auth",
                ]
            self.members.append(EtcdMember(name, client, peer, self.folder, tuple(arguments)))
        for member in self.members:
            member.start()
        self.wait_healthy()

    def enable_auth(self, user: str, password: str) -> None:
        """Make ``user`` root and switch authentication on."""
        self.etcdctl("user", "add", f"root:{password}")
        if user != "root":
            self.etcdctl("user", "add", f"{user}:{password}")
            self.etcdctl("user", "grant-role", user, "root")
        self.etcdctl("user", "grant-role", "root", "root")
        self.etcdctl("auth", "enable")
        self.user, self.password = user, password

    def wait_healthy(self, timeout_s: float = 30.0) -> None:
        """Until every started, thawed member has a leader. Raises when one of them ended."""
        deadline_s = time.monotonic() + timeout_s
        waiting = [m for m in self.members if m.process is not None and not m.is_frozen]
        while waiting:
            if time.monotonic() > deadline_s:
                raise TimeoutError(f"{[m.name for m in waiting]} not healthy; see {self.folder}")
            for member in list(waiting):
                if member.process is not None and member.process.poll() is not None:
                    log = (self.folder / f"{member.name}.log").read_text()[-1500:]
                    raise RuntimeError(f"{member.name} ended with {member.process.poll()}: {log}")
                if self._ask(member, "/health", None).get("health") == "true":
                    waiting.remove(member)
            time.sleep(0.05)

    def leader(self, timeout_s: float = 10.0) -> int:
        """The leader's index, by what a running member says of it."""
        deadline_s = time.monotonic() + timeout_s
        while time.monotonic() < deadline_s:
            for index, member in enumerate(self.members):
                if member.is_running and not member.is_frozen:
                    status = self._ask(member, "/v3/maintenance/status", b"{}")
                    mine = status.get("header", {}).get("member_id")
                    if mine is not None and status.get("leader") == mine:
                        return index
            time.sleep(0.05)
        raise TimeoutError("no leader")

    def etcdctl(
        self, *arguments: str, binary: Path | None = None, stdin: bytes | None = None
    ) -> str:
        """Run etcdctl against all members; its standard output. Raises on failure."""
        done = subprocess.run(
            [str(binary or find_etcd().with_name("etcdctl")), *self.etcdctl_flags(), *arguments],
            input=stdin,
            capture_output=True,
            timeout=20,
            env={**os.environ, "ETCDCTL_API": "3"},
            check=False,
        )
        if done.returncode != 0:
            raise RuntimeError(f"etcdctl {arguments}: {done.stderr.decode()}")
        return done.stdout.decode()

    def etcdctl_flags(self) -> list[str]:
        flags = [f"--endpoints={','.join(self.endpoints)}"]
        if self.tls:
            flags += [f"--cacert={CERTS / 'ca.pem'}", f"--cert={CERTS / 'client.pem'}"]
            flags += [f"--key={CERTS / 'client.key'}"]
        if self.user is not None:
            flags.append(f"--user={self.user}:{self.password}")
        return flags

    def heal(self) -> None:
        """Thaw and restart whatever is not running, and wait."""
        for member in self.members:
            member.thaw()
            if not member.is_running:
                member.start()
        self.wait_healthy()

    def close(self) -> None:
        for member in self.members:
            member.kill()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _ask(self, member: EtcdMember, path: str, body: bytes | None) -> dict[str, Any]:
        context: ssl.SSLContext | None = None
        if self.tls:
            context = ssl.create_default_context(cafile=str(CERTS / "ca.pem"))
            context.load_cert_chain(CERTS / "client.pem", CERTS / "client.key")
        url = f"{'https' if self.tls else 'http'}://127.0.0.1:{member.client_port}{path}"
        try:
            with urllib.request.urlopen(url, body, timeout=1, context=context) as answer:
                return json.load(answer)
        except (urllib.error.URLError, OSError, ValueError):
            return {}


@contextmanager
def etcd_cluster(
    size: int = 1, *, tls: bool = False, extra: Sequence[str] = ()
) -> Iterator[EtcdCluster]:
    """``with etcd_cluster(3) as cluster: EtcdStore.connect(cluster.settings())``"""
    cluster = EtcdCluster(size, tls=tls, extra=tuple(extra))
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.close()
