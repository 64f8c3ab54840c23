"""``python -m tests.sim --seeds 0..99 --nodes 200``: run the simulation; replay one seed."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time

MUTATION_NAMES = (
    "skipped-revision", "lost-rollback", "double-coordinator", "early-commit", "unnoticed-loss",
)  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.sim", description=__doc__)
    parser.add_argument("--seeds", default="0..9", help="N, or FIRST..LAST")
    parser.add_argument("--nodes", type=int, default=200)
    parser.add_argument("--ungated", action="store_true", help="no rollouts, only immediate ones")
    parser.add_argument("--history", action="store_true", help="print what happened")
    parser.add_argument("--mutation", choices=["", *MUTATION_NAMES], default="", help="plant a bug")
    parser.add_argument(
        "--until-found", action="store_true",
        help="stop at the first seed that finds what the planted bug breaks",
    )  # fmt: skip
    parser.add_argument("--profile", action="store_true")
    args = parser.parse_args()
    if os.environ.get("PYTHONHASHSEED") != "0":
        # Sets of text are gone through in an order of their own otherwise.
        os.environ["PYTHONHASHSEED"] = "0"
        os.execv(sys.executable, [sys.executable, "-m", "tests.sim", *sys.argv[1:]])
    from tests.sim.history import line_of
    from tests.sim.loop import START_S
    from tests.sim.mutations import MUTATIONS
    from tests.sim.scenario import Plan, run

    mutation = MUTATIONS[args.mutation][0] if args.mutation else contextlib.nullcontext

    first, _, last = args.seeds.partition("..")
    failed = 0
    plan = Plan(nodes=args.nodes, gated=not args.ungated)
    for seed in range(int(first), int(last or first) + 1):
        started_s = time.process_time()
        if args.profile:
            import cProfile
            import pstats

            profile = cProfile.Profile()
            outcome = profile.runcall(run, seed, plan, mutation=mutation)
            pstats.Stats(profile).sort_stats(os.environ.get("SORT", "tottime")).print_stats(70)
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
        failed += bool(outcome.found)
        wanted = MUTATIONS[args.mutation][1] if args.mutation else ""
        if args.until_found and any(found.promise == wanted for found in outcome.found):
            return 1
    return 1 if failed and not args.until_found else 0


if __name__ == "__main__":
    sys.exit(main())
