"""The state folder of a stack: the embedded server's data, and the lock that keeps a second stack out.

.throughline/             0700
  up.lock                 held by flock while a stack runs; says which one
  redis/                  the embedded server's append-only file
  trace_viewer.json       where spans are read and sent, while a viewer listens
  redis.sock              its socket, unless the path is too long for one
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from cli.errors import StateFolderError
from cli.stack import redis_server

VIEWER_FILE = "trace_viewer.json"


@dataclass(frozen=True, slots=True)
class StateFolder:
    """A state folder that this process holds."""

    path: Path
    redis_data: Path
    redis_socket: Path
    trace_viewer: Path


@contextmanager
def hold(path: Path, *, url: str) -> Iterator[StateFolder]:
    """Make the folder private and hold its lock for the block.

    Args:
        path: The folder; made where it is missing.
        url: Where the stack answers; told to whoever tries to start a second one.

    Raises:
        StateFolderError: Another stack holds it, or it cannot be made or made private.
    """
    path = path.absolute()
    _make_private(path)
    data = path / "redis"
    _make_private(data)
    with _lock(path / "up.lock") as lock:
        _write(lock, {"pid": os.getpid(), "url": url})
        viewer = path / VIEWER_FILE
        viewer.unlink(missing_ok=True)  # left by a stack that was killed: this one holds the lock
        yield StateFolder(path, data, _socket_path(path), viewer)


def _make_private(path: Path) -> None:
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        if path.stat().st_uid != os.getuid():
            raise StateFolderError(f"--state-dir {path}: belongs to another user; name one of your own")
        path.chmod(0o700)
    except OSError as error:
        raise StateFolderError(f"--state-dir {path}: cannot be used: {error.strerror or error}") from error


@contextmanager
def _lock(path: Path) -> Iterator[TextIO]:
    # The lock goes with the process, however that ends, so the file itself is never stale.
    with path.open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = _read(file)
            raise StateFolderError(
                f"--state-dir {path.parent}: a stack runs here already (pid {holder.get('pid', 'unknown')}, "
                f"{holder.get('url', 'starting')}); stop it, or name another folder"
            ) from error
        yield file


def _read(file: TextIO) -> dict[str, object]:
    file.seek(0)
    try:
        content = json.load(file)
    except ValueError:  # its holder has not got round to writing
        return {}
    return content if isinstance(content, dict) else {}


def _write(file: TextIO, content: Mapping[str, object]) -> None:
    file.seek(0)
    file.truncate()
    json.dump(content, file)
    file.flush()


def _socket_path(folder: Path) -> Path:
    path = folder / "redis.sock"
    if redis_server.fits_socket_path(path):
        return path
    digest = hashlib.sha256(os.fsencode(folder)).hexdigest()[:12]
    short = Path(tempfile.gettempdir()) / f"throughline-{os.getuid()}-{digest}"
    _make_private(short)
    return short / "redis.sock"
