"""A bad value as a message may show it: never what can be a prompt or an output."""

from __future__ import annotations

from collections.abc import Sized

MAX_SHOWN_CHARACTERS = 60

TEXT_FIELDS = frozenset({"prompt", "messages", "stop", "suffix", "user", "metadata", "body"})
"""Fields that hold the client's own words: described by type and size."""


def describe(param: str, value: object) -> str:
    """Numbers, booleans and short names as they are; texts and collections by type and size.

    Args:
        param: where the value stood, such as `temperature` or `stop[1]`.
        value: as it came out of the JSON.
    """
    match value:
        case None:
            return "null"
        case bool():
            return str(value).lower()
        case int():
            return str(value) if abs(value) < 10**MAX_SHOWN_CHARACTERS else "(a huge number)"
        case float():
            return str(value)
        case str() if _field_of(param) in TEXT_FIELDS:
            return f"(a string of {_count(value, 'character')})"
        case str():
            return _shorten(repr(value))
        case list() | tuple():
            return f"(a list of {_count(value, 'item')})"
        case dict():
            return f"(an object of {_count(value, 'field')})"
        case _:
            return f"({type(value).__name__})"


def _field_of(param: str) -> str:
    return param.partition("[")[0].partition(".")[0]


def _count(value: Sized, noun: str) -> str:
    return f"{len(value)} {noun}{'' if len(value) == 1 else 's'}"


def _shorten(text: str) -> str:
    return text if len(text) <= MAX_SHOWN_CHARACTERS else text[:MAX_SHOWN_CHARACTERS] + "…"
