"""`throughline api`: the HTTP process alone."""

from __future__ import annotations

import os

import click

from cli import options
from cli.settings import ServeOptions, environment


@click.command(
    name="api",
    short_help="Run the HTTP API alone.",
    epilog=options.examples(
        "REDIS_URL=redis://127.0.0.1:6379/0 throughline api",
        "throughline api --redis-url unix:///run/redis.sock --served-model-name my-model --port 8080",
        "opentelemetry-instrument throughline api",
    ),
)
@options.listen_options
@options.redis_option
@options.model_options
@click.option(
    "--trace-url-template", type=options.trace_url_template, metavar="URL",
    help="Page of a trace, with {trace_id} in its place, that replies and errors link to, as in "
    "http://127.0.0.1:16686/trace/{trace_id}. Also THROUGHLINE_TRACE_URL_TEMPLATE.",
)  # fmt: skip
@click.option(
    "--drain-seconds", type=click.FloatRange(0, 3600), default=15.0, show_default=True,
    help="Time that requests in flight have to end after SIGTERM.",
)  # fmt: skip
def command(
    host: str,
    port: int,
    redis_url: str | None,
    model: str | None,
    served_model_names: tuple[str, ...],
    otlp_traces_endpoint: str | None,
    trace_url_template: str | None,
    drain_seconds: float,
) -> None:
    """Run the HTTP API alone: it takes jobs and answers, and loads no model.

    It needs a Redis (--redis-url or REDIS_URL) and, somewhere, at least one `throughline worker` on the same
    Redis that serves the same model.
    """
    import logging

    import uvicorn

    serve = ServeOptions(
        model=model,
        served_model_names=served_model_names,
        redis_url=redis_url,
        otlp_traces_endpoint=otlp_traces_endpoint,
    )
    os.environ.update(environment(serve, os.environ))
    os.environ.update(THROUGHLINE_HOST=host, THROUGHLINE_PORT=str(port))
    if trace_url_template is not None:
        os.environ["THROUGHLINE_TRACE_URL_TEMPLATE"] = trace_url_template
    # Probes come several times a minute and would bury the requests.
    logging.getLogger("uvicorn.access").addFilter(lambda record: '"GET /health/' not in record.getMessage())
    uvicorn.run(
        "api.app:create_app",
        factory=True,
        host=host,
        port=port,
        log_config=None,  # the app sets up the logs of the process
        timeout_graceful_shutdown=max(1, round(drain_seconds)),
    )
