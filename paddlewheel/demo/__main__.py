"""``python -m paddlewheel.demo``, which is what ``make demo`` runs."""

from __future__ import annotations

import asyncio
import logging
import sys
import tempfile
from pathlib import Path

import click
import structlog
from rich.console import Console

from paddlewheel.bench.report import print_table
from paddlewheel.bench.stage import tail
from paddlewheel.demo import closing
from paddlewheel.demo.play import Report, perform
from paddlewheel.demo.prepare import prepare
from registry.errors import PaddlewheelError


@click.command("demo")
@click.option(
    "--prepare",
    "prepare_in",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="DIR",
    help="Only put models, documents and a request into DIR, to try things by hand.",
)
def main(prepare_in: Path | None) -> None:
    """Swap real OCR models under steady traffic by editing their documents in etcd.

    Takes about a minute. Exits 0 only when no request failed, every text was right, and every
    edit had the outcome that it must have.
    """
    console = Console()
    try:
        if prepare_in is not None:
            prepare(prepare_in)
            return
        report = _perform(console)
    except PaddlewheelError as exc:
        console.print(str(exc), markup=False, highlight=False, soft_wrap=True)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
    for table in closing.tables(report):
        print_table(table, console=console)
    if closing.is_well(report):
        console.print("No request failed and every text was right.", style="bold green")
    else:
        console.print("Not all went as it must: see above.", style="bold red")
        sys.exit(1)


def _perform(console: Console) -> Report:
    """Play in a folder of its own. A failure's message ends with the node's last words."""
    # The play tells what happens; our own components' log lines would come between.
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    with tempfile.TemporaryDirectory(prefix="paddlewheel-demo-") as name:
        folder = Path(name)
        try:
            return asyncio.run(perform(folder, console))
        except PaddlewheelError as exc:
            say = f"the demo could not be played to its end: {exc}"
            log_path = folder / "node.log"
            if log_path.exists():
                say += f"\nthe node's last words:\n{tail(log_path)}"
            raise PaddlewheelError(say) from exc


if __name__ == "__main__":
    main()
