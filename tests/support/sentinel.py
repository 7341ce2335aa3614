"""A primary, its replica and a Sentinel that replaces the one by the other within about a second.

with running_sentinel() as cluster:
    cluster.url                      # sentinel://127.0.0.1:…/main/0
    cluster.primary.kill()           # the replica takes over
"""

from __future__ import annotations

import os
import shutil
import ssl
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import redis

from cli.stack import leash, redis_server
from tests.support.processes import wait_until
from tests.support.tcp_proxy import TcpProxy
from tests.support.valkey import ValkeyServer, free_port

NAME = "main"
PASSWORD = "s3cret/of@all"
"""Of the primary and the replica; with characters that a URL has to quote."""
QUOTED_PASSWORD = "s3cret%2Fof%40all"
_START_SECONDS = 20.0


@dataclass(frozen=True, slots=True)
class SentinelCluster:
    primary: ValkeyServer
    replica: ValkeyServer
    url: str


@contextmanager
def running_sentinel(certificate: Path | None = None) -> Iterator[SentinelCluster]:
    """With a certificate (and its key, in one file) Sentinel and primary are reached over TLS."""
    with ExitStack() as stack:
        primary = stack.enter_context(_server())
        port = _port(primary) if certificate is None else _over_tls(stack, certificate, _port(primary))
        replica = stack.enter_context(_server("--replicaof", "127.0.0.1", str(port)))
        sentinel_port = free_port()
        stack.enter_context(_sentinel(sentinel_port, port))
        url = f"sentinel://:{QUOTED_PASSWORD}@127.0.0.1:{sentinel_port}/{NAME}/0"
        if certificate is not None:
            shown_port = _over_tls(stack, certificate, sentinel_port)
            url = f"sentinels://:{QUOTED_PASSWORD}@127.0.0.1:{shown_port}/{NAME}/0?ssl_ca_certs={certificate}"
        _wait_for_replica(sentinel_port)
        yield SentinelCluster(primary, replica, url)


def _over_tls(stack: ExitStack, certificate: Path, port: int) -> int:
    """Of a proxy before `port`. Servers that speak to one another without TLS are let through."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate)
    return stack.enter_context(TcpProxy(port, tls=context)).port


@contextmanager
def _server(*more_argv: str) -> Iterator[ValkeyServer]:
    folder = Path(tempfile.mkdtemp(prefix="valkey-"))
    login = ("--requirepass", PASSWORD, "--masterauth", PASSWORD)
    server = ValkeyServer(folder, tcp=True, more_argv=(*login, *more_argv))
    server.url = server.url.replace("://", f"://:{QUOTED_PASSWORD}@")
    try:
        server.start()
        yield server
    finally:
        server.kill()
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _sentinel(port: int, primary_port: int) -> Iterator[None]:
    folder = Path(tempfile.mkdtemp(prefix="sentinel-"))
    config = folder / "sentinel.conf"
    config.write_text(
        f"port {port}\nbind 127.0.0.1\ndir {folder}\n"
        f"sentinel monitor {NAME} 127.0.0.1 {primary_port} 1\n"
        f"sentinel auth-pass {NAME} {PASSWORD}\n"
        f"sentinel down-after-milliseconds {NAME} 300\n"
        f"sentinel failover-timeout {NAME} 3000\n"
    )
    binary = redis_server.find_binary(os.environ).path
    with (folder / "sentinel.log").open("wb") as log:
        process = subprocess.Popen(
            leash.argv((str(binary), str(config), "--sentinel")),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        yield
    finally:
        process.kill()
        process.wait(10)
        shutil.rmtree(folder, ignore_errors=True)


def _wait_for_replica(sentinel_port: int) -> None:
    """Until the Sentinel could fail over: it knows of one that is in step."""
    with redis.Redis(port=sentinel_port, decode_responses=True) as client:

        def is_ready() -> bool:
            try:
                return [
                    r["is_slave"] and r["master-link-status"] == "ok" for r in client.sentinel_slaves(NAME)
                ] == [True]
            except redis.RedisError:
                return False

        wait_until(is_ready, timeout_seconds=_START_SECONDS, what="the Sentinel knows a replica in step")


def _port(server: ValkeyServer) -> int:
    return int(server.url.rpartition(":")[2].partition("/")[0])
