"""`throughline up`: the whole stack, kept running until it is told to stop."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cli import options
from cli.settings import STAND_IN_FOR, ServeOptions, served_names

if TYPE_CHECKING:
    from cli.stack.log import Log
    from cli.stack.runner import PreparedStack

EXIT_FORCED = 130


@click.command(
    name="up",
    short_help="Run the whole stack until Ctrl-C.",
    epilog=options.examples(
        "throughline up",
        "throughline up --model ./opt-125m --served-model-name facebook/opt-125m",
        "throughline up --workers 2 --port 8080 --redis-url redis://127.0.0.1:6379/0",
        "throughline up --otlp-traces-endpoint grpc://127.0.0.1:4317",
    ),
)
@options.model_options
@options.listen_options
@click.option(
    "--workers",
    "num_workers",
    type=click.IntRange(1, 64),
    default=1,
    show_default=True,
    help="Worker processes; each loads the model.",
)
@options.redis_option
@options.engine_options
@click.option(
    "--state-dir",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path(".throughline"),
    show_default=True,
    envvar="THROUGHLINE_STATE_DIR",
    help="Where the embedded server keeps its data; one stack at a time.",
)
@click.option(
    "--grace-seconds", type=click.FloatRange(0, 3600), default=30.0, show_default=True,
    help="Time that the API, and then the workers, have to finish at the end.",
)  # fmt: skip
def command(
    model: str | None,
    served_model_names: tuple[str, ...],
    otlp_traces_endpoint: str | None,
    host: str,
    port: int,
    num_workers: int,
    redis_url: str | None,
    dtype: str | None,
    device: str | None,
    state_dir: Path,
    grace_seconds: float,
) -> None:
    """Run the whole stack: Redis (an embedded Valkey unless one is named), the API and the workers.

    Shows one log of all of them, starts again what dies, and stops everything in order on Ctrl-C or SIGTERM;
    a second Ctrl-C kills. Jobs that were accepted survive in the state folder.
    """
    import asyncio

    from cli.stack import runner
    from cli.stack.log import TerminalLog
    from cli.stack.plan import StackOptions

    serve = ServeOptions(model, served_model_names, redis_url, otlp_traces_endpoint, dtype, device)
    stack_options = StackOptions(serve, host, port, num_workers, grace_seconds)
    with runner.prepare(stack_options, state_dir, os.environ) as stack:
        was_forced = asyncio.run(_run(stack, TerminalLog(stack.process_names())))
    if was_forced:
        sys.exit(EXIT_FORCED)


async def _run(stack: PreparedStack, log: Log) -> bool:
    """Run until asked to stop; return whether the end was forced."""
    import asyncio

    from cli.stack import runner

    started = time.monotonic()
    _announce_start(stack, log)
    async with runner.running(stack, log, os.environ) as supervisor:
        announcer = asyncio.create_task(_announce_ready(stack, log, started))
        try:
            await supervisor.wait()
        finally:
            announcer.cancel()
        log.note("stopping: first the API, then the workers, then Redis; Ctrl-C again kills")
    log.note("stopped; nothing left running")
    return supervisor.was_forced


def _announce_start(stack: PreparedStack, log: Log) -> None:
    if stack.embedded:
        binary = stack.embedded.binary
        server = f"embedded server {binary.version_text} ({binary.origin})"
        log.note(f"Redis: {server}, data in {stack.state.redis_data}")
    names = served_names(stack.options.serve, os.environ)
    if STAND_IN_FOR in names[1:]:
        log.note(f"model: the built-in {names[0]}, also as {STAND_IN_FOR}; --model names another")


async def _announce_ready(stack: PreparedStack, log: Log, started: float) -> None:
    from cli.stack import readiness, redis_server

    await readiness.wait_until_ready(stack.options.url)
    names = served_names(stack.options.serve, os.environ)
    endpoint = stack.options.serve.otlp_traces_endpoint or os.environ.get(
        "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"
    )
    log.note(f"ready after {time.monotonic() - started:.1f} s")
    log.note(f"  API     {stack.options.url}   (its pages: {stack.options.url}/docs)")
    log.note(f"  models  {', '.join(names)}")
    log.note(f"  Redis   {redis_server.without_password(stack.options.serve.redis_url or '')}")
    log.note(f"  traces  {endpoint or 'not exported; --otlp-traces-endpoint says where to'}")
    log.note("Try:")
    log.note(f"  curl -s {stack.options.url}/v1/completions -H 'Content-Type: application/json' \\")
    log.note(f"""    -d '{{"model": "{names[0]}", "prompt": "San Francisco is a", "max_tokens": 16}}'""")
    log.note("Ctrl-C stops everything.")
