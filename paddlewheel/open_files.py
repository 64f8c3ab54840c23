"""How many files and connections this process may have open."""

from __future__ import annotations

import contextlib
import resource

ENOUGH = 65536


def raise_limit() -> None:
    """Take what the hard limit allows, up to `ENOUGH`, as servers written in Go do.

    The usual soft limit of 1024 is there for programs that use ``select``. Here it would be about
    a hundred workers, of ten descriptors each, and no connection.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = ENOUGH if hard == resource.RLIM_INFINITY else min(hard, ENOUGH)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
