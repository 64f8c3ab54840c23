"""How long a client still waits, as a header: each hop takes off the time it spent (pure).

A span, not a time of day: it needs no two clocks that agree.
"""

from __future__ import annotations

from router.errors import BadRequest

TIMEOUT_HEADER = "X-Request-Timeout-Ms"
"""Whole milliseconds from the moment the request is whole. Clients may send it too."""

_DIGITS_MAX = 9


def parse_timeout_s(value: str | None) -> float | None:
    """Return the header's span in seconds, or ``None`` without the header. Raises `BadRequest`."""
    if value is None:
        return None
    text = value.strip()
    if not (text.isascii() and text.isdigit() and len(text) <= _DIGITS_MAX) or int(text) == 0:
        raise BadRequest(f"{TIMEOUT_HEADER}: want milliseconds as a positive integer")
    return int(text) / 1e3


def show_timeout_ms(left_s: float) -> str:
    """Return the header for the ``left_s`` seconds that are left; at least one millisecond."""
    return str(max(1, int(left_s * 1e3)))
