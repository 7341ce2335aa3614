"""One readable log out of the output of many processes."""

from __future__ import annotations

import os
import sys
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Protocol, TextIO

import click

_COLOURS = ("cyan", "green", "yellow", "magenta", "blue", "bright_cyan", "bright_green", "bright_magenta")
SUPERVISOR = "up"


class Log(Protocol):
    def line(self, source: str, text: str) -> None:
        """Take one line that the process `source` wrote."""

    def note(self, text: str) -> None:
        """Take a line of the supervisor's own."""


class TerminalLog:
    """Writes each line behind the name of its process, coloured where the stream is a terminal.

    A reader that goes away (`throughline up | head`) stops the log, not the stack.
    """

    def __init__(self, names: tuple[str, ...], stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stdout
        self._width = max(map(len, (*names, SUPERVISOR)))
        self._colour = dict(zip(names, _cycle(len(names)), strict=True)) | {SUPERVISOR: "bright_white"}

    def line(self, source: str, text: str) -> None:
        prefix = click.style(f"{source:<{self._width}} │", fg=self._colour.get(source))
        try:
            click.echo(f"{prefix} {text}", file=self._stream)
        except BrokenPipeError:
            # Python flushes the stream once more at exit, and must not fail there.
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())

    def note(self, text: str) -> None:
        self.line(SUPERVISOR, text)


class FileLog:
    """Keeps the lines in a file, and the last ones at hand for the report of a failure; may echo them too."""

    def __init__(self, path: Path, *, num_last: int = 30, echo: Callable[[str], None] | None = None) -> None:
        self.path = path
        self.last: deque[str] = deque(maxlen=num_last)
        self._echo = echo
        self._file = path.open("w", encoding="utf-8", buffering=1)

    def line(self, source: str, text: str) -> None:
        entry = f"{source} │ {text}"
        self.last.append(entry)
        self._file.write(entry + "\n")
        if self._echo is not None:
            self._echo(entry)

    def note(self, text: str) -> None:
        self.line(SUPERVISOR, text)

    def close(self) -> None:
        self._file.close()


def _cycle(count: int) -> list[str]:
    return [_COLOURS[index % len(_COLOURS)] for index in range(count)]
