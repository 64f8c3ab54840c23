"""The worker's side of a drill: what a marked run does where a real fault would happen."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from loader.drills import error_for
from registry.inference import Array


def before_run(order: Mapping[str, Any]) -> None:
    """Do what ``order`` (`loader.drills.Order.as_json`) says. May raise or end the process."""
    if order["delay_ms"]:
        time.sleep(order["delay_ms"] / 1000)
    code = str(order["code"])
    match order["kind"]:
        case "code" | "oom":
            exception, text = error_for(code)
            raise exception(text)
        case "crash" if code.startswith("EXIT:"):
            os._exit(int(code.removeprefix("EXIT:")))
        case "crash":
            number = signal.Signals[code]
            if number not in (signal.SIGKILL, signal.SIGSTOP):
                signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        case "hang" if code == "SIGSTOP":
            os.kill(os.getpid(), signal.SIGSTOP)
        case "hang":
            while True:
                time.sleep(3600)
        case _:
            pass


def after_run(order: Mapping[str, Any], outputs: Mapping[str, Array]) -> dict[str, Array]:
    """Spoil the outputs where ``order`` asks for it."""
    if order["kind"] != "nan":
        return dict(outputs)
    return {
        name: np.full_like(array, np.nan) if array.dtype.kind == "f" else array
        for name, array in outputs.items()
    }
