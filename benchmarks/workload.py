"""What the engine's benchmarks run: made from a seed, or read from a file.

A file is {"requests": [{"id": "a", "prompt_ids": [5, 6], "max_new_tokens": 64}, ...]}.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_TOKEN_IDS = range(10, 30000)


@dataclass(frozen=True, slots=True)
class BenchRequest:
    request_id: str
    prompt_ids: list[int]
    max_new_tokens: int


class WorkloadError(Exception):
    """One line that names the file, the field and the rule."""


def make_workload(num_requests: int = 64, seed: int = 0, vocab_size: int = 30000) -> list[BenchRequest]:
    """Prompts of 16 to 128 tokens, 64 new ones each."""
    generator = random.Random(seed)
    ids = range(_TOKEN_IDS.start, min(_TOKEN_IDS.stop, vocab_size))
    return [
        BenchRequest(str(index), [generator.choice(ids) for _ in range(generator.randint(16, 128))], 64)
        for index in range(num_requests)
    ]


def load_workload(path: Path) -> list[BenchRequest]:
    """Raises WorkloadError."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise WorkloadError(f"{path}: is no JSON file that can be read: {error}") from error
    entries = raw.get("requests") if isinstance(raw, dict) else None
    if not isinstance(entries, list) or not entries:
        raise WorkloadError(f"{path}: requests must be a list that is not empty")
    requests = [_read_request(entry, f"{path}: requests[{place}]") for place, entry in enumerate(entries)]
    (request_id, count), *_ = Counter(request.request_id for request in requests).most_common(1)
    if count > 1:
        raise WorkloadError(f"{path}: the id {request_id!r} comes {count} times")
    return requests


def _read_request(raw: Any, where: str) -> BenchRequest:
    if not isinstance(raw, dict):
        raise WorkloadError(f"{where} must be an object")
    request_id, prompt_ids, max_new_tokens = (
        raw.get(name) for name in ("id", "prompt_ids", "max_new_tokens")
    )
    if not isinstance(request_id, str):
        raise WorkloadError(f"{where}.id must be a string")
    if not isinstance(prompt_ids, list) or not prompt_ids or not all(map(_is_count, prompt_ids)):
        raise WorkloadError(f"{where}.prompt_ids must be a list of token ids that is not empty")
    if not _is_count(max_new_tokens) or max_new_tokens == 0:
        raise WorkloadError(f"{where}.max_new_tokens must be a whole number above 0")
    return BenchRequest(request_id, prompt_ids, max_new_tokens)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
