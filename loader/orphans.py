"""Workers outlive their zygote: the front adopts them, and the kernel ends them with the front.

A child of the zygote that is left without it becomes the front's own, because the front is a
subreaper; so its end and its exit status are still seen. PR_SET_PDEATHSIG, which watches one
parent, is therefore no leash for workers. A pipe is: the front holds the only write end and never
writes, and its close, which comes with any end of the front, makes the kernel signal the
zygote's whole process group (O_ASYNC with F_SETOWN and F_SETSIG, see fcntl(2)).
"""

from __future__ import annotations

import asyncio
import ctypes
import fcntl
import os
import signal
from collections.abc import Callable

_PR_SET_CHILD_SUBREAPER = 36
_F_SETSIG = 10  # not in the fcntl module of 3.11
_LIBC = ctypes.CDLL(None, use_errno=True)


def become_subreaper() -> None:
    """From now on processes below this one that lose their parent become its children."""
    _LIBC.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def end_group_with(leash_fd: int) -> None:
    """SIGKILL for the caller's process group when the last write end of this pipe is closed.

    It holds for processes that are forked later and for stopped ones. The descriptor must stay
    open in each of them: with the last one the promise ends.
    """
    fcntl.fcntl(leash_fd, fcntl.F_SETOWN, -os.getpgrp())
    fcntl.fcntl(leash_fd, _F_SETSIG, signal.SIGKILL)
    flags = fcntl.fcntl(leash_fd, fcntl.F_GETFL)
    fcntl.fcntl(leash_fd, fcntl.F_SETFL, flags | os.O_ASYNC)


def watch_adopted(pid: int, on_end: Callable[[int | None], None]) -> None:
    """Call once, from the loop, with the wait status (as `os.waitstatus_to_exitcode` gives it)
    when this process has ended; with None when it is no child of ours, or no more.

    The process must be ours already: its parent has been waited for.
    """
    loop = asyncio.get_running_loop()
    try:
        # Before anything else: a number that somebody else has by now must not be watched.
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        pidfd = os.pidfd_open(pid)
    except (ChildProcessError, ProcessLookupError):
        loop.call_soon(on_end, None)
        return

    def ended() -> None:
        loop.remove_reader(pidfd)
        os.close(pidfd)
        try:
            _, status = os.waitpid(pid, 0)
        except ChildProcessError:
            on_end(None)
        else:
            on_end(os.waitstatus_to_exitcode(status))

    loop.add_reader(pidfd, ended)
