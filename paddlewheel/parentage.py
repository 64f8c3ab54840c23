"""Processes that must not outlive the one that started them."""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Callable

_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None, use_errno=True)
"""Loaded here: between fork and exec nothing may be imported."""


def end_with_parent(number: signal.Signals) -> Callable[[], None]:
    """Return a ``preexec_fn``: the child gets ``number`` when the calling process ends.

    The kernel watches the thread that forks, so it must be one that lives as long as the process.
    """
    parent = os.getpid()

    def prepare() -> None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, number, 0, 0, 0)
        if os.getppid() != parent:
            os._exit(1)  # the parent died before it could be watched

    return prepare
