"""`python -m tests.chaos`: kill everything at random while jobs run, then look for a broken promise."""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
from pathlib import Path

from tests.chaos.drill import Plan, run


def main() -> int:
    arguments = read_arguments()
    plan = Plan(
        seed=arguments.seed,
        num_jobs=arguments.jobs,
        seconds=arguments.seconds,
        num_faults=arguments.faults,
        num_workers=arguments.workers,
        lease_seconds=arguments.lease_seconds,
        sample_ratio=arguments.sample_ratio,
    )
    if arguments.plan_only:
        print(*plan.schedule(), sep="\n")
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # so that nothing is left running
    folder = Path(tempfile.mkdtemp(prefix="chaos-"))
    print(f"logs are kept in {folder}", flush=True)
    outcome = run(plan, folder, say=lambda line: print(line, flush=True))
    print(outcome.table())
    for breach in outcome.breaches:
        print(f"BROKEN PROMISE: {breach}")
    print(f"{len(outcome.breaches)} broken promises; seed {plan.seed}")
    return 1 if outcome.breaches else 0


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--seed", type=int, default=1, help="of orders and faults")
    parser.add_argument("--jobs", type=int, default=10_000)
    parser.add_argument("--seconds", type=float, default=300.0, help="over which the faults are spread")
    parser.add_argument("--faults", type=int, default=75)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--lease-seconds", type=float, default=9.0, help="as in production")
    parser.add_argument("--sample-ratio", type=float, default=0.25, help="of the traces")
    parser.add_argument("--plan-only", action="store_true", help="print the faults and run nothing")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
