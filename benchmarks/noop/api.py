"""`python -m benchmarks.noop.api --port N`: the product's API, its spans thrown away."""

from __future__ import annotations

from api.app import SERVICE_NAME
from benchmarks.noop.spans import trace_as_the_product
from cli.commands.api import command

if __name__ == "__main__":
    trace_as_the_product(SERVICE_NAME)
    command()
