from __future__ import annotations

import pytest

from telemetry.errors import SettingsError
from telemetry.settings import Target, TelemetrySettings

ENDPOINT = "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"
GENERAL_ENDPOINT = "OTEL_EXPORTER_OTLP_ENDPOINT"
INSECURE = "OTEL_EXPORTER_OTLP_TRACES_INSECURE"
PROTOCOL = "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL"


def read(**environ: str) -> TelemetrySettings:
    return TelemetrySettings.from_environment(environ)


@pytest.mark.parametrize(
    ("endpoint", "insecure", "url", "num_warnings"),
    [
        ("grpc://collector:4317", "true", "http://collector:4317", 0),
        ("grpc://collector:4317", "", "http://collector:4317", 0),
        ("grpc://collector:4317", "1", "http://collector:4317", 0),
        ("grpc://collector:4317", "false", "http://collector:4317", 1),
        ("http://collector:4317", "", "http://collector:4317", 0),
        ("http://collector:4317", "false", "http://collector:4317", 1),
        ("https://collector:4317", "true", "https://collector:4317", 1),
        ("https://collector:4317", "", "https://collector:4317", 0),
        ("grpcs://collector:4317", "true", "https://collector:4317", 1),
        ("grpcs://collector:4317", "", "https://collector:4317", 0),
        ("collector:4317", "true", "http://collector:4317", 0),
        ("collector:4317", "false", "https://collector:4317", 0),
        ("collector:4317", "", "https://collector:4317", 1),
        ("localhost:4317", "true", "http://localhost:4317", 0),
        ("[::1]:4317", "true", "http://[::1]:4317", 0),
        ("grpc://collector:4317/v1/traces", "true", "http://collector:4317", 0),
        ("grpc://collector", "", "http://collector:4317", 0),
        ("https://api.example.com", "", "https://api.example.com", 0),
        ("http://collector:4318", "", "http://collector:4318", 1),
    ],
)
def test_settings_follow_scheme_then_flag_when_protocol_is_grpc(
    endpoint: str, insecure: str, url: str, num_warnings: int
) -> None:
    settings = read(**{ENDPOINT: endpoint, INSECURE: insecure, PROTOCOL: "grpc"})

    assert settings.target == Target(url=url, protocol="grpc")
    assert len(settings.warnings) == num_warnings


@pytest.mark.parametrize(
    ("variable", "endpoint", "insecure", "url", "num_warnings"),
    [
        (ENDPOINT, "http://collector:4318/v1/traces", "", "http://collector:4318/v1/traces", 0),
        (ENDPOINT, "http://collector:4318", "", "http://collector:4318/v1/traces", 1),
        (ENDPOINT, "http://collector:4318/", "", "http://collector:4318/v1/traces", 1),
        (ENDPOINT, "https://host/otlp/custom?key=1", "", "https://host/otlp/custom?key=1", 0),
        (ENDPOINT, "grpc://collector:4318/v1/traces", "", "http://collector:4318/v1/traces", 1),
        (ENDPOINT, "grpcs://collector:4318/v1/traces", "", "https://collector:4318/v1/traces", 1),
        (ENDPOINT, "grpc://collector:4317", "true", "http://collector:4317/v1/traces", 3),
        (ENDPOINT, "collector:4318/v1/traces", "true", "http://collector:4318/v1/traces", 0),
        (ENDPOINT, "collector:4318/v1/traces", "", "https://collector:4318/v1/traces", 1),
        (GENERAL_ENDPOINT, "http://collector:4318", "", "http://collector:4318/v1/traces", 0),
        (GENERAL_ENDPOINT, "http://collector:4318/otlp/", "", "http://collector:4318/otlp/v1/traces", 0),
    ],
)
def test_settings_give_a_url_that_can_be_posted_to_when_protocol_is_http(
    variable: str, endpoint: str, insecure: str, url: str, num_warnings: int
) -> None:
    settings = read(**{variable: endpoint, INSECURE: insecure, PROTOCOL: "http/protobuf"})

    assert settings.target == Target(url=url, protocol="http/protobuf")
    assert len(settings.warnings) == num_warnings


def test_settings_use_http_when_no_protocol_is_named_and_the_port_is_that_of_http() -> None:
    settings = read(**{ENDPOINT: "http://collector:4318/v1/traces"})

    assert settings.target == Target(url="http://collector:4318/v1/traces", protocol="http/protobuf")
    assert "PROTOCOL=grpc" in settings.warnings[0]


def test_settings_prefer_the_traces_variables_when_both_are_set() -> None:
    settings = read(
        **{
            ENDPOINT: "grpc://mine:4317",
            GENERAL_ENDPOINT: "http://all:4318",
            PROTOCOL: "grpc",
            "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf",
        }
    )

    assert settings.target == Target(url="http://mine:4317", protocol="grpc")


def test_settings_take_the_general_flag_when_the_traces_one_is_unset() -> None:
    settings = read(**{GENERAL_ENDPOINT: "collector:4317", "OTEL_EXPORTER_OTLP_INSECURE": "true"})

    assert settings.target == Target(url="http://collector:4317", protocol="grpc")


def test_settings_have_no_target_when_no_endpoint_is_set() -> None:
    settings = read()

    assert settings.target is None
    assert settings.exporters == ("otlp",)
    assert not settings.captures_content


@pytest.mark.parametrize(
    ("exporters", "expected"),
    [
        ("otlp", Target(url="http://localhost:4317", protocol="grpc")),
        ("otlp_proto_http", Target(url="http://localhost:4318/v1/traces", protocol="http/protobuf")),
        ("console", None),
        ("none", None),
    ],
)
def test_settings_use_the_default_endpoint_only_when_an_otlp_exporter_is_asked_for(
    exporters: str, expected: Target | None
) -> None:
    assert read(OTEL_TRACES_EXPORTER=exporters).target == expected


def test_settings_drop_the_endpoint_when_the_exporter_is_none() -> None:
    settings = read(**{"OTEL_TRACES_EXPORTER": "none", ENDPOINT: "grpc://collector:4317"})

    assert settings.target is None
    assert settings.exporters == ()


@pytest.mark.parametrize(
    ("variable", "value", "rule"),
    [
        (PROTOCOL, "http/json", "grpc or http/protobuf"),
        (ENDPOINT, "ftp://collector:21", "scheme"),
        (ENDPOINT, "grpc://", "host"),
        (ENDPOINT, "grpc://collector:99999", "port"),
        (ENDPOINT, "grpc://collector:0", "host"),
        (ENDPOINT, "grpc://[::1", "address"),
        (INSECURE, "maybe", "true or false"),
        ("OTEL_SDK_DISABLED", "perhaps", "true or false"),
        ("OTEL_TRACES_EXPORTER", "zipkin", "otlp"),
        ("OTEL_BSP_MAX_QUEUE_SIZE", "0", "above 0"),
        ("OTEL_BSP_SCHEDULE_DELAY", "1.5", "whole number"),
        ("OTEL_EXPORTER_OTLP_TRACES_TIMEOUT", "soon", "seconds"),
        ("OTEL_EXPORTER_OTLP_TIMEOUT", "-1", "seconds"),
        ("OTEL_INSTRUMENTATION_GENAI_CAPTURE_MESSAGE_CONTENT", "yes", "SPAN_ONLY"),
    ],
)
def test_settings_name_variable_value_and_rule_when_a_value_is_refused(
    variable: str, value: str, rule: str
) -> None:
    environ = {ENDPOINT: "collector:4317"} | {variable: value}

    with pytest.raises(SettingsError) as caught:
        TelemetrySettings.from_environment(environ)

    assert caught.value.variable == variable
    assert value in str(caught.value)
    assert rule in str(caught.value)


def test_settings_keep_the_password_out_of_messages_when_the_address_is_refused() -> None:
    with pytest.raises(SettingsError) as caught:
        read(**{ENDPOINT: "ftp://user:secret@collector:21"})

    assert "secret" not in str(caught.value)


def test_settings_never_repeat_a_password_when_warning() -> None:
    settings = read(**{ENDPOINT: "grpc://user:secret@collector:4317", PROTOCOL: "http/protobuf"})

    assert settings.warnings
    assert not any("secret" in warning for warning in settings.warnings)


@pytest.mark.parametrize(
    ("value", "is_captured"),
    [
        ("", False),
        ("NO_CONTENT", False),
        ("EVENT_ONLY", False),
        ("SPAN_ONLY", True),
        ("span_and_event", True),
    ],
)
def test_settings_capture_content_only_when_spans_are_named(value: str, is_captured: bool) -> None:
    settings = read(OTEL_INSTRUMENTATION_GENAI_CAPTURE_MESSAGE_CONTENT=value)

    assert settings.captures_content is is_captured


def test_settings_keep_the_batch_within_the_queue_when_the_queue_is_small() -> None:
    settings = read(OTEL_BSP_MAX_QUEUE_SIZE="100")

    assert (settings.max_queue_spans, settings.max_batch_spans) == (100, 100)
