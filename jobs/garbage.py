"""When a process of the path looks for garbage: seldom, and never through what it began with."""

from __future__ import annotations

import gc
from typing import Final

YOUNG_OBJECTS: Final = 50_000
"""Objects made and not yet freed before the young ones are looked through. Nearly all of a job's go without a
collector's help; with Python's own 700 a draining worker spent a quarter of its CPU on looking."""


def collect_seldom() -> None:
    """Called once, when all modules are loaded. A full collection through these stood still for 80 ms."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(YOUNG_OBJECTS, 20, 20)
