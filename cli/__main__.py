"""The front door: `throughline COMMAND`, or `python -m cli COMMAND`.

A command's module is imported when it is named; what a command needs beyond click it imports inside its
function, so that `--help` costs no torch.
"""

from __future__ import annotations

import importlib
import sys

import click

from cli.errors import CliError
from cli.options import examples

_COMMANDS = ("demo", "up", "api", "worker", "submit", "trace", "bench", "doctor", "flower")


class _Commands(click.Group):
    """The commands in the order in which one meets them, each imported when asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        command = importlib.import_module(f"cli.commands.{cmd_name}").command
        assert isinstance(command, click.Command)
        return command


@click.group(
    cls=_Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog=examples(
        "throughline demo                          see it work, start to end, in a minute",
        "throughline up                            serve the built-in model on 127.0.0.1:8000",
        "throughline up --model ./opt-125m         serve a Hugging Face folder",
        'throughline submit "San Francisco is a"   send a job to it and wait',
        "throughline trace JOB_ID                  where its time went (after: up --trace-viewer)",
        "throughline doctor                        what is here, what is missing",
    ),
)
@click.version_option(package_name="throughline")
def _throughline() -> None:
    """Queue-based batch inference for language models, with one trace from client to generation."""


def main() -> None:
    """Run a command; its own errors end in one line and exit code 1."""
    try:
        _throughline(prog_name="throughline")
    except CliError as error:
        click.echo(f"{click.style('Error:', fg='red')} {error}", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
