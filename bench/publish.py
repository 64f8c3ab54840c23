"""Put the figures of one `make bench` into docs/benchmarks.md.

    python bench/publish.py [bench-results] [docs/benchmarks.md]

Everything after the line `MARK` is written anew; what stands above it is prose and stays.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

MARK = "<!-- figures: written by bench/publish.py -->"
_LATENCIES = ("p50_ms", "p90_ms", "p99_ms", "max_ms")

Run = dict[str, Any]


def figures(folder: Path) -> str:
    """Markdown of all result files in ``folder``."""
    runs = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    machine = next(iter(runs.values()))["machine"]
    parts = [
        f"Run of {machine['date']}: {machine['cores']} cores ({machine['architecture']}), "
        f"Python {machine['python']}, paddlepaddle {machine['paddle']}, "
        f"aiohttp {machine['aiohttp']}. Load average before each began: "
        + ", ".join(f"{name} {run['machine']['load_average_before']}" for name, run in runs.items())
        + "."
    ]
    if any(run["machine"]["load_average_before"] > machine["cores"] / 4 for run in runs.values()):
        parts.append("The machine was shared: latencies and rates of this run say little alone.")
    for name, run in runs.items():
        parts += [_SECTIONS[run["bench"]](run), *([_verdict(name, run)] if run["verdict"] else [])]
    return "\n\n".join(parts) + "\n"


def _swap(run: Run) -> str:
    kinds = run["by_kind"]
    rows = [["steady", *_row(run["steady"])]]
    rows += [[f"while {kind} changes", *_row(seen)] for kind, seen in kinds.items()]
    capacity = f" of {run['capacity_per_s']:g} possible" if run["capacity_per_s"] else ""
    facts = [
        ["requests, failed", f"{run['requests']}, {run['failed']}"],
        ["requests per second", f"{run['rate_per_s']:g}{capacity}"],
        ["longest gap between answers", f"{run['longest_gap_ms']:.1f} ms"],
        *(
            [f"put to in force, {kind}: p50, p99",
             "{p50_ms:.0f} ms, {p99_ms:.0f} ms".format(**seen["to_in_force"])]
            for kind, seen in kinds.items()
        ),
        ["swap of the routing table: p50, p99",
         "{p50:.0f} us, {p99:.0f} us".format(**run["pointer_swap_us"])],
        ["memory (PSS) before, after", "{before}, {after} MB".format(**run["pss_mb"])],
        ["of that allocated", "{before}, {after} MB".format(**run["own_mb"])],
        ["open files before, after", "{before}, {after}".format(**run["open_files"])],
    ]  # fmt: skip
    return "\n\n".join([
        f"## {run['swaps']} swaps of {run['model']}",
        _table(["requests", "count", "p50", "p90", "p99", "max"], rows),
        _table(["", ""], facts),
    ])  # fmt: skip


def _responsiveness(run: Run) -> str:
    start = [[phase.replace("_", " "), f"{ms:.0f} ms"] for phase, ms in run["start_ms"].items()]
    spells = [[spell, *_row(seen)] for spell, seen in run["livez"].items()]
    return "\n\n".join([
        "## Responsiveness",
        _table(["/livez while", "count", "p50", "p90", "p99", "max"], spells),
        "From `paddlewheel node` to the first small model live:",
        _table(["phase", "took"], start),
    ])  # fmt: skip


def _front(run: Run) -> str:
    systems = [
        [name, f"{seen['per_s']:.0f}", *(_ms(seen.get(k)) for k in ("p50_ms", "p99_ms"))]
        for name, seen in run["systems"].items()
    ]
    ratios = [[pair, f"{ratio:.2f}"] for pair, ratio in run["ratios"].items()]
    return "\n\n".join([
        "## Front and worker against simpler servers",
        _table(["system", "per second", "p50", "p99"], systems),
        _table(["requests per second", "ratio"], ratios),
    ])  # fmt: skip


def _routing(run: Run) -> str:
    names = ("p50_us", "p99_us", "p999_us", "mean_us")
    rows = [[name.removesuffix("_us"), f"{run[name]:.2f} us"] for name in names]
    title = f"## Routing decision, {run['models']} models of {run['rules']} rules"
    return f"{title}\n\n" + _table(["", ""], rows)


def _rollback(run: Run) -> str:
    steps = {
        "from the error that is one too many to the standby's first answer": "error_to_answer_ms",
        "to changed routes, by the node's log": "error_to_flip_ms",
        "slowest request around it": "slowest_request_ms",
    }
    rows = [[what, *_spread(run[key])] for what, key in steps.items()]
    return "\n\n".join([
        f"## {run['rollbacks']} rollbacks of {run['model']}",
        f"{run['requests']} requests at {run['rate_per_s']:g}/s, {run['failed']} failed; "
        f"{run['workers_left']} poisoned workers left.",
        _table(["", "p50", "p99", "max"], rows),
    ])  # fmt: skip


def _propagation(run: Run) -> str:
    steps = {
        "etcd's answer": "put_ms",
        "a node's ACK": "ack_ms",
        "the last node's ACK": "last_ack_ms",
        "in force on the last node": "last_in_force_ms",
    }
    rows = [[what, *_spread(run[key])] for what, key in steps.items()]
    title = f"## {run['documents']} documents to {run['nodes']} nodes"
    return f"{title}\n\n" + _table(["from the put to", "p50", "p99", "max"], rows)


def _gateway(run: Run) -> str:
    names = ("p50_ms", "p99_ms", "added_p50_ms", "added_p99_ms")
    rows = [
        [
            system, f"{seen['per_s']:.0f}", f"{seen['ratio']:.2f}" if "ratio" in seen else "-",
            *("-" if name not in seen else f"{seen[name]:.2f} ms" for name in names),
        ]
        for system, seen in run["systems"].items()
    ]  # fmt: skip
    head = ["system", "per second", "ratio", "p50", "p99", "added p50", "added p99"]
    absent = "" if run["nginx"] else "\n\nnginx was not on PATH."
    return "## Through a gateway\n\n" + _table(head, rows) + absent


def _soak(run: Run) -> str:
    facts = [
        [what.replace("_", " "), f"{value:g}" if isinstance(value, float) else str(value)]
        for what, value in run.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    ]
    return "## Soak\n\n" + _table(["", ""], facts)


def _spread(seen: Run) -> list[str]:
    return [_ms(seen[name]) for name in ("p50", "p99", "max")]


_SECTIONS = {
    "swap": _swap, "responsiveness": _responsiveness, "front": _front, "routing": _routing,
    "rollback": _rollback, "propagation": _propagation, "gateway": _gateway, "soak": _soak,
}  # fmt: skip


def _verdict(name: str, run: Run) -> str:
    missed = [c for c in run["verdict"] if not c["holds"]]
    if not missed:
        return f"All {len(run['verdict'])} criteria of `{name}` hold."
    said = "; ".join(f"{c['what']}: {c['measured']}, wanted {c['wanted']}" for c in missed)
    return f"Of `{name}`'s {len(run['verdict'])} criteria, missed: {said}."


def _row(seen: Run) -> list[str]:
    return [str(seen["requests"]), *(_ms(seen[name]) for name in _LATENCIES)]


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f} ms"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> None:
    given = [Path(argument) for argument in sys.argv[1:]]
    results = given[0] if given else Path("bench-results")
    page = given[1] if len(given) > 1 else Path("docs/benchmarks.md")
    prose, found, _ = page.read_text().partition(MARK)
    if not found:
        sys.exit(f"{page}: no line {MARK!r}")
    page.write_text(f"{prose}{MARK}\n\n{figures(results)}")


if __name__ == "__main__":
    main()
