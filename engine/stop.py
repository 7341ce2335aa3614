"""Finds stop strings in text that arrives in pieces, and says how much of it may be shown meanwhile."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StopScan:
    """Attributes:
    text: What may be shown now; on a match, the last there is.
    matched: The stop string found, if one was.
    """

    text: str
    matched: str | None


class StopMatcher:
    """Holds back only the longest tail that could still become a stop string.

    Of several matches the one complete first counts, and of those the one that starts first: what a reader
    of the stream, character by character, would find.
    """

    __slots__ = ("_held", "_keep_match", "_stops")

    def __init__(self, stops: tuple[str, ...], *, keep_match: bool) -> None:
        self._stops = stops
        self._keep_match = keep_match
        self._held = ""

    def feed(self, text: str) -> StopScan:
        if not self._stops:
            return StopScan(text, None)
        # A match cannot start before the held tail: that is the longest tail one could have started in.
        pending = self._held + text
        start, stop = self._first_match(pending)
        if stop is not None:
            self._held = ""
            return StopScan(pending[: start + len(stop) * self._keep_match], stop)
        num_held = self._num_to_hold(pending)
        self._held = pending[len(pending) - num_held :]
        return StopScan(pending[: len(pending) - num_held], None)

    def flush(self) -> str:
        """The held tail, once no more text can come."""
        held, self._held = self._held, ""
        return held

    def _first_match(self, text: str) -> tuple[int, str | None]:
        found = [(start + len(stop), start, stop) for stop in self._stops if (start := text.find(stop)) >= 0]
        if not found:
            return 0, None
        _, start, stop = min(found)
        return start, stop

    def _num_to_hold(self, text: str) -> int:
        return max(_overlap(text, stop) for stop in self._stops)


def _overlap(text: str, stop: str) -> int:
    """Length of the longest proper prefix of `stop` that `text` ends with."""
    longest = min(len(text), len(stop) - 1)
    return next((length for length in range(longest, 0, -1) if text.endswith(stop[:length])), 0)
