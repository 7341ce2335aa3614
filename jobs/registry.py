"""Which models are served, by whom, and what the API must know to check a prompt against them.

A worker announces a card and its tokenizer when its engine is ready and beats every few seconds; the
API reads cards and beats. So the API needs no model folder, and a model without a live worker is
known (503) rather than unknown (404).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from jobs.model import Document, Priority, WorkerId

BEAT_SECONDS = 2.0
"""How often a worker says that it is alive."""
ALIVE_SECONDS = 10.0
"""A worker silent for longer counts as gone; five missed beats."""


class ModelCard(Document):
    name: str
    """The canonical served name; jobs and queues carry it."""
    aliases: tuple[str, ...] = ()
    vocab_size: int
    max_model_len: int
    """Prompt and output tokens together."""
    max_num_sequences: int
    """Sequences that one worker runs at once."""
    max_logprobs: int = 20
    architecture: str
    dtype: str
    device: str
    tokenizer_digest: str
    """SHA-256 of the tokenizer's JSON, the key under which it is stored."""


@dataclass(frozen=True, slots=True)
class ServedModel:
    card: ModelCard
    num_workers: int
    """Workers heard from within ALIVE_SECONDS."""


def queue_name(model: str, priority: Priority) -> str:
    """The Celery queue of a model and a priority class."""
    return f"{model}.{priority}"


class ModelDirectory(Protocol):
    """The API's side. Raises `StoreUnavailable`."""

    async def list_models(self, *, now: float) -> list[ServedModel]: ...

    async def tokenizer_json(self, digest: str) -> str | None: ...


class ModelAnnouncer(Protocol):
    """A worker's side. Raises `StoreUnavailable`."""

    def announce(self, card: ModelCard, tokenizer_json: str) -> None: ...

    def beat(self, model: str, worker: WorkerId, *, now: float) -> None: ...

    def leave(self, model: str, worker: WorkerId) -> None: ...
