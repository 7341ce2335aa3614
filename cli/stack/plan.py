"""What the stack consists of: from options and environment to the stages the supervisor runs."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from cli import settings
from cli.errors import RedisUnreachableError
from cli.settings import ServeOptions
from cli.stack import redis_server
from cli.stack.policy import RestartPolicy
from cli.stack.process import ProcessSpec
from cli.stack.redis_server import ServerBinary
from cli.stack.supervisor import Stage

# What a worker exits with when its model cannot be loaded: the next try would read the same folder.
EXIT_BROKEN_MODEL = 3
REDIS_GRACE_SECONDS = 10.0
_GIVE_UP_AFTER = 5


@dataclass(frozen=True, slots=True)
class StackOptions:
    """A stack to run.

    Attributes:
        grace_seconds: What API and workers each have to finish what they began.
        are_workers_vital: Whether the stack ends when a worker is given up, instead of answering 503.
    """

    serve: ServeOptions
    host: str
    port: int
    num_workers: int
    grace_seconds: float
    are_workers_vital: bool = False

    @property
    def url(self) -> str:
        """Where a client on this machine finds the API."""
        host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(self.host, self.host)
        return f"http://{host}:{self.port}"


@dataclass(frozen=True, slots=True)
class EmbeddedRedis:
    """The server of the stack's own: its program, its data and its socket."""

    binary: ServerBinary
    data_folder: Path
    socket: Path

    @property
    def url(self) -> str:
        return redis_server.socket_url(self.socket)


def stages(
    options: StackOptions, embedded: EmbeddedRedis | None, environ: Mapping[str, str]
) -> tuple[Stage, ...]:
    """Return the stages in the order of their start.

    Args:
        options: With `serve.redis_url` set, the embedded server's included.
        embedded: The server to run as the first stage; `None` where somebody else runs it.
        environ: The environment to hand down.
    """
    child_environ = settings.with_project_importable(settings.environment(options.serve, environ))
    # A worker hands back what it has not finished a little before it would be killed.
    child_environ.setdefault("THROUGHLINE_SHUTDOWN_GRACE_SECONDS", f"{options.grace_seconds * 0.8:g}")
    workers = tuple(_worker(options, number, child_environ) for number in range(1, options.num_workers + 1))
    own_redis = (Stage((_redis(embedded, environ),)),) if embedded else ()
    return (*own_redis, Stage(workers), Stage((_api(options, child_environ),)))


def _redis(embedded: EmbeddedRedis, environ: Mapping[str, str]) -> ProcessSpec:
    def is_ready() -> bool:
        try:
            redis_server.ping(embedded.url, timeout_seconds=1.0)
        except RedisUnreachableError:
            return False
        return True

    return ProcessSpec(
        name="redis",
        argv=redis_server.server_argv(
            embedded.binary.path, data_folder=embedded.data_folder, socket=embedded.socket
        ),
        environ=environ,
        folder=embedded.data_folder,
        grace_seconds=REDIS_GRACE_SECONDS,
        policy=RestartPolicy(first_delay_seconds=0.1, max_quick_failures=_GIVE_UP_AFTER),
        is_ready=is_ready,
    )


def _worker(options: StackOptions, number: int, environ: Mapping[str, str]) -> ProcessSpec:
    name = f"worker-{number}"
    return ProcessSpec(
        name=name,
        # The port tells the workers of two stacks on one Redis and one machine apart.
        argv=(sys.executable, "-m", "cli", "worker", "--name", f"{name}-{options.port}"),
        environ=environ,
        folder=settings.PROJECT_FOLDER,
        grace_seconds=options.grace_seconds,
        policy=RestartPolicy(final_codes={EXIT_BROKEN_MODEL: "its settings or its model are at fault"}),
        is_vital=options.are_workers_vital,
    )


def _api(options: StackOptions, environ: Mapping[str, str]) -> ProcessSpec:
    listen = ("--host", options.host, "--port", str(options.port))
    # Half of the grace period for requests in flight leaves the other half for the rest of the shutdown.
    drain = ("--drain-seconds", f"{options.grace_seconds / 2:g}")
    return ProcessSpec(
        name="api",
        argv=(sys.executable, "-m", "cli", "api", *listen, *drain),
        environ=environ,
        folder=settings.PROJECT_FOLDER,
        grace_seconds=options.grace_seconds,
        policy=RestartPolicy(max_quick_failures=_GIVE_UP_AFTER),
    )
