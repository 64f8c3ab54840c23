"""Simulate the fleet: ``python -m tests.sim --seeds 0..99 --nodes 200`` (docs/simulation.md)."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
from typing import Any

MUTATIONS = (
    "skipped-revision", "lost-rollback", "double-coordinator", "early-commit", "unnoticed-loss",
)  # fmt: skip


def main() -> int:
    """Return 1 when a promise was broken; with ``--find``, when it was not."""
    parser = argparse.ArgumentParser(prog="python -m tests.sim", description=__doc__)
    parser.add_argument("--seeds", default="0..9", help="N, or FIRST..LAST")
    parser.add_argument("--nodes", type=int, default=200)
    parser.add_argument("--ungated", action="store_true", help="no rollouts, only immediate ones")
    parser.add_argument("--history", action="store_true", help="print what happened")
    parser.add_argument("--mutation", choices=MUTATIONS, help="plant a bug")
    parser.add_argument(
        "--find", choices=MUTATIONS, help="plant a bug, and stop where the promise it breaks is"
    )
    parser.add_argument("--profile", action="store_true")
    args = parser.parse_args()
    if os.environ.get("PYTHONHASHSEED") != "0":
        # Sets of text are gone through in an order of their own otherwise.
        os.environ["PYTHONHASHSEED"] = "0"
        os.execv(sys.executable, [sys.executable, "-m", "tests.sim", *sys.argv[1:]])
    return simulate(args)


def simulate(args: argparse.Namespace) -> int:
    # Imported under the hash seed that counts.
    from tests.sim.mutations import MUTATIONS as PLANTED
    from tests.sim.scenario import Plan

    plan = Plan(nodes=args.nodes, gated=not args.ungated)
    bug = args.find or args.mutation
    mutation = PLANTED[bug][0] if bug else contextlib.nullcontext
    first, _, last = args.seeds.partition("..")
    failed = total = 0
    started_s = time.perf_counter()
    for seed in range(int(first), int(last or first) + 1):
        found = _one(args, seed, plan, mutation)
        total += 1
        failed += bool(found)
        if args.find and PLANTED[bug][1] in found:
            return 0
    took_s = time.perf_counter() - started_s
    print(f"{total} seeds of {plan.nodes} nodes in {took_s:.0f} s: {failed} broke a promise")
    return 1 if failed or args.find else 0


def _one(args: argparse.Namespace, seed: int, plan: Any, mutation: Any) -> set[str]:
    """Play one seed; return the names of the promises it broke."""
    from tests.sim.history import line_of
    from tests.sim.loop import START_S
    from tests.sim.scenario import run

    started_s = time.process_time()
    if args.profile:
        import cProfile
        import pstats

        profile = cProfile.Profile()
        outcome = profile.runcall(run, seed, plan, mutation=mutation)
        pstats.Stats(profile).sort_stats("tottime").print_stats(45)
    else:
        outcome = run(seed, plan, mutation=mutation)
    took_s = time.process_time() - started_s
    if args.history:
        for entry in outcome.history.entries:
            print(line_of(entry))
    print(
        f"seed {seed}: {len(outcome.found)} found, {took_s:.2f} s for "
        f"{outcome.lasted_s:.0f} s, {len(outcome.history.entries)} entries, "
        f"{outcome.history.digest()}",
        flush=True,
    )
    for found in outcome.found:
        print(f"  {found.promise} at {found.at_s - START_S:.3f}: {found.what}", flush=True)
    return {found.promise for found in outcome.found}


if __name__ == "__main__":
    sys.exit(main())
