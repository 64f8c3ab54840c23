"""``python -m paddlewheel.demo``, which is what ``make demo`` runs."""

from __future__ import annotations

import asyncio
import sys
import tempfile
from pathlib import Path

import structlog
from rich.console import Console

from paddlewheel.bench.report import print_table
from paddlewheel.demo import closing
from paddlewheel.demo.play import perform
from paddlewheel.demo.stage import tail
from registry.errors import PaddlewheelError


def main() -> int:
    """Play the demo. 0 only when no request failed, all texts were right, all went as it must."""
    # The play tells what happens; our own components' log lines would come between.
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(40))
    console = Console()
    with tempfile.TemporaryDirectory(prefix="paddlewheel-demo-") as name:
        folder = Path(name)
        try:
            report = asyncio.run(perform(folder, console))
        except PaddlewheelError as exc:
            say = f"the demo could not be played to its end: {exc}"
            log_path = folder / "node.log"
            if log_path.exists():
                say += f"\nthe node's last words:\n{tail(log_path)}"
            console.print(say, markup=False, highlight=False, soft_wrap=True)
            return 1
        except KeyboardInterrupt:
            return 130
    for table in closing.tables(report):
        print_table(table, console=console)
    is_well = report.result.failed == 0 and len(report.result) > 0 and not report.problems
    console.print(
        "No request failed and every text was right."
        if is_well
        else "Not all went as it must: see above.",
        style="bold green" if is_well else "bold red",
    )
    return 0 if is_well else 1


if __name__ == "__main__":
    sys.exit(main())
