"""Limits of the HTTP side, read once at start."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, BeforeValidator, Field
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from api.trace_link import checked_template


def _split_names(value: object) -> object:
    if not isinstance(value, str):
        return value
    return tuple(name.strip() for name in value.split(",") if name.strip())


class ApiSettings(BaseSettings):
    """One API process; the variables are these names in capitals behind `THROUGHLINE_`."""

    model_config = SettingsConfigDict(env_prefix="THROUGHLINE_", frozen=True, extra="ignore")

    served_model_names: Annotated[tuple[str, ...], NoDecode, BeforeValidator(_split_names)] = ()
    """Models that ought to be here, separated by commas: without a worker they answer 503 instead of 404."""
    max_open_jobs: int = Field(default=100_000, ge=1)
    """A queue; beyond it submitting answers 429."""
    max_attempts: int = Field(default=3, ge=1, le=100)
    max_body_bytes: int = Field(default=10_000_000, ge=1024)
    max_prompts: int = Field(default=10_000, ge=1)
    """A job."""
    max_sequences: int = Field(default=16_384, ge=1)
    """Prompts times sequences each, a job: what its result may have to hold."""
    sync_wait_seconds: float = Field(default=600.0, gt=0.0, le=86_400.0)
    """How long POST /v1/completions waits before it answers 504."""
    long_poll_seconds: float = Field(default=60.0, gt=0.0, le=3600.0)
    """The most that `wait=n` on a job is given."""
    trace_url_template: Annotated[str, AfterValidator(checked_template)] | None = None
    """Page of a trace, with {trace_id} in its place; replies and errors then link to it."""
