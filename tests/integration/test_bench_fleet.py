"""`paddlewheel bench propagation` and `bench gateway`: what they report, and on a small fleet."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
from rich.console import Console

from paddlewheel.bench import gateway, propagation
from paddlewheel.bench.propagation import Round


@pytest.mark.timeout(120)
def test_documents_reach_every_node(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "paddlewheel", "bench", "propagation", "--nodes", "7", "--n", "2",
         "--processes", "2", "--json", "--save", str(tmp_path / "results")],
        env={**os.environ, "TMPDIR": str(tmp_path)},
        capture_output=True, text=True, timeout=110, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    run = json.loads(done.stdout)
    assert (run["nodes"], run["documents"], run["refused"]) == (7, 2, 0)
    assert 0 < run["put_ms"]["p50"] < run["last_ack_ms"]["p50"] < run["last_in_force_ms"]["max"]
    assert [p.name for p in tmp_path.iterdir()] == ["results"]
    assert not [p for p in psutil.process_iter() if str(tmp_path) in " ".join(_arguments(p))]
    assert "| the last node's ACK |" in published(tmp_path / "results")


def test_the_slowest_node_counts() -> None:
    rounds = [
        Round(0.001, {"a": 0.1, "b": at_s}, set(), {"a": 0.3, "b": 2 * at_s})
        for at_s in (0.2, 0.2, 1.5)
    ]
    run: dict[str, Any] = {"nodes": 2, **propagation.figures(rounds)}
    assert run["last_ack_ms"] == {"p50": 200.0, "p99": 1500.0, "max": 1500.0}
    assert run["last_in_force_ms"]["max"] == 3000.0
    assert [c.holds for c in propagation.criteria(run)] == [True, False]


def test_a_refusal_breaks_the_promise() -> None:
    run: dict[str, Any] = {
        "nodes": 1,
        **propagation.figures([Round(0.001, {"a": 0.1}, {"a"}, {"a": 0.2})]),
    }
    assert [c.holds for c in propagation.criteria(run) if c.is_promise] == [False]


def _seen(per_s: float, p50_ms: float) -> dict[str, float]:
    return {"per_s": per_s, "p50_s": p50_ms / 1e3, "p99_s": 2 * p50_ms / 1e3}


def test_a_proxy_is_compared_with_its_node_round_by_round() -> None:
    run = gateway.figures(
        {
            "node json x1": [_seen(1000, 1), _seen(100, 10), _seen(1000, 1)],
            "gateway json x1": [_seen(500, 2), _seen(50, 11), _seen(500, 2)],
        }
    )
    assert run["systems"]["gateway json x1"] == {
        "per_s": 500, "p50_ms": 2, "p99_ms": 4, "added_p50_ms": 1, "added_p99_ms": 2, "ratio": 0.5,
    }  # fmt: skip


def test_a_missing_nginx_is_said() -> None:
    systems = [f"{kind} {load}" for kind in ("node", "gateway") for load in gateway.LOADS]
    run = gateway.figures({system: [_seen(100, 1)] for system in systems})
    assert not run["nginx"]
    console = Console(file=(shown := io.StringIO()), width=120)
    for table in gateway.tables(run):
        console.print(table)
    assert shown.getvalue().count("not on PATH") == len(gateway.LOADS)


def published(results: Path) -> str:
    page = results / "page.md"
    page.write_text("prose\n<!-- figures: written by bench/publish.py -->\n")
    script = Path(__file__).parents[2] / "bench" / "publish.py"
    subprocess.run([sys.executable, str(script), str(results), str(page)], check=True, timeout=30)
    return page.read_text()


def _arguments(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def test_figures_without_criteria_have_no_verdict(tmp_path: Path) -> None:
    machine: dict[str, Any] = {
        "date": "2026-01-01", "cores": 2, "architecture": "x86_64", "python": "3.11.7",
        "paddle": "3.3.1", "aiohttp": "3.14.5", "load_average_before": 0.1,
    }  # fmt: skip
    run = {
        "bench": "gateway", "nginx": False, "verdict": [], "machine": machine,
        "systems": {"node json x1": {"per_s": 100, "p50_ms": 1, "p99_ms": 2}},
    }  # fmt: skip
    (tmp_path / "gateway.json").write_text(json.dumps(run))
    page = published(tmp_path)
    assert "criteria" not in page
    assert "nginx was not on PATH" in page
