"""Option types and groups shared by the commands; a bad value's message names option, value and rule."""

from __future__ import annotations

import re
from collections.abc import Callable
from math import isfinite
from typing import Any, TypeVar
from urllib.parse import urlsplit

import click

_DEVICE = re.compile(r"auto|cpu|cuda(:\d+)?")
_BARE_ADDRESS = re.compile(r"[\w.\-]+:\d{1,5}")

Command = TypeVar("Command", bound=Callable[..., Any])

DEFAULT_HOST = "127.0.0.1"
DEFAULT_PORT = 8000
DEFAULT_URL = f"http://{DEFAULT_HOST}:{DEFAULT_PORT}"


def examples(*lines: str) -> str:
    """Return the part of a help text that shows commands, one a line."""
    return "\n".join(["\b", "Examples:", *(f"  {line}" for line in lines)])


def url(*schemes: str, bare_address: bool = False) -> Callable[[str], str]:
    """Return an option type: a URL with one of the schemes, or `host:port` with `bare_address`."""
    rule = " or ".join(f"{scheme}://" for scheme in schemes) + (", or be host:port" if bare_address else "")

    def convert(text: str) -> str:
        if bare_address and _BARE_ADDRESS.fullmatch(text):
            return text
        if "://" not in text or text.partition("://")[0] not in schemes:
            raise click.BadParameter(f"{text!r} must begin with {rule}")
        if not _has_target(text):
            raise click.BadParameter(f"{text!r} names no host, or no valid port (1-65535)")
        return text

    return convert


def _has_target(text: str) -> bool:
    try:
        parts = urlsplit(text)
        if parts.scheme == "unix":
            return parts.path.startswith("/")
        return bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port out of range, or an unclosed bracket
        return False


def model_name(text: str) -> str:
    """An option type: a name that clients may ask for."""
    name = text.strip()
    if not name or "," in name:
        raise click.BadParameter(f"{text!r} must not be empty or hold a comma; repeat the option instead")
    return name


def device(text: str) -> str:
    """An option type: where a model runs."""
    if not _DEVICE.fullmatch(text):
        raise click.BadParameter(f"{text!r} must be cpu, cuda, cuda:N or auto")
    return text


class _Finite(click.FloatRange):
    """A range that refuses nan too, which compares with nothing, and infinity."""

    name = "number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        number = super().convert(value, param, ctx)
        if not isfinite(number):
            self.fail(f"{value} is not a finite number.", param, ctx)
        return number


def trace_url_template(text: str) -> str:
    """An option type: the page of a trace, with {trace_id} in its place."""
    from api.trace_link import checked_template

    try:
        return checked_template(text)
    except ValueError as error:
        raise click.BadParameter(f"{text!r} {error}") from error


_ONE_HOST = url("redis", "rediss", "unix", "sentinel", "sentinels")


def redis_url(text: str) -> str:
    """An option type: where a Redis is."""
    from jobs.redis_url import SENTINEL_SCHEMES, checked, without_password

    if text.partition("://")[0] not in SENTINEL_SCHEMES:  # those name several hosts
        text = _ONE_HOST(text)
    try:
        return checked(text)
    except ValueError as error:
        raise click.BadParameter(f"{without_password(text)!r} {error}") from error


PORT = click.IntRange(1, 65535)
RATIO = _Finite(0, 1)
SECONDS = _Finite(0, min_open=True)
REDIS_URL = redis_url
OTLP_URL = url("grpc", "grpcs", "http", "https", bare_address=True)
API_URL = url("http", "https")


def listen_options(command: Command) -> Command:
    """--host and --port."""
    for option in (
        click.option(
            "--port", type=PORT, default=DEFAULT_PORT, envvar="THROUGHLINE_PORT", show_default=True,
            help="Port of the API.",
        ),
        click.option(
            "--host", default=DEFAULT_HOST, envvar="THROUGHLINE_HOST", show_default=True,
            help="Address the API listens on. There is no authentication: think before you choose 0.0.0.0.",
        ),
    ):  # fmt: skip
        command = option(command)
    return command


def redis_option(command: Command) -> Command:
    """--redis-url."""
    return click.option(
        "--redis-url", type=REDIS_URL, metavar="URL",
        help="A Redis 6.2 or newer: redis://host:port/db, rediss://…, unix:///path or "
        "sentinel[s]://host:port,host:port/service. Also THROUGHLINE_REDIS_URL or REDIS_URL.",
    )(command)  # fmt: skip


def otlp_option(command: Command) -> Command:
    """--otlp-traces-endpoint."""
    return click.option(
        "--otlp-traces-endpoint", type=OTLP_URL, metavar="URL",
        help="Where spans go: grpc://host:4317, or http://host:4318/v1/traces with "
        "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL=http/protobuf.",
    )(command)  # fmt: skip


def model_option(command: Command) -> Command:
    """--model."""
    return click.option(
        "--model", metavar="PATH_OR_NAME",
        help="Hugging Face model folder or hub name.  [default: the built-in throughline-tiny]",
    )(command)  # fmt: skip


def model_options(command: Command) -> Command:
    """--model, --served-model-name and --otlp-traces-endpoint."""
    served = click.option(
        "--served-model-name", "served_model_names", type=model_name, multiple=True, metavar="NAME",
        help="Name that clients ask for; repeat it for more, the first is the canonical one.  "
        "[default: the folder's name, or the hub name]",
    )  # fmt: skip
    return model_option(served(otlp_option(command)))


def engine_options(command: Command) -> Command:
    """How the engine runs: its numbers, its devices, what it runs ahead, and which of its steps are drawn."""
    for option in (
        click.option(
            "--trace-slow-steps",
            type=SECONDS,
            metavar="SECONDS",
            help="Draw each engine step that takes longer, whatever --trace-steps says.",
        ),
        click.option(
            "--trace-steps",
            type=RATIO,
            metavar="RATIO",
            help="Draw this part of the engine's steps (0 to 1), each as a trace of its own, linked to the "
            "jobs that join or leave in it; 0.01 is a good start.  [default: none]",
        ),
        click.option(
            "--batch-invariant",
            "is_batch_invariant",
            is_flag=True,
            help="The same request gives the same tokens whatever else runs, to the last bit of its logits; "
            "slower; on a GPU only in bfloat16.",
        ),
        click.option(
            "--speculative-tokens",
            type=click.IntRange(0, 64),
            metavar="N",
            help="Run up to N tokens of a sequence ahead in a step, as they followed when the same words "
            "stood before: faster for text that repeats itself, the same tokens for all.  [default: 0]",
        ),
        click.option(
            "--tensor-parallel-size",
            type=click.IntRange(1, 64),
            metavar="N",
            help="Share the model out over N GPUs, from the one that --device names on; N divides its heads "
            "and key heads.  [default: 1]",
        ),
        click.option(
            "--device",
            type=device,
            metavar="DEVICE",
            help="Where the model runs: cpu, cuda (the first GPU), cuda:N, or auto, a GPU if there is one.  "
            "[default: cpu]",
        ),
        click.option(
            "--kv-cache-dtype",
            type=click.Choice(["auto", "fp8"]),
            help="Type of cached keys and values: fp8 takes half of bfloat16's memory, or a quarter of "
            "float32's, and is less accurate; slow on a CPU.  [default: auto, as the model computes]",
        ),
        click.option(
            "--dtype",
            type=click.Choice(["float32", "bfloat16", "int8", "fp8"]),
            help="Type of the weights; fp8 is for GPUs of compute capability 8.9 and newer.",
        ),
    ):
        command = option(command)
    return command
