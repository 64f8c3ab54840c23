"""The `paddlewheel` command, one module for each group of commands."""

from __future__ import annotations


def main() -> None:
    """Entry point of the `paddlewheel` script. Ends the process with 0, 1 or 2 (SPEC section 6)."""
    from paddlewheel.cli.root import root

    root(prog_name="paddlewheel")
