"""`paddlewheel bench`: the figures we publish, measured on this machine."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Coroutine, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from rich.table import Table

    from paddlewheel.bench.criteria import Criterion

_LOAD_BEFORE = os.getloadavg()[0]
"""As this command began: the module is imported for it alone."""

Decorated = TypeVar("Decorated", bound=Callable[..., Any])


def result_options(command: Decorated) -> Decorated:
    """``--json`` and ``--save``. Passes ``as_json`` and ``save_in``."""
    command = click.option(
        "--save", "save_in", type=click.Path(file_okay=False, path_type=Path), metavar="DIR",
        help="Write the figures to DIR/<name>.json too.",
    )(command)  # fmt: skip
    return click.option("--json", "as_json", is_flag=True, help="Figures as JSON on stdout.")(
        command
    )


@click.group()
def bench() -> None:
    """Measure the figures we publish, on this machine.

    Everything that is needed (an etcd, nodes, small models, a load generator) is started on
    loopback and ended again. Exits 1 when a promise is broken that no machine excuses: a request
    lost, an answer that mixes versions, something left open.
    """


@bench.command()
@result_options
@click.option("--models", default=100, show_default=True, type=click.IntRange(min=1))
@click.option("--rules", default=20, show_default=True, type=click.IntRange(min=0))
@click.option("--requests", default=200_000, show_default=True, type=click.IntRange(min=1))
def routing(as_json: bool, save_in: Path | None, models: int, rules: int, requests: int) -> None:
    """Time single routing decisions."""
    from paddlewheel.bench import tables
    from paddlewheel.bench.routing import routing as measure

    run = measure(models=models, rules=rules, requests=requests)
    _finish("routing", run, tables.routing(run), tables.routing_criteria(run), as_json, save_in)


@bench.command()
@result_options
@click.option("--n", default=200, show_default=True, type=click.IntRange(min=1), help="Swaps.")
@click.option(
    "--model", type=click.Choice(["mlp", "ocr-cls", "ocr-rec"]), default="mlp", show_default=True,
    help="A small MLP, or PP-OCRv4's direction or recognition model.",
)  # fmt: skip
@click.option(
    "--rate", "rate_per_s", type=click.FloatRange(min=0, min_open=True), metavar="R",
    help="Requests per second.  [200 for the MLP, else half of what the node can do]",
)  # fmt: skip
@click.option(
    "--pause", "pause_s", default=1.0, show_default=True, type=click.FloatRange(min=0),
    metavar="S", help="Steady traffic between two swaps.",
)  # fmt: skip
def swap(
    as_json: bool,
    save_in: Path | None,
    n: int,
    model: str,
    rate_per_s: float | None,
    pause_s: float,
) -> None:
    """Swap a served model many times under load; count what is lost, late or left over."""
    from paddlewheel.bench import tables
    from paddlewheel.bench.swap import swap as measure
    from paddlewheel.bench.swap_figures import criteria

    run = _run(lambda: measure(n=n, model=model, rate_per_s=rate_per_s, pause_s=pause_s))
    _finish(f"swap-{model}", run, tables.swap(run), criteria(run), as_json, save_in)


@bench.command()
@result_options
@click.option(
    "--spell", "spell_s", default=10.0, show_default=True, metavar="S",
    type=click.FloatRange(min=0, min_open=True), help="Length of each measurement.",
)  # fmt: skip
@click.option(
    "--loads", default=3, show_default=True, type=click.IntRange(min=1),
    help="How often the large model is loaded.",
)  # fmt: skip
def responsiveness(as_json: bool, save_in: Path | None, spell_s: float, loads: int) -> None:
    """Ask /livez while workers load and compute; time a node's start by phase."""
    from paddlewheel.bench import tables
    from paddlewheel.bench.responsiveness import criteria
    from paddlewheel.bench.responsiveness import responsiveness as measure

    run = _run(lambda: measure(spell_s=spell_s, loads=loads))
    _finish("responsiveness", run, tables.responsiveness(run), criteria(run), as_json, save_in)


@bench.command()
@result_options
@click.option("--rounds", default=15, show_default=True, type=click.IntRange(min=1))
@click.option(
    "--turn", "turn_s", default=0.5, show_default=True, metavar="S",
    type=click.FloatRange(min=0, min_open=True), help="How long each server is asked per round.",
)  # fmt: skip
def front(as_json: bool, save_in: Path | None, rounds: int, turn_s: float) -> None:
    """Compare a node with a naive server, an echo and a bare predictor, interleaved."""
    from paddlewheel.bench import tables
    from paddlewheel.bench.front import criteria
    from paddlewheel.bench.front import front as measure

    run = _run(lambda: measure(rounds=rounds, turn_s=turn_s))
    _finish("front", run, tables.front(run), criteria(run), as_json, save_in)


@bench.command()
@result_options
@click.option("--n", default=100, show_default=True, type=click.IntRange(min=1), help="Rollbacks.")
@click.option(
    "--model", type=click.Choice(["mlp", "ocr-cls"]), default="mlp", show_default=True,
    help="A small MLP, or PP-OCRv4's direction model.",
)  # fmt: skip
@click.option("--code", default=700, show_default=True, help="What the drill raises.")
@click.option(
    "--rate", "rate_per_s", type=click.FloatRange(min=0, min_open=True), metavar="R",
    help="Requests per second.  [200 for the MLP, else half of what the node can do]",
)  # fmt: skip
@click.option(
    "--guard-rounds", default=40, show_default=True, type=click.IntRange(min=0),
    help="Turns with and without output guards, to compare them.",
)  # fmt: skip
def rollback(
    as_json: bool,
    save_in: Path | None,
    n: int,
    model: str,
    code: int,
    rate_per_s: float | None,
    guard_rounds: int,
) -> None:
    """Fail the live version many times under load; time the standby's first answer."""
    from paddlewheel.bench.rollback import criteria, tables
    from paddlewheel.bench.rollback import rollback as measure

    run = _run(
        lambda: measure(
            n=n, model=model, code=code, rate_per_s=rate_per_s, guard_rounds=guard_rounds
        )
    )
    _finish(f"rollback-{model}", run, tables(run), criteria(run), as_json, save_in)


@bench.command()
@result_options
@click.option(
    "--duration", "duration_s", default=60.0, show_default=True, metavar="S",
    type=click.FloatRange(min=1), help="Seconds of faults.",
)  # fmt: skip
@click.option("--seed", default=1, show_default=True, help="Which faults, and when.")
@click.option(
    "--rate", "rate_per_s", default=100.0, show_default=True, metavar="R",
    type=click.FloatRange(min=0, min_open=True), help="Requests per second.",
)  # fmt: skip
def soak(
    as_json: bool, save_in: Path | None, duration_s: float, seed: int, rate_per_s: float
) -> None:
    """Let everything go wrong, once a second, under load; look for what is lost or left over."""
    from paddlewheel.bench.soak import criteria, tables
    from paddlewheel.bench.soak import soak as measure

    run = _run(lambda: measure(duration_s=duration_s, seed=seed, rate_per_s=rate_per_s))
    _finish("soak", run, tables(run), criteria(run), as_json, save_in)


@bench.command()
@result_options
@click.option("--nodes", default=100, show_default=True, type=click.IntRange(min=1))
@click.option("--n", default=100, show_default=True, type=click.IntRange(min=1), help="Documents.")
@click.option(
    "--processes", default=4, show_default=True, type=click.IntRange(min=1),
    help="Over which the nodes are spread.",
)  # fmt: skip
def propagation(as_json: bool, save_in: Path | None, nodes: int, n: int, processes: int) -> None:
    """Put documents before many nodes, whole but for their predictors; time the last ACK."""
    from paddlewheel.bench.propagation import criteria, tables
    from paddlewheel.bench.propagation import propagation as measure

    run = _run(lambda: measure(nodes=nodes, n=n, processes=processes))
    _finish("propagation", run, tables(run), criteria(run), as_json, save_in)


@bench.command()
@result_options
@click.option("--rounds", default=15, show_default=True, type=click.IntRange(min=1))
@click.option(
    "--turn", "turn_s", default=0.5, show_default=True, metavar="S",
    type=click.FloatRange(min=0, min_open=True), help="How long each system is asked per round.",
)  # fmt: skip
def gateway(as_json: bool, save_in: Path | None, rounds: int, turn_s: float) -> None:
    """Compare a gateway with its node alone, and with nginx before it where that is on PATH."""
    from paddlewheel.bench.gateway import gateway as measure
    from paddlewheel.bench.gateway import tables

    run = _run(lambda: measure(rounds=rounds, turn_s=turn_s))
    _finish("gateway", run, tables(run), (), as_json, save_in)


def _run(measure: Callable[[], Coroutine[Any, Any, dict[str, Any]]]) -> dict[str, Any]:
    # gRPC would tell on stderr of each process that we start beside its threads.
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    import structlog

    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    return asyncio.run(measure())


def _finish(
    name: str,
    run: dict[str, Any],
    shown: Sequence[Table],
    criteria: Sequence[Criterion],
    as_json: bool,
    save_in: Path | None,
) -> None:
    """Print, save, and exit 1 when a promise is broken."""
    import orjson

    from paddlewheel.bench.criteria import is_kept, to_json, verdict_table
    from paddlewheel.bench.machine import machine
    from paddlewheel.bench.report import print_table
    from paddlewheel.cli.output import print_json

    document: Mapping[str, Any] = {
        **run,
        "verdict": to_json(criteria),
        "machine": machine(load_before=_LOAD_BEFORE),
    }
    if save_in is not None:
        save_in.mkdir(parents=True, exist_ok=True)
        text = orjson.dumps(document, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE)
        (save_in / f"{name}.json").write_bytes(text)
    if as_json:
        print_json(document)
    else:
        for table in shown:
            print_table(table)
        if criteria:
            print_table(verdict_table(criteria))
    if not is_kept(criteria):
        raise SystemExit(1)
