"""From options to the environment the processes read.

An option beats a variable, a variable beats the default. Only what was given is written, so that every other
default stays with the settings class of the process that reads it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

BUILTIN_MODEL = "throughline-tiny"
# What vLLM's tracing example asks for: the built-in model answers to it, so that client runs as it is.
STAND_IN_FOR = "facebook/opt-125m"

PROJECT_FOLDER = Path(__file__).resolve().parent.parent


@dataclass(frozen=True, slots=True)
class ServeOptions:
    """What `up`, `api` and `worker` have in common; `None` or empty means not given."""

    model: str | None = None
    served_model_names: tuple[str, ...] = ()
    redis_url: str | None = None
    otlp_traces_endpoint: str | None = None
    dtype: str | None = None
    device: str | None = None
    trace_steps: float | None = None
    trace_slow_steps_seconds: float | None = None
    speculative_tokens: int | None = None
    is_batch_invariant: bool = False
    tensor_parallel_size: int | None = None
    kv_cache_dtype: str | None = None


def environment(options: ServeOptions, base: Mapping[str, str]) -> dict[str, str]:
    """Return `base` with the options written into it."""
    model = options.model or base.get("THROUGHLINE_MODEL")
    has_threads = "THROUGHLINE_NUM_THREADS" in base or "OMP_NUM_THREADS" in base
    given = {
        "THROUGHLINE_REDIS_URL": options.redis_url,
        "THROUGHLINE_MODEL": absolute_model(model) if model else None,
        "THROUGHLINE_SERVED_MODEL_NAMES": ",".join(served_names(options, base)),
        # Too small for a second thread: waiting for it made steps 80 times longer on a busy machine.
        "THROUGHLINE_NUM_THREADS": None if model or has_threads else "1",
        "THROUGHLINE_DTYPE": options.dtype,
        "THROUGHLINE_DEVICE": options.device,
        "THROUGHLINE_TRACE_STEPS": _number(options.trace_steps),
        "THROUGHLINE_TRACE_SLOW_STEPS_SECONDS": _number(options.trace_slow_steps_seconds),
        "THROUGHLINE_SPECULATIVE_TOKENS": _number(options.speculative_tokens),
        "THROUGHLINE_BATCH_INVARIANT": "true" if options.is_batch_invariant else None,
        "THROUGHLINE_TENSOR_PARALLEL_SIZE": _number(options.tensor_parallel_size),
        "THROUGHLINE_KV_CACHE_DTYPE": options.kv_cache_dtype,
        "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": options.otlp_traces_endpoint,
    }
    return {**base, **{name: value for name, value in given.items() if value}}


def _number(value: float | None) -> str | None:
    return None if value is None else str(value)


def served_names(options: ServeOptions, base: Mapping[str, str]) -> tuple[str, ...]:
    """Return the names the model answers to, the canonical one first."""
    if options.served_model_names:
        return options.served_model_names
    named = tuple(filter(None, map(str.strip, base.get("THROUGHLINE_SERVED_MODEL_NAMES", "").split(","))))
    if named:
        return named
    model = options.model or base.get("THROUGHLINE_MODEL")
    if not model:
        return (BUILTIN_MODEL, STAND_IN_FOR)
    folder = Path(model).expanduser()
    return (folder.resolve().name if folder.is_dir() else model,)


def absolute_model(model: str) -> str:
    """Return a folder's absolute path, since workers run elsewhere; a hub name as it is."""
    path = Path(model).expanduser()
    return str(path.absolute()) if path.exists() else model


def with_project_importable(base: Mapping[str, str]) -> dict[str, str]:
    """Return `base` such that a Python started with it finds our packages before any others."""
    rest = base.get("PYTHONPATH")
    path = f"{PROJECT_FOLDER}:{rest}" if rest else str(PROJECT_FOLDER)
    return {**base, "PYTHONPATH": path, "PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": "1"}
