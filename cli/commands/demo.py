"""`throughline demo`: the whole product in one go, on real parts."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import click

from cli import options

if TYPE_CHECKING:
    from rich.console import Console

    from cli.demo.scenario import Outcome
    from cli.stack.log import Log
    from cli.stack.plan import StackOptions
    from cli.stack.runner import PreparedStack
    from telemetry.receiver import Receiver

HOST = "127.0.0.1"
GRACE_SECONDS = 10.0
_FOREIGN = ("THROUGHLINE_", "OTEL_", "REDIS_URL")
LOG_WIDTH = 132  # of a file or a CI log, where nothing says how wide it is shown


@click.command(
    name="demo",
    short_help="Show all of it once: stack, jobs, completions, one trace.",
    epilog=options.examples("throughline demo", "throughline demo --verbose"),
)
@click.option(
    "--deadline",
    "deadline_seconds",
    type=click.FloatRange(5, 3600),
    default=90.0,
    show_default=True,
    help="Seconds until the demo counts as failed.",
)
@click.option("--verbose", is_flag=True, help="Show the log of the stack as well.")  # fmt: skip
def command(deadline_seconds: float, verbose: bool) -> None:
    """Start a stack with the built-in model, send it real requests, show what came of them, and stop it.

    Runs the client of vLLM's tracing example unchanged, then a few jobs through submit and poll, a job with a
    list of prompts and a synchronous completion; prints the completions, the timings and the trace of the
    client's request as a tree. Needs no Redis, no GPU and no network; leaves nothing behind.
    """
    from rich.console import Console

    from cli.demo import report

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = LOG_WIDTH
    started = time.monotonic()
    outcome = _run(console, started + deadline_seconds, verbose=verbose)
    report.show(outcome, console)
    console.print(f"[green]Done[/] in {time.monotonic() - started:.1f} s; everything was stopped.")


def _run(console: Console, deadline: float, *, verbose: bool) -> Outcome:
    import asyncio

    from cli.errors import CliError
    from cli.stack import runner
    from cli.stack.log import FileLog
    from telemetry.receiver import Receiver

    environ = own_environment(os.environ)
    with ExitStack() as exits:
        folder = Path(exits.enter_context(TemporaryDirectory(prefix="throughline-demo-")))
        log = FileLog(folder / "stack.log", echo=_print_raw(console) if verbose else None)
        exits.callback(log.close)
        receiver = exits.enter_context(Receiver(HOST))
        options = _stack_options(receiver, console)
        stack = exits.enter_context(runner.prepare(options, folder / "state", environ))
        try:
            return asyncio.run(_run_stack(stack, receiver, log, console, deadline))
        except CliError:
            if not verbose:
                click.echo("\n".join(["The last lines of the stack's log:", *log.last]), err=True)
            raise


def own_environment(base: Mapping[str, str]) -> dict[str, str]:
    """Return `base` without what would aim the demo at somebody's queue, model or collector."""
    ours = {name: value for name, value in base.items() if not name.startswith(_FOREIGN)}
    # Where no server can be started, one that was named serves; a prefix keeps the demo to itself.
    return {**ours, "THROUGHLINE_KEY_PREFIX": f"tl-demo-{os.getpid()}:"}


def _stack_options(receiver: Receiver, console: Console) -> StackOptions:
    from cli.settings import ServeOptions
    from cli.stack.plan import StackOptions

    serve = ServeOptions(redis_url=_named_redis(os.environ), otlp_traces_endpoint=receiver.grpc_endpoint)
    return StackOptions(serve, HOST, _choose_port(console), 1, GRACE_SECONDS, are_workers_vital=True)


def _named_redis(environ: Mapping[str, str]) -> str | None:
    """Return a server from the environment only where none can be started: it may hold somebody's queue."""
    from cli.errors import NoRedisError
    from cli.stack import redis_server

    try:
        redis_server.find_binary(environ)
    except NoRedisError:
        choice = redis_server.choose(None, environ)
        return choice.url if isinstance(choice, redis_server.ExternalRedis) else None
    return None


def _choose_port(console: Console) -> int:
    """Return the port the seed's client posts to, or, where that is taken, another one."""
    from cli.demo import seed_client
    from cli.errors import PortInUseError
    from cli.stack import port

    try:
        port.check_free(HOST, seed_client.PORT)
        return seed_client.PORT
    except PortInUseError:
        chosen = port.choose_free(HOST)
        console.print(
            f"Port {seed_client.PORT} is in use: the seed's client is run with port {chosen} in its URL."
        )
        return chosen


async def _run_stack(
    stack: PreparedStack, receiver: Receiver, log: Log, console: Console, deadline: float
) -> Outcome:
    """Play the scenario against a running stack; end with whichever ends first, the play or the stack."""
    import asyncio

    from cli.client import ApiClient
    from cli.demo.scenario import Scenario
    from cli.errors import DemoError
    from cli.stack import runner

    environ = own_environment(os.environ)
    with ApiClient(stack.options.url) as client:
        async with runner.running(stack, log, environ) as supervisor:
            scenario = Scenario(
                client,
                stack.options.port,
                receiver,
                _teller(console),
                lambda: supervisor.is_stopping,
                deadline,
            )
            playing = asyncio.create_task(asyncio.to_thread(scenario.run))
            watching = asyncio.create_task(supervisor.wait())
            # A little more than the scenario's own deadline, whose message says more.
            limit_seconds = max(0.0, deadline - time.monotonic()) + 5.0
            await asyncio.wait(
                {playing, watching}, timeout=limit_seconds, return_when=asyncio.FIRST_COMPLETED
            )
            if playing.done():
                watching.cancel()
                return playing.result()
            await supervisor.stop()  # requests in flight fail, and so the scenario ends
            await asyncio.gather(playing, return_exceptions=True)  # what ended the stack says more than this
    await watching
    raise DemoError("interrupted" if supervisor.was_asked_to_stop else "the deadline passed")


def _teller(console: Console) -> Callable[[str], AbstractContextManager[None]]:
    """Return what shows a step while it runs, and how long it took."""

    @contextmanager
    def tell(text: str) -> Iterator[None]:
        started = time.monotonic()
        with console.status(text):
            yield
        console.print(f"[green]✓[/] {text} [dim]({time.monotonic() - started:.1f} s)[/]")

    return tell


def _print_raw(console: Console) -> Callable[[str], None]:
    # The lines of the stack hold brackets, which are no markup.
    return lambda line: console.print(line, markup=False, style="dim")
