"""Ties a program's life to its parent's, then becomes that program.

Run as a file by a bare interpreter (`python -I -S leash.py PARENT_PID COMMAND…`), so it may import nothing of
ours. On Linux the kernel sends SIGKILL to the program when the thread that started it ends, whatever ended
it; elsewhere the program runs untied and only the watchman cleans up after a killed supervisor. A
`preexec_fn` would do the same, but runs Python between fork and exec, which is not safe in a process that
has threads.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def argv(command: Sequence[str]) -> list[str]:
    """Return the command that runs `command` on the leash of the calling process.

    The process it is started from must start it from a thread that outlives it: the main one.
    """
    return [sys.executable, "-I", "-S", os.path.abspath(__file__), str(os.getpid()), *command]


def main(parent: int, command: Sequence[str]) -> None:
    if sys.platform == "linux":
        import ctypes

        if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
        if os.getppid() != parent:  # it died before the leash was on
            sys.exit(1)
    # Python ignores SIGPIPE, and what is ignored stays so through exec.
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    os.execvp(command[0], list(command))


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
