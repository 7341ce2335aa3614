"""`throughline doctor`: what is here, what is reachable, what would be used."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

import click

from cli import options

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cli.diagnosis import Finding

_STYLES = {"ok": ("ok", "green"), "note": ("note", "yellow"), "missing": ("missing", "red")}


@click.command(
    name="doctor",
    short_help="Say what is installed, reachable and would be used.",
    epilog=options.examples(
        "throughline doctor",
        "throughline doctor --model ./opt-125m",
        "throughline doctor --redis-url redis://10.0.0.5:6379/0 --url http://10.0.0.6:8000",
    ),
)
@options.redis_option
@click.option("--url", type=options.API_URL, metavar="URL", help="An API that must be ready.")
@options.otlp_option
@options.model_option
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
def command(
    redis_url: str | None,
    url: str | None,
    otlp_traces_endpoint: str | None,
    model: str | None,
    as_json: bool,
) -> None:
    """Say what is installed and reachable, and which server, device and kernels would be used.

    Starts nothing and changes nothing. Exits with 1 when something is missing that the stack needs.
    """
    from cli.diagnosis import Subject, diagnose

    findings = diagnose(Subject(os.environ, redis_url, url, otlp_traces_endpoint, model))
    _print(findings, as_json=as_json)
    if any(finding.state == "missing" for finding in findings):
        sys.exit(1)


def _print(findings: Sequence[Finding], *, as_json: bool) -> None:
    if as_json:
        import dataclasses
        import json

        click.echo(json.dumps([dataclasses.asdict(finding) for finding in findings], indent=2))
        return
    width = max(len(finding.what) for finding in findings)
    for finding in findings:
        word, colour = _STYLES[finding.state]
        click.echo(f"{click.style(f'{word:<8}', fg=colour)} {finding.what:<{width}}  {finding.detail}")
