"""Outlives the supervisor by a moment, to kill what the leash does not hold.

The leash ties children, not what they start themselves: a worker's engine process would be left behind by
a supervisor that gets SIGKILL. This program reads from a pipe whose other end only the supervisor has. Each
line holds the process groups that run now; at the end of the file the supervisor is gone, and the groups of
the last line are killed. Run as a file by a bare interpreter, so it may import nothing of ours.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager


class Watchman:
    """The supervisor's end of the pipe."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process

    def note(self, groups: Sequence[int]) -> None:
        """Tell which process groups run now."""
        assert self._process.stdin is not None
        # Without its watchman the stack still runs; the leash holds most of it.
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(" ".join(map(str, groups)).encode() + b"\n")
            self._process.stdin.flush()


@contextmanager
def on_watch() -> Iterator[Watchman]:
    """Post a watchman for the block; at its end, too, whatever was noted last is killed."""
    # A session of its own: Ctrl-C in the terminal is for the supervisor.
    with subprocess.Popen(
        [sys.executable, "-I", "-S", os.path.abspath(__file__)],
        stdin=subprocess.PIPE,
        start_new_session=True,
    ) as process:
        yield Watchman(process)  # leaving the block closes the pipe and waits


def main() -> None:
    groups: list[int] = []
    for line in sys.stdin:
        groups = [int(group) for group in line.split()]
    for group in groups:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(group, signal.SIGKILL)


if __name__ == "__main__":
    main()
