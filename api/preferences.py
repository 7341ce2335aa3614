"""How long a client wants to wait (RFC 7240 `Prefer`), and the key that makes a repeat harmless."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from starlette.datastructures import Headers

from api.errors import InvalidRequest

MAX_KEY_CHARACTERS = 255
_KEY = re.compile(r'"(?P<quoted>[ -!#-~]+)"|(?P<bare>[!#-~][ -~]*)')


@dataclass(frozen=True, slots=True)
class Preferences:
    respond_async: bool = False
    wait_seconds: float | None = None

    @property
    def wants_job(self) -> bool:
        """The client knows jobs: it can be given one instead of an answer, and the job goes on without it."""
        return self.respond_async or self.wait_seconds is not None

    def applied(self, wait_seconds: float | None) -> dict[str, str]:
        """The header that says what was done about them, given the wait that was granted."""
        parts = ["respond-async"] if self.respond_async else []
        if self.wait_seconds is not None and wait_seconds is not None:
            parts.append(f"wait={wait_seconds:g}")
        return {"Preference-Applied": ", ".join(parts)} if parts else {}


def read_preferences(headers: Headers) -> Preferences:
    """Preferences that are unknown or cannot be read are ignored, as the RFC wants."""
    respond_async, wait_seconds = False, None
    for part in ",".join(headers.getlist("prefer")).split(","):
        name, _, value = part.partition(";")[0].partition("=")
        match name.strip().lower():
            case "respond-async":
                respond_async = True
            case "wait" if wait_seconds is None:
                wait_seconds = _seconds(value.strip().strip('"'))
    return Preferences(respond_async, wait_seconds)


def read_wait(value: str | None) -> float | None:
    """The query parameter `wait`. Raises InvalidRequest."""
    if value is None:
        return None
    seconds = _seconds(value)
    if seconds is None:
        raise InvalidRequest("wait", value, "must be a number of seconds of at least 0")
    return seconds


def read_idempotency_key(headers: Headers) -> str | None:
    """Quoted, as the IETF draft has it, or bare, as most write it. Raises InvalidRequest."""
    raw = headers.get("idempotency-key")
    if raw is None:
        return None
    found = _KEY.fullmatch(raw.strip())
    key = (found["quoted"] or found["bare"]) if found else ""
    if not key or len(key) > MAX_KEY_CHARACTERS:
        rule = f"must be 1 to {MAX_KEY_CHARACTERS} printable ASCII characters, quoted or not"
        raise InvalidRequest("Idempotency-Key", raw, rule)
    return key


def _seconds(text: str) -> float | None:
    try:
        seconds = float(text)
    except ValueError:
        return None
    return seconds if math.isfinite(seconds) and seconds >= 0 else None
