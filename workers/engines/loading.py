"""Shows a model's loading to whoever watches a terminal."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)


@dataclass(frozen=True, slots=True)
class LoadingBar:
    """An engine's `LoadObserver`: what happens, and of the weights how many bytes are in."""

    progress: Progress
    task: TaskID

    def on_stage(self, what: str) -> None:
        self.progress.update(self.task, description=what)

    def on_weights(self, num_bytes: int, total_bytes: int) -> None:
        self.progress.update(self.task, completed=num_bytes, total=total_bytes)


@contextmanager
def show_loading(console: Console | None = None) -> Iterator[LoadingBar]:
    """Draw a bar, by default on standard error, that is gone afterwards; nothing where it is no terminal."""
    console = console if console is not None else Console(stderr=True)
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        yield LoadingBar(progress, progress.add_task("starting the engine", total=None))
