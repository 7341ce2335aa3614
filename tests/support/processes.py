"""What runs on this machine, as the tests of the supervisor need to know it."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path


def running_with(mark: str) -> list[int]:
    """Return the ids of the running processes whose environment holds `mark` (zombies have none)."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (folder / "environ").read_bytes():
                found.append(int(folder.name))
        except OSError:  # it ended meanwhile, or belongs to somebody else
            continue
    return found


def kill_all_with(mark: str) -> None:
    for pid in running_with(mark):
        with contextlib.suppress(ProcessLookupError):  # it ended with the one before it
            os.kill(pid, signal.SIGKILL)


def wait_until(condition: Callable[[], bool], *, timeout_seconds: float, what: str) -> None:
    """Return once the condition holds; fail with `what` when it does not in time."""
    deadline = time.monotonic() + timeout_seconds
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout_seconds:g} s: {what}")
        time.sleep(0.02)


def of_each_thread(pid: int, name: str) -> list[str]:
    """What Linux tells under this name of each thread of a process; one that ends meanwhile is left out."""
    told = []
    for path in Path(f"/proc/{pid}/task").glob(f"*/{name}"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            told.append(path.read_text())
    return told


def children(pid: int) -> list[int]:
    """Of any of the process's threads."""
    return [int(child) for told in of_each_thread(pid, "children") for child in told.split()]
