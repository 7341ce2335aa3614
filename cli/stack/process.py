"""One program under supervision: on a leash, in a process group of its own, its output read by line."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from cli.stack import leash
from cli.stack.policy import RestartPolicy

# A line without an end, such as a progress bar's, is passed on in pieces of this size.
MAX_LINE_BYTES = 64 * 1024


@dataclass(frozen=True, slots=True)
class ProcessSpec:
    """How to run one program.

    Attributes:
        environ: Its whole environment.
        grace_seconds: Time between the request to stop and the SIGKILL.
        is_vital: Whether the stack ends when this program is given up.
        is_ready: A quick blocking check that the program serves; `None` where nobody waits for it.
    """

    name: str
    argv: tuple[str, ...]
    environ: Mapping[str, str]
    folder: Path
    grace_seconds: float
    policy: RestartPolicy = field(default_factory=RestartPolicy)
    is_vital: bool = True
    is_ready: Callable[[], bool] | None = None


class Child:
    """A started program. Made and used in the main thread's event loop: the leash is tied to that thread."""

    def __init__(self, spec: ProcessSpec, on_line: Callable[[str], None]) -> None:
        self.spec = spec
        self._on_line = on_line
        self._loop = asyncio.get_running_loop()
        self._started = time.monotonic()
        self._partial = b""
        self.exit: asyncio.Future[int] = self._loop.create_future()
        self._output, write_end = os.pipe()
        try:
            self._popen = subprocess.Popen(
                leash.argv(spec.argv),
                env=dict(spec.environ),
                cwd=spec.folder,
                stdin=subprocess.DEVNULL,
                stdout=write_end,
                stderr=write_end,
                start_new_session=True,
            )
        except OSError:
            os.close(self._output)
            raise
        finally:
            os.close(write_end)
        os.set_blocking(self._output, False)
        self._loop.add_reader(self._output, self._read)
        # Not asyncio's own subprocess: up to 3.12 its wait() also waits for every heir of the pipe.
        threading.Thread(target=self._watch, name=f"watch-{spec.name}", daemon=True).start()

    @property
    def pid(self) -> int:
        """The process id, which is the id of its group too."""
        return self._popen.pid

    @property
    def ran_seconds(self) -> float:
        return time.monotonic() - self._started

    def ask_to_stop(self) -> None:
        """Send SIGTERM to the program itself; what it started is its own to stop."""
        if not self.exit.done():
            self._popen.send_signal(signal.SIGTERM)

    def kill_group(self) -> None:
        """SIGKILL the program and everything left of its group; harmless when all are gone."""
        with contextlib.suppress(ProcessLookupError, PermissionError):  # macOS: EPERM for a group of zombies
            os.killpg(self.pid, signal.SIGKILL)

    async def ended(self) -> int:
        """Return the exit status once the program and its group are gone and its last line was passed on."""
        status = await asyncio.shield(self.exit)
        self.kill_group()
        self._drain()
        return status

    def _watch(self) -> None:
        status = self._popen.wait()
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            self._loop.call_soon_threadsafe(self._set_exit, status)

    def _set_exit(self, status: int) -> None:
        if not self.exit.done():
            self.exit.set_result(status)

    def _read(self) -> bool:
        """Pass on what is there; return whether there may be more."""
        try:
            data = os.read(self._output, MAX_LINE_BYTES)
        except BlockingIOError:
            return False
        if not data:
            self._loop.remove_reader(self._output)
            return False
        *lines, self._partial = (self._partial + data).split(b"\n")
        if len(self._partial) > MAX_LINE_BYTES:
            lines, self._partial = [*lines, self._partial], b""
        for line in lines:
            self._emit(line)
        return True

    def _emit(self, line: bytes) -> None:
        # What a progress bar drew over is dropped, as a terminal would.
        text = line.decode(errors="replace").rstrip("\r").rpartition("\r")[2]
        if text.strip():
            self._on_line(text)

    def _drain(self) -> None:
        if self._output < 0:
            return
        while self._read():
            pass
        self._emit(self._partial)
        self._loop.remove_reader(self._output)
        os.close(self._output)
        self._output = -1
