"""`throughline up`: the whole stack, kept running until it is told to stop."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cli import options
from cli.settings import STAND_IN_FOR, ServeOptions, served_names

if TYPE_CHECKING:
    from cli.stack.log import Log
    from cli.stack.runner import PreparedStack
    from cli.stack.viewer import ViewerAddress

EXIT_FORCED = 130


@click.command(
    name="up",
    short_help="Run the whole stack until Ctrl-C.",
    epilog=options.examples(
        "throughline up",
        "throughline up --model ./opt-125m --served-model-name facebook/opt-125m",
        "throughline up --workers 2 --port 8080 --redis-url redis://127.0.0.1:6379/0",
        "throughline up --otlp-traces-endpoint grpc://127.0.0.1:4317",
        "throughline up --trace-viewer            then: throughline trace JOB_ID",
        "throughline up --trace-viewer --trace-steps 0.01 --trace-slow-steps 0.5",
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
@click.option(
    "--trace-viewer",
    is_flag=True,
    help="Keep the newest spans in memory for `throughline trace`, instead of sending them elsewhere.",
)
@click.option(
    "--trace-viewer-grpc-port",
    "viewer_grpc_port",
    type=options.PORT,
    help="Port of the viewer for OTLP over gRPC, for clients of yours.  [default: a free one]",
)
@click.option(
    "--trace-viewer-http-port", "viewer_http_port", type=options.PORT,
    help="Port of the viewer for OTLP over HTTP and for reading.  [default: a free one]",
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
    trace_steps: float | None,
    trace_slow_steps: float | None,
    speculative_tokens: int | None,
    is_batch_invariant: bool,
    tensor_parallel_size: int | None,
    kv_cache_dtype: str | None,
    state_dir: Path,
    grace_seconds: float,
    trace_viewer: bool,
    viewer_grpc_port: int | None,
    viewer_http_port: int | None,
) -> None:
    """Run the whole stack: Redis (an embedded Valkey unless one is named), the API and the workers.

    Shows one log of all of them, starts again what dies, and stops everything in order on Ctrl-C or SIGTERM;
    a second Ctrl-C kills. Jobs that were accepted survive in the state folder.
    """
    import asyncio

    from cli.stack import runner, viewer
    from cli.stack.log import TerminalLog
    from cli.stack.plan import StackOptions

    _check_viewer_endpoint(trace_viewer, otlp_traces_endpoint)
    _check_viewer_ports(trace_viewer, port, viewer_grpc_port, viewer_http_port)
    serve = ServeOptions(
        model,
        served_model_names,
        redis_url,
        otlp_traces_endpoint,
        dtype,
        device,
        trace_steps,
        trace_slow_steps,
        speculative_tokens,
        is_batch_invariant,
        tensor_parallel_size,
        kv_cache_dtype,
    )
    stack_options = StackOptions(serve, host, port, num_workers, grace_seconds)
    with ExitStack() as exits:
        environ: Mapping[str, str] = os.environ
        stack = exits.enter_context(runner.prepare(stack_options, state_dir, environ))
        address = None
        if trace_viewer:
            address = exits.enter_context(
                viewer.viewing(
                    stack.state,
                    api_url=stack_options.url,
                    http_port=viewer_http_port or 0,
                    grpc_port=viewer_grpc_port or 0,
                )
            )
            environ = viewer.environment(address, environ)
        was_forced = asyncio.run(_run(stack, TerminalLog(stack.process_names()), environ, address))
    if was_forced:
        sys.exit(EXIT_FORCED)


def _check_viewer_endpoint(is_asked: bool, endpoint: str | None) -> None:
    if is_asked and endpoint:
        raise click.UsageError(
            "give --trace-viewer or --otlp-traces-endpoint, not both: spans go to one place only"
        )


def _check_viewer_ports(is_asked: bool, api_port: int, grpc_port: int | None, http_port: int | None) -> None:
    ports = {
        "--port": api_port,
        "--trace-viewer-grpc-port": grpc_port,
        "--trace-viewer-http-port": http_port,
    }
    given = {option: port for option, port in ports.items() if port is not None}
    if len(given) > 1 and not is_asked:
        raise click.UsageError(f"{list(given)[1]} needs --trace-viewer")
    if len(set(given.values())) < len(given):
        raise click.UsageError(f"{', '.join(given)} must differ: {', '.join(map(str, given.values()))}")


async def _run(
    stack: PreparedStack, log: Log, environ: Mapping[str, str], viewer: ViewerAddress | None
) -> bool:
    """Run until asked to stop; return whether the end was forced."""
    import asyncio

    from cli.stack import runner

    started = time.monotonic()
    _announce_start(stack, log)
    async with runner.running(stack, log, environ) as supervisor:
        announcer = asyncio.create_task(_announce_ready(stack, log, started, viewer))
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


async def _announce_ready(
    stack: PreparedStack, log: Log, started: float, viewer: ViewerAddress | None
) -> None:
    from cli.stack import readiness, redis_server

    await readiness.wait_until_ready(stack.options.url)
    names = served_names(stack.options.serve, os.environ)
    log.note(f"ready after {time.monotonic() - started:.1f} s")
    log.note(f"  API     {stack.options.url}   (its pages: {stack.options.url}/docs)")
    log.note(f"  models  {', '.join(names)}")
    log.note(f"  Redis   {redis_server.without_password(stack.options.serve.redis_url or '')}")
    log.note(f"  traces  {_where_traces_go(stack, viewer)}")
    log.note("Try:")
    log.note(f"  curl -s {stack.options.url}/v1/completions -H 'Content-Type: application/json' \\")
    log.note(f"""    -d '{{"model": "{names[0]}", "prompt": "San Francisco is a", "max_tokens": 16}}'""")
    log.note("Ctrl-C stops everything.")


def _where_traces_go(stack: PreparedStack, viewer: ViewerAddress | None) -> str:
    if viewer is not None:
        return f"throughline trace JOB_ID   (spans of yours: {viewer.grpc_endpoint}, {viewer.http_endpoint})"
    endpoint = stack.options.serve.otlp_traces_endpoint or os.environ.get(
        "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"
    )
    return endpoint or "not exported; --otlp-traces-endpoint says where to, --trace-viewer keeps them here"
