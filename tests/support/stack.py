"""`throughline up` as a process, for tests that need the real stack."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from cli.settings import PROJECT_FOLDER
from cli.stack import redis_server
from cli.stack.readiness import readiness
from tests.support.processes import kill_all_with, running_with, wait_until
from tests.support.valkey import free_port

# The first import of torch on a busy machine takes most of it.
READY_SECONDS = 90.0


class RunningStack:
    """A real stack; `mark` is in the environment of every process of it."""

    def __init__(
        self,
        folder: Path,
        arguments: Sequence[str] = (),
        *,
        launcher: Sequence[str] = (),
        environ: Mapping[str, str] | None = None,
    ) -> None:
        """`launcher` is put before the interpreter, `environ` added to this process's environment."""
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.state_folder = folder / "state"
        self.mark = f"STACK_MARK={uuid.uuid4()}"
        self._log = folder / "up.log"
        up = (sys.executable, "-m", "cli", "up")
        with self._log.open("w") as log:
            self.process = subprocess.Popen(
                [*launcher, *up, *self.arguments(), "--grace-seconds", "5", *arguments],
                cwd=PROJECT_FOLDER,
                env={**own_environment(), **(environ or {}), "STACK_MARK": self.mark.partition("=")[2]},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def arguments(self) -> list[str]:
        return ["--port", str(self.port), "--state-dir", str(self.state_folder)]

    @property
    def redis_url(self) -> str:
        return redis_server.socket_url(self.state_folder / "redis.sock")

    def log(self) -> str:
        return self._log.read_text()

    def wait_until_ready(self) -> None:
        self.wait(lambda: readiness(self.url)[0], "the stack is ready", READY_SECONDS)

    def wait_for_log(self, text: str, timeout_seconds: float = 60.0) -> None:
        self.wait(lambda: text in self.log(), f"the log says {text!r}", timeout_seconds)

    def wait(self, condition: object, what: str, timeout_seconds: float) -> None:
        assert callable(condition)
        try:
            wait_until(condition, timeout_seconds=timeout_seconds, what=what)
        except AssertionError as error:
            raise AssertionError(f"{error}; the stack's log:\n{self.log()}") from None

    def pids(self) -> list[int]:
        return running_with(self.mark)

    def pids_of(self, program: str) -> list[int]:
        """Return the ids of the processes whose command line holds `program`."""
        return [pid for pid in self.pids() if program in command_line(pid)]

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Send the signal and return the exit status."""
        self.process.send_signal(number)
        return self.process.wait(40)

    def kill_everything(self) -> None:
        kill_all_with(self.mark)
        self.process.wait()


@contextmanager
def running_stack(folder: Path, *arguments: str) -> Iterator[RunningStack]:
    """Start a stack without waiting for it; whatever the test leaves of it is killed."""
    stack = RunningStack(folder, arguments)
    try:
        yield stack
    finally:
        stack.kill_everything()


def own_environment() -> dict[str, str]:
    """Return this process's environment without what would aim a stack at somebody else's parts."""
    foreign = ("THROUGHLINE_", "OTEL_", "REDIS_URL")
    return {name: value for name, value in os.environ.items() if not name.startswith(foreign)}


def command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:  # it ended meanwhile
        return ""
