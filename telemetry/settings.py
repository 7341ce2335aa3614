"""What the environment says about tracing, read once at start.

The variables are OpenTelemetry's own, as on vLLM's page. The SDK reads most of them too, but trips over
schemes it does not know: `grpc://` without the insecure flag becomes TLS, `grpc://` with http/protobuf
loses every span, a bare `host:port` over HTTP fails at once. Here a scheme that says something is believed,
the flag decides where the scheme is silent, what is unambiguous is mended, and each mending is one warning
line.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal
from urllib.parse import SplitResult, urlsplit

from telemetry.errors import SettingsError

Protocol = Literal["grpc", "http/protobuf"]
Exporter = Literal["otlp", "console"]

_TRACES_PATH = "/v1/traces"
_GRPC_PORT, _HTTP_PORT = 4317, 4318
_PLAINTEXT_BY_SCHEME = {"grpc": True, "http": True, "grpcs": False, "https": False}
_EXPORTER_NAMES: Mapping[str, tuple[Exporter, Protocol | None]] = {
    "otlp": ("otlp", None),
    "otlp_proto_grpc": ("otlp", "grpc"),
    "otlp_proto_http": ("otlp", "http/protobuf"),
    "console": ("console", None),
}
_CONTENT_MODES = {
    "SPAN_ONLY": True,
    "SPAN_AND_EVENT": True,
    "TRUE": True,
    "NO_CONTENT": False,
    "EVENT_ONLY": False,
    "FALSE": False,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Where spans go: `url` is http (plaintext) or https (TLS) for either protocol; HTTP's has a path."""

    url: str
    protocol: Protocol

    @property
    def is_plaintext(self) -> bool:
        return self.url.startswith("http://")


@dataclass(frozen=True, slots=True, kw_only=True)
class TelemetrySettings:
    """What a process needs to know to trace.

    Args:
        target: None where no endpoint is set: spans get ids, nothing is exported.
        exporters: what OTEL_TRACES_EXPORTER lists; empty for `none`.
        service_name: None leaves the name to the process (OTEL_RESOURCE_ATTRIBUTES may have it).
        captures_content: prompts and outputs may go on spans.
        uses_vllm_keys: generations also carry the keys that vLLM gives its spans.
        uses_links_only: a job's `process` span starts a trace of its own and only links to the request's.
        export_timeout_seconds: of one export call, tries included.
        warnings: one line each, for the log once there is one.
    """

    target: Target | None = None
    exporters: tuple[Exporter, ...] = ("otlp",)
    service_name: str | None = None
    is_disabled: bool = False
    captures_content: bool = False
    uses_vllm_keys: bool = False
    uses_links_only: bool = False
    export_timeout_seconds: float = 2.0
    max_queue_spans: int = 16_384
    max_batch_spans: int = 512
    schedule_delay_seconds: float = 1.0
    warnings: tuple[str, ...] = ()

    @classmethod
    def from_environment(cls, environ: Mapping[str, str]) -> TelemetrySettings:
        """Raises: SettingsError for a value that its rule refuses."""
        exporters, exporter_protocol = _exporters(environ)
        target, warnings = _target(environ, exporter_protocol)
        max_queue_spans = _positive_int(environ, "OTEL_BSP_MAX_QUEUE_SIZE", 16_384)
        return cls(
            target=target if "otlp" in exporters else None,
            exporters=exporters,
            service_name=environ.get("OTEL_SERVICE_NAME", "").strip() or None,
            is_disabled=_flag(environ, "OTEL_SDK_DISABLED") or False,
            captures_content=_captures_content(environ),
            uses_vllm_keys=_flag(environ, "THROUGHLINE_TRACE_VLLM_KEYS") or False,
            uses_links_only=_flag(environ, "THROUGHLINE_TRACE_LINKS_ONLY") or False,
            export_timeout_seconds=_first_seconds(
                environ, ("OTEL_EXPORTER_OTLP_TRACES_TIMEOUT", "OTEL_EXPORTER_OTLP_TIMEOUT"), 2.0
            ),
            max_queue_spans=max_queue_spans,
            max_batch_spans=min(
                max_queue_spans, _positive_int(environ, "OTEL_BSP_MAX_EXPORT_BATCH_SIZE", 512)
            ),
            schedule_delay_seconds=_positive_int(environ, "OTEL_BSP_SCHEDULE_DELAY", 1000) / 1000,
            warnings=warnings,
        )


@dataclass(frozen=True, slots=True)
class _Setting:
    """A variable that is set, and whether it is the traces' own one rather than the one for all signals."""

    variable: str
    value: str
    is_for_traces: bool


def _first(environ: Mapping[str, str], suffix: str) -> _Setting | None:
    """The traces' variable wins over the general one; an empty value counts as unset (specification)."""
    for variable, is_for_traces in (
        (f"OTEL_EXPORTER_OTLP_TRACES_{suffix}", True),
        (f"OTEL_EXPORTER_OTLP_{suffix}", False),
    ):
        value = environ.get(variable, "").strip()
        if value:
            return _Setting(variable, value, is_for_traces)
    return None


def _target(
    environ: Mapping[str, str], exporter_protocol: Protocol | None
) -> tuple[Target | None, tuple[str, ...]]:
    endpoint = _first(environ, "ENDPOINT") or _default_endpoint(environ)
    protocol = _protocol(environ) or exporter_protocol
    if endpoint is None:
        return None, ()
    has_scheme, parts = _split(endpoint)
    warnings: list[str] = []
    if protocol is None:
        protocol = _guess_protocol(endpoint, parts, warnings)
    scheme = "http" if _is_plaintext(environ, endpoint, parts, has_scheme, warnings) else "https"
    if protocol == "grpc":
        url = _grpc_url(endpoint, scheme, parts, warnings)
    else:
        url = _http_url(endpoint, scheme, parts, warnings)
    return Target(url=url, protocol=protocol), tuple(warnings)


def _default_endpoint(environ: Mapping[str, str]) -> _Setting | None:
    """The specification's default endpoint, for one who asks for OTLP by name and gives no address."""
    listed = environ.get("OTEL_TRACES_EXPORTER", "")
    if "otlp" not in listed:
        return None
    protocol = _protocol(environ)
    is_http = protocol == "http/protobuf" or (protocol is None and "otlp_proto_http" in listed)
    port = _HTTP_PORT if is_http else _GRPC_PORT
    return _Setting("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://localhost:{port}", is_for_traces=False)


def _split(endpoint: _Setting) -> tuple[bool, SplitResult]:
    has_scheme = "://" in endpoint.value
    try:
        parts = urlsplit(endpoint.value if has_scheme else f"//{endpoint.value}")
    except ValueError as error:
        raise _refused(endpoint, "the address must be host:port, or [IPv6]:port") from error
    if has_scheme and parts.scheme not in _PLAINTEXT_BY_SCHEME:
        raise _refused(endpoint, "the scheme must be grpc, grpcs, http or https, or be left out")
    try:
        has_address = parts.hostname is not None and parts.port != 0
    except ValueError as error:
        raise _refused(endpoint, "the port must be a number from 1 to 65535") from error
    if not has_address:
        raise _refused(endpoint, "it must name a host, as in grpc://collector:4317")
    return has_scheme, parts


def _guess_protocol(endpoint: _Setting, parts: SplitResult, warnings: list[str]) -> Protocol:
    """gRPC, the page's default, unless everything in the address speaks of HTTP."""
    if parts.scheme in ("http", "https") and parts.port == _HTTP_PORT:
        warnings.append(
            f"{endpoint.variable} names port {_HTTP_PORT}, the one of OTLP over HTTP: using http/protobuf; "
            "set OTEL_EXPORTER_OTLP_TRACES_PROTOCOL=grpc if gRPC is meant"
        )
        return "http/protobuf"
    return "grpc"


def _is_plaintext(
    environ: Mapping[str, str], endpoint: _Setting, parts: SplitResult, has_scheme: bool, warnings: list[str]
) -> bool:
    flag = _insecure(environ)
    if not has_scheme:
        if flag is None:
            warnings.append(
                f"{endpoint.variable} has no scheme, so TLS is used; for plaintext write http:// before it "
                "or set OTEL_EXPORTER_OTLP_TRACES_INSECURE=true"
            )
        return flag or False
    by_scheme = _PLAINTEXT_BY_SCHEME[parts.scheme]
    if flag is not None and flag != by_scheme:
        warnings.append(
            f"{endpoint.variable} begins with {parts.scheme}://, so "
            f"{'plaintext' if by_scheme else 'TLS'} is used, although the insecure flag says the opposite"
        )
    return by_scheme


def _grpc_url(endpoint: _Setting, scheme: str, parts: SplitResult, warnings: list[str]) -> str:
    if parts.port == _HTTP_PORT:
        warnings.append(
            f"{endpoint.variable} names port {_HTTP_PORT}, usual for HTTP, but the protocol is grpc: "
            f"spans are lost unless gRPC does listen there (its usual port is {_GRPC_PORT})"
        )
    # A path means nothing to gRPC. Without a port TLS goes to 443, as hosted collectors expect.
    netloc = parts.netloc.rpartition("@")[2]
    if parts.port is None and scheme == "http":
        netloc = f"{netloc}:{_GRPC_PORT}"
    return f"{scheme}://{netloc}"


def _http_url(endpoint: _Setting, scheme: str, parts: SplitResult, warnings: list[str]) -> str:
    if parts.scheme in ("grpc", "grpcs"):
        warnings.append(
            f"{endpoint.variable} begins with {parts.scheme}://, but the protocol is http/protobuf: using {scheme}://"
        )
    if parts.port == _GRPC_PORT:
        warnings.append(
            f"{endpoint.variable} names port {_GRPC_PORT}, usual for gRPC, but protocol is http/protobuf: "
            f"spans are lost unless HTTP does listen there (its usual port is {_HTTP_PORT})"
        )
    path = parts.path.rstrip("/")
    if not endpoint.is_for_traces:
        path += _TRACES_PATH
    elif not path:
        warnings.append(f"{endpoint.variable} has no path: posting to {_TRACES_PATH}")
        path = _TRACES_PATH
    query = f"?{parts.query}" if parts.query else ""
    return f"{scheme}://{parts.netloc}{path}{query}"


def _protocol(environ: Mapping[str, str]) -> Protocol | None:
    setting = _first(environ, "PROTOCOL")
    if setting is None:
        return None
    if setting.value == "grpc":
        return "grpc"
    if setting.value == "http/protobuf":
        return "http/protobuf"
    raise _refused(setting, "must be grpc or http/protobuf")


def _insecure(environ: Mapping[str, str]) -> bool | None:
    setting = _first(environ, "INSECURE")
    return None if setting is None else _flag(environ, setting.variable)


def _exporters(environ: Mapping[str, str]) -> tuple[tuple[Exporter, ...], Protocol | None]:
    variable = "OTEL_TRACES_EXPORTER"
    listed = [name.strip() for name in environ.get(variable, "").split(",") if name.strip()] or ["otlp"]
    if listed == ["none"]:
        return (), None
    found: dict[Exporter, Protocol | None] = {}
    for name in listed:
        if name not in _EXPORTER_NAMES:
            raise SettingsError(variable, name, f"must be none, or a list of {', '.join(_EXPORTER_NAMES)}")
        exporter, protocol = _EXPORTER_NAMES[name]
        found[exporter] = protocol
    return tuple(found), found.get("otlp")


def _captures_content(environ: Mapping[str, str]) -> bool:
    variable = "OTEL_INSTRUMENTATION_GENAI_CAPTURE_MESSAGE_CONTENT"
    value = environ.get(variable, "").strip() or "NO_CONTENT"
    if value.upper() not in _CONTENT_MODES:
        raise SettingsError(variable, value, "must be NO_CONTENT, SPAN_ONLY, EVENT_ONLY or SPAN_AND_EVENT")
    return _CONTENT_MODES[value.upper()]


def _flag(environ: Mapping[str, str], variable: str) -> bool | None:
    value = environ.get(variable, "").strip()
    if not value:
        return None
    match value.lower():
        case "true" | "1":
            return True
        case "false" | "0":
            return False
    raise SettingsError(variable, value, "must be true or false")


def _positive_int(environ: Mapping[str, str], variable: str, default: int) -> int:
    value = environ.get(variable, "").strip()
    if not value:
        return default
    if not value.isascii() or not value.isdigit() or int(value) == 0:
        raise SettingsError(variable, value, "must be a whole number above 0")
    return int(value)


def _first_seconds(environ: Mapping[str, str], variables: tuple[str, ...], default: float) -> float:
    for variable in variables:
        value = environ.get(variable, "").strip()
        if not value:
            continue
        try:
            seconds = float(value)
        except ValueError as error:
            raise SettingsError(variable, value, "must be a number of seconds above 0") from error
        if not 0 < seconds < float("inf"):
            raise SettingsError(variable, value, "must be a number of seconds above 0")
        return seconds
    return default


def _refused(setting: _Setting, rule: str) -> SettingsError:
    """An address may carry a password before its `@`, which no message repeats."""
    return SettingsError(setting.variable, setting.value.rpartition("@")[2], rule)
