"""The zygote: imports paddle once, then forks workers that have it already.

``python -m loader.zygote_main <fd> <leash fd> <front's pid>``, started by `loader.zygote` with one
end of a SEQPACKET socket and the leash of `loader.orphans`. Packets in: ``{"op": "spawn", "id"}``
with the worker's descriptors (its socket, then two for each slot). Packets out: ``ready``,
``spawned`` (with a pidfd), ``refused``, ``exited``.

It makes no predictor and touches no device: a fork of a process that did would be useless. It
is single-threaded, and ends when its socket does.
"""

from __future__ import annotations

import ctypes
import gc
import os
import select
import signal
import socket
import sys
import time
import traceback
import warnings
from typing import NoReturn

from loader import wire
from loader.arena import Slot
from loader.orphans import end_group_with

_PR_SET_PDEATHSIG = 1
_PR_SET_NAME = 15
_FDS_MAX = 64
_libc = ctypes.CDLL(None, use_errno=True)


class ZygoteProcess:
    """One loop over the front's socket and the pidfds of the children."""

    def __init__(self, sock: socket.socket, leash_fd: int) -> None:
        self._sock = sock
        self._leash_fd = leash_fd
        self._poll = select.poll()
        self._poll.register(sock, select.POLLIN)
        self._children: dict[int, int] = {}
        """pid by pidfd. A child is reaped here and nowhere else, so its pidfd stays its own."""

    def main(self) -> None:
        while True:
            for fd, _ in self._poll.poll():
                if fd == self._sock.fileno():
                    self._receive()
                else:
                    self._reap(fd)

    def _receive(self) -> None:
        try:
            data, fds, _, _ = socket.recv_fds(self._sock, wire.MESSAGE_MAX_BYTES, _FDS_MAX)
        except ConnectionResetError:
            os._exit(0)
        if not data:
            os._exit(
                0
            )  # the front is gone, or has given this zygote up; the workers are on its leash
        request_id = wire.unpacked(data)["id"]
        try:
            pid = os.fork()
        except OSError as exc:
            self._send({"op": "refused", "id": request_id, "message": f"fork: {exc.strerror}"})
        else:
            if pid == 0:
                _become_worker(fds, self._leash_fd)
            pidfd = os.pidfd_open(pid)
            self._children[pidfd] = pid
            self._poll.register(pidfd, select.POLLIN)
            self._send({"op": "spawned", "id": request_id, "pid": pid}, [pidfd])
        finally:
            for fd in fds:
                os.close(fd)

    def _reap(self, pidfd: int) -> None:
        pid = self._children.pop(pidfd)
        _, status = os.waitpid(pid, 0)
        self._poll.unregister(pidfd)
        os.close(pidfd)
        self._send({"op": "exited", "pid": pid, "status": os.waitstatus_to_exitcode(status)})

    def _send(self, message: dict[str, object], fds: list[int] | None = None) -> None:
        try:
            socket.send_fds(self._sock, [wire.packed(message)], fds or [])
        except (BrokenPipeError, ConnectionResetError):
            os._exit(0)


def _become_worker(fds: list[int], leash_fd: int) -> NoReturn:
    """In the child: keep nothing of the zygote but its memory, then serve until the end."""
    code = 70
    try:
        _libc.prctl(_PR_SET_NAME, b"pw-worker", 0, 0, 0)
        kept = sorted({0, 1, 2, leash_fd, *fds})
        for low, high in zip(kept, [*kept[1:], os.sysconf("SC_OPEN_MAX")], strict=True):
            os.closerange(low + 1, high)
        from loader.worker_main import WorkerProcess

        WorkerProcess(socket.socket(fileno=fds[0]), Slot.attach(fds[1:])).main()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def _die_with(parent_pid: int) -> None:
    """SIGKILL when the parent ends, however it ends, even in the middle of a long run."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent_pid:  # it ended before we asked
        os._exit(0)


def _ignore_interrupts() -> None:
    """The front decides when a worker ends (it drains first); a signal to the whole group, as
    systemd and terminals send it, must not."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)


def main() -> None:
    leash_fd = int(sys.argv[2])
    end_group_with(leash_fd)  # the workers too, whether this process still lives then or not
    _die_with(int(sys.argv[3]))  # after it: the front may have ended before the leash was on
    os.set_inheritable(leash_fd, False)
    _ignore_interrupts()
    os.dup2(2, 1)  # stdout is the front's alone
    _libc.prctl(_PR_SET_NAME, b"pw-zygote", 0, 0, 0)
    sock = socket.socket(fileno=int(sys.argv[1]))
    sock.set_inheritable(False)
    started_s = time.perf_counter()
    warnings.filterwarnings("ignore", message="No ccache found")  # nothing is compiled here
    from loader import worker_main

    worker_main.prepare()
    _ignore_interrupts()  # again: Paddle set its own handlers, and took them off
    gc.collect()
    gc.freeze()  # the collector of a worker leaves these pages alone, so they stay shared
    zygote = ZygoteProcess(sock, leash_fd)
    sock.send(wire.packed({"op": "ready", "import_s": time.perf_counter() - started_s}))
    zygote.main()


if __name__ == "__main__":
    main()
