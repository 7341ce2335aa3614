"""`python -m benchmarks [NAME] [ARGS]`: the benchmarks by name; without one, the list."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path


def main() -> None:
    names = sorted(path.stem.removeprefix("bench_") for path in Path(__file__).parent.glob("bench_*.py"))
    if len(sys.argv) < 2 or sys.argv[1] not in names:
        print("usage: python -m benchmarks NAME [--help]\n\n  " + "\n  ".join(names))
        raise SystemExit(len(sys.argv) > 1)
    name = sys.argv.pop(1)
    runpy.run_module(f"benchmarks.bench_{name}", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
