"""One stack from its options to its end: everything is checked before anything is started."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from cli.stack import plan, port, redis_server, state, watchman
from cli.stack.log import Log
from cli.stack.plan import EmbeddedRedis, StackOptions
from cli.stack.redis_server import ExternalRedis
from cli.stack.state import StateFolder
from cli.stack.supervisor import Stage, Supervisor

_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass(frozen=True, slots=True)
class PreparedStack:
    """A stack whose port, state folder and Redis were found fit; `options.serve.redis_url` is set."""

    options: StackOptions
    embedded: EmbeddedRedis | None
    state: StateFolder

    def process_names(self) -> tuple[str, ...]:
        stages = plan.stages(self.options, self.embedded, {})
        return tuple(process.name for stage in stages for process in stage.processes)


@contextmanager
def prepare(options: StackOptions, state_folder: Path, environ: Mapping[str, str]) -> Iterator[PreparedStack]:
    """Check everything that can be checked, and hold the state folder.

    Raises:
        CliError: The port is taken, the folder is in use, or there is no Redis; nothing was started.
    """
    choice = redis_server.choose(options.serve.redis_url, environ)
    if isinstance(choice, ExternalRedis):
        redis_server.ping(choice.url)
    port.check_free(options.host, options.port)
    with state.hold(state_folder, url=options.url) as folder:
        if isinstance(choice, ExternalRedis):
            embedded, url = None, choice.url
        else:
            embedded = EmbeddedRedis(choice, folder.redis_data, folder.redis_socket)
            url = embedded.url
        yield PreparedStack(replace(options, serve=replace(options.serve, redis_url=url)), embedded, folder)


@asynccontextmanager
async def running(stack: PreparedStack, log: Log, environ: Mapping[str, str]) -> AsyncIterator[Supervisor]:
    """Start the stack, and leave nothing of it behind however the block ends; see `supervised`."""
    stages = plan.stages(stack.options, stack.embedded, environ)
    async with supervised(stages, log) as supervisor:
        yield supervisor


@asynccontextmanager
async def supervised(stages: Sequence[Stage], log: Log) -> AsyncIterator[Supervisor]:
    """Enter the block with everything started, or with a stop requested; leave it with nothing running.

    Meanwhile SIGINT, SIGTERM and SIGHUP ask the supervisor to stop; a second one kills.

    Raises:
        StackError: A process that others wait for does not come up.
    """
    loop = asyncio.get_running_loop()
    with watchman.on_watch() as watch:
        supervisor = Supervisor(stages, log, watch.note)
        for number in _STOP_SIGNALS:
            loop.add_signal_handler(number, supervisor.request_stop)
        try:
            await supervisor.start()
            yield supervisor
        finally:
            await supervisor.stop()
            for number in _STOP_SIGNALS:
                loop.remove_signal_handler(number)
