"""What this machine has for running the stack, check by check; nothing is started, nothing is changed.

A check is a function from a `Subject` to findings. It never raises for what it looks at: what is wrong there
is what it is to find.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import socket
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal
from urllib.parse import urlsplit

from cli import settings
from cli.errors import NoRedisError, RedisUnreachableError
from cli.stack import readiness, redis_server
from cli.stack.redis_server import ExternalRedis

if TYPE_CHECKING:
    from cuda_ops.native import KernelChoice, KernelsInUse

State = Literal["ok", "note", "missing"]
PACKAGES = (
    "throughline", "torch", "celery", "kombu", "redis", "fastapi", "uvicorn", "opentelemetry-sdk",
    "tokenizers", "safetensors",
)  # fmt: skip
CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
_OTLP_PORT = 4317


@dataclass(frozen=True, slots=True)
class Finding:
    """One fact; `missing` is what makes the stack impossible to run, `note` what may surprise."""

    what: str
    state: State
    detail: str


@dataclass(frozen=True, slots=True)
class Subject:
    """What to look at; `url` is None where the API need not be there."""

    environ: Mapping[str, str]
    redis_url: str | None = None
    url: str | None = None
    otlp_traces_endpoint: str | None = None
    model: str | None = None


def diagnose(subject: Subject) -> list[Finding]:
    """Return the findings of all checks, in the order of their report."""
    return [finding for check in CHECKS for finding in check(subject)]


def check_python(subject: Subject) -> list[Finding]:
    version = platform.python_version()
    if (3, 11) <= sys.version_info[:2] <= (3, 13):
        return [Finding("python", "ok", version)]
    return [Finding("python", "missing", f"{version}; 3.11 to 3.13 is needed")]


def check_packages(subject: Subject) -> list[Finding]:
    return [_package(name) for name in PACKAGES]


def _package(name: str) -> Finding:
    try:
        return Finding(name, "ok", importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return Finding(name, "missing", "not installed; `make setup` installs everything")


def check_redis(subject: Subject) -> list[Finding]:
    try:
        choice = redis_server.choose(subject.redis_url, subject.environ)
    except NoRedisError as error:
        return [Finding("redis server", "missing", str(error))]
    if isinstance(choice, ExternalRedis):
        return [_external_redis(choice)]
    return [
        Finding(
            "redis server", "ok", f"{choice.path} {choice.version_text} ({choice.origin}) would be started"
        )
    ]


def _external_redis(choice: ExternalRedis) -> Finding:
    try:
        redis_server.ping(choice.url)
    except RedisUnreachableError as error:
        return Finding("redis server", "missing", f"{error} (from {choice.source})")
    return Finding(
        "redis server", "ok", f"{redis_server.without_password(choice.url)} answers (from {choice.source})"
    )


def check_api(subject: Subject) -> list[Finding]:
    url = subject.url or "http://127.0.0.1:8000"
    is_ready, said = readiness.readiness(url)
    if is_ready:
        return [Finding("api", "ok", f"{url} is ready")]
    # Nobody asked for it to be there: that it is not is worth a word, not an alarm.
    return [Finding("api", "missing" if subject.url else "note", f"{url}: {said}")]


def check_otlp(subject: Subject) -> list[Finding]:
    endpoint = (
        subject.otlp_traces_endpoint
        or subject.environ.get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
        or subject.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT")
    )
    if not endpoint:
        return [Finding("otlp", "note", "no endpoint is set: spans get ids, but go nowhere")]
    parts = urlsplit(endpoint if "://" in endpoint else f"//{endpoint}")
    try:
        with socket.create_connection((parts.hostname or "", parts.port or _OTLP_PORT), timeout=3):
            return [Finding("otlp", "ok", f"{endpoint} takes connections")]
    except (OSError, ValueError) as error:
        # No job waits for telemetry, so the stack runs without it.
        return [Finding("otlp", "note", f"{endpoint}: {error}")]


def check_device(subject: Subject) -> list[Finding]:
    flags = [flag for flag in CPU_FLAGS if flag in _cpu_flags()]
    units = ", ".join(flags) or "none of the vector units known here"
    cpu = Finding("cpu", "ok", f"{platform.machine()}, {units}")
    if importlib.util.find_spec("torch") is None:
        return [cpu]
    import torch

    if not torch.cuda.is_available():
        return [
            cpu,
            Finding("cuda", "note", f"no device for torch {torch.__version__}: models run on the CPU"),
        ]
    names = ", ".join(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))
    return [cpu, Finding("cuda", "ok", names)]


def _cpu_flags() -> frozenset[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return frozenset()
    line = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return frozenset(line.partition(":")[2].split())


def check_model(subject: Subject) -> list[Finding]:
    model = subject.model or subject.environ.get("THROUGHLINE_MODEL")
    if not model:
        return [Finding("model", "ok", f"the built-in {settings.BUILTIN_MODEL}")]
    folder = Path(model).expanduser()
    if not folder.exists():
        return [Finding("model", "note", f"{model} is no folder here: a worker would ask the hub for it")]
    return [_model_folder(folder)]


def _model_folder(folder: Path) -> Finding:
    """Read what is quick to read: all but the weights themselves."""
    import torch

    from engine.checkpoint import Checkpoint
    from engine.errors import ModelLoadError
    from engine.model_config import ConfigFields
    from engine.models.registry import find_family
    from engine.quantisation import read_quantisation
    from engine.tokenizer import Tokenizer

    try:
        fields = ConfigFields.from_file(folder / "config.json")
        architecture, family = find_family(fields)
        quantisation = read_quantisation(fields)
        vocabulary = Tokenizer.from_folder(folder).vocab_size
        cpu = torch.device("cpu")
        Checkpoint.open(
            folder,
            name_prefix=family.name_prefix,
            dtype=torch.float32,
            device=cpu,
            quantisation=quantisation,
        )
    except ModelLoadError as error:
        return Finding("model", "missing", str(error))
    stored = f"; weights stored as {quantisation.fate}" if quantisation is not None else ""
    return Finding("model", "ok", f"{folder}: {architecture}, {vocabulary} tokens in the vocabulary{stored}")


def check_kernels(subject: Subject) -> list[Finding]:
    """Choose as an engine of this environment would, which leaves this process so."""
    if importlib.util.find_spec("torch") is None:
        return []
    import torch

    from cuda_ops.native import use_cuda_kernels, use_kernels

    choice = subject.environ.get("THROUGHLINE_KERNELS") or "auto"
    findings = [_kernels("kernels cpu", choice, use_kernels)]
    if torch.cuda.is_available():
        findings.append(_kernels("kernels cuda", choice, use_cuda_kernels))
    return findings


def _kernels(name: str, choice: str, use: Callable[[KernelChoice], KernelsInUse]) -> Finding:
    from cuda_ops.errors import KernelsUnavailableError
    from cuda_ops.native import KERNEL_CHOICES

    if choice not in KERNEL_CHOICES:
        rule = f"must be one of {', '.join(KERNEL_CHOICES)}"
        return Finding(name, "missing", f"THROUGHLINE_KERNELS={choice!r} {rule}")
    try:
        in_use = use(choice)
    except KernelsUnavailableError as error:
        return Finding(name, "missing", f"THROUGHLINE_KERNELS={choice}: {error}")
    if in_use.level is not None:
        return Finding(name, "ok", f"native, {in_use.level}")
    # The engine is right without them, and slower.
    state: State = "ok" if choice == "reference" else "note"
    return Finding(name, state, f"reference in plain torch: {in_use.reason}")


CHECKS: tuple[Callable[[Subject], list[Finding]], ...] = (
    check_python,
    check_packages,
    check_redis,
    check_api,
    check_otlp,
    check_device,
    check_kernels,
    check_model,
)
