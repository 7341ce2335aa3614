"""`throughline flower`: Flower on the project's own Celery application."""

from __future__ import annotations

import os

import click

from cli import options, settings
from cli.settings import ServeOptions

DEFAULT_PORT = 5555


@click.command(
    name="flower",
    short_help="Run Flower: workers, tasks and queues in a browser.",
    epilog=options.examples(
        "throughline flower --redis-url unix://$PWD/.throughline/redis.sock       beside `throughline up`",
        "REDIS_URL=redis://127.0.0.1:6379/0 throughline flower --port 5556",
    ),
)
@options.redis_option
@click.option("--host", default=options.DEFAULT_HOST, show_default=True, help="Address it listens on.")
@click.option(
    "--port", type=options.PORT, default=DEFAULT_PORT, show_default=True, help="Port it listens on."
)
def command(redis_url: str | None, host: str, port: int) -> None:
    """Run Flower, Celery's own monitor, on the broker of a stack.

    It needs the application for its broker options, not for its tasks, so it loads no model. Prompts are not
    in the messages and therefore not in Flower.
    """
    os.environ.update(settings.environment(ServeOptions(redis_url=redis_url), os.environ))

    from jobs.queue import create_celery
    from jobs.settings import JobsSettings, read_settings

    app = create_celery(read_settings(JobsSettings))
    app.start(["flower", f"--address={host}", f"--port={port}"])
