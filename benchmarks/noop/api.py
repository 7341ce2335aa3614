"""`python -m benchmarks.noop.api --port N`: the product's API, its spans thrown away."""

from __future__ import annotations

from benchmarks.noop.spans import trace_into_nothing
from cli.commands.api import command

if __name__ == "__main__":
    trace_into_nothing()
    command()
