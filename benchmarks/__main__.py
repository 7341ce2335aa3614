"""`python -m benchmarks [NAME] [ARGS]`: the benchmarks by name; without one, the list."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from pathlib import Path


def names() -> list[str]:
    return sorted(path.stem.removeprefix("bench_") for path in Path(__file__).parent.glob("bench_*.py"))


def run(name: str, arguments: Sequence[str], *, program: str) -> None:
    """Run one benchmark with these arguments; `program` is what its help calls itself."""
    sys.argv = [program, *arguments]
    importlib.import_module(f"benchmarks.bench_{name}").main()


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1] not in names():
        print("usage: python -m benchmarks NAME [--help]\n\n  " + "\n  ".join(names()))
        raise SystemExit(len(sys.argv) > 1)
    run(sys.argv[1], sys.argv[2:], program=f"python -m benchmarks {sys.argv[1]}")


if __name__ == "__main__":
    main()
