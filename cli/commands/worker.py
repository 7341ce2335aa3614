"""`throughline worker`: one Celery worker with its engine."""

from __future__ import annotations

import os
import sys

import click

from cli import options, settings
from cli.settings import ServeOptions


@click.command(
    name="worker",
    short_help="Run one Celery worker with its engine.",
    epilog=options.examples(
        "REDIS_URL=redis://127.0.0.1:6379/0 throughline worker",
        "throughline worker --redis-url redis://10.0.0.5:6379/0 --model ./opt-125m",
        "throughline worker --name gpu-1 --model meta-llama/Llama-3.2-1B --device cuda --dtype bfloat16",
        "throughline worker --model ./llama-70b --device cuda --dtype bfloat16 --tensor-parallel-size 2",
    ),
)
@click.option(
    "--name", default="worker", show_default=True, metavar="NAME",
    help="Celery node name, unique among the workers of one Redis and host.",
)  # fmt: skip
@options.redis_option
@options.model_options
@options.engine_options
def command(
    name: str,
    redis_url: str | None,
    model: str | None,
    served_model_names: tuple[str, ...],
    otlp_traces_endpoint: str | None,
    dtype: str | None,
    device: str | None,
    trace_steps: float | None,
    trace_slow_steps: float | None,
    speculative_tokens: int | None,
    is_batch_invariant: bool,
    tensor_parallel_size: int | None,
    kv_cache_dtype: str | None,
) -> None:
    """Run one worker: an ordinary Celery worker whose tasks feed one continuously batching engine.

    SIGTERM asks it to finish or hand back what it holds. It exits with code 3 when the model cannot be
    loaded.
    """
    serve = ServeOptions(
        model,
        served_model_names,
        redis_url,
        otlp_traces_endpoint,
        dtype,
        device,
        trace_steps,
        trace_slow_steps,
        speculative_tokens,
        is_batch_invariant,
        tensor_parallel_size,
        kv_cache_dtype,
    )
    environ = settings.with_project_importable(settings.environment(serve, os.environ))
    # Celery imports the app with its current folder first on the path, where another `workers` could lie.
    os.chdir(settings.PROJECT_FOLDER)
    os.execve(sys.executable, celery_argv(name), environ)


def celery_argv(name: str) -> list[str]:
    """Return the worker's command; pool, concurrency and the rest are in the app's own configuration."""
    # It is about accepting pickled messages as root; the app accepts JSON only.
    quiet = ["-W", "ignore:You're running the worker with superuser privileges"]
    app = ["-m", "celery", "-A", "workers.main", "worker", "-n", f"{name}@%h"]
    return [sys.executable, *quiet, *app, "--without-mingle", "--without-gossip"]
