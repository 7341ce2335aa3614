"""The atomic moves: one Lua file each, read once and run by digest."""

from __future__ import annotations

from functools import cache
from importlib.resources import files


@cache
def source(name: str) -> str:
    """The script `name` with the shared functions in front of it."""
    folder = files("jobs") / "lua"
    return "\n".join((folder / f"{part}.lua").read_text(encoding="utf-8") for part in ("_common", name))
