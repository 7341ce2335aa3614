"""A real Valkey server for tests: on a unix socket in a folder of its own, gone at the end.

with valkey_server() as url:                 # unix:///tmp/…/redis.sock
    ...
with running_valkey() as server:             # the same, with a handle on the process
    server.kill(); server.start()            # SIGKILL, then back with its append-only file
    server.pause(); server.resume()          # hung: accepts, never answers
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cli.stack import leash, redis_server


class ValkeyServer:
    """One server process over one data folder; may be killed and started again, with the data it had."""

    def __init__(self, folder: Path, *, tcp: bool = False, more_argv: tuple[str, ...] = ()) -> None:
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None
        binary = redis_server.find_binary(os.environ).path
        if tcp:
            port = free_port()
            self.url = f"redis://127.0.0.1:{port}/0"
            self._argv = redis_server.tcp_server_argv(binary, data_folder=folder, port=port)
        else:
            path = folder / "redis.sock"
            self.url = redis_server.socket_url(path)
            self._argv = redis_server.server_argv(binary, data_folder=folder, socket=path)
        self._argv += more_argv

    def start(self) -> None:
        """Return once the server answers."""
        if self.is_running():
            raise RuntimeError("the server runs already")
        with (self._folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                leash.argv(self._argv),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        redis_server.wait_until_ready(self.url, is_running=self.is_running)

    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def pause(self) -> None:
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    def kill(self) -> None:
        """SIGKILL, as a crash would."""
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        self._end(signal.SIGTERM)

    def log(self) -> str:
        return (self._folder / "server.log").read_text()

    def _signal(self, number: signal.Signals) -> None:
        if self._process is not None and self.is_running():
            self._process.send_signal(number)

    def _end(self, number: signal.Signals) -> None:
        if self._process is None:
            return
        self._signal(number)
        self._signal(signal.SIGCONT)  # a paused process takes no SIGTERM
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


@contextmanager
def running_valkey(*, tcp: bool = False) -> Iterator[ValkeyServer]:
    # Not pytest's tmp_path: its folders can be longer than a socket's path may be.
    folder = Path(tempfile.mkdtemp(prefix="valkey-"))
    server = ValkeyServer(folder, tcp=tcp)
    try:
        server.start()
        yield server
    finally:
        server.kill()
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def valkey_server(*, tcp: bool = False) -> Iterator[str]:
    """Yield the URL of a fresh server: `unix:///…`, or `redis://127.0.0.1:port/0` with `tcp`."""
    with running_valkey(tcp=tcp) as server:
        yield server.url


def free_port() -> int:
    """Return a loopback port that nobody listened on a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    with valkey_server(tcp="--tcp" in sys.argv) as served_url:
        print(served_url, flush=True)
        signal.pause()
