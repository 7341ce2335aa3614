"""`throughline bench`: the benchmarks of a checkout."""

from __future__ import annotations

import sys

import click

from cli import options
from cli.errors import NoBenchmarksError
from cli.settings import PROJECT_FOLDER


@click.command(
    name="bench",
    short_help="Measure: tracing, queue, engine.",
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
    epilog=options.examples(
        "throughline bench                         the list",
        "throughline bench tracing --rounds 5      what tracing costs",
        "throughline bench queue --help            a benchmark's own options",
    ),
)
@click.argument("name", required=False)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED, metavar="[ARGUMENTS]...")
def command(name: str | None, arguments: tuple[str, ...]) -> None:
    """Run the benchmark NAME with its own ARGUMENTS; without a name, list them.

    They lie in the checkout's benchmarks folder, whose README says what each measures.
    """
    if not (PROJECT_FOLDER / "benchmarks" / "__main__.py").is_file():
        raise NoBenchmarksError(
            f"{PROJECT_FOLDER} holds no benchmarks folder: run this from a checkout of the project"
        )
    sys.path.insert(0, str(PROJECT_FOLDER))
    from benchmarks import __main__ as benchmarks

    if name is None:
        click.echo("\n".join(benchmarks.names()))
        return
    if name not in benchmarks.names():
        raise click.UsageError(f"{name!r} is no benchmark; there are {', '.join(benchmarks.names())}")
    benchmarks.run(name, arguments, program=f"throughline bench {name}")
