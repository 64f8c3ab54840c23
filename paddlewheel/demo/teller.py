"""Tells on the terminal what happens, as it happens."""

from __future__ import annotations

import time

from rich.console import Console

from paddlewheel.bench.stage import Status


class Teller:
    """One line for each thing that happened, with the seconds since the start."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._started_s = time.monotonic()

    def say(self, who: str, what: str, style: str = "") -> None:
        at_s = time.monotonic() - self._started_s
        self._console.print(
            f"[dim]{at_s:6.1f} s[/]  [bold]{who:<8}[/]", end="", highlight=False, soft_wrap=True
        )
        self._console.print(
            what, style=style or None, markup=False, highlight=False, soft_wrap=True
        )

    def status_changed(self, before: Status | None, now: Status) -> None:
        """One line for each servable that moved, and one for each document judged."""
        model = now["model"]
        old = {
            (servable["version"], servable["digest"]): servable["state"]
            for servable in (before or {}).get("servables", ())
        }
        known = {version for version, digest in old if digest is not None}
        for servable in now["servables"]:
            state, version = servable["state"], servable["version"]
            if old.get((version, servable["digest"])) == state:
                continue
            if servable["digest"] is None and version in known:
                continue  # only looks whether the bytes of a loaded version are still the same
            why = f": {servable['reason']}" if state == "FAILED" else ""
            self.say("node", f"{model} {version} is {state}{why}", "red" if why else "")
        if before is not None and now["revision"] != before["revision"] and not now["accepted"]:
            for error in now["errors"]:
                where = f"line {error['line']}, " if error.get("line") else ""
                self.say(
                    "node", f"{model} refused: {where}{error['path']}: {error['message']}", "red"
                )

    def tick(self, event: dict[str, object]) -> None:
        """Nothing while all is well: only failures interrupt."""
        if event["failed"]:
            self.say("traffic", f"{event['failed']} failed in the last second", "bold red")
